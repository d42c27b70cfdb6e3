"""Run RecTools' transformers for parity_peers.py, in its own environment: python rectools_parity.py '{"out": ..., ...}'

With "epochs" it trains, once for each seed in "outs"; without, it draws random weights and writes them with the
outputs that they give.
"""

import json
import os
import sys
import warnings

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models.nn.transformers.base import TransformerModelBase
from rectools.models.nn.transformers.data_preparator import SequenceDataset
from rectools_model import make_model
from torch.nn import functional as F

WINDOWS, MOST_WINDOWS = 32, 128  # per batch of the losses, and in all


def main() -> None:
    """Write the arrays and print their file as JSON."""
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    if "epochs" in task:
        for seed, out in task["outs"].items():
            write(out, trained(task | {"seed": int(seed)}))
    else:
        parts = task["parts"].items()
        write(task["out"], {f"{name}/{key}": x for name, part in parts for key, x in outputs(task, part).items()})
    print(json.dumps({"written": task.get("outs") or task["out"]}))


def write(out: str, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays; an interrupted call leaves no file of this name."""
    with open(f"{out}.draft", "wb") as draft:
        np.savez(draft, **arrays)
    os.replace(f"{out}.draft", out)


def outputs(task: dict, part: dict) -> dict[str, np.ndarray]:
    """Return random weights and what they give: states, scores, lists, losses of training batches and gradients.

    Items are numbered from 1 in the order of `item_ids`; 0 is the mask, or no target.
    """
    task = task | part
    given = np.load(task["interactions"])
    dataset = Dataset.construct(table(given))
    model = make_model(task)
    model._build_model_from_dataset(dataset)
    randomize(model, task["seed"])
    model.is_fitted = True
    preparator, lightning = model.data_preparator, model.lightning_model
    users = dataset.user_id_map.external_ids
    context = when_asked(given) if model.require_recommend_context else None
    known = preparator.transform_dataset_u2i(dataset, users, context)
    loader = preparator.get_dataloader_recommend(known, batch_size=128)
    states, vectors = lightning._get_user_item_embeddings(loader, "cpu")  # (U, D), (E + V, D), extra tokens first
    with torch.no_grad():
        scores = model.torch_model.similarity_module(states, vectors) / lightning.logits_t
    arrays = {f"weights/{name}": x.numpy() for name, x in model.torch_model.state_dict().items()}
    arrays |= {
        "item_ids": np.array(list(preparator.get_known_item_ids())),
        "user_ids": np.asarray(known.user_id_map.external_ids),
        "states": states.numpy(),
        "scores": scores[:, preparator.n_item_extra_tokens :].numpy(),
    }
    if task["model"] == "hstu":
        blocks = model.torch_model.transformer_layers.stu_blocks
        differences = torch.from_numpy(given["differences"])
        arrays["buckets"] = blocks[0].rel_attn._quantization_func(differences).clamp(0, 128).numpy()
    return arrays | training(model, task, pd.unique(given["user"])) | lists(model, dataset, task, arrays, context)


def when_asked(given: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return the time at which each user asks for lists, as RecTools takes it."""
    users = pd.unique(given["user"])
    times = pd.to_datetime(given["asked"], unit="s")
    return pd.DataFrame({Columns.User: users, Columns.Weight: 1.0, Columns.Datetime: times})


def training(model: TransformerModelBase, task: dict, users: np.ndarray) -> dict[str, np.ndarray]:
    """Return the batches of these users and the loss of each, with and without the extra tokens as classes.

    Of the first batch return also the states, the sampled softmax with its negatives, and the gradients of the sum of
    this loss and the one without extra tokens.
    """
    preparator, lightning, network = model.data_preparator, model.lightning_model, model.torch_model
    extra = preparator.n_item_extra_tokens
    sessions = SequenceDataset.from_interactions(preparator.train_dataset.interactions.df, sort_users=True)
    windows = [sessions[i] for i in preparator.train_dataset.user_id_map.convert_to_internal(users, strict=False)]
    seed_everything(task["seed"], verbose=False)  # for the masks
    count = min(len(windows), MOST_WINDOWS)
    batches = [
        preparator._collate_fn_train([windows[i] for i in range(start, min(start + WINDOWS, count))])
        for start in range(0, count, WINDOWS)
    ]
    own, without = [], []
    for batch in batches:
        with torch.set_grad_enabled(batch is batches[0]):
            logits = lightning.get_batch_logits(batch)  # (B, L, E + V)
            own.append(lightning._calc_softmax_loss(logits, batch["y"], batch["yw"]))
            targets = batch["y"] - extra
            loss = F.cross_entropy(logits[:, :, extra:].transpose(1, 2), targets, ignore_index=-extra, reduction="none")
            without.append((loss * batch["yw"]).sum() / (targets >= 0).sum())
    sampled, negatives = sampled_softmax(model, batches[0], task["negatives"])
    (without[0] + sampled).backward()
    with torch.no_grad():
        vectors = network.item_model.get_all_embeddings()
        states = network.encode_sessions(batches[0], vectors)[batches[0]["x"] > 0]  # (T, D)
    return {f"gradients/{name}": x.grad.numpy() for name, x in network.named_parameters()} | {
        "losses": torch.stack(own).detach().numpy(),
        "losses_without_extra_tokens": torch.stack(without).detach().numpy(),
        "sampled_softmax": sampled.detach().numpy(),
        "negatives": (negatives - extra + 1)[batches[0]["x"] > 0].numpy(),  # (T, N)
        "training/states": states.numpy(),
        "training/lengths": torch.cat([(batch["x"] > 0).sum(1) for batch in batches]).numpy(),
        "training/items": tokens(batches, "x") - extra + 1,
        "training/targets": (tokens(batches, "y") - extra + 1).clip(0),
        "training/weights": tokens(batches, "yw"),
    }


def sampled_softmax(model: TransformerModelBase, batch: dict, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return RecTools' sampled softmax of a batch, and its negatives (B, L, N)."""
    preparator, lightning = model.data_preparator, model.lightning_model
    shape = (*batch["x"].shape, count)
    negatives = torch.randint(preparator.n_item_extra_tokens, preparator.item_id_map.size, shape)
    candidates = torch.cat([batch["y"][:, :, None], negatives], 2)
    logits = model.torch_model(batch, candidates) / lightning.logits_t
    loss = lightning._calc_sampled_softmax_loss(logits, batch["y"], batch["yw"])
    return loss, negatives


def tokens(batches: list[dict], name: str) -> np.ndarray:
    """Return the values of the tokens of all batches."""
    return torch.cat([batch[name][batch["x"] > 0] for batch in batches]).numpy()


def lists(
    model: TransformerModelBase, dataset: Dataset, task: dict, arrays: dict, context: pd.DataFrame | None
) -> dict[str, np.ndarray]:
    """Return the lists that the task names."""
    found = {}
    for name in task["lists"]:
        allowed = task["allowed"] if name.endswith("some items allowed") else None
        excluded = "excluded" in name
        if name.startswith("users"):
            given = {"context": context.copy()} if context is not None else {}
            made = model.recommend(
                arrays["user_ids"], dataset, task["k"], excluded, allowed, on_unsupported_targets="ignore", **given
            )
        else:
            made = model.recommend_to_items(arrays["item_ids"], dataset, task["k"], excluded, allowed)
        target = Columns.User if name.startswith("users") else Columns.TargetItem
        columns = (target, Columns.Item, Columns.Score, Columns.Rank)
        found |= {f"lists/{name}/{key}": made[key].to_numpy() for key in columns}
    return found


def trained(task: dict) -> dict[str, np.ndarray]:
    """Train, and return the item vectors and the states of the users whose histories are given."""
    arrays = np.load(task["interactions"])
    dataset = Dataset.construct(table({name: arrays[name] for name in ("user", "item", "time") if name in arrays}))
    seed_everything(task["seed"], verbose=False)
    model = make_model(task)
    model.fit(dataset)
    names = {name: f"history_{name}" for name in ("user", "item", "time")}
    histories = Dataset.construct(table({name: arrays[key] for name, key in names.items() if key in arrays}))
    context = None
    if model.require_recommend_context:
        context = when_asked({"user": arrays["asked_user"], "asked": arrays["asked"]})
    known = model.data_preparator.transform_dataset_u2i(histories, histories.user_id_map.external_ids, context)
    loader = model.data_preparator.get_dataloader_recommend(known, batch_size=128)
    states, vectors = model.lightning_model._get_user_item_embeddings(loader, "cpu")
    return {
        "item_ids": np.array(list(model.data_preparator.get_known_item_ids())),
        "user_ids": np.asarray(known.user_id_map.external_ids),
        "states": states.numpy(),
        "vectors": vectors[1:].numpy(),
    }


def randomize(model: TransformerModelBase, seed: int) -> None:
    """Draw initial weights, with no bias at zero and no norm at one, so that forgetting one of them shows."""
    torch.manual_seed(seed)
    model.lightning_model._xavier_normal_init()
    for parameter in model.torch_model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.torch_model.eval()


def table(arrays: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return interactions as a table; without times the row number serves as one.

    Users keep the order of their first rows.
    """
    times = arrays["time"] if "time" in arrays else np.arange(len(arrays["user"]))
    return pd.DataFrame(
        {
            Columns.User: arrays["user"],
            Columns.Item: arrays["item"],
            Columns.Weight: arrays.get("weight", 1),
            Columns.Datetime: pd.to_datetime(times, unit="s"),
        }
    )


if __name__ == "__main__":
    main()
