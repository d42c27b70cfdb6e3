"""The memory that is there: of the machine and of control groups; and the message if it does not suffice."""

from pathlib import Path

import pytest
import torch

from sasrec_lab.errors import InputError
from sasrec_lab.ops import memory
from sasrec_lab.ops.memory import Need, available_bytes, check_memory, format_bytes

CPU, GIB = "cpu", 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """The files of a machine with 8 GiB to give, without swap, of whose memory this process has 1 GiB."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\nSwapFree: 0 kB\n")
    write(tmp_path / "proc/self/status", f"Name:\tpython\nVmRSS:\t {2**20} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_own_memory_and_swap_count_as_available(machine):
    assert available_bytes(CPU) == 9 * GIB
    write(machine / "proc/meminfo", f"MemAvailable: {8 * 2**20} kB\nSwapFree: {2 * 2**20} kB\n")
    assert available_bytes(CPU) == 11 * GIB


def test_the_narrowest_group_of_version_2_counts(machine):
    groups = machine / "sys/fs/cgroup"
    write(machine / "proc/self/cgroup", "0::/user/session\n")
    write(groups / "user/session/memory.max", "max\n")
    write(groups / "user/memory.max", f"{3 * GIB}\n")
    write(groups / "user/memory.stat", f"anon {GIB}\nfile {GIB}\n")  # files can be dropped
    assert available_bytes(CPU) == 3 * GIB
    write(groups / "memory.max", f"{2 * GIB}\n")  # of a container, at the root of its mount
    write(groups / "memory.stat", f"anon {2 * GIB}\n")
    assert available_bytes(CPU) == GIB


def test_a_group_of_version_1_counts_by_its_mount(machine):
    group = machine / "sys/fs/cgroup/memory"
    write(machine / "proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    write(group / "memory.limit_in_bytes", "9223372036854771712\n")
    write(group / "memory.stat", "total_rss 5\n")
    assert available_bytes(CPU) == 9 * GIB
    write(group / "memory.limit_in_bytes", f"{4 * GIB}\n")
    write(group / "memory.stat", f"cache 7\nrss 1\ntotal_rss {GIB}\n")
    assert available_bytes(CPU) == 4 * GIB


def test_the_file_cache_of_zfs_counts_as_available(machine):
    write(machine / "proc/spl/kstat/zfs/arcstats", f"name type data\nc 4 9\nsize 4 {2 * GIB}\n")
    assert available_bytes(CPU) == 11 * GIB


def test_memory_that_torch_keeps_on_a_gpu_counts_as_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    assert available_bytes("cuda:1") == 5 * GIB


@pytest.mark.parametrize("content", ["", "MemAvailable:", "MemAvailable: many kB"])
def test_an_unknown_amount_refuses_nothing(machine, content):
    write(machine / "proc/meminfo", content)
    assert available_bytes(CPU) is None
    check_memory([Need("all", ("a=1",), 2**80)], CPU)
    assert available_bytes("mps") is None


def test_this_machine_has_memory():
    if Path("/proc/meminfo").exists():
        assert 2**20 < available_bytes(CPU) < 2**60


def test_a_lack_names_the_keys_of_the_largest_needs(machine):
    needs = [
        Need("items", ("dim=8",), 6 * GIB),
        Need("positions", ("maxlen=9", "dim=8"), 4 * GIB),
        Need("z", ("c",), 5),
    ]
    with pytest.raises(InputError) as caught:
        check_memory(needs, CPU)
    assert str(caught.value) == (
        "dim=8, maxlen=9: the run needs at least 10.0 GiB of memory (6.0 GiB for items, 4.0 GiB for positions), but"
        " 9.0 GiB are available on cpu; lower these"
    )
    check_memory(needs[:1], CPU)


def test_sizes_have_readable_units():
    sizes = (0, 1023, 1024, 1536 * 2**20, 2**60, 2**80)
    assert [format_bytes(size) for size in sizes] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 GiB",
        "1,024.0 PiB",
        "1,073,741,824.0 PiB",
    ]
