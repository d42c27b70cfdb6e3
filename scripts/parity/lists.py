"""Lists of recommendations of this project and of RecTools, compared item by item."""

import numpy as np
import pandas as pd

from parity.comparison import AT_MOST, FOLDER, Arrays
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.ids import Ids
from sasrec_lab.data.sequences import Sequences
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommend.rankers import EncoderRanker
from sasrec_lab.recommend.recommender import Recommender


def lists_differences(
    theirs: Arrays, encoder: Encoder, item_ids: np.ndarray, sequences: Sequences, cfg: TrainConfig
) -> dict[str, float]:
    """Return the differences of the lists of users, and of items, that RecTools made."""
    ranker = EncoderRanker(encoder, cfg.objective, cfg.model)
    recommender = Recommender(FOLDER, ranker, Ids(item_ids), cfg.dataset)
    found: dict[str, float] = {}
    for name in dict.fromkeys(key.split("/")[1] for key in theirs if key.startswith("lists/")):
        columns = {key: theirs[f"lists/{name}/{key}"] for key in ("item_id", "score", "rank")}
        target = "user_id" if name.startswith("users") else "target_item_id"
        expected = pd.DataFrame({target: theirs[f"lists/{name}/{target}"], **columns})
        kind = f"lists of {name.partition(',')[0]}"
        if target == "user_id":  # RecTools ranks by the cosine itself
            expected["score"] /= cfg.model.temperature
        difference = lists_differ(our_lists(recommender, name, theirs, sequences), expected, target)
        found[kind] = max(found.get(kind, 0.0), difference)
    return found


def our_lists(recommender: Recommender, name: str, theirs: Arrays, sequences: Sequences) -> pd.DataFrame:
    """Return our lists for the name of lists that RecTools made."""
    allowed = theirs["allowed"] if name.endswith("some items allowed") else None
    if allowed is not None:  # unknown items would only cause a warning
        allowed = allowed[np.isin(allowed, theirs["item_ids"])]
    k = int(theirs[f"lists/{name}/rank"].max())
    if name.startswith("items"):
        return recommender.recommend_to_items(theirs["item_ids"], k, allowed, filter_itself="excluded" in name)
    users, items = np.repeat(sequences.user_ids, sequences.lengths), sequences.item_ids[sequences.items - 1]
    times = np.arange(len(items)) if sequences.times is None else sequences.times
    histories = pd.DataFrame({"user_id": users, "item_id": items, "datetime": times})
    asked = None
    if recommender.ranker.query_time is not None:
        asked = pd.DataFrame({"user_id": sequences.user_ids, "datetime": theirs["asked"]})
    return recommender.recommend(theirs["user_ids"], k, histories, "excluded" in name, allowed, query_time=asked)


def lists_differ(ours: pd.DataFrame, theirs: pd.DataFrame, target: str) -> float:
    """Return the largest difference of the scores at one rank of one list.

    It is infinite if lists differ in length, or in the item at a rank; two items of a list whose scores are within
    1e-5 of each other may come in either order.
    """
    keys = [target, "rank"]
    both = ours.merge(theirs, on=keys, how="outer", suffixes=("", "_theirs"))
    if both.isna().any(axis=None):
        return float("inf")
    others = both[both["item_id"] != both["item_id_theirs"]]
    if len(others):
        score = ours.set_index([target, "item_id"])["score"]
        swapped = pd.MultiIndex.from_frame(others[[target, "item_id_theirs"]])
        if (np.abs(score.reindex(swapped).to_numpy() - others["score"].to_numpy()) <= AT_MOST).sum() < len(others):
            return float("inf")
    return float(np.abs(both["score"] - both["score_theirs"]).max())
