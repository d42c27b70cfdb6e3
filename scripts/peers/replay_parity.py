"""Run RePlay's Bert4Rec for parity_peers.py, in its own environment: python replay_parity.py '{"out": ..., ...}'

It draws random weights and writes them with the states and logits that they give. Items are numbered from 1 in the
order of `item_ids`; 0 is the mask.
"""

import json
import sys

import numpy as np
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.models.nn.sequential.bert4rec.dataset import Bert4RecUniformMasker, _shift_features
from replay.models.nn.sequential.bert4rec.model import Bert4RecModel

USERS = 32  # the first ones


def main() -> None:
    """Write the arrays and print their file as JSON."""
    task = json.loads(sys.argv[1])
    torch.manual_seed(task["seed"])
    arrays = {f"{name}/{key}": x for name, part in task["parts"].items() for key, x in outputs(task | part).items()}
    np.savez(task["out"], **arrays)
    print(json.dumps({"out": task["out"]}))


@torch.no_grad()
def outputs(task: dict) -> dict[str, np.ndarray]:
    """Return random weights, states and logits of masked histories, and those at the mask behind each history."""
    arrays = np.load(task["interactions"])
    item_ids, items = np.unique(arrays["item"], return_inverse=True)
    schema = make_schema(task, len(item_ids))
    model = random_model(task, schema)
    histories = padded(arrays["user"], torch.from_numpy(items), task["maxlen"])
    masker = Bert4RecUniformMasker(task["mask_share"])
    masked = [(row, known, masker.mask(known)) for row, known in histories]
    states, items, known, unmasked = states_of(model, masked)
    newest = states_of(model, [shifted(schema, row, known) for row, known in histories])[0][:, -1]
    found = {f"weights/{name}": x for name, x in model.state_dict().items()} | {
        "training/items": torch.where(unmasked, items + 1, 0)[known],
        "training/lengths": known.sum(1),
        "training/states": states[known],
        "logits": model.get_logits(states[known & ~unmasked]),
        "states": newest,
        "scores": model.get_logits(newest),
    }
    return {"item_ids": item_ids} | {name: x.numpy() for name, x in found.items()}


def make_schema(task: dict, num_items: int) -> TensorSchema:
    """Describe item ids, the only feature."""
    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=task["dim"],
        padding_value=0,
        cardinality=num_items,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    return TensorSchema([item])


def random_model(task: dict, schema: TensorSchema) -> Bert4RecModel:
    """Return a model with its initial values, but with no bias at zero and no norm at one."""
    model = Bert4RecModel(
        schema,
        max_len=task["maxlen"],
        hidden_size=task["dim"],
        num_blocks=task["blocks"],
        num_heads=task["heads"],
        enable_embedding_tying=task["tied"],
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def padded(users: np.ndarray, items: torch.Tensor, maxlen: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the newest items of each user, left-padded, and whether each is an item, not padding; both (L,)."""
    ends = np.append(np.flatnonzero(np.diff(users)) + 1, len(users))[:USERS]
    rows = []
    for start, end in zip(np.append(0, ends), ends, strict=False):
        history = items[max(start, end - maxlen) : end]
        row, known = torch.zeros(maxlen, dtype=torch.long), torch.zeros(maxlen, dtype=torch.bool)
        row[maxlen - len(history) :], known[maxlen - len(history) :] = history, True
        rows.append((row, known))
    return rows


def shifted(schema: TensorSchema, row: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a history with a mask behind it, as RePlay does to recommend: items, known and unmasked, each (L,)."""
    features, known, unmasked = _shift_features(schema, {"item_id": row}, known)
    return features["item_id"], known, unmasked


def states_of(model: Bert4RecModel, rows: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Return states (B, L, D), and items, whether each is not padding, and whether it is not masked, each (B, L)."""
    items, known, unmasked = (torch.stack(part) for part in zip(*rows, strict=True))
    return model.forward_step({"item_id": items}, known, unmasked), items, known, unmasked


if __name__ == "__main__":
    main()
