"""Reading and cleaning of interaction files, with the message for every kind of mistake."""

import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, Format, IdType, Repeats, WeightConfig
from sasrec_lab.data import columns, interactions, source
from sasrec_lab.data.cleaning import clean, describe_span, time_unit
from sasrec_lab.data.interactions import read_file, read_interactions
from sasrec_lab.errors import InputError
from sasrec_lab.ops import memory

FILE = Path("x.csv")
TIMED = load(["dataset=csv", "dataset.path=x.csv"]).dataset  # user_id, item_id, timestamp
PLAIN = replace(TIMED, time=None)
RATED = replace(TIMED, rating="rating")


def table(text: str | bytes, dataset: DatasetConfig = PLAIN, **changes) -> pd.DataFrame:
    data = text if isinstance(text, bytes) else text.encode()
    return read_interactions(data, FILE, replace(dataset, **changes))


def rows(frame: pd.DataFrame) -> list[tuple]:
    return list(frame.itertuples(index=False, name=None))


def refused(text: str | bytes, dataset: DatasetConfig = PLAIN, **changes) -> str:
    with pytest.raises(InputError) as caught:
        table(text, dataset, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Layouts


def test_columns_are_found_by_name_and_rows_keep_their_order():
    read = table(
        "rating,timestamp,extra,item_id,user_id\n4.5,20,x,7,2\n3,10,y,8,1\n3,10,z,7,2\n",
        RATED,
        weight=WeightConfig("rating", above=4, then=3, otherwise=1),
    )
    assert list(read) == ["user", "item", "time", "rating", "weight"]
    assert rows(read) == [(2, 7, 20, 4.5, 3.0), (1, 8, 10, 3.0, 1.0), (2, 7, 10, 3.0, 1.0)]
    assert [str(kind) for kind in read.dtypes] == ["int64", "int64", "int64", "float64", "float32"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", "\t", "::", "|", " - ", ";"])
def test_separators_and_line_ends(separator, end):
    lines = [separator.join(fields) for fields in (("user_id", "item_id"), ("1", "2"), ("3", "4"))]
    assert rows(table(end.join(lines), separator=separator)) == [(1, 2), (3, 4)]


@pytest.mark.parametrize("separator", ["::", "é", ", "])
def test_a_long_separator_in_quotes_is_text(separator):
    text = 'user_id,item_id\n"a,b",x\nc,"y"\n'.replace(",", separator)
    assert rows(table(text, separator=separator)) == [(f"a{separator}b", "x"), ("c", "y")]


def test_a_file_without_header_line():
    read = table("1\t9\t5\n2\t8\t3\n", separator="\t", names=["item_id", "other", "user_id"])
    assert rows(read) == [(5, 1), (3, 2)]


@pytest.mark.parametrize("text", ["1 2\n3 4\n", "1 2 \r\n3 4 \r\n", "1 2  \n\n3 4 "])
def test_user_item_lines(text):
    assert rows(table(text, separator=" ", names=["user_id", "item_id"])) == [(1, 2), (3, 4)]


@pytest.mark.parametrize("text", ["1 5 6\n2 7\n", "1 5 6 \r\n\r\n2\t7", "\n 1  5 6\n2 7\n\n"])
def test_lists(text):
    assert rows(table(text, format=Format.lists)) == [(1, 5), (1, 6), (2, 7)]


def test_lists_of_text():
    assert rows(table("ann a b\nbob a\n", format=Format.lists)) == [("ann", "a"), ("ann", "b"), ("bob", "a")]


def test_values_exclude_byte_order_mark_and_quotes():
    read = table('\ufeffuser_id,item_id\n1,"a, b"\n2,"say ""hi"""\n')
    assert rows(read) == [(1, "a, b"), (2, 'say "hi"')]


# Ids


def test_a_header_with_blanks_around_names(tmp_path):
    text = " user_id , timestamp,item_id\t\n1,2,3\n"
    assert rows(table(text, TIMED)) == [(1, 3, 2)]
    assert both(tmp_path, text, TIMED) == ({"user": [1], "item": [3], "time": [2]},) * 2
    assert refused(" user_id,user_id ,item_id\n1,2,3\n") == (
        "x.csv: column 'user_id' is twice in the header; rename one of the two"
    )
    assert rows(table(" user_id,user_id,item_id\n1,2,3\n")) == [(2, 3)]  # the exact name is preferred


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04", "a zip archive or an Excel file; unpack it, or save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0", "an Excel file; save the sheet as CSV"),
        (b"\x1f\x8b\x08", "packed by gzip; end its name in .gz"),
        (b"<!DOCTYPE html>", "an HTML page, not data; download the file itself"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path, start, what):
    (tmp_path / "x.csv").write_bytes(start + b"\n1,2\n")
    for dataset in (PLAIN, replace(PLAIN, names=["user_id", "item_id"]), replace(PLAIN, format=Format.lists)):
        with pytest.raises(InputError) as caught:
            read_file(tmp_path / "x.csv", dataset)
        assert str(caught.value) == (
            f"{tmp_path / 'x.csv'} is {what}; dataset.path must name a CSV or other text file, plain or .gz,"
            " or a Parquet file"
        )


def test_json_is_named_by_the_ending_of_the_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"user_id": 1}\n')
    with pytest.raises(InputError, match=r"x\.jsonl is a JSON file; convert it: dataset\.path must name a CSV"):
        read_file(tmp_path / "x.jsonl", PLAIN)


def test_auto_reads_integers_as_integers_and_the_rest_as_text():
    read = table("user_id,item_id\n-1,007\n9223372036854775807,7\n0,x\n")
    assert rows(read) == [(-1, "007"), (9223372036854775807, "7"), (0, "x")]
    assert read["user"].dtype == np.int64
    assert read["item"].dtype == pd.StringDtype(na_value=np.nan)
    assert table("user_id,item_id\n1,92233720368547758070\n")["item"].tolist() == ["92233720368547758070"]
    assert table("user_id,item_id\n1,1.5\n2,v1.5\n")["item"].tolist() == ["1.5", "v1.5"]


def test_ids_of_a_given_type():
    assert rows(table("user_id,item_id\n1,007\n2,7\n", item_type=IdType.int)) == [(1, 7), (2, 7)]
    assert rows(table("user_id,item_id\n1,007\n2,7.0\n", item_type=IdType.str)) == [(1, "007"), (2, "7.0")]


@pytest.mark.parametrize("value", ["abc", "1.0", "0x1F", "92233720368547758070", "1e3"])
def test_an_id_of_the_wrong_type(value):
    assert refused(f"user_id,item_id\n1,2\n3,{value}\n", item_type=IdType.int) == (
        f"x.csv, line 3: column item_id is {value!r}, not an integer (of 64 bits); use dataset.item_type=str"
    )


MISSING = ["NaN", "nan", "null", "NULL", "None", "NA", "N/A", "<NA>", "#N/A", "\\N"]
KEEP = "or keep them as ids: dataset.check_ids=false"


@pytest.mark.parametrize("kind", list(IdType))
@pytest.mark.parametrize("value", MISSING)
def test_an_id_that_means_a_missing_value(value, kind):
    text = f"user_id,item_id\n1,2\n2,{value}\n3,4\n4,{value}\n"
    assert refused(text, item_type=kind) == (
        f"x.csv, line 3: column item_id is {value!r}, which means a missing value, the first of 2;"
        f" remove these lines, {KEEP}"
    )
    if kind is not IdType.int:
        assert table(text, item_type=kind, check_ids=False)["item"].tolist() == ["2", value, "4", value]


@pytest.mark.parametrize("value", [" 7", "7 ", "\t7", " "])
def test_an_id_with_blanks_around_it(value):
    text = f"user_id,item_id\n1,2\n{value},3\n"
    assert refused(text) == (
        f"x.csv, line 3: column user_id is {value!r}, with blanks around it; remove the blanks"
        f" (dataset.separator=', ' if each comma has one), {KEEP}"
    )
    assert table(text, check_ids=False)["user"].tolist() == ["1", value]
    assert refused("user_id, item_id\n1, 2\n").startswith(
        "x.csv, line 2: column item_id is ' 2', with blanks around it;"
    )
    assert rows(table("user_id, item_id\n1, 2\n", separator=", ")) == [(1, 2)]


def test_ids_are_found_missing_in_lists_too():
    assert refused("1 2\n3 4 nan\n", format=Format.lists).startswith("x.csv, line 2: column item_id is 'nan', which")


def test_words_within_ids_are_ids():
    assert table("user_id,item_id\nNancy,nan1\nNA1,a b\n")["user"].tolist() == ["Nancy", "NA1"]


def test_ids_that_arrays_of_text_cannot_contain():
    assert refused("user_id,item_id\n1,a\n2,a\0\n") == (
        "x.csv, line 3: column item_id is 'a\\x00', with a NUL character; ids are shorter text; correct or remove the"
        " line"
    )
    assert table(f"user_id,item_id\n1,{'9' * 1000}\n")["item"].tolist() == ["9" * 1000]


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    ("column", "rule"),
    [
        ("user_id", "longer than 1,000 characters; ids are shorter text"),
        ("item_id", "longer than 1,000 characters; ids are shorter text"),
        ("timestamp", "a number of more than 64 bits; correct"),
        ("rating", "a number of more than 64 bits; correct"),
        ("pct", "a number of more than 64 bits; correct"),
    ],
)
@pytest.mark.parametrize("sign", ["", "-"])
def test_a_number_of_5000_digits_in_any_column(column, rule, sign):
    weighted = replace(RATED, weight=WeightConfig("pct"))
    value = f"{sign}{DIGITS}"
    values = {"user_id": "1", "item_id": "2", "timestamp": "3", "rating": "4", "pct": "5"} | {column: value}
    message = refused(f"{','.join(values)}\n{','.join(values.values())}\n", weighted)
    assert message.startswith(f"x.csv, line 2: column {column} is '{sign}999")
    assert f"(5,00{len(sign)} characters), {rule}" in message


def test_decimals_as_ids():
    assert refused("user_id,item_id\n1,2\n1.0,3\n2.5,3\n") == (
        "x.csv, line 3: column user_id is '1.0', a decimal number; use dataset.user_type=str to take it as text"
    )


@pytest.mark.parametrize("kind", list(IdType))
def test_a_missing_id(kind):
    assert refused("user_id,item_id\n1,2\n\n3,\n", item_type=kind) == (
        "x.csv, line 4: column item_id is missing; every interaction needs one; correct or remove the line"
    )


def test_a_user_without_items_in_lists():
    assert refused("1 5 6\n\n2\n", format=Format.lists) == ("x.csv, line 3: a user without an item; remove the line")


def test_lists_of_blank_lines_only_have_no_interactions():
    text = "\n \n\t\r\n"
    message = "x.csv has only empty lines; dataset.path must name a file with interactions"
    assert refused(text, format=Format.lists) == message


def test_bytes_of_all_values_are_no_text():
    controls = "".join(map(chr, range(1, 32))) + "\x7f"
    message = "x.csv has bytes of all values, so it is not text; dataset.path must name "
    assert refused(f"user_id::item_id\n{controls}::1\n", separator="::").startswith(message)


def test_a_wrong_id_in_lists():
    assert refused("1 5 6\n\n2 7 x\n", format=Format.lists, item_type=IdType.int) == (
        "x.csv, line 3: column item_id is 'x', not an integer (of 64 bits); use dataset.item_type=str"
    )


# Times, ratings and weights

FIX = "correct or remove the line"
NO_DATE = "not an ISO date like 2021-05-11 above"
NO_TIME = "neither a number nor an ISO date"
OTHER_COLUMN = "correct it, or name the column of the times: dataset.time=..."


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (["10", "9"], [10, 9]),
        (["10.5", "9"], [10.5, 9.0]),
        (["10", "9.5"], [10.0, 9.5]),
        (["1e9", "5"], [1e9, 5.0]),
        (["1970-01-02", "1969-12-31"], [86400, -86400]),
        (["1970-01-01 00:01", "1970-01-01T00:00:05"], [60, 5]),
        (["1970-01-01T01:00:00Z", "1970-01-01T01:00:00+01:00"], [3600, 0]),
        (["1970-01-01 00:00:01.25", "1970-01-01 00:00:02"], [1.25, 2.0]),
    ],
)
def test_times(written, read):
    times = table("user_id,item_id,timestamp\n" + "".join(f"1,2,{time}\n" for time in written), TIMED)["time"]
    assert times.tolist() == read
    assert times.dtype == type(read[0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1,2,30\n3,4,soon\n", f"line 3: column timestamp is 'soon', not a number; {FIX}"),
        ("1,2,30\n\n\r\n3,4,\n", f"line 5: column timestamp is missing; {FIX}"),
        ("1,2,30\n3,4,nan\n", f"line 3: column timestamp is 'nan', not a number; {FIX}"),
        ("1,2,30\n3,4,2021-05-11\n", f"line 3: column timestamp is '2021-05-11', not a number; {FIX}"),
        ("1,2,2021-05-11\n3,4,2021-13-01\n", f"line 3: column timestamp is '2021-13-01', {NO_DATE}; {FIX}"),
        ("1,2,2021-05-11\n3,4,\n", f"line 3: column timestamp is missing; {FIX}"),
        ("1,2,2021-05-11\n3,4,30\n", f"line 3: column timestamp is '30', {NO_DATE}; {FIX}"),
        ("1,2,11.05.2021\n", f"line 2: column timestamp is '11.05.2021', {NO_TIME}; {OTHER_COLUMN}"),
        ("1,2,\n3,4,30\n", f"line 2: column timestamp is missing; {OTHER_COLUMN}"),
    ],
)
def test_a_wrong_time(lines, message):
    assert refused("user_id,item_id,timestamp\n" + lines, TIMED) == f"x.csv, {message}"


@pytest.mark.parametrize(("value", "rule"), [("good", "is 'good', not a number"), ("", "is missing")])
def test_a_wrong_rating(value, rule):
    assert refused(f"user_id,item_id,timestamp,rating\n1,2,3,4\n1,2,3,{value}\n", RATED) == (
        f"x.csv, line 3: column rating {rule}; correct or remove the line"
    )


def test_the_invalid_row_is_found_anywhere():
    random = np.random.default_rng(0)
    for _ in range(50):
        size = int(random.integers(1, 40))
        wrong = int(random.integers(size))
        times = [str(time) for time in random.integers(100, size=size)]
        for row in range(wrong, size, 3):
            times[row] = "x"
        lines = "".join(f"1,2,{time}\n" for time in ["1", *times])
        assert f"line {wrong + 3}: column timestamp is 'x'" in refused("user_id,item_id,timestamp\n" + lines, TIMED)


def test_weights():
    text = "user_id,item_id,pct\n1,2,10\n1,3,10.5\n1,4,\n1,5,nan\n1,6,100\n"
    weights = table(text, weight=WeightConfig("pct", above=10, then=3, otherwise=1))["weight"]
    assert weights.tolist() == [1, 3, 1, 1, 3]
    assert table("user_id,item_id,pct\n1,2,0\n1,3,2.5\n", weight=WeightConfig("pct"))["weight"].tolist() == [0, 2.5]


@pytest.mark.parametrize(
    ("value", "above", "rule"),
    [
        ("x", 10, "is 'x', not a number"),
        ("x", None, "is 'x', not a number"),
        ("", None, "is missing"),
        ("-1", None, "is '-1', a weight below 0"),
    ],
)
def test_a_wrong_weight(value, above, rule):
    message = refused(f"user_id,item_id,pct\n1,2,5\n1,3,{value}\n", weight=WeightConfig("pct", above=above))
    assert message == f"x.csv, line 3: column pct {rule}; correct or remove the line"


# The file as a whole

NO_HEADER = "if the file has only data, name its columns: dataset.names=[...]"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("userId,item_id", "no column 'user_id'; the file has {}; did you mean dataset.user=userId?"),
        ("user_id,itemid", "no column 'item_id'; the file has {}; did you mean dataset.item=itemid?"),
        ("user_id,b", "no column 'item_id'; the file has {}; name the column: dataset.item=..."),
        ("196,242", f"no column 'user_id'; the file has {{}}; {NO_HEADER}"),
        ("a;b", "no column 'user_id'; the file has {}; set 'dataset.separator=\";\"'"),
        ("a|b", "no column 'user_id'; the file has {}; check that dataset.separator is the file's"),
        ("user_id,item_id,user_id", "column 'user_id' is twice in the header; rename one of the two"),
    ],
)
def test_a_missing_column(header, message):
    message = message.format(header.replace(",", ", "))
    assert refused(f"{header}\n1,2\n") == f"x.csv: {message}"


def test_a_missing_column_of_weights_and_of_given_names():
    assert refused("user_id,item_id,percent\n1,2,3\n", weight=WeightConfig("percents")) == (
        "x.csv: no column 'percents'; the file has user_id, item_id, percent;"
        " did you mean dataset.weight.column=percent?"
    )
    assert refused("1,2\n", names=["user_id", "movie"]) == (
        "x.csv: no column 'item_id'; dataset.names has user_id, movie; name the column: dataset.item=..."
    )


@pytest.mark.parametrize("text", ["user_id,item_id", "user_id,item_id\n", "\nuser_id,item_id\r\n\r\n"])
def test_a_header_line_only(text):
    assert refused(text) == ("x.csv has a header line and no interactions; dataset.path must name a file with some")


@pytest.mark.parametrize("text", ["user_id,item_id\r1,2\r3,4\r", '"user_id","item_id"\r1,2\n3,4', "\r{}\r\r\n1,2\r3,4"])
def test_a_carriage_return_only_ends_a_line(tmp_path, text):
    text = text.replace("{}", "user_id,item_id")
    assert rows(table(text)) == [(1, 2), (3, 4)]
    assert both(tmp_path, text, PLAIN) == ({"user": [1, 3], "item": [2, 4]},) * 2
    assert rows(table("1 2\r3 4\r\n5 6 \r", separator=" ", names=["user_id", "item_id"])) == [(1, 2), (3, 4), (5, 6)]
    assert rows(table("1 2 3\r4 5\n", format=Format.lists)) == [(1, 2), (1, 3), (4, 5)]


def test_lines_are_numbered_as_an_editor_numbers_them():
    assert refused("user_id,item_id\r1,2\r\n\r3\n").startswith("x.csv, line 4: 1 column, not 2")
    assert refused(",\r,", names=["user_id", "item_id"]).startswith("x.csv, line 1: column user_id is missing")
    assert refused("1 2\r\r3\r\n", format=Format.lists).startswith("x.csv, line 3: a user without an item")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_are_not_rows_of_a_file_read_in_blocks(tmp_path, end):
    (tmp_path / "x.csv").write_text(f"user_id,item_id,timestamp{end}{end}", newline="")
    with pytest.raises(InputError, match="no interactions"):
        read_file(tmp_path / "x.csv", PLAIN)
    (tmp_path / "x.csv").write_text(f"{end}{end}", newline="")
    with pytest.raises(InputError, match="only empty lines"):
        read_file(tmp_path / "x.csv", replace(PLAIN, names=["user_id", "item_id", "timestamp"]))


def test_lists_of_too_much_text_are_one_line(monkeypatch):
    monkeypatch.setattr(columns, "_MAX_TEXT", 3)
    assert refused("1 2\n", format=Format.lists) == (
        "x.csv has over 2 GiB of lists; convert it to a table, or use a part of it"
    )


def test_rows_that_would_fill_the_memory_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"user_id,item_id\n" + 10_000 * b"1,1\n"))
    monkeypatch.setattr(source, "_BLOCK_BYTES", 1000)
    assert len(read_file(tmp_path / "x.csv.gz", PLAIN)) == 10_000
    monkeypatch.setattr(memory, "available_bytes", lambda _: 40_000)
    with pytest.raises(InputError, match=r"x\.csv\.gz is too large for this machine; use a part of it, or more memory"):
        read_file(tmp_path / "x.csv.gz", PLAIN)


def test_a_file_in_utf_16():
    assert refused("user_id,item_id,timestamp\n1,2,3\n".encode("utf-16")) == (
        "x.csv, line 1 is not UTF-8 text (byte 0xff); convert the file from its encoding, such as:"
        " iconv -f utf-16 -t utf-8 x.csv > converted.csv"
    )


@pytest.mark.parametrize("changes", [{}, {"names": ["user_id", "item_id"]}, {"format": Format.lists}])
def test_empty_lines_only(changes):
    assert refused("\n\r\n\n", **changes) == (
        "x.csv has only empty lines; dataset.path must name a file with interactions"
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1,2\n\n3\n4\n", "line 4: 1 column, not 2 as in the header"),
        ("1,2\n3,4,5\n", "line 3: 3 columns, not 2 as in the header"),
    ],
)
def test_a_ragged_row(lines, message):
    assert refused("user_id,item_id\n" + lines) == f"x.csv, {message}; correct or remove the line"


def test_a_row_that_does_not_fit_the_given_names():
    assert refused("1,2,3\n", names=["user_id", "item_id"]) == (
        "x.csv, line 1: 3 columns, not 2 as in dataset.names; correct dataset.names, or correct or remove the line"
    )


LATIN_1 = (
    "{}, line {} is not UTF-8 text (byte 0xe9); convert the file from its encoding, such as:"
    " {}iconv -f latin1 -t utf-8{} > converted.csv"
)


@pytest.mark.parametrize("changes", [{}, {"format": Format.lists}])
def test_text_that_is_not_utf_8(changes):
    message = refused("user_id,item_id\r1,2\r\n1,é\n".encode("latin-1"), **changes)
    assert message == LATIN_1.format("x.csv", 3, "", " x.csv")
    assert refused("usér_id,item_id\n1,2\n".encode("latin-1")) == LATIN_1.format("x.csv", 1, "", " x.csv")


def test_text_that_is_not_utf_8_in_a_gzip_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a b.csv.gz").write_bytes(gzip.compress("user_id,item_id\n1,é\n".encode("latin-1")))
    with pytest.raises(InputError) as caught:
        read_file(Path("a b.csv.gz"), PLAIN)
    assert str(caught.value) == LATIN_1.format("a b.csv.gz", 2, "zcat 'a b.csv.gz' | ", "")


def test_text_that_is_not_utf_8_in_a_column_not_read():
    assert rows(table("user_id,item_id,other\n1,2,é\n".encode("latin-1"))) == [(1, 2)]


def test_a_row_that_is_ragged_and_not_utf_8(capfd):
    message = refused("user_id,item_id\n1,2\né,3,4\n".encode("latin-1"))
    assert message == "x.csv, line 3: 3 columns, not 2 as in the header; correct or remove the line"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("below", [1, 1_000_000])
@pytest.mark.parametrize("rows", ['1,"2\n', '1,2\n3,"4\n5,6"\n'])
def test_an_open_quote_swallows_no_rows(rows, below):
    line = 2 if rows.startswith('1,"') else 3
    message = f"x.csv, line {line}: a quote is not closed on its line; close it or remove the line"
    assert refused("user_id,item_id\n" + rows + "7,8\n" * below) == message


def test_quotes_above_an_open_one_do_not_mislead():
    message = "x.csv, line 5: a quote is not closed on its line; close it or remove the line"
    assert refused('user_id,item_id\n1,5" pipe\n\n2,"a"\n3,"b\nc"\n') == message


def test_a_quote_inside_a_value_is_text():
    assert table('user_id,item_id\n1,5" pipe\n2,"5"" pipe"\n')["item"].tolist() == ['5" pipe', '5" pipe']


def test_lists_have_no_times():
    assert refused("1 5 6\n", TIMED, format=Format.lists) == (
        "dataset.time is set, but dataset.format=lists has users and items only; set it to null"
    )


# Blocks; the reference is the whole file at once


def both(tmp_path: Path, text: str | bytes, dataset: DatasetConfig, **changes) -> tuple:
    """Return what the file gives in blocks and at once: a table's columns, or the error message."""
    path = tmp_path / "x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    dataset = replace(dataset, **changes)

    def outcome(read) -> dict | str:
        try:
            return {name: column.tolist() for name, column in read().items()}
        except InputError as error:
            return str(error)

    return outcome(lambda: read_file(path, dataset)), outcome(
        lambda: read_interactions(source.content(path), path, dataset)
    )


IDS = ["0", "7", "-12", "123456", "9223372036854775807", "-9223372036854775807"]
ODD_IDS = [
    "-9223372036854775808",
    "007",
    " 7",
    "7 ",
    "-0",
    "+7",
    "0x1F",
    "0X3B9ACA00",
    "1.5",
    "",
    "x",
    "9223372036854775808",
    '"7"',
    "é",
]
TIMES = [["10", "9", "-3", "5000000000"], ["1.5", "2", "1e3"], ["2021-05-11", "2021-05-12 10:00:00.25"]]
TIMES += [["2021-05-11T10:00:00Z", "2021-05-11T10:00:00+02:00"]]
ODD_TIMES = ["", "nan", "soon", "2021-13-01", "2021-05-11", "7"]
ODD_LINES = ["", "1", "1,2,3,4,5,6", '1,2,"3', "\r", "1,2,3\r4,5,6"]


def test_weights_may_not_all_be_zero():
    with pytest.raises(InputError, match=r"^dataset\.weight gives every interaction the weight 0, so that nothing is"):
        WeightConfig("rating", above=2, then=0, otherwise=0)


@pytest.mark.parametrize("separator", [",", "::", " "])
def test_blocks_give_what_the_whole_file_gives(tmp_path, monkeypatch, separator):
    random = np.random.default_rng(0)
    weighted = replace(RATED, weight=WeightConfig("rating", above=2, then=3, otherwise=1))
    at_once, outcomes = [], []
    monkeypatch.setattr(
        interactions, "read_interactions", lambda *given: at_once.append(1) or read_interactions(*given)
    )
    for round_ in range(300):
        monkeypatch.setattr(source, "_BLOCK_BYTES", int(random.integers(30, 200)))
        times = TIMES[random.integers(len(TIMES))]
        lines = [
            [
                random.choice(IDS[: random.integers(1, 7)]),
                random.choice(IDS),
                random.choice(times),
                random.choice(["1", "2.5"]),
            ]
            for _ in range(random.integers(1, 30))
        ]
        if round_ % 2:
            column = random.integers(3)
            lines[random.integers(len(lines))][column] = random.choice(ODD_TIMES if column == 2 else ODD_IDS)
        written = ["user_id,item_id,timestamp,rating", *(",".join(line) for line in lines)]
        if round_ % 5 == 1:
            written.insert(random.integers(len(written) + 1), random.choice(ODD_LINES))
        text = random.choice(["\n", "\r\n"]).join(written).replace(",", separator)
        kind = IdType.int if round_ % 3 else IdType.auto
        inside, whole = both(tmp_path, text, weighted, separator=separator, user_type=kind, item_type=kind)
        assert inside == whole, text
        outcomes.append(type(inside))
    assert outcomes.count(dict) > 100
    assert outcomes.count(str) > 50
    assert 100 < len(at_once) < 200


def test_integer_ids_and_one_time_type_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_BLOCK_BYTES", 60)  # the header line and a row
    monkeypatch.setattr(interactions, "read_interactions", lambda *_: pytest.fail("read at once"))
    path = tmp_path / "x.csv"
    path.write_text(KION)
    read = read_file(path, load(["dataset=kion"]).dataset)
    assert rows(read) == [(176549, 9506, 1620691200, 3), (699317, 1659, 1622246400, 1)]


@pytest.mark.parametrize("value", ["007", " 7", "7 ", "-0", "0x1F", "0x3B9ACA00", "0XE8D4A51000", "1.0", "", "x"])
def test_only_plain_integers_are_converted_together(value):
    assert interactions.plain_integers(pa.array(["-5", "1000000000", value])) is None


def test_plain_integers_of_every_length():
    edges = [sign * (10**power + more) for power in range(19) for more in (-1, 0, 1) for sign in (-1, 1)]
    edges += [2**63 - 1, 1 - 2**63]
    assert interactions.plain_integers(pa.array([str(edge) for edge in edges])).tolist() == edges


# Cleaning


def cleaned(lines: list[tuple], dataset: DatasetConfig = TIMED, **changes) -> list[tuple]:
    columns = ["user", "item", "time", "rating"][: len(lines[0])]
    return rows(clean(pd.DataFrame(lines, columns=columns), replace(dataset, **changes)))


def not_cleaned(lines: list[tuple], dataset: DatasetConfig = TIMED, **changes) -> str:
    with pytest.raises(InputError) as caught:
        cleaned(lines, dataset, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sorted_by_user_and_time_with_ties_in_file_order():
    lines = [(2, 5, 9), (1, 8, 4), (2, 7, 3), (1, 6, 4), (1, 9, 1), (1, 5, 4)]
    assert cleaned(lines) == [(1, 9, 1), (1, 8, 4), (1, 6, 4), (1, 5, 4), (2, 7, 3), (2, 5, 9)]


def test_without_times_a_users_rows_stay_in_file_order():
    assert cleaned([("b", 9), ("a", 7), ("b", 3), ("a", 8)], PLAIN) == [("a", 7), ("a", 8), ("b", 9), ("b", 3)]


def test_columns_and_index_after_cleaning():
    lines = pd.DataFrame({"user": [1, 1], "item": [2, 3], "time": [2, 1], "rating": [5, 4], "weight": [1.0, 3.0]})
    after = clean(lines, RATED)
    assert list(after) == ["user", "item", "time", "weight"]
    assert after.index.tolist() == [0, 1]
    assert rows(after) == [(1, 3, 1, 3.0), (1, 2, 2, 1.0)]


def test_ratings_below_min_rating_are_dropped():
    lines = [(1, 2, 10, 3), (1, 3, 11, 4), (1, 4, 12, 3.5)]
    assert cleaned(lines, RATED, min_rating=3.5) == [(1, 3, 11), (1, 4, 12)]


@pytest.mark.parametrize(
    ("since", "until", "left"),
    [
        ("86400", None, [3, 4, 5]),
        (None, "86400", [2, 3]),
        ("86400", "172799.5", [3, 4]),
        ("1970-01-02", None, [3, 4, 5]),
        (None, "1970-01-02", [2, 3, 4]),  # the whole day
        (None, "1970-01-02T00:00:00", [2, 3]),
        ("1970-01-02T01:00:00+01:00", "1970-01-02", [3, 4]),
    ],
)
def test_the_time_window_includes_both_ends(since, until, left):
    lines = [(1, 2, 86399), (1, 3, 86400), (1, 4, 172799), (1, 5, 172800)]
    assert [item for _, item, _ in cleaned(lines, since=since, until=until)] == left


@pytest.mark.parametrize(("unit", "scale"), [("milliseconds", 10**3), ("microseconds", 10**6), ("nanoseconds", 10**9)])
def test_dates_are_compared_in_the_unit_of_the_times(unit, scale):
    days = [1620604800 + 86400 * day for day in range(4)]  # from 2021-05-10
    lines = [(1, item, day * scale + scale // 2) for item, day in enumerate(days)] + [(2, 9, days[3] * scale - 1)]
    kept = [(item, time) for _, item, time in cleaned(lines, since="2021-05-11", until="2021-05-12")]
    assert kept == [(1, lines[1][2]), (2, lines[2][2]), (9, lines[4][2])]
    assert [item for _, item, _ in cleaned(lines, since=str(days[2] * scale))] == [2, 3, 9]  # a number as in the file
    assert not_cleaned(lines, since=str(days[2])) == (
        f"dataset.since={days[2]} is a date in seconds, but the times are in {unit};"
        f" write a date, or the number in {unit}"
    )
    assert not_cleaned(lines, since="2018") == (
        "dataset.since=2018 is a number near 0, but the times are dates; write a date, such as 2018-01-31"
    )
    assert not_cleaned(lines, since="2022-01-01") == (
        f"dataset.since=2022-01-01 keeps none of 5 interactions; time ranges from 2021-05-10 to 2021-05-13, in {unit}"
    )


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([0, 1, 2], "seconds"),
        ([1620000000, 1620000001, 0], "seconds"),
        ([-1, 99_999_999_999, 99_999_999_999], "seconds"),
        ([0, 1620000000000, 1620000000001], "milliseconds"),
        ([1.5, 1620000000000.5, 1620000000001.5], "milliseconds"),
        ([0, 1620000000000000, 1620000000000001], "microseconds"),
        ([-1620000000000000000, 1620000000000000000, 1620000000000000001], "nanoseconds"),
        ([1e300], "nanoseconds"),
    ],
)
def test_the_unit_of_times_is_that_of_the_median(times, unit):
    assert time_unit(np.array(times)) == unit
    assert time_unit(pd.Series(times * 1000)) == unit


def test_times_are_shown_as_dates_if_they_can_be_dates():
    assert describe_span(np.array([1620000000, 1630000000]), "seconds") == "from 2021-05-03 to 2021-08-26"
    assert describe_span(np.array([0, 1620000000000]), "milliseconds") == "from 0 to 2021-05-03"
    assert describe_span(np.array([-1e300, 1e300]), "nanoseconds") == "from -1e+300 to 1e+300"


@pytest.mark.parametrize("bound", ["nan", "inf", "9" * 5000, "0000-01-01", "2021-02-30"])
def test_a_bound_without_a_place_in_time(bound):
    message = not_cleaned([(1, 2, 10)], since=bound)
    assert message.startswith("dataset.since=")
    assert len(message) < 1600


def test_bounds_at_the_ends_of_the_calendar():
    assert cleaned([(1, 2, 10), (1, 3, 11)], since="0001-01-01T00:00:00+14:00", until="9999-12-31") == [
        (1, 2, 10),
        (1, 3, 11),
    ]


def test_repeats_keep_the_earliest_by_time_then_by_line():
    lines = [(1, 5, 9), (1, 5, 2), (1, 6, 2), (1, 5, 2), (2, 5, 1)]
    assert cleaned(lines, repeats=Repeats.keep) == [(1, 5, 2), (1, 6, 2), (1, 5, 2), (1, 5, 9), (2, 5, 1)]
    assert cleaned(lines, repeats=Repeats.drop) == [(1, 5, 2), (1, 6, 2), (2, 5, 1)]


def test_rare_items_are_dropped_before_rare_users():
    lines = [(1, 5), (1, 6), (2, 5), (2, 6), (2, 7), (3, 7), (3, 8), (4, 6), (4, 5)]
    # item 8 (1 time) is dropped, then user 3 with 1 left; now item 7 has 1 left, which only `until_stable` drops
    once = cleaned(lines, PLAIN, min_item=2, min_user=2)
    assert once == [(1, 5), (1, 6), (2, 5), (2, 6), (2, 7), (4, 6), (4, 5)]
    stable = cleaned(lines, PLAIN, min_item=2, min_user=2, until_stable=True)
    assert stable == [(1, 5), (1, 6), (2, 5), (2, 6), (4, 6), (4, 5)]


def test_a_filter_that_keeps_nothing_is_named():
    lines = [(1, 2, 10, 3), (1, 3, 11, 4)]
    assert not_cleaned(lines, RATED, min_rating=6) == (
        "dataset.min_rating=6 keeps none of 2 interactions; rating ranges from 3 to 4"
    )
    assert not_cleaned(lines, RATED, since="2021-05-11") == (
        "dataset.since=2021-05-11 keeps none of 2 interactions; time ranges from 10 to 11"
    )
    assert not_cleaned(lines, RATED, until="9") == (
        "dataset.until=9 keeps none of 2 interactions; time ranges from 10 to 11"
    )
    assert not_cleaned(lines, RATED, min_user=3) == (
        "dataset.min_item=0 and dataset.min_user=3 keep none of 2 interactions; lower them"
    )


def test_a_bound_that_is_not_a_time():
    assert not_cleaned([(1, 2, 10)], since="yesterday") == (
        "dataset.since=yesterday must be a number or an ISO date; write it like 2021-05-11"
    )


def test_fewer_than_two_items():
    assert not_cleaned([(1, 2, 10), (2, 2, 11)]) == (
        "dataset.path=x.csv: only one item, 2, is left after cleaning, and a ranking needs at least two; check that"
        " dataset.item=item_id is the column of the items, or keep more with lower filters"
    )


def test_without_filters_all_interactions_are_kept_in_order():
    random = np.random.default_rng(0)
    for _ in range(100):
        size = int(random.integers(2, 60))
        lines = [(int(u), int(i), int(t)) for u, i, t in random.integers((5, 9, 4), size=(size, 3))] + [(0, 9, 0)]
        order = sorted(range(len(lines)), key=lambda row: (lines[row][0], lines[row][2], row))
        assert cleaned(lines) == [lines[row] for row in order]


def test_until_stable_gives_a_core():
    random = np.random.default_rng(0)
    for _ in range(50):
        lines = [(int(u), int(i), 0) for u, i in random.integers((12, 12), size=(60, 2))]
        core = pd.DataFrame(cleaned(lines, min_user=3, min_item=3, until_stable=True))
        assert core[0].value_counts().min() >= 3
        assert core[1].value_counts().min() >= 3


# Published formats, on small files of the same layout


ML_1M = "1::1193::5::978300760\n2::661::3::978302109\n"
ML_20M = "userId,movieId,rating,timestamp\r\n1,2,3.5,1112486027\r\n1,29,4,1112484676\r\n"
PAIRS = "1 10\n1 11\n2 10\n"
LISTS = "1 10 11\n2 10\n"
KION = """user_id,item_id,last_watch_dt,total_dur,watched_pct
176549,9506,2021-05-11,4250,72.0
699317,1659,2021-05-29,8317,
"""


@pytest.mark.parametrize(
    ("name", "path", "text", "read"),
    [
        ("ml_1m", "ml-1m/ratings.dat", ML_1M, [(1, 1193, 978300760, 5), (2, 661, 978302109, 3)]),
        ("ml_20m", "ml-20m/ratings.csv", ML_20M, [(1, 2, 1112486027, 3.5), (1, 29, 1112484676, 4)]),
        ("sasrec_steam", "sasrec-steam/Steam.txt", PAIRS, [(1, 10), (1, 11), (2, 10)]),
        ("sasrec_games", "sasrec-games/Video.txt", PAIRS, [(1, 10), (1, 11), (2, 10)]),
        ("s3rec_toys", "s3rec-toys/Toys_and_Games.txt", LISTS, [(1, 10), (1, 11), (2, 10)]),
        ("kion", "kion/interactions.csv", KION, [(176549, 9506, 1620691200, 3), (699317, 1659, 1622246400, 1)]),
    ],
)
def test_published_formats(tmp_path, name, path, text, read):
    file = tmp_path / f"{path}.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(text.encode()))
    cfg = load([f"dataset={name}", f"data_dir={tmp_path}", "dataset.sha256=null"])
    found = source.find(cfg.dataset, source.data_root(cfg.data_dir))
    frame = read_interactions(source.content(found), found, cfg.dataset)
    assert rows(frame) == read
    assert len(clean(frame, cfg.dataset)) == len(read)


@pytest.mark.parametrize("header", ['"user_id","item_id","timestamp","rating"', '"user_id",item_id,timestamp,"rating"'])
def test_a_quoted_header_is_read_in_blocks_too(tmp_path, monkeypatch, header):
    rows = "\n1,2,10,3\n4,5,11,2.5\n"
    expected, _ = both(tmp_path, "user_id,item_id,timestamp,rating" + rows, RATED)
    monkeypatch.setattr(interactions, "read_interactions", None)  # the file is not read as a whole
    path = tmp_path / "x.csv"
    path.write_text(header + rows)
    assert {name: column.tolist() for name, column in read_file(path, RATED).items()} == expected


def test_filled_lines_are_counted_as_by_a_loop():
    random = np.random.default_rng(0)
    for _ in range(200):
        data = random.choice(list(b"a\n\r"), random.integers(1, 30)).astype(np.uint8).tobytes()
        assert columns._filled_lines(data) == len([line for line in re.split(rb"[\r\n]", data) if line])
    whole = b"ab\n" * 2**19  # parts end within a line and after one
    for data in (whole, b"x" + whole, b"\n\n" + whole, whole + b"\n"):
        assert columns._filled_lines(data) == 2**19
