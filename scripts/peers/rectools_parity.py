"""Run RecTools' SASRec for parity_rectools.py, in its own environment: python rectools_parity.py '{"out": ..., ...}'

With "epochs" it trains; without, it draws random weights and writes them with the outputs that they give.
"""

import json
import sys
import warnings

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.data_preparator import SequenceDataset
from rectools_model import make_model
from torch.nn import functional as F

WINDOWS = 32  # per batch of the losses


def main() -> None:
    """Write the arrays and print their file as JSON."""
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    if "epochs" in task:
        arrays = trained(task)
    else:
        arrays = {f"{name}/{key}": x for name, part in task["parts"].items() for key, x in outputs(task, part).items()}
    np.savez(task["out"], **arrays)
    print(json.dumps({"out": task["out"]}))


def outputs(task: dict, part: dict) -> dict[str, np.ndarray]:
    """Return random weights and what they give: losses of training batches, states, scores and lists."""
    dataset = Dataset.construct(table(np.load(task["interactions"])))
    model = make_model(task | part)
    model._build_model_from_dataset(dataset)
    randomize(model, task["seed"])
    model.is_fitted = True
    preparator, lightning = model.data_preparator, model.lightning_model
    users = dataset.user_id_map.external_ids
    known = preparator.transform_dataset_u2i(dataset, users)
    loader = preparator.get_dataloader_recommend(known, batch_size=128)
    states, vectors = lightning._get_user_item_embeddings(loader, "cpu")  # (U, D), (1 + V, D), padding first
    arrays = {f"weights/{name}": x.numpy() for name, x in model.torch_model.state_dict().items()}
    arrays |= {
        "item_ids": np.array(list(preparator.get_known_item_ids())),
        "user_ids": np.asarray(known.user_id_map.external_ids),
        "states": states.numpy(),
        "scores": (states @ vectors[1:].T).numpy(),
    }
    arrays |= losses(model)
    for allowed in (None, task["allowed"]):
        ending = "" if allowed is None else ", some items allowed"
        for filter_viewed in (True, False):
            lists = model.recommend(
                arrays["user_ids"], dataset, task["k"], filter_viewed, allowed, on_unsupported_targets="ignore"
            )
            name = f"lists/users, seen {'excluded' if filter_viewed else 'kept'}{ending}"
            arrays |= columns(name, lists, Columns.User)
        for filter_itself in (True, False):
            lists = model.recommend_to_items(arrays["item_ids"], dataset, task["k"], filter_itself, allowed)
            name = f"lists/items, itself {'excluded' if filter_itself else 'kept'}{ending}"
            arrays |= columns(name, lists, Columns.TargetItem)
    return arrays


@torch.no_grad()
def losses(model: SASRecModel) -> dict[str, np.ndarray]:
    """Return the loss per batch, with and without the pad as a class, and the states of the first batch."""
    preparator, lightning = model.data_preparator, model.lightning_model
    windows = SequenceDataset.from_interactions(preparator.train_dataset.interactions.df, sort_users=True)
    own, without = [], []
    for start in range(0, len(windows), WINDOWS):
        batch = preparator._collate_fn_train([windows[i] for i in range(start, min(start + WINDOWS, len(windows)))])
        logits = lightning.get_batch_logits(batch)  # (B, L, 1 + V)
        own.append(lightning._calc_softmax_loss(logits, batch["y"], batch["yw"]))
        loss = F.cross_entropy(logits[:, :, 1:].transpose(1, 2), batch["y"] - 1, ignore_index=-1, reduction="none")
        without.append((loss * batch["yw"]).sum() / (batch["y"] > 0).sum())
        if start == 0:
            vectors = model.torch_model.item_model.get_all_embeddings()
            states = model.torch_model.encode_sessions(batch, vectors)[batch["x"] > 0]  # (T, D)
    return {"losses": torch.stack(own).numpy(), "losses_without_pad": torch.stack(without).numpy()} | {
        "training_states": states.numpy()
    }


def trained(task: dict) -> dict[str, np.ndarray]:
    """Train, and return the item vectors and the states of the users whose histories are given."""
    arrays = np.load(task["interactions"])
    dataset = Dataset.construct(table({"user": arrays["user"], "item": arrays["item"]}))
    seed_everything(task["seed"], verbose=False)
    model = make_model(task)
    model.fit(dataset)
    histories = Dataset.construct(table({"user": arrays["history_user"], "item": arrays["history_item"]}))
    known = model.data_preparator.transform_dataset_u2i(histories, histories.user_id_map.external_ids)
    loader = model.data_preparator.get_dataloader_recommend(known, batch_size=128)
    states, vectors = model.lightning_model._get_user_item_embeddings(loader, "cpu")
    return {
        "item_ids": np.array(list(model.data_preparator.get_known_item_ids())),
        "user_ids": np.asarray(known.user_id_map.external_ids),
        "states": states.numpy(),
        "vectors": vectors[1:].numpy(),
    }


def randomize(model: SASRecModel, seed: int) -> None:
    """Draw initial weights, with no bias at zero and no norm at one, so that forgetting one of them shows."""
    torch.manual_seed(seed)
    model.lightning_model._xavier_normal_init()
    for parameter in model.torch_model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.torch_model.eval()


def table(arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return interactions as a table; the row number serves as time, and users keep the order of their first rows."""
    rows = len(arrays["user"])
    return pd.DataFrame(
        {
            Columns.User: arrays["user"],
            Columns.Item: arrays["item"],
            Columns.Weight: arrays.get("weight", 1),
            Columns.Datetime: pd.to_datetime(np.arange(rows), unit="s"),
        }
    )


def columns(name: str, lists: pd.DataFrame, target: str) -> dict[str, np.ndarray]:
    """Return the columns of a table of lists by name."""
    return {f"{name}/{key}": lists[key].to_numpy() for key in (target, Columns.Item, Columns.Score, Columns.Rank)}


if __name__ == "__main__":
    main()
