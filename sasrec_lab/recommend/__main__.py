"""The command `python -m sasrec_lab.recommend`: top-k lists from a finished run.

python -m sasrec_lab.recommend run=outputs/ml_100k/<run> users=[1,2] k=5                 lists for two users
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> users=all output=lists.parquet  for all users of the data set
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> items=[50]                      items most similar to an item
python -m sasrec_lab.recommend run=outputs/ml_100k/<run> split=test output=lists.parquet as the test ranked its rows
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from sasrec_lab.config.command_line import check_command_line
from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.hydra_errors import run_hydra
from sasrec_lab.config.hydra_internals import VERSION_BASE
from sasrec_lab.config.list_commands import RecommendConfig
from sasrec_lab.config.overrides import normalize
from sasrec_lab.config.schema import CONF_DIR
from sasrec_lab.errors import InputError, InputWarning, explain_out_of_memory, printable
from sasrec_lab.files import tolerate_closed_pipe
from sasrec_lab.run import signals

if TYPE_CHECKING:
    from sasrec_lab.recommend.lists import Lists
    from sasrec_lab.recommend.recommender import Recommender


def entry() -> None:
    """Run the command; an error is one line on stderr and exit status 1."""
    signals.exit_at_once()
    try:
        sys.argv[1:] = normalize(sys.argv[1:])
        command = check_command_line(sys.argv[1:], "recommend")
        if command is None:  # Hydra's own flags, such as --help; for lists Hydra's main would create a folder
            with tolerate_closed_pipe():
                run_hydra(main, "recommend")
        else:
            cfg = command.jobs[0].cfg
            assert isinstance(cfg, RecommendConfig)
            recommend(cfg)
    except InputError as error:
        sys.exit(f"error: {error}")
    finally:
        signals.expect_exit()


@hydra.main(config_path=CONF_DIR, config_name="recommend", **VERSION_BASE)
def main(cfg: DictConfig) -> None:
    """Let Hydra answer its own flags."""
    recommend(to_typed(cfg))


def recommend(cfg: RecommendConfig) -> None:
    """Print or write the lists that a config asks for.

    Raises:
        InputError: a value of the config, the run or its data set is invalid.
    """
    with _print_own_warnings(), explain_out_of_memory("ask for fewer users or items at a time, or use more memory"):
        # imported here, so that help and most errors need not wait for torch
        from sasrec_lab.recommend import lists
        from sasrec_lab.recommend.inputs import expand_home
        from sasrec_lab.recommend.recommender import Recommender

        signals.raise_exit()  # from here on a draft of the output may have to be removed
        output = expand_home(cfg.output) if cfg.output else None
        if output:
            lists.check_output(output)
        recommender = Recommender.from_run(cfg.run, data_dir=cfg.data_dir, device=cfg.device, trust=cfg.trust)
        wanted = _make_lists(cfg, recommender)
        if output:
            lists.write(output, wanted)
            count = len(wanted.targets)
            asked = f", {wanted.asked}" if wanted.asked else ""
            print(f"wrote {count:,} list{'' if count == 1 else 's'} to {output}{asked}")
        else:
            with tolerate_closed_pipe():
                if wanted.asked:
                    print(wanted.asked)
                lists.show(wanted, recommender.items, recommender.titles)


def _make_lists(cfg: RecommendConfig, recommender: "Recommender") -> "Lists":
    """Read the ids and histories that the config names, and return the lists for them."""
    from sasrec_lab.recommend.inputs import expand_home, read_ids, read_interactions
    from sasrec_lab.recommend.query_times import read_query_times
    from sasrec_lab.recommend.split_lists import lists_of_split

    dataset = recommender.dataset
    user_columns, item_columns = (dataset.user, "user_id"), (dataset.item, "item_id")
    allowed = read_ids(cfg.items_to_recommend, "items_to_recommend", item_columns)
    on_unsupported = cfg.on_unsupported_targets.name
    if cfg.split is not None:
        return lists_of_split(recommender, cfg.split.name, cfg.k)
    if cfg.items is not None:
        items = read_ids(cfg.items, "items", item_columns)
        return recommender.lists_of_items(items, cfg.k, allowed, cfg.filter_itself, on_unsupported)
    interactions = None
    if cfg.interactions:
        interactions = read_interactions(expand_home(cfg.interactions), dataset)
    users = read_ids(cfg.users, "users", user_columns)
    asked = read_query_times(cfg.query_time, dataset)
    return recommender.lists_of_users(users, cfg.k, interactions, cfg.filter_viewed, allowed, on_unsupported, asked)


@contextmanager
def _print_own_warnings() -> Iterator[None]:
    """Print our warnings as one line each on stderr, and hide those of libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = lambda message, *_: print(printable(f"warning: {message}"), file=sys.stderr)
        yield


if __name__ == "__main__":
    entry()
