"""A finished run as an object: its records at once, its ranks and its model when they are asked for."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasrec_lab.config.convert import completed
from sasrec_lab.config.foreign import check_trust
from sasrec_lab.errors import InputError
from sasrec_lab.files import display_path
from sasrec_lab.run.folder import RANKS, RETRAIN_HINT, RUN, VALIDATION_RANKS, load_finished, read_arrays, read_json
from sasrec_lab.run.model_name import model_name

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from sasrec_lab.recommend.recommender import Recommender


class Run:
    """A finished run; `load_run` makes one.

    `config`, `info` and `results` are the plain content of its files: the configuration with all keys, the rest of
    run.json, and metrics.json.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        results: dict[str, Any],
        data_dir: str | None,
        device: str,
        trust: Sequence[str] = (),
    ):
        self.folder, self.config, self.results = folder, config, results
        self.info = {key: value for key, value in (read_json(folder / RUN) or {}).items() if key != "config"}
        self._data_dir, self._device, self._trust = data_dir, device, trust

    def __repr__(self) -> str:
        described = [model_name(self.config), str(self.config["dataset"].get("name"))]
        monitor = str(self.config["evaluation"].get("monitor"))
        shown = next((name for name in (monitor.replace("val/", "test/"), monitor) if name in self.metrics), None)
        if shown:
            described.append(f"{shown} {self.metrics[shown]:.4f}")
        return f"Run({display_path(self.folder)!r}: {', '.join(described)})"

    @property
    def metrics(self) -> dict[str, float]:
        """Return the metrics by name, such as val/ndcg@10 of the tested epoch and test/ndcg@10."""
        return dict(self.results["metrics"])

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Return the same metrics of popularity and the other baselines."""
        return dict(self.results["baselines"])

    @property
    def protocol(self) -> dict[str, Any]:
        """Return everything that makes two numbers comparable."""
        return dict(self.results["protocol"])

    @cached_property
    def ranks(self) -> "pd.DataFrame":
        """Return a row per test target, with the columns of ranks.npz: user, target, rank (0: a miss) and others.

        The targets are those of validation if the run saw no test (evaluation.test=false).

        Raises:
            InputError: the run held nothing out, or the file is broken.
        """
        import pandas as pd

        has_test = self.config["evaluation"].get("test", True)
        path = self.folder / (RANKS if has_test else VALIDATION_RANKS)
        try:
            columns = read_arrays(path)
            return pd.DataFrame(columns)
        except FileNotFoundError as error:
            nothing_held_out = self.config["dataset"].get("holdout") == "none"
            why = ", because it held nothing out (dataset.holdout=none)" if nothing_held_out else f"; {RETRAIN_HINT}"
            raise InputError(f"{display_path(self.folder)} has no {path.name}{why}") from error
        except (OSError, ValueError) as error:
            raise InputError(
                f"{display_path(path)} is not a file that a run writes ({error}); {RETRAIN_HINT}"
            ) from error

    @cached_property
    def recommender(self) -> "Recommender":
        """Return the model with the ids of its items and the histories of its data set.

        Raises:
            InputError: the checkpoint is broken or of another run, or the device does not exist.
        """
        from sasrec_lab.recommend.recommender import Recommender

        return Recommender.from_run(self.folder, data_dir=self._data_dir, device=self._device, trust=self._trust)

    @property
    def encoder(self) -> "nn.Module":
        """Return the encoder, in evaluation mode, with the weights that were tested.

        Raises:
            InputError: the model has none, because it has weights between items (EASE, item-kNN).
        """
        return self.recommender.encoder

    @property
    def item_vectors(self) -> "pd.DataFrame":
        """Return the vectors of all items, by item_id; their dot products with a user's vector are the scores."""
        return self.recommender.item_vectors()

    def user_vectors(
        self,
        users: Any,
        interactions: "pd.DataFrame | None" = None,
        on_unsupported_targets: str = "raise",
        query_time: Any = None,
    ) -> "pd.DataFrame":
        """Return the vector of each user, by user_id: the state after the newest items. See `Recommender`."""
        return self.recommender.user_vectors(users, interactions, on_unsupported_targets, query_time)

    def recommend(
        self,
        users: Any,
        k: int = 10,
        interactions: "pd.DataFrame | None" = None,
        filter_viewed: bool = True,
        items_to_recommend: Any = None,
        on_unsupported_targets: str = "raise",
        query_time: Any = None,
    ) -> "pd.DataFrame":
        """Return the k best items of each user: user_id, item_id, score, rank. See `Recommender.recommend`."""
        options = interactions, filter_viewed, items_to_recommend, on_unsupported_targets, query_time
        return self.recommender.recommend(users, k, *options)

    def recommend_to_items(
        self,
        items: Any,
        k: int = 10,
        items_to_recommend: Any = None,
        filter_itself: bool = True,
        on_unsupported_targets: str = "raise",
    ) -> "pd.DataFrame":
        """Return the k items most similar to each item. See `Recommender.recommend_to_items`."""
        options = items_to_recommend, filter_itself, on_unsupported_targets
        return self.recommender.recommend_to_items(items, k, *options)


def load_run(
    folder: str | Path, *, data_dir: str | Path | None = None, device: str = "auto", trust: Sequence[str] = ()
) -> Run:
    """Return a finished run; its records are read at once, its model when it is needed.

    Args:
        folder: the run folder, such as outputs/ml_100k/<time>.
        data_dir: where its data set is now; None: where it was.
        device: of the model: auto (a GPU if there is one), cpu, cuda, ...
        trust: packages whose code may be imported, for a run with a block, head or objective of your own.

    Raises:
        InputError: the folder does not exist, or has no finished run.
    """
    if not str(folder):
        raise InputError("folder is empty; give the folder of a finished run")
    path = Path(folder).expanduser()
    config, results = load_finished(path, "folder")
    root = None if data_dir is None else str(data_dir)
    return Run(path, completed(config), results, root, device, check_trust(trust))
