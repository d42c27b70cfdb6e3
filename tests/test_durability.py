"""Runs that are killed, whose files fail, or whose disk loses power: what was finished stays, the rest resumes.

SASREC_LAB_FAULTS=kinds fails the last operation of each kind, with three kinds of error, instead of every third kind of
operation with one; SASREC_LAB_FAULTS=all fails every single operation.
"""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import ForkServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, as Linux has it"),
]

WORDS = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=30", "model=tiny"]
WORDS += ["optimizer.lr=0.01", "optimizer.ema=0.5", "trainer.max_epochs=3"]
KILLS, CUTS = 20, 20
SHUTDOWN, WITHOUT_FLUSHING = 0x8004587D, 2  # of <linux/fs.h>: the file system stops as if the power was cut


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Return a folder in memory, if there is one: a busy disk makes each sync slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def server(folder) -> Iterator[ForkServer]:
    server = ForkServer(folder, composed=True)
    yield server
    server.close()


def run_in(folder: str, *words: str) -> list[str]:
    return [*WORDS, f"hydra.run.dir={folder}/run", f"data_dir={folder}/data", *words]


def ckpt_of(server: ForkServer, folder: str) -> list[str]:
    """Return the word with which a user resumes: ckpt=last if there is a checkpoint."""
    checkpoints = server.folder / folder / "run" / "checkpoints"
    has_one = any((checkpoints / name).exists() for name in ("best.ckpt", "last.ckpt"))
    return ["ckpt=last"] if has_one else []


def check_resumes_exactly(server: ForkServer, folder: str, whole: Path) -> None:
    """Resume a run, and check that it ends bit-identical to a whole one, without drafts."""
    done = server.run(*run_in(folder, *ckpt_of(server, folder)))
    assert (done.code, done.stderr) == (0, ""), done
    run = server.folder / folder / "run"
    for name in ("metrics.json", "ranks.npz", "items.npz"):
        if name.endswith("json"):
            assert json.loads((run / name).read_text()) == json.loads((whole / name).read_text())
        else:
            arrays, expected = np.load(run / name), np.load(whole / name)
            assert arrays.keys() == expected.keys()
            assert all(np.array_equal(arrays[key], expected[key]) for key in arrays)
    for name in ("best", "last"):
        saved, expected = (torch.load(path / "checkpoints" / f"{name}.ckpt") for path in (run, whole))
        for key in ("epoch", "global_step", "validation", "state_dict", "optimizer_states"):
            assert repr(saved[key]) == repr(expected[key]), f"{name}.ckpt: {key}"
        assert all(torch.equal(saved["state_dict"][key], x) for key, x in expected["state_dict"].items())
    assert not [path for path in (server.folder / folder).rglob(".*") if "draft" in path.name]


def whole_run(server: ForkServer, folder: str = "whole") -> tuple[Path, float]:
    """Make an uninterrupted run; return its folder and how long it took, as one that is not the first."""
    for _ in range(2):
        shutil.rmtree(server.folder / folder, ignore_errors=True)
        start = time.monotonic()
        done = server.run(*run_in(folder))
        assert (done.code, done.stderr) == (0, ""), done
    return server.folder / folder / "run", time.monotonic() - start


def test_a_run_killed_at_random_moments_ends_unchanged(server):
    whole, seconds = whole_run(server)
    moments = random.Random(0)
    killed = number = 0
    while killed < KILLS:
        folder, number = f"killed-{number}", number + 1
        for _ in range(2):  # the second one kills the resumed run
            process = server.start(*run_in(folder, *ckpt_of(server, folder)))
            time.sleep(moments.uniform(0, 0.9 * seconds))
            with suppress(ProcessLookupError):  # it has finished
                os.kill(process, signal.SIGKILL)
            killed += server.wait().code == -signal.SIGKILL
        check_resumes_exactly(server, folder, whole)


# Power cuts


@pytest.fixture
def disk(folder) -> Iterator[Path]:
    """Mount a file system of its own at `disk`, from an image that `cut_power` mounts again."""
    mounted, image = folder / "disk", folder / "image"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    for words in (["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(mounted)]):
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip(f"needs {words[0]}")
        if done.returncode:
            pytest.skip(f"needs a file system in a file, and here none can be mounted: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted])


def cut_power(disk: Path) -> None:
    """Stop the file system without writing anything more."""
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_FLUSHING))
    except OSError as error:
        pytest.skip(f"needs a file system that can be shut down: {error}")
    finally:
        os.close(descriptor)


def mount_again(disk: Path) -> None:
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk.with_name("image"), disk], check=True)


def test_a_run_survives_power_cuts_at_random_moments(server, disk):
    whole, seconds = whole_run(server)
    moments = random.Random(1)
    for number in range(CUTS):
        folder = f"disk/{number}"
        process = server.start(*run_in(folder))
        time.sleep(moments.uniform(0, 1.2 * seconds))
        cut_power(disk)
        with suppress(ProcessLookupError):  # it has finished
            os.kill(process, signal.SIGKILL)
        ended = server.wait()
        mount_again(disk)
        run = disk / str(number) / "run"
        reported = [int(epoch) for epoch in re.findall(r"^epoch +(\d+) ", ended.stdout, re.M)]
        if reported:
            assert torch.load(run / "checkpoints" / "last.ckpt")["epoch"] + 1 >= max(reported)
        if "run folder" in ended.stdout:
            assert "already finished" in server.run(*run_in(folder)).stdout
        check_resumes_exactly(server, folder, whole)
        shutil.rmtree(disk / str(number))


# Failing operations


@pytest.fixture
def failing_server(folder) -> Iterator[ForkServer]:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = folder / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    server = ForkServer(folder, library)
    yield server
    server.close()


def operations(server: ForkServer) -> list[str]:
    """Return the file operations of a whole run, in order."""
    shutil.rmtree(server.folder / "whole")
    log = server.folder / "operations"
    done = server.run(*run_in("whole"), below=str(server.folder / "whole"), at=-1, error=0, log=str(log))
    assert done.code == 0, done
    return log.read_text().splitlines()


def chosen(operations: list[str]) -> list[tuple[int, int]]:
    """Return the operations to fail, with error numbers: the last one of every third kind, or all with all errors."""
    errors = [errno.ENOSPC, errno.EIO, errno.EACCES]
    wanted = os.environ.get("SASREC_LAB_FAULTS")
    if wanted == "all":
        return [(at, error) for at in range(len(operations)) for error in errors]
    kinds = {re.sub(r"[0-9a-f]{10,}|\d{6,}", "N", operation): at for at, operation in enumerate(operations)}
    if wanted == "kinds":
        return [(at, error) for at in kinds.values() for error in errors]
    return [(at, errors[number // 3 % 3]) for number, at in enumerate(kinds.values()) if number % 3 == 0]


def test_a_run_whose_file_operations_fail_ends_in_one_line(failing_server):
    server = failing_server
    whole, _ = whole_run(server)
    kept = shutil.copytree(whole, server.folder / "kept")
    names = operations(server)
    problems = []
    for at, error in chosen(names):
        folder = server.folder / "failing"
        shutil.rmtree(folder, ignore_errors=True)
        done = server.run(*run_in("failing"), below=str(folder), at=at, error=error, always=error == errno.ENOSPC)
        case = f"{at} {names[at]}: {errno.errorcode[error]}"
        if (
            "Traceback" in done.stdout + done.stderr
            or done.stderr.count("\n") != (done.code != 0)
            or done.code not in (0, 1)
        ):
            problems.append(f"{case}: {done.code} {done.stderr[-1500:]}")
        reported = [int(epoch) for epoch in re.findall(r"^epoch +(\d+) ", done.stdout, re.M)]
        try:
            if reported:
                assert torch.load(folder / "run" / "checkpoints" / "last.ckpt")["epoch"] + 1 >= max(reported)
            check_resumes_exactly(server, "failing", kept)
        except Exception as problem:
            problems.append(f"{case}: {str(problem)[:600]}")
    assert not problems, "\n".join(problems)
