"""Print RecTools' metrics per user as JSON: python rectools_metrics.py '{"lists": ..., "targets": ..., "ks": ...}'

`lists` has the ranked items of each user, `targets` the relevant ones. A user without targets has no values.
"""

import json
import sys

import pandas as pd
from rectools import Columns
from rectools.metrics import MAP, MRR, NDCG, HitRate, Precision, Recall

METRICS = {
    "hit_rate": HitRate,
    "recall": Recall,
    "precision": Precision,
    "mrr": MRR,
    "map": MAP,  # divided by the number of targets, even if that exceeds k
    "ndcg": lambda k: NDCG(k, divide_by_achievable=True),
}


def main() -> None:
    """Print a list with one value per user for each metric and k, named `ndcg@10`."""
    task = json.loads(sys.argv[1])
    lists, targets = pairs(task["lists"]), pairs(task["targets"])
    lists[Columns.Rank] = lists.groupby(Columns.User).cumcount() + 1
    found = {}
    for name, metric in METRICS.items():
        for k in task["ks"]:
            values = metric(k).calc_per_user(lists, targets).reindex(range(len(task["targets"])))
            found[f"{name}@{k}"] = [None if pd.isna(value) else value for value in values]
    print(json.dumps(found))


def pairs(rows: list[list[int]]) -> pd.DataFrame:
    """Return users, numbered from 0, and items as a table."""
    return pd.DataFrame(
        [(user, item) for user, items in enumerate(rows) for item in items], columns=[Columns.User, Columns.Item]
    )


if __name__ == "__main__":
    main()
