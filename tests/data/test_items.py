"""Item titles and features."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sasrec_lab.config.composition import load
from sasrec_lab.config.dataset import DatasetConfig, TitlesConfig
from sasrec_lab.data.items import read_features, read_titles
from sasrec_lab.errors import InputError
from sasrec_lab.ops import memory

IDS = np.array([1, 3, 7])


def dataset(path: Path, *words: str) -> DatasetConfig:
    return load(["dataset=csv", "dataset.path=x.csv", f"dataset.titles.path={path}", *words]).dataset


def test_each_item_gets_its_title_or_none(tmp_path):
    (tmp_path / "t.csv").write_text('item_id,year,title\n7,1999,"Seven, again"\n9,2000,Nine\n1,2001,NA\n1,2002,Later\n')
    assert read_titles(dataset(tmp_path / "t.csv"), None, IDS).tolist() == ["NA", "", "Seven, again"]


def test_lines_longer_than_the_header_shift_no_column(tmp_path):
    """Pandas would take their first field for the name of the row."""
    text = "item_id,title\n1,A,\n3,B,\n7,C,\n"
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(
        InputError, match=r"t.csv cannot be read \(.*length.*; check the file, and its separator, names"
    ):
        read_titles(dataset(tmp_path / "t.csv"), None, IDS)
    (tmp_path / "t.csv").write_text(text.replace(",", "::"))
    cfg = dataset(tmp_path / "t.csv", "dataset.titles.separator='::'")
    assert read_titles(cfg, None, IDS).tolist() == ["A", "B", "C"]


def test_a_missing_title_of_a_parquet_file_is_empty(tmp_path):
    pd.DataFrame({"item_id": IDS, "title": ["A", None, "C"]}).to_parquet(tmp_path / "t.parquet")
    assert read_titles(dataset(tmp_path / "t.parquet"), None, IDS).tolist() == ["A", "", "C"]


def test_a_file_without_rows_is_one_line(tmp_path):
    pd.DataFrame({"item_id": [], "vector": []}).to_parquet(tmp_path / "f.parquet")
    words = ["dataset=csv", "dataset.path=x.csv", f"dataset.features.path={tmp_path}/f.parquet"]
    cfg = load([*words, "dataset.features.vectors=vector", "model.items=features"]).dataset
    with pytest.raises(InputError, match=r"f.parquet has no rows; it must have one for each item$"):
        read_features(cfg, None, IDS, 3)


def test_a_typo_in_the_path_of_titles_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^dataset.titles.path=typo.csv: no such file"):
        read_titles(load(["dataset=ml_1m", "dataset.titles.path=typo.csv"]).dataset, str(tmp_path), IDS)


def test_movielens_file_has_no_header_and_another_encoding(tmp_path):
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "u.item").write_bytes(
        "3|Mis\xe9rables|1998||x|0\n1|Toy Story|1995||y|1\n".encode("latin-1")
    )
    titles = read_titles(load(["dataset=ml_100k"]).dataset, str(tmp_path), IDS)
    assert titles.tolist() == ["Toy Story", "Mis\xe9rables", ""]


def test_titles_are_none_if_not_fetched_or_not_configured(tmp_path):
    assert read_titles(load(["dataset=ml_100k"]).dataset, str(tmp_path), IDS) is None
    assert read_titles(load(["dataset=synthetic"]).dataset, str(tmp_path), IDS) is None


def test_a_file_that_is_not_what_the_config_says(tmp_path):
    file = tmp_path / "t.csv"
    with pytest.raises(InputError, match=r"dataset\.titles\.path=.*t\.csv: no such file"):
        read_titles(dataset(file), str(tmp_path), IDS)
    file.write_text("item_id,name\n1,One\n")
    with pytest.raises(InputError, match=r"t\.csv: no column 'title'; it has item_id, name; name the two columns:"):
        read_titles(dataset(file), str(tmp_path), IDS)
    assert read_titles(dataset(file, "dataset.titles.title=name"), None, IDS).tolist() == ["One", "", ""]
    file.write_text("")
    with pytest.raises(InputError, match=r"dataset\.titles\.path: .*t\.csv cannot be read"):
        read_titles(dataset(file), None, IDS)


def test_a_broken_gzip_file_of_titles_is_one_line(tmp_path):
    packed = gzip.compress(b"item_id,title\n" + b"1,One\n" * 100)
    for data in (packed[:20], packed[:-1], packed[:12] + b"\xff" + packed[13:], b"no gzip"):
        (tmp_path / "t.csv.gz").write_bytes(data)
        with pytest.raises(InputError, match=r"t\.csv\.gz is a broken gzip file \(.+\); replace it"):
            read_titles(dataset(tmp_path / "t.csv"), None, IDS)


def test_titles_in_another_encoding_name_the_key(tmp_path):
    (tmp_path / "t.csv").write_bytes("item_id,title\n1,é\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"is not utf-8 text \(.+\); set dataset\.titles\.encoding to the file's"):
        read_titles(dataset(tmp_path / "t.csv"), None, IDS)
    words = ["dataset.titles.encoding=latin-1"]
    assert read_titles(dataset(tmp_path / "t.csv", *words), None, IDS).tolist() == ["é", "", ""]


@pytest.mark.parametrize(("key", "value"), [("encoding", "hex"), ("encoding", "no-such"), ("separator", "''")])
def test_titles_with_a_wrong_key_are_one_line(tmp_path, key, value):
    (tmp_path / "t.csv").write_text("item_id,title\n1,One\n")
    with pytest.raises(InputError, match=r"t\.csv cannot be read \(.+\); check the file, and its separator, names and"):
        read_titles(dataset(tmp_path / "t.csv", f"dataset.titles.{key}={value}"), None, IDS)


@pytest.mark.parametrize("separator", ["::", "|", "é", "+", "(a+)+$", r"\t", r"\\s"])
def test_a_separator_of_titles_is_text_not_a_pattern(tmp_path, separator):
    written = "\t" if separator == r"\t" else separator
    rows = [["1", "One a", "x"], ["7", "Se|ven" if written != "|" else "Seven", "x"]]
    (tmp_path / "t.csv").write_text("".join(written.join(row) + "\n" for row in rows))
    given = replace(TitlesConfig(), path=str(tmp_path / "t.csv"), separator=separator, names=["item_id", "title"])
    titles = read_titles(replace(dataset(tmp_path / "t.csv"), titles=given), None, IDS)
    assert titles.tolist() == ["One a", "", rows[1][1]]


def test_titles_that_would_fill_the_memory_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"item_id,title\n" + b"1,One\n" * 1000))
    monkeypatch.setattr(memory, "available_bytes", lambda _: 5000)
    with pytest.raises(InputError, match=r"t\.csv\.gz is too large for this machine; use a part of it, or more memory"):
        read_titles(dataset(tmp_path / "t.csv"), None, IDS)


def features(path: Path, *words: str) -> DatasetConfig:
    words = [f"dataset.features.path={path}", *(f"dataset.features.{word}" for word in words)]
    return load(["dataset=csv", "dataset.path=x.csv", "model.items=features", *words]).dataset


def test_categories_of_cells_with_several_of_them(tmp_path):
    file = tmp_path / "f.csv"
    file.write_text("item_id,genres,year\n7,Comedy | Drama||Comedy,1999\n3,,2001\n1,Drama,\n9,War,1900\n7,Later,1\n")
    found = read_features(features(file, "categories=[genres,year]"), None, IDS, num_trained=2)
    # item 7 is not in training, so its own categories are omitted
    assert found.names == ["genres=Drama", "year=2001"]
    assert (found.offsets.tolist(), found.categories.tolist()) == ([0, 1, 2, 3], [0, 1, 0])
    assert str(found) == "2 categories, of 3 of 3 items"
    whole = read_features(features(file, "categories=[genres]", "split=null"), None, IDS, num_trained=3)
    assert whole.names == ["genres=Drama", "genres=Comedy | Drama||Comedy"]


def test_vectors_of_a_matrix_or_of_a_parquet_column(tmp_path):
    file = tmp_path / "f.csv"
    file.write_text("item_id\n7\n9\n1\n")
    np.save(tmp_path / "v.npy", np.arange(6.0).reshape(3, 2))
    found = read_features(features(file, f"vectors={tmp_path / 'v.npy'}"), None, IDS, num_trained=3)
    assert found.vectors.tolist() == [[4, 5], [0, 0], [0, 1]]
    assert str(found) == "vectors of 2 numbers, of 2 of 3 items"
    table = pd.DataFrame({"item_id": [7, 1], "vector": [[1.0, 2.0], [3.0, 4.0]], "genres": [["a", "b"], []]})
    table.to_parquet(tmp_path / "f.parquet")
    both = read_features(features(tmp_path / "f.parquet", "vectors=vector", "categories=[genres]"), None, IDS, 3)
    assert both.vectors.tolist() == [[3, 4], [0, 0], [1, 2]]
    assert (both.names, both.offsets.tolist()) == (["genres=a", "genres=b"], [0, 0, 0, 2])


def test_broken_vectors_are_one_line(tmp_path):
    file, matrix = tmp_path / "f.csv", tmp_path / "v.npy"
    file.write_text("item_id\n7\n1\n")
    cfg = features(file, f"vectors={matrix}")
    for content, message in (
        (np.zeros((3, 2)), r"v\.npy has 3 rows, but .*f\.csv has 2 items"),
        (np.array([[1, 1], [0, np.nan]]), "v.npy: row 2 has NaN, infinite or too large numbers"),
        (np.array([[1, 1], [0, 1e300]]), "v.npy: row 2 has NaN, infinite or too large numbers"),
        (np.zeros(4), r"v.npy is not a matrix of real numbers \(float64 of shape \(4,\)\)"),
        (np.zeros((2, 2), complex), r"is not a matrix of real numbers \(complex128 of shape"),
        (np.zeros(2, [("a", int)]), r"is not a matrix of real numbers \("),
        (np.array([{}, {}]), "is not a .npy file of numbers .Array can't be memory-mapped: Python objects"),
    ):
        np.save(matrix, content, allow_pickle=True)
        with pytest.raises(InputError, match=message):
            read_features(cfg, None, IDS, 3)
    with matrix.open("wb") as archive:
        np.savez(archive, x=np.zeros((2, 2)))
    with pytest.raises(InputError, match=r"v\.npy is not a matrix of real numbers .an archive of arrays"):
        read_features(cfg, None, IDS, 3)
    for vectors, message in (([[1.0], [3.0, 4.0]], "a list of 2, not 1"), ([["y"], ["x"]], "could not convert")):
        pd.DataFrame({"item_id": [7, 1], "vector": vectors}).to_parquet(tmp_path / "f.parquet")
        with pytest.raises(InputError, match=rf"column vector must have lists of numbers of one length \({message}"):
            read_features(features(tmp_path / "f.parquet", "vectors=vector"), None, IDS, 3)


def test_missing_values_of_a_parquet_file_are_no_features(tmp_path):
    table = pd.DataFrame(
        {
            "item_id": [7, 1],
            "year": pd.array([1999, None], "Int64"),
            "score": [None, 2.0],
            "genres": [["a", None], None],
            "vector": [None, [1.0, 2.0]],
            "new": pd.array([None, True], "boolean"),
        }
    )
    table.to_parquet(tmp_path / "f.parquet")
    words = ["categories=[year,score,genres]", "flags=[new]", "vectors=vector"]
    found = read_features(features(tmp_path / "f.parquet", *words), None, IDS, 3)
    assert found.names == ["score=2", "new", "year=1999", "genres=a"]
    assert found.categories.tolist() == [0, 1, 2, 3]
    assert found.vectors.tolist() == [[1, 2], [0, 0], [0, 0]]


def test_flags_are_ones_and_other_values_are_refused(tmp_path):
    file = tmp_path / "f.csv"
    file.write_text("item_id,War,Drama\n7,1,0\n1,,true\n")
    found = read_features(features(file, "flags=[War,Drama]"), None, IDS, 3)
    assert (found.names, found.offsets.tolist()) == (["Drama", "War"], [0, 1, 1, 2])
    file.write_text("item_id,War\n7,1\n1,2\n")
    with pytest.raises(InputError, match="row 2 of the items: column War is '2', but a flag is 1 or 0, true or false"):
        read_features(features(file, "flags=[War]"), None, IDS, 3)


def test_features_of_other_items_are_refused(tmp_path):
    file = tmp_path / "f.csv"
    file.write_text("item_id,genre\n1,\n8,Drama\n")
    with pytest.raises(
        InputError, match=r"f\.csv has no feature of any item in training; check dataset\.features\.item="
    ):
        read_features(features(file, "categories=[genre]"), None, IDS, 3)


def test_a_missing_file_of_a_published_data_set_says_its_place(tmp_path):
    cfg = load(["dataset=ml_100k", "model.items=both"]).dataset
    with pytest.raises(
        InputError, match=r"u\.item is missing; put the file at .*ml-100k/u\.item; https://.*zip has it"
    ):
        read_features(cfg, str(tmp_path), IDS, 3)
