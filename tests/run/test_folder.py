"""Records and arrays of a run folder that may be a stranger's: checked, and read within the memory of their size."""

import json
import os
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sasrec_lab.errors import InputError
from sasrec_lab.run.folder import read_arrays, read_json


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", {}, "it has no config"),
        ("run.json", {"config": []}, r"config must be an object, not \[\]"),
        ("run.json", {"config": {}, "seconds": {"fit": -1}}, "seconds.fit must be a number of at least 0, not -1"),
        ("run.json", {"config": {}, "earlier": [{"seconds": 1}]}, "earlier.0.seconds must be an object, not 1"),
        ("run.json", {"config": {"seed": True}}, "config.seed must be an integer of at least 0, not True"),
        ("run.json", {"config": {"data_dir": "a\0b"}}, "config.data_dir must be text or null"),
        ("metrics.json", {"status": "finished"}, "it has no protocol"),
        (
            "metrics.json",
            {"status": "failed", "metrics": {"test/mrr": float("nan")}},
            "a finite number, not nan",
        ),
        ("metrics.json", {"status": "failed", "epochs": 2**63}, "epochs must be an integer of at least 0, not 922"),
    ],
)
def test_a_field_of_another_type_is_named(tmp_path, name, content, reason):
    with pytest.raises(InputError, match=reason):
        read_json(written(tmp_path / name, content))


def test_a_deeply_nested_record_is_refused(tmp_path):
    content: dict[str, object] = {}
    for _ in range(31):
        content = {"config": content}
    for text in (json.dumps(content), '{"config": ' + "[" * 100_000):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match=r"run\.json is not a file that a run writes"):
            read_json(tmp_path / "run.json")


def npy(shape: str, kind: str, data: bytes = b"") -> bytes:
    """Return a .npy file with this header."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("member", "compression", "reason"),
    [
        (npy("(1,)", "<i8", b"\1" + bytes(7)), zipfile.ZIP_DEFLATED, "it is compressed"),
        (npy("(1000000000000,)", "<i8", bytes(8)), zipfile.ZIP_STORED, "does not contain the int64"),
        (npy("(1,)", "|O", bytes(8)), zipfile.ZIP_STORED, "does not contain the object"),
        (npy("(1,)", "<f8", bytes(8)), zipfile.ZIP_STORED, "does not contain the float64"),
        (npy("(-1, -1)", "<i8", bytes(8)), zipfile.ZIP_STORED, "unknown dimension"),
        (npy("(" * 5000, "<i8"), zipfile.ZIP_STORED, "multi-line|parse|recursion"),
        (b"not an array", zipfile.ZIP_STORED, "magic string"),
    ],
)
def test_arrays_that_a_run_does_not_write_are_refused(tmp_path, member, compression, reason):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("ids.npy", member)
    with pytest.raises(ValueError, match=reason) as caught:
        read_arrays(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


def test_members_that_overlap_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy("(1000,)", "<i8", bytes(8000)))
        for number in range(5):  # the same bytes under more names
            copy = zipfile.ZipInfo(f"{number}.npy")
            first = archive.filelist[0]
            copy.header_offset, copy.CRC = first.header_offset, first.CRC
            copy.file_size = copy.compress_size = first.file_size
            archive.filelist.append(copy)
    with pytest.raises(ValueError, match="its members are larger than itself"):
        read_arrays(path)


def test_arrays_larger_than_a_runs_are_refused(tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        file.truncate(9 << 30)
    with pytest.raises(ValueError, match="9,663,676,416 bytes, more than 8,589,934,592"):
        read_arrays(tmp_path / "x.npz")


LARGE = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 9 << 20, 0)
PLACE = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 9 << 20, 0, 0), "it has more members than a run writes"),
        (LARGE + PLACE + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0), "it has more members"),
        (b"x" + LARGE + PLACE + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0), "it does not end like"),
        (PLACE + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0), "it does not end like"),
        (struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 1) + b"x", "it does not end like"),
        (b"", "it does not end like"),
    ],
)
def test_an_archive_of_too_many_members_is_not_opened(tmp_path, monkeypatch, end, reason):
    (tmp_path / "x.npz").write_bytes(end)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ValueError, match=reason):
        read_arrays(tmp_path / "x.npz")


def test_arrays_are_returned_as_saved(tmp_path):
    saved = {"ids": np.array([3, 1]), "titles": np.array(["ä", "b"])}
    np.savez(tmp_path / "x.npz", **saved)
    read = read_arrays(tmp_path / "x.npz")
    assert {name: array.tolist() for name, array in read.items()} == {"ids": [3, 1], "titles": ["ä", "b"]}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_only_regular_files_are_opened(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("x")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        socket.socket(socket.AF_UNIX).bind("x")
    with pytest.raises((ValueError, OSError), match=r"not a regular file|No such device"):
        read_arrays(path)
