"""Print RePlay's metrics per user as JSON: python replay_metrics.py '{"lists": ..., "targets": ..., "ks": ...}'

`lists` has the ranked items of each user, `targets` the relevant ones. A user without targets has zeros.
"""

import json
import sys

from replay.metrics import MAP, MRR, NDCG, HitRate, PerUser, Precision, Recall

METRICS = {"hit_rate": HitRate, "recall": Recall, "precision": Precision, "mrr": MRR, "map": MAP, "ndcg": NDCG}


def main() -> None:
    """Print a list with one value per user for each metric and k, named `ndcg@10`."""
    task = json.loads(sys.argv[1])
    lists = {user: [(item, -rank) for rank, item in enumerate(row)] for user, row in enumerate(task["lists"])}
    targets = dict(enumerate(task["targets"]))
    found = {}
    for name, metric in METRICS.items():
        by_k = metric(task["ks"], mode=PerUser())(lists, targets)  # {"NDCG-PerUser@10": {user: value}}
        for key, values in by_k.items():
            found[f"{name}@{key.partition('@')[2]}"] = [values[user] for user in targets]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
