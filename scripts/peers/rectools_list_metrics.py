"""Print RecTools' metrics beyond accuracy as JSON: python rectools_list_metrics.py '{"lists": ..., "ks": ..., ...}'

`lists` has the ranked items of each user, `training` pairs of user and item, `catalogue` the number of items, counted
from 1, `categories` those of each item, and `ks` the lengths.
"""

import json
import sys

import numpy as np
import pandas as pd
from rectools import Columns
from rectools.metrics import AvgRecPopularity, CatalogCoverage, IntraListDiversity, MeanInvUserFreq
from rectools.metrics.distances import PairwiseHammingDistanceCalculator


def main() -> None:
    """Print a dict with the value of each metric and k, named `novelty@10`."""
    task = json.loads(sys.argv[1])
    rows = [(user, item, rank) for user, items in enumerate(task["lists"]) for rank, item in enumerate(items, start=1)]
    lists = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Rank])
    training = pd.DataFrame(task["training"], columns=[Columns.User, Columns.Item])
    width = 1 + max(max(own, default=0) for own in task["categories"])
    features = np.zeros((task["catalogue"], width), dtype=int)
    for item, own in enumerate(task["categories"]):
        features[item, own] = 1
    items = pd.Index(range(1, task["catalogue"] + 1), name=Columns.Item)
    distances = PairwiseHammingDistanceCalculator(pd.DataFrame(features, index=items))
    found = {}
    for k in task["ks"]:
        found[f"coverage@{k}"] = CatalogCoverage(k, normalize=True).calc(lists, list(items))
        found[f"novelty@{k}"] = MeanInvUserFreq(k).calc(lists, training)
        found[f"popularity@{k}"] = AvgRecPopularity(k).calc(lists, training)
        found[f"diversity@{k}"] = IntraListDiversity(k, distance_calculator=distances).calc(lists)
    print(json.dumps({name: float(value) for name, value in found.items()}))


if __name__ == "__main__":
    main()
