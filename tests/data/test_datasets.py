"""The data sets of conf/: their sources, and the published counts of the real files."""

from pathlib import Path

import pytest

from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import section_of, to_plain
from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.schema import CONF_DIR
from sasrec_lab.data import source
from sasrec_lab.data.cleaning import clean
from sasrec_lab.data.interactions import read_interactions
from sasrec_lab.errors import InputError

NAMES = sorted(path.stem for path in Path(CONF_DIR, "dataset").glob("*.yaml"))
OWN = ["dataset.path=my/interactions.csv"]  # dataset=csv asks for it

# users, items, interactions as published
COUNTS = {
    "bert4rec_beauty": (40_226, 54_542, 353_962),
    "kion": (962_179, 15_706, 5_476_251),
    "ml_100k": (943, 1_682, 100_000),
    "ml_1m": (6_040, 3_706, 1_000_209),
    "ml_20m": (138_493, 26_744, 20_000_263),
    "ml_latest_small": (610, 9_724, 100_836),
    "s3rec_beauty": (22_363, 12_101, 198_502),
    "s3rec_sports": (35_598, 18_357, 296_337),
    "s3rec_toys": (19_412, 11_924, 167_597),
    "sasrec_beauty": (52_204, 57_289, 394_908),
    "sasrec_games": (31_013, 23_715, 287_107),
    "sasrec_ml_1m": (6_040, 3_416, 999_611),
    "yelp_2020": (30_431, 20_033, 316_354),
}


def dataset_config(name: str) -> DatasetConfig:
    return load([f"dataset={name}", *(OWN if name == "csv" else [])]).dataset


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_composes_under_its_own_name(name):
    assert dataset_config(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_published_files_have_sources_and_archives_have_members(name):
    dataset = dataset_config(name)
    assert bool(dataset.sources) == (name not in ("csv", "synthetic", "yelp", "yelp_2020"))
    for place in dataset.sources:
        archive = place.pip is not None or place.url.endswith(".zip")
        assert archive == (place.member is not None)
        assert place.url is None or place.url.startswith("https://")


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_are_the_published_ones(name, data_root):
    dataset = dataset_config(name)
    if not any((data_root / f"{dataset.path}{suffix}").exists() for suffix in ("", ".gz")):
        pytest.skip(f"needs {dataset.path} in SASREC_LAB_DATA")
    path = source.find(dataset, data_root)
    assert dataset.sha256 in (None, source.digest(path, is_text=True))
    table = clean(read_interactions(source.content(path), path, dataset), dataset)
    assert (table["user"].nunique(), table["item"].nunique(), len(table)) == COUNTS[name]


def test_dataset_csv_needs_a_path():
    with pytest.raises(InputError, match=r"^dataset\.path has no value; set it on the command line"):
        load(["dataset=csv"])


def test_the_record_of_an_older_run_checks_ids():
    record = to_plain(dataset_config("ml_100k"))
    del record["check_ids"]
    assert section_of({"dataset": record}, "dataset", DatasetConfig) == dataset_config("ml_100k")
