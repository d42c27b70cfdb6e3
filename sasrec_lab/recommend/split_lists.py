"""Lists for the rows of validation or test, as a run ranked them: the same histories, candidates and query times."""

import numpy as np
import pandas as pd

from sasrec_lab.config.convert import section_of
from sasrec_lab.config.evaluation import EvaluationConfig
from sasrec_lab.config.model import ModelConfig
from sasrec_lab.config.training import ObjectiveConfig
from sasrec_lab.data.evaluation_data import EvaluationData
from sasrec_lab.data.holdout import hold_out_for
from sasrec_lab.data.objectives import build_objective
from sasrec_lab.errors import InputError, warn
from sasrec_lab.evaluation.row_lists import lists_of_rows
from sasrec_lab.files import display_path
from sasrec_lab.ops import backend
from sasrec_lab.recommend.inputs import check_k
from sasrec_lab.recommend.lists import Lists
from sasrec_lab.recommend.recommender import Recommender
from sasrec_lab.run.folder import RETRAIN_HINT
from sasrec_lab.run.split import load_split_model


def lists_of_split(recommender: Recommender, split: str, k: int) -> Lists:
    """Return a list for each row that the run ranked in its validation ("val") or test ("test").

    The tables have the column `row`, the place of the row in the split, if a user has several rows.

    Raises:
        InputError: the run holds nothing out, k is not a length of a list, or the data set is missing or has changed.
    """
    k = check_k(k, len(recommender.items))
    config, sequences, ranker = recommender.config, recommender.sequences, recommender.ranker
    model, evaluation = load_split_model(config), section_of(config, "evaluation", EvaluationConfig)
    holdout = hold_out_for(sequences, recommender.dataset, model)
    rows = holdout.rows(split)
    if split == "test" and not evaluation.test:
        warn(f"split=test: {display_path(recommender.folder)} measured nothing on the test (evaluation.test=false)")
    if not len(rows):
        raise InputError(
            f"split={split}: {display_path(recommender.folder)} holds nothing out (dataset.holdout=none); choose a run"
            " with a holdout"
        )
    if not np.array_equal(holdout.item_ids, recommender.items.ids):
        raise InputError(
            f"{display_path(recommender.folder)} knows other items than its data set has today; {RETRAIN_HINT}"
        )
    objective = section_of(config, "objective", ObjectiveConfig, recommender.trust)
    data = EvaluationData(holdout, split, build_objective(objective, model), None)
    precision = config.get("trainer", {}).get("precision") if isinstance(model, ModelConfig) else None
    with backend.fastest_matmul(ranker.device):
        found = lists_of_rows(ranker.scorer, data, evaluation, k, model.dim, ranker.device, precision)
    user_ids = sequences.user_ids[rows.users]

    def make_table(part: np.ndarray) -> pd.DataFrame:
        is_item = found.items[part] > 0
        places = np.repeat(part, is_item.sum(1))
        columns = {
            "user_id": user_ids[places],
            "item_id": recommender.items.ids[found.items[part][is_item] - 1],
            "score": found.scores[part][is_item],
            "rank": found.ranks[part][is_item],
        }
        return pd.DataFrame(columns | ({"row": places} if rows.num_users < len(rows) else {}), copy=False)

    return Lists(np.arange(len(rows)), k, make_table)
