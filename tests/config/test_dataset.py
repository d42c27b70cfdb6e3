"""The rules on a data set's sources, on the places of its files, and on its name, however the config is given."""

from dataclasses import replace

import pytest

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import section_of, to_plain
from sasrec_lab.config.dataset import DatasetConfig, TitlesConfig
from sasrec_lab.config.sources import SourceConfig
from sasrec_lab.errors import InputError
from sasrec_lab.run.resume import differences

ADDRESSES = [
    "file:///etc/passwd",
    "ftp://host/x",
    "git+https://host/x",
    "//host/x",
    "/etc/passwd",
    "https:///x",
    "https://ho st/x",
    "https://host/x\n",
    "https://[::1/x",
    "https://host:99999/x",
    "https://host:x/x",
    "-o/tmp/x",
    "",
]
RELEASES = [
    "recbole",
    "recbole>=1.2",
    "recbole==1.*",
    "recbole==1.2.1 --no-binary=:all:",
    "--index-url=http://host/recbole==1",
    "-rrequirements.txt",
    "recbole==1.2.1\n",
    "recbole[extra]==1.2.1",
    "recbole @ https://host/recbole.tar.gz",
    "https://host/recbole-1.2.1.tar.gz",
    "git+https://host/recbole",
    "./recbole==1.2.1",
    "../x",
    ".",
    "recbole==1.2.1; python_version > '3'",
    "recbole==1.2.zip",
    "recbole==1+local.zip",
    "recbole===1.2.1",
    "",
]
PLACES = [
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/./x",
    "a//x",
    "a/",
    "~/x",
    "a/~x",
    "a\\x",
    "a\nx",
    "a\x1b[2Jx",
    "a\0x",
    ".ssh/x",
    "a/.x",
    "-x",
    "cache/x",
    "Cache/x",
    "",
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_a_source_must_be_on_the_web(url):
    with pytest.raises(InputError, match=r"^dataset\.sources: url=.* must be an address that begins with https://"):
        SourceConfig(url=url)


@pytest.mark.parametrize("release", RELEASES)
def test_pip_gets_one_release_and_nothing_else(release):
    with pytest.raises(InputError, match=r"^dataset\.sources: pip=.* must be name==version, such as recbole==1\.2\.1$"):
        SourceConfig(pip=release)


def test_valid_sources():
    for url in ("https://host/x", "http://127.0.0.1:80/x?y=%20#z", "HTTPS://host"):
        assert SourceConfig(url=url).url == url
    for release in ("recbole==1.2.1", "a==1", "A.b_c-d==1!2.0rc1.post2.dev3"):
        assert SourceConfig(pip=release).pip == release


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "dataset.sources: size=0 must be at least 1"),
        ({"drop_lines": -1}, "dataset.sources: drop_lines=-1 must be at least 0"),
        ({"sha256": "ab"}, "dataset.sources: sha256=ab must be 64 digits of 0-9 and a-f, as sha256sum prints;"),
    ],
)
def test_values_of_a_source(values, message):
    with pytest.raises(InputError) as caught:
        SourceConfig(url="https://host/x", **values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("path", PLACES)
def test_a_fetched_file_has_a_plain_path_below_the_root(path):
    dataset = load(["dataset=ml_100k"]).dataset
    with pytest.raises(InputError, match=r"^dataset\.path=.* must be a plain path below the data root"):
        replace(dataset, path=path)
    with pytest.raises(InputError, match=r"^dataset\.titles\.path=.* must be a plain path below the data root"):
        replace(dataset, titles=TitlesConfig(path=path))
    assert replace(dataset, path=path, titles=None, sources=[]).path == path  # the user's own file may be anywhere


def test_plain_paths_and_names():
    dataset = load(["dataset=ml_100k"]).dataset
    for path in ("x", "a/b/c.csv", "KuaiRec 2.0/data (1)/big_matrix.csv", "café/données,1.csv", "a/cache/x"):
        assert replace(dataset, path=path).path == path
    with pytest.raises(InputError, match=r"must be different files, but both are ml-100k/u\.data"):
        replace(dataset, titles=TitlesConfig(path="ml-100k/u.data"))
    for name in (".hidden", "..", "a/b", "-x", "a\n", "~", ""):
        with pytest.raises(InputError, match=r"^dataset\.name="):
            replace(dataset, name=name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("path: ../x\nsources: [{url: 'https://host/x'}]", "dataset.path=../x must be a plain path"),
        ("path: x\nsources: [{pip: 'https://host/x.tar.gz'}]", "dataset.sources: pip=https://host/x.tar.gz must be"),
        ("path: x\nsources: [{url: 'file:///etc/passwd'}]", "dataset.sources: url=file:///etc/passwd must be"),
    ],
)
def test_a_data_set_file_of_the_users_has_the_same_rules(tmp_path, line, message):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text(f"name: mine\nformat: table\n{line}\n")
    with pytest.raises(InputError) as caught:
        check_command_line(["--config-dir", str(tmp_path), "dataset=mine"])
    assert str(caught.value).startswith(message)


def test_a_recorded_config_has_the_same_rules():
    config = {"dataset": to_plain(load(["dataset=ml_100k"]).dataset)}
    assert section_of(config, "dataset", DatasetConfig).name == "ml_100k"
    for key, value in {
        "path": "../x",
        "name": "../x",
        "sources": [{"pip": "./x"}],
        "user": "${oc.env:HOME}",
        "synthetic": {"users": 10**400, "items": 9, "mean_length": 2, "seed": 0},
        "min_rating": 10**400,
    }.items():
        with pytest.raises(InputError, match=r"^the run's dataset is not valid: "):
            section_of({"dataset": config["dataset"] | {key: value}}, "dataset", DatasetConfig)


@pytest.mark.parametrize("dataset", [None, [1], "x", {"user": {"a": 1}}, {"sources": [5]}, {"sources": 5}, {"x": 1}])
def test_a_recorded_config_of_any_shape_is_one_line(dataset):
    with pytest.raises(InputError, match=r"^the run's dataset does not fit this version: .*; train it again"):
        section_of({"dataset": dataset}, "dataset", DatasetConfig)


def test_sources_do_not_make_configurations_differ():
    plain = to_plain(load(["dataset=ml_100k"]))
    moved = plain | {"dataset": plain["dataset"] | {"sources": []}}
    assert differences(plain, moved) == []
    assert differences(plain, plain | {"dataset": plain["dataset"] | {"path": "x"}}) == ["dataset.path"]
