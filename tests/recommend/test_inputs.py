"""Files that `recommend` reads: ids and histories."""

import gzip

import pytest

from sasrec_lab.errors import InputError
from sasrec_lab.recommend.inputs import read_ids, read_table

COLUMNS = ("user_id", "item_id")
PACKED = gzip.compress(b"user_id,item_id\n" + b"1,2\n" * 100, mtime=0)


@pytest.mark.parametrize("data", [PACKED[:20], PACKED[:-1], PACKED[:12] + b"\xff" + PACKED[13:], b"no gzip"])
def test_a_broken_gzip_file_is_one_line(tmp_path, data):
    (tmp_path / "h.csv.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"^interactions=.*h\.csv\.gz cannot be read \(.+\); check the file$"):
        read_table(tmp_path / "h.csv.gz", "interactions", COLUMNS)


@pytest.mark.parametrize("name", ["ids.txt", "ids.csv"])
def test_text_that_is_not_utf_8_names_line_and_fix(tmp_path, name):
    (tmp_path / name).write_bytes("user_id\nx\né\n".encode("latin-1"))
    with pytest.raises(
        InputError, match=r"line 3 is not UTF-8 text \(byte 0xe9\); convert .*: iconv -f latin1 -t utf-8 "
    ):
        read_ids(str(tmp_path / name), "users", COLUMNS)


def test_text_in_gzip_that_is_not_utf_8_names_the_line(tmp_path):
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress("user_id,item_id\n1,é\n".encode("latin-1")))
    with pytest.raises(InputError, match=r"h\.csv\.gz, line 2 is not UTF-8 text \(byte 0xe9\); convert .*: zcat "):
        read_table(tmp_path / "h.csv.gz", "interactions", COLUMNS)


def test_an_empty_or_broken_parquet_file_is_one_line(tmp_path):
    for data in (b"", b"PAR1", b"PAR1\x15PAR1"):
        (tmp_path / "h.parquet").write_bytes(data)
        with pytest.raises(InputError, match=r"h\.parquet cannot be read \(.+\); check the file$"):
            read_table(tmp_path / "h.parquet", "interactions", COLUMNS)
