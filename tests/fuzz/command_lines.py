"""Try mutated command lines in this process and print each exception that is not an InputError of one line.

python tests/fuzz/command_lines.py 5000            5,000 command lines
python tests/fuzz/command_lines.py 5000 7          with another seed

Each is checked as its command would check it, up to the point at which data or a run would be read: composed, typed,
converted to JSON, planned as jobs, and its Trainer built. Each finding is printed as its shortest command line.
"""

import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path

from hydra._internal.core_plugins import file_config_source
from omegaconf import OmegaConf

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.convert import known_keys, to_plain
from sasrec_lab.config.overrides import format_override, normalize
from sasrec_lab.config.schema import CONF_DIR, SCHEMAS, RecommendConfig, TrainConfig
from sasrec_lab.errors import InputError, printable
from sasrec_lab.export import __main__ as export
from sasrec_lab.recommend.inputs import read_ids
from sasrec_lab.report import __main__ as report
from sasrec_lab.training.trainer import build_trainer

SECONDS_PER_LINE = 30
LONGEST_MESSAGE = 2000
Words = list[str]

SEEDS: dict[str, list[Words]] = {
    "train": [
        ["model=tiny", "trainer=fast", "dataset=synthetic"],
        ["dataset=csv", "dataset.path=x.csv", "dataset.user=u", "dataset.item=i", "dataset.time=t"],
        ["-m", "seed=range(3)", "model.dim=8,16", "hydra.sweep.dir=s"],
        ["-m", "ablation=glob(blocks_*)", "experiment=sasrec_paper/beauty"],
        ["--cfg", "job", "loss=bce"],
        ["hydra.run.dir=outputs/a", "ckpt=last", "seed=1"],
        ["+trainer.profiler=simple", "optimizer.lr=0.01", "evaluation.k=[5,10]"],
        ["dataset.weight={column: a, above: 10, then: 3, otherwise: 1}", "~trainer.precision"],
        ["--help", "model.dim=3"],
        ["--info", "searchpath"],
        ["--config-dir", "mine", "model=mine"],
    ],
    "recommend": [
        ["run=outputs/a", "users=all", "k=5"],
        ["run=outputs/a", "users=[7,12]", "output=x.csv", "device=cpu"],
        ["run=outputs/a", "items=ids.txt", "filter_itself=false"],
    ],
    "report": [
        ["outputs/a", "--metric", "test/mrr", "--csv", "x.csv"],
        ["outputs/a", "b", "--baseline", "model.dim=3"],
    ],
    "export": [["outputs/a", "x.pt2"]],
}
GROUPS = [f"{path.parent.name}={path.stem}" for path in sorted(Path(CONF_DIR).glob("[!h]*/*.yaml"))]
GROUPS += ["experiment=quality/sasrec_ml_1m", "hydra/launcher=basic", "hydra/job_logging=none", "model@loss=tiny"]
KEYS = {name: known_keys(schema) for name, schema in SCHEMAS.items()} | {"report": ["--html"], "export": ["x"]}
HYDRA_KEYS = [
    "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.verbose", "hydra.callbacks",
    "hydra.launcher", "hydra.sweeper", "hydra.sweeper.params", "hydra.job", "hydra.job.name", "hydra.job.chdir",
    "hydra.job.env_set", "hydra.job_logging", "hydra.output_subdir", "hydra.searchpath", "hydra.help", "hydra",
    "hydra.x",
]  # fmt: skip
VALUES = [
    "", "0", "1", "-1", "007", "1.5", "-0.0", "1e-3", "1e400", "nan", "inf", "-inf", "true", "null", "None", "x",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 5000, "0." + "3" * 5000, "a" * 5000,
    "/".join(["a"] * 2000), "é", "имя", "日本", "\u2028", "\u202e", "\x00", "\x1b[31m", "\x7f", "\ud800", "\udcff",
    "a b", " a", "a ", "a\tb", "a\nb", "a=b", "a,b", "1,2", "[1,2]", "[]", "[[1]]", "[a,", "]", "{a: 1}", "{}", "{a",
    "{a: {b: [1, {c: d}]}}", "'a b'", '"a', "'", '"', "'a' b", "\\", "\\,", "(", ")", "range(3)", "range(0)",
    "range(3,1)",
    "range(1", "range(a)", "choice(1,2)", "choice()", "interval(1,2)", "interval(2,1)", "glob(*)", "glob(no_*)",
    "shuffle(1,2)", "sort(3,1)", "sort(a,1)", "tag(t, 1)", "int(3.5)", "float(x)", "str([1])", "json_str({a: 1})",
    "extend_list(1)", "merge()", "${seed}", "${model}", "${nope}", "${model.dim}", "${oc.env:NOPE}", "${oc.env:HOME}",
    "${oc.decode:'['}", "${oc.select:nope}", "${oc.dict.keys:model}", "${oc.create:[1]}", "${started:}", "${.dim}",
    "${..seed}", "${job_folder:1}", "${hydra:run.dir}", "${now:%Y}", "${a:${b:c}}", "${", "$", "$x", "???", "!!int 3",
    "[" * 300, "[" * 60 + "]" * 60, "*a", "&a", "@", ":", "a:b", "a: b", "~", "#", "%", "0x10", "1_000", "1e5", ".5",
    "5.",
    "+5", "../..", "/", "~/x", "outputs/a", "x.csv", "last", "all", "ids.txt", "gpu", "val/mrr",
    "00:00:01:00", "0-seed=1,model.dim=2", "sasrec", "tiny", "32-true", "auto",
]  # fmt: skip
FLAGS = [
    "-m", "--multirun", "--cfg", "job", "-c", "--resolve", "--package", "model", "--run", "--help", "-h",
    "--hydra-help",
    "--info", "--config-dir", ".", "--config-name", "train", "--config-path", "-sc", "--hlep", "--multi", "-x", "--",
    "-",
    "--cfg=job", "--user", "--seed=1", "-1", "--metric", "--csv", "--baseline", "=", "==", "a", "help", "\ufeff",
    "--experimental-rerun", "--shell-completion", "--info=all", "-mr", "--model.dim", "3",
]  # fmt: skip
PREFIXES = ["+", "++", "~", "-", "--", " ", "'", ".", "@", "\ufeff"]


def mutate(words: Words, name: str, rng: random.Random) -> Words:
    """Return the words after one to four mutations."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        place = rng.randrange(len(words) + 1)
        kind = rng.random()
        if kind < 0.45:
            key = rng.choice(HYDRA_KEYS if rng.random() < 0.15 and name in SCHEMAS else KEYS[name])
            key = rng.choice(PREFIXES) + key if rng.random() < 0.15 else key
            words.insert(place, f"{key}={rng.choice(VALUES)}")
        elif kind < 0.55:
            words.insert(place, rng.choice(GROUPS))
        elif kind < 0.67:
            words.insert(place, rng.choice(FLAGS))
        elif words:
            place %= len(words)
            words[place : place + 1] = change(words[place], rng)
    return words


def change(word: str, rng: random.Random) -> Words:
    """Return what takes the place of a word: nothing, two words, or one with a part replaced."""
    kind = rng.randrange(6)
    place = rng.randrange(len(word) + 1)
    if kind == 0:
        return []
    if kind == 1:
        return [word, word]
    if kind == 2:
        return [word[:place], word[place:]]
    if kind == 3:
        return [word.partition("=")[0] + "=" + rng.choice(VALUES)]
    if kind == 4:
        return [word[:place] + rng.choice(VALUES)[:40] + word[place:]]
    return [word[:place] + word[place + 1 :]]


def check(name: str, words: Words) -> None:
    """Do what the command does with these words before it reads data or a run."""
    if name == "report":
        report._parse(words)
        return
    if name == "export":
        export.parse(words)
        return
    argv = normalize(words)
    command = check_command_line(argv, name)
    for job in command.jobs if command else []:
        format_override("hydra.run.dir", str(job.folder))
        if isinstance(job.cfg, TrainConfig):
            json.dumps(to_plain(job.cfg))
            if len(command.jobs) == 1 and job.cfg.trainer["accelerator"] == "cpu":
                build_trainer(job.cfg, Path("run"))
        elif isinstance(job.cfg, RecommendConfig):
            for key in ("users", "items", "items_to_recommend"):
                read_ids(getattr(job.cfg, key), key, ("user_id",))


def outcome(name: str, words: Words) -> tuple[str, str] | None:
    """Return the kind and the text of an unexpected exception, or None."""
    signal.alarm(SECONDS_PER_LINE)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            check(name, words)
    except InputError as error:
        text = str(error)
        if not text or printable(text) != text or len(text) > LONGEST_MESSAGE:
            return f"InputError of {len(text) // 100}00 characters, or not one line", text[:500]
    except SystemExit as end:
        if end.code not in (0, None):
            return "SystemExit", str(end.code)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "sasrec_lab" in frame.filename] or list(frames)
        where = " < ".join(f"{Path(frame.filename).name}:{frame.name}" for frame in (frames[-1], ours[-1]))
        return f"{type(error).__name__} {where}", str(error)[:300]
    finally:
        signal.alarm(0)
    return None


def shorten(name: str, words: Words, kind: str) -> Words:
    """Return the fewest and shortest words that still fail so, found by removing words and parts of them in turn."""

    def fails(words: Words) -> bool:
        failed = outcome(name, words)
        return failed is not None and failed[0] == kind

    for place in reversed(range(len(words))):
        if fails(fewer := words[:place] + words[place + 1 :]):
            words = fewer
    for place in range(len(words)):
        size = len(words[place]) // 2
        while size:
            for start in range(0, len(words[place]), size):
                shorter = words[place][:start] + words[place][start + size :]
                if fails(changed := [*words[:place], shorter, *words[place + 1 :]]):
                    words = changed
                    break
            else:
                size //= 2
    return words


def run(count: int, seed: int) -> int:
    """Try `count` command lines, print the findings, and return how many there are."""
    rng, tried = random.Random(seed), Counter[str]()
    found: set[tuple[str, str]] = set()
    names = list(SEEDS)
    for _ in range(count):
        name = rng.choices(names, weights=(12, 4, 1, 1))[0]
        words = mutate(rng.choice(SEEDS[name]), name, rng)
        failed = outcome(name, words)
        tried[name] += 1
        if failed and (name, failed[0]) not in found:
            found.add((name, failed[0]))
            print(f"{name} {shorten(name, words, failed[0])!a}\n    {failed[0]}: {failed[1]!a}", flush=True)
    print(f"{count:,} command lines ({', '.join(f'{name} {n}' for name, n in tried.items())}): {len(found)} findings")
    return len(found)


def prepare() -> None:
    """Read each config file once, raise an exception after SECONDS_PER_LINE, and use an empty folder."""

    @cache
    def read(path: str) -> object:
        with open(path, encoding="utf-8") as file:
            return load(file)

    load = OmegaConf.load
    cached = type("Cached", (OmegaConf,), {"load": staticmethod(lambda file: deepcopy(read(file.name)))})
    file_config_source.OmegaConf = cached

    def expire(*_: object) -> None:
        raise TimeoutError(f"not finished after {SECONDS_PER_LINE} seconds")

    signal.signal(signal.SIGALRM, expire)
    warnings.simplefilter("ignore")
    os.chdir(tempfile.mkdtemp())
    Path("mine/model").mkdir(parents=True)
    Path("mine/model/mine.yaml").write_text("defaults: [sasrec]\ndim: 8\n")
    Path("ids.txt").write_text("1\n2\n")


if __name__ == "__main__":
    prepare()
    count, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 5000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    sys.exit(1 if run(count, seed) else 0)
