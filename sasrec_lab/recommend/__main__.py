"""Top-k lists for users and for items, from a finished run.

python -m sasrec_lab.recommend run=outputs/ml_100k/<run> users=[1,2] k=5                   lists for two users
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> users=all output=lists.parquet    for all of the data set
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> items=[50]                        items most like an item
"""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.overrides import normalize
from sasrec_lab.config.schema import CONF_DIR, RecommendConfig
from sasrec_lab.errors import InputError, InputWarning
from sasrec_lab.files import tolerate_closed_pipe
from sasrec_lab.recommend.inputs import _ids, _path, _table

if TYPE_CHECKING:
    from sasrec_lab.recommend.lists import Lists
    from sasrec_lab.recommend.recommender import Recommender


def entry() -> None:
    """One line for a mistake; Hydra itself is asked only for help and the like, so it makes no folder."""
    sys.argv[1:] = normalize(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        command = check_command_line(sys.argv[1:], "recommend")
        if command is None:
            with tolerate_closed_pipe():
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
            with tolerate_closed_pipe():
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
