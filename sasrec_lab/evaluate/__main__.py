"""The command `python -m sasrec_lab.evaluate`: metrics of top-k lists of any system.

python -m sasrec_lab.evaluate lists=lists.parquet run=outputs/ml_100k/<run>         on the test of a run
python -m sasrec_lab.evaluate lists=lists.csv dataset=ml_1m dataset.holdout=time    on that of a data set
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.hydra_errors import run_hydra
from sasrec_lab.config.hydra_internals import VERSION_BASE
from sasrec_lab.config.list_commands import EvaluateConfig
from sasrec_lab.config.overrides import check_syntax, normalize
from sasrec_lab.config.schema import CONF_DIR
from sasrec_lab.errors import InputError, counted, explain_out_of_memory, printable
from sasrec_lab.files import atomic_write, tolerate_closed_pipe
from sasrec_lab.run import signals

_OF_DATASET = re.compile(r"[+~]{0,2}dataset(\.[\w.]+)?(=|$)")


def entry() -> None:
    """Run the command; an error is one line on stderr and exit status 1."""
    signals.exit_at_once()
    try:
        words = normalize(sys.argv[1:])
        dataset_words = [word for word in words if _OF_DATASET.match(word)]  # of conf/train.yaml
        sys.argv[1:] = [word for word in words if word not in dataset_words]
        command = check_command_line(sys.argv[1:], "evaluate")
        if command is None:  # Hydra's own flags, such as --help
            with tolerate_closed_pipe():
                run_hydra(main, "evaluate")
        else:
            cfg = command.jobs[0].cfg
            assert isinstance(cfg, EvaluateConfig)
            with explain_out_of_memory("give lists of fewer items"), tolerate_closed_pipe():
                evaluate(cfg, dataset_words)
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        signals.expect_exit()


@hydra.main(config_path=CONF_DIR, config_name="evaluate", **VERSION_BASE)
def main(cfg: DictConfig) -> None:
    """Let Hydra answer its own flags."""
    evaluate(to_typed(cfg), [])


def evaluate(cfg: EvaluateConfig, dataset_words: list[str]) -> None:
    """Print the metrics of the lists in a file, and write them if the config names an output.

    Raises:
        InputError: a value of the config, the lists, the run or the data set is invalid.
    """
    if cfg.run is None and not dataset_words:
        raise InputError("give the held-out items: run=<folder of a finished run>, or dataset=... as for sasrec-train")
    _check_single(dataset_words)
    # imported here, so that help and most errors need not wait for torch
    from sasrec_lab.evaluate import held_out as held_outs
    from sasrec_lab.evaluate.listed_rows import match_lists
    from sasrec_lab.evaluate.measure import measure
    from sasrec_lab.recommend.inputs import expand_home, read_table
    from sasrec_lab.recommend.lists import check_output
    from sasrec_lab.run.protocol import describe_test

    output = expand_home(cfg.output) if cfg.output else None
    if output:
        check_output(output)
    split = cfg.split.name
    if cfg.run is not None:
        held_out = held_outs.of_run(expand_home(cfg.run), split, cfg.data_dir, dataset_words)
    else:
        held_out = held_outs.of_dataset(dataset_words, split, cfg.data_dir)
    ids = (held_out.dataset.user, "user_id", held_out.dataset.item, "item_id")
    listed = match_lists(read_table(expand_home(cfg.lists), "lists", ids), held_out)
    k = cfg.k or [cut for cut in held_out.lengths if cut <= listed.longest] or [listed.longest]
    notes = listed.notes
    try:
        categories = held_out.categories()
    except InputError as error:
        if any(word.startswith("dataset.features") for word in dataset_words):
            raise
        categories = None
        notes = [*notes, f"diversity is not measured: {error}"]
    values, more = measure(listed, held_out, categories, k)
    for note in [*notes, *more]:
        print(printable(f"note: {note}"), file=sys.stderr)
    test, users = describe_test(held_out.protocol), counted(held_out.rows.num_users, "user")
    described = {"test": f"Test: {test}", "val": f"Validation: the targets of {users}"}[split]
    print(printable(f"{described}, {held_out.protocol['dataset']}"))
    print(metrics_table(values, k))
    if output:
        named = {f"{split}/{name}": value for name, value in values.items()}
        _write(output, {"lists": cfg.lists, "protocol": held_out.protocol, "notes": [*notes, *more], "metrics": named})


def _check_single(words: list[str]) -> None:
    """Raise InputError if words of the training command are malformed, or choose several data sets."""
    check_syntax(words)
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            raise InputError(f"{override.input_line} has several values; run the command once for each")


def metrics_table(values: dict[str, float], k: list[int]) -> str:
    """Return a table with a line per metric and a column per length of a list."""
    kinds = dict.fromkeys(re.sub(r"@\d+", "", name) for name in values)
    lines = [" " * 20 + "".join(f"{f'@{cut}':>12}" for cut in k)]
    for kind in kinds:
        metric, dash, suffix = kind.partition("-")
        lines.append(f"  {kind:<18}" + "".join(f"{values[f'{metric}@{cut}{dash}{suffix}']:>12.4f}" for cut in k))
    return "\n".join(lines)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        with atomic_write(path) as draft:
            draft.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"output={path} cannot be written: {error.strerror or error}; choose another path") from error


if __name__ == "__main__":
    entry()
