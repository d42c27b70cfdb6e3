"""Fit RecTools' EASE and item-kNN, in its own environment: python rectools_closed_form.py '{"out": ..., ...}'"""

import json
import sys
import warnings

import numpy as np
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender, TFIDFRecommender
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import EASEModel, ImplicitItemKNNWrapperModel
from rectools_parity import table


def main() -> None:
    """Write item matrices (V, V) and lists, and print their file as JSON."""
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    interactions = table(np.load(task["interactions"]))
    interactions[Columns.Weight] = 1.0
    dataset = Dataset.construct(interactions)
    arrays = {"item_ids": dataset.item_id_map.external_ids, "user_ids": dataset.user_id_map.external_ids}
    for name, model in models(task).items():
        model.fit(dataset)
        matrix = model.weight if name == "ease" else model.model.similarity.toarray()
        lists = model.recommend(arrays["user_ids"], dataset, task["k"], filter_viewed=True)
        arrays[f"{name}/matrix"] = np.asarray(matrix)
        arrays |= {
            f"{name}/{key}": lists[key].to_numpy() for key in (Columns.User, Columns.Item, Columns.Score, Columns.Rank)
        }
    np.savez(task["out"], **arrays)
    print(json.dumps({"out": task["out"]}))


def models(task: dict) -> dict[str, EASEModel | ImplicitItemKNNWrapperModel]:
    """Return the models by name."""
    neighbors = task["neighbors"]
    return {
        "ease": EASEModel(regularization=task["regularization"]),
        "cosine": ImplicitItemKNNWrapperModel(CosineRecommender(K=neighbors)),
        "tfidf": ImplicitItemKNNWrapperModel(TFIDFRecommender(K=neighbors)),
        "bm25": ImplicitItemKNNWrapperModel(BM25Recommender(K=neighbors)),
    }


if __name__ == "__main__":
    main()
