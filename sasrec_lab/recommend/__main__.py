"""Top-k lists for users and for items, from a finished run.

python -m sasrec_lab.recommend run=outputs/ml_100k/<run> users=[1,2] k=5                   lists for two users
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> users=all output=lists.parquet    for all of the data set
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> items=[50]                        items most like an item
"""

import csv
import gzip
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.overrides import prepared
from sasrec_lab.config.printed import printed
from sasrec_lab.config.schema import CONF_DIR, RecommendConfig
from sasrec_lab.errors import InputError, InputWarning

if TYPE_CHECKING:
    import pandas as pd

    from sasrec_lab.recommend.lists import Lists
    from sasrec_lab.recommend.recommender import Recommender


def entry() -> None:
    """One line for a mistake; Hydra itself is asked only for help and the like, so it makes no folder."""
    sys.argv[1:] = prepared(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        command = check_command_line(sys.argv[1:], "recommend")
        if command is None:
            with printed():
                main()
        else:
            recommend(command.jobs[0].cfg)
    except InputError as error:
        sys.exit(f"error: {error}")


def _end(number: int, _: FrameType | None) -> None:
    """No KeyboardInterrupt: Python ends by the signal itself where one passed through an eval, as in an import."""
    sys.exit(128 + number)


@hydra.main(config_path=CONF_DIR, config_name="recommend", version_base="1.3")
def main(cfg: DictConfig) -> None:
    recommend(to_typed(cfg))


def recommend(cfg: RecommendConfig) -> None:
    """Print or write the lists that a config asks for.

    Raises:
        InputError: one line that says what is wrong.
    """
    with _warnings_as_lines():
        # imported here, because help and messages about mistakes need not wait for torch
        from sasrec_lab.recommend import lists
        from sasrec_lab.recommend.recommender import Recommender

        output = _path(cfg.output) if cfg.output else None
        if output:
            lists.check_output(output)
        recommender = Recommender.from_run(cfg.run, data_dir=cfg.data_dir, device=cfg.device)
        wanted = _lists(cfg, recommender)
        if output:
            lists.write(output, wanted)
            print(f"{len(wanted.targets):,} lists in {output}")
        else:
            with printed():
                lists.show(wanted, recommender.items, recommender.titles)


def _lists(cfg: RecommendConfig, recommender: "Recommender") -> "Lists":
    dataset = recommender.dataset
    allowed = _ids(cfg.items_to_recommend, "items_to_recommend", (dataset.item, "item_id"))
    if cfg.items is not None:
        items = _ids(cfg.items, "items", (dataset.item, "item_id"))
        return recommender.lists_of_items(items, cfg.k, allowed, cfg.filter_itself, cfg.on_unsupported_targets.name)
    interactions = None
    if cfg.interactions:
        interactions = _table(
            _path(cfg.interactions), "interactions", (dataset.user, dataset.item, "user_id", "item_id")
        )
    users = _ids(cfg.users, "users", (dataset.user, "user_id"))
    options = cfg.filter_viewed, allowed, cfg.on_unsupported_targets.name
    return recommender.lists_of_users(users, cfg.k, interactions, *options)


def _ids(given: Any, key: str, columns: tuple[str, ...]) -> Any:
    """A list as it stands, `all`, or the ids in a file: a line each in .txt, else a column of one of these names."""
    if given is None or isinstance(given, list) or (given == "all" and key != "items_to_recommend"):
        return given
    if isinstance(given, dict):
        raise InputError(f"{key}={given} is no list of ids; write {key}=[...]")
    path = _path(str(given))
    if path.suffix not in (".txt", ".csv", ".parquet"):
        raise InputError(f"{key}={given} is no .txt, .csv or .parquet file; ids stand in brackets: {key}=[{given}]")
    if path.suffix == ".txt":
        with _readable(path, key), path.open(encoding="utf-8-sig") as file:
            return [line.strip() for line in file if line.strip()]
    table = _table(path, key, columns)
    column = next((name for name in columns if name in table), None)
    if column is None:
        wanted = " or ".join(dict.fromkeys(columns))
        raise InputError(f"{key}={given} has no column {wanted}; it has {', '.join(table.columns)}")
    return table[column]


def _path(given: str) -> Path:
    """`~` is the home folder; a user's whom nobody knows stands as it is."""
    return Path(os.path.expanduser(given))


def _table(path: Path, key: str, ids: tuple[str, ...]) -> "pd.DataFrame":
    """A .csv, plain or .gz, or a .parquet. Ids become numbers where all are, so that 007 stays what it is."""
    import pandas as pd

    from sasrec_lab.data.ids import whole_if_all

    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise InputError(f"{key}={path} is no .csv or .parquet file")
    with _readable(path, key):
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        text = dict.fromkeys(ids, str)
        try:
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
                # index_col=False: else of rows that are longer than the header the first columns become an index
                table = pd.read_csv(path, index_col=False, dtype=text, keep_default_na=False, na_values=[""])
        except (pd.errors.ParserError, pd.errors.ParserWarning):
            _check_rows(path)
            raise
        if table.iloc[:, -1].isna().any():  # as in a short row, which pandas fills up
            _check_rows(path)
    return table.assign(**{name: whole_if_all(table[name]) for name in set(ids) & set(table)})


def _check_rows(path: Path) -> None:
    """Raises InputError where a row is longer or shorter than the header."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows, header, line = csv.reader(file), None, 1  # a value in quotes may go over several lines
        for row in rows:
            if any(value.strip() for value in row) or len(row) > 1:
                header = header or row
                if len(row) != len(header):
                    count = f"{len(row)} column{'s' if len(row) > 1 else ''}, not {len(header)}"
                    raise InputError(f"{path}, line {line}: {count} as in the header; correct the line or leave it out")
            line = rows.line_num + 1


@contextmanager
def _readable(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{key}={path}: there is no such file") from error
    except InputError:
        raise
    except (OSError, ValueError, EOFError, csv.Error) as error:  # pandas' and pyarrow's own are ValueErrors
        raise InputError(f"{key}={path} cannot be read: {str(error).splitlines()[0]}") from error


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Ours on the error stream as lines of their own; a library's are of no use to the user here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


if __name__ == "__main__":
    entry()
