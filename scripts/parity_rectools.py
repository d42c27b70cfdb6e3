"""Show that model=sasrec_rectools is RecTools' SASRec: the same weights give the same numbers in both.

python scripts/parity_rectools.py                                  ML-100K; ends with 1 if a difference exceeds 1e-5
python scripts/parity_rectools.py dataset=synthetic model.dim=8    other data and sizes: keys of sasrec_lab.train
python scripts/parity_rectools.py --train --seeds 3 --epochs 20    both are trained, on MovieLens-1M's first 2,000 users

RecTools 0.19 runs in the environment that bench_peers.py makes for it. Its weights are random, biases and norms among
them, and carried over; nothing is trained without --train, whose results are kept and not computed again.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import torch
from benchmark.child import JobFailed
from benchmark.peer import PEERS
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sasrec_lab.command_line import load
from sasrec_lab.config import Catalogue, HeldOut, ModelConfig, TrainConfig, Windows
from sasrec_lab.data.batches import pack, training_batch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.data.sequences import Holdout, Sequences, hold_out, load_sequences
from sasrec_lab.errors import InputError
from sasrec_lab.histories import Histories
from sasrec_lab.ids import Ids
from sasrec_lab.losses import softmax
from sasrec_lab.metrics import HoldoutMetrics, Scores
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.recommender import Recommender
from sasrec_lab.run_folder import whole
from sasrec_lab.train import train

FOLDER = Path("outputs/parity")
PEER = replace(PEERS["rectools"], script="rectools_parity.py")
WITHIN = 1e-5
WINDOWS = 32  # a batch of the losses, as in peers/rectools_parity.py
MODEL = ["model=sasrec_rectools", "loss=softmax"]
FIRST_USERS = 2000
TRAINED = [
    f"dataset.path={FOLDER.resolve()}/ml_1m_first_{FIRST_USERS}.txt",
    "dataset=sasrec_ml_1m",
    "dataset.sha256=null",
    "dataset.sources=[]",
    "dataset.catalogue=train",  # the items that RecTools knows
    "model.maxlen=50",
    "trainer.limit_val_batches=0",  # the last epoch is tested
    "trainer.enable_progress_bar=false",
]

Arrays = dict[str, np.ndarray]


def main() -> None:
    args = parse_args()
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        if args.train:
            print(compare_training(args.seeds, args.epochs))
        else:
            compare_outputs(load([*MODEL, *args.overrides]), args.k, args.fixture)
    except (InputError, JobFailed) as error:
        sys.exit(f"error: {error}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=10, help="length of the lists (10)")
    parser.add_argument(
        "--fixture", type=Path, metavar="FILE", help="write what RecTools gave, for tests/test_parity.py"
    )
    parser.add_argument("--train", action="store_true", help="train both instead, and compare their NDCG@10")
    parser.add_argument("--seeds", type=int, default=3, help="of the training (3)")
    parser.add_argument("--epochs", type=int, default=20, help="of the training (20)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of python -m sasrec_lab.train")
    return parser.parse_intermixed_args()


# The same weights in both


def compare_outputs(cfg: TrainConfig, k: int, fixture: Path | None) -> None:
    sequences = with_weights(load_sequences(cfg.dataset, cfg.data_dir))
    theirs = outputs_of_rectools(sequences, cfg, k)
    if fixture:
        write_fixture(fixture, sequences, cfg.model, theirs)
    found = {name: differences(arrays, sequences, variants(cfg.model)[name]) for name, arrays in theirs.items()}
    print(table(found))
    if max(largest for part in found.values() for largest in part.values()) > WITHIN:
        sys.exit(f"error: a difference exceeds {WITHIN:g}")


@cache
def defaults() -> TrainConfig:
    """Of interactions that are given as a table."""
    return load([*MODEL, "dataset=csv", "dataset.path=-"])


def variants(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """One head and several, with and without RecTools' use_key_padding_mask."""
    heads = next(n for n in (4, 3, 2, 1) if cfg.dim % n == 0)
    return {
        f"{n} head{'s' if n > 1 else ''}, {'no ' if pad_keys else ''}key mask": replace(cfg, heads=n, pad_keys=pad_keys)
        for n in sorted({1, heads})
        for pad_keys in (True, False)
    }


def with_weights(sequences: Sequences) -> Sequences:
    """Weights from 1 to 3, so that the loss has to honour them."""
    return replace(sequences, weights=(1 + np.arange(len(sequences.items)) % 3).astype(np.float32))


def outputs_of_rectools(sequences: Sequences, cfg: TrainConfig, k: int) -> dict[str, Arrays]:
    """What RecTools gives for each variant."""
    file, out = FOLDER / "interactions.npz", FOLDER / "rectools.npz"
    users = np.repeat(sequences.user_ids, sequences.lengths)
    np.savez(file, user=users, item=sequences.item_ids[sequences.items - 1], weight=sequences.weights)
    parts = {
        name: {"heads": model.heads, "key_mask": not model.pad_keys} for name, model in variants(cfg.model).items()
    }
    allowed = sequences.item_ids[::3].tolist()
    PEER.run(sizes(cfg) | {"parts": parts, "interactions": str(file), "out": str(out), "allowed": allowed, "k": k})
    found: dict[str, Arrays] = {name: {"allowed": np.array(allowed)} for name in parts}
    with np.load(out) as arrays:
        for key in arrays:
            name, _, rest = key.partition("/")
            found[name][rest] = arrays[key]
    return found


def sizes(cfg: TrainConfig) -> dict[str, Any]:
    model = {key: getattr(cfg.model, key) for key in ("blocks", "heads", "dim", "maxlen", "dropout")}
    return model | {"batch_size": cfg.batch_size, "lr": cfg.optimizer.lr, "seed": cfg.seed}


@torch.inference_mode()
def differences(theirs: Arrays, sequences: Sequences, cfg: ModelConfig) -> dict[str, float]:
    """The largest absolute difference of each kind of number, lists among them; infinite where lists differ in form."""
    holdout = hold_out(sequences, Windows.last, Catalogue.train, cfg.maxlen, HeldOut.none)
    encoder = carried_over(theirs, holdout.item_ids, cfg).eval()
    places = Ids(theirs["item_ids"]).numbers(holdout.item_ids, "items")  # RecTools' number of each of our items
    histories = Histories.of_sequences(sequences, Ids(holdout.item_ids))
    states = newest_states(encoder, histories, histories.users.numbers(theirs["user_ids"], "users"))
    found = {
        "states": largest(states, theirs["states"]),
        "states in training": 0.0,
        "scores": largest(states @ encoder.item_table.T, theirs["scores"][:, places]),
    }
    losses, with_pad, training_states = losses_and_states(encoder, theirs, holdout)
    found["states in training"] = largest(training_states, theirs["training_states"])
    found["softmax loss, the pad a class as in RecTools"] = largest(with_pad, theirs["losses"])
    found["softmax loss, items only"] = largest(losses, theirs["losses_without_pad"])
    recommender = Recommender(FOLDER, encoder, Ids(holdout.item_ids), cfg, defaults().dataset)
    for name in lists_in(theirs):
        columns = {key: theirs[f"lists/{name}/{key}"] for key in ("item_id", "score", "rank")}
        target = "user_id" if name.startswith("users") else "target_item_id"
        expected = pd.DataFrame({target: theirs[f"lists/{name}/{target}"], **columns})
        found[f"lists of {name}"] = lists_differ(our_lists(recommender, name, theirs, sequences), expected, target)
    return found


def carried_over(theirs: Arrays, item_ids: np.ndarray, cfg: ModelConfig) -> Encoder:
    """RecTools' weights in our encoder. Its attention has the three projections in one matrix, its items a pad."""

    def weights(name: str) -> Tensor:
        return torch.from_numpy(theirs[f"weights/{name}"])

    order = torch.from_numpy(Ids(theirs["item_ids"]).numbers(item_ids, "items"))
    state = {"input_items.weight": weights("item_model.item_net_blocks.0.ids_emb.weight")[1:][order]}
    state["output_items.weight"] = state["input_items.weight"]
    state["positions.weight"] = weights("pos_encoding_layer.pos_emb.weight")  # both count from the newest item
    names = {
        "attention_norm": "q_layer_norm",
        "output": "multi_head_attn.out_proj",
        "feed_forward_norm": "ff_layer_norm",
        "feed_forward.inner": "feed_forward.ff_linear_1",
        "feed_forward.outer": "feed_forward.ff_linear_2",
    }
    for kind in ("weight", "bias"):
        state[f"final_norm.{kind}"] = weights(f"transformer_layers.last_layernorm.{kind}")
        for block in range(cfg.blocks):
            at = f"transformer_layers.transformer_blocks.{block}."
            for own, name in names.items():
                state[f"blocks.{block}.{own}.{kind}"] = weights(f"{at}{name}.{kind}")
            packed = weights(f"{at}multi_head_attn.in_proj_{kind}").chunk(3)
            for own, part in zip(("query", "key", "value"), packed, strict=True):
                state[f"blocks.{block}.{own}.{kind}"] = part
    encoder = Encoder(len(item_ids), cfg)
    encoder.load_state_dict(state)
    return encoder


def newest_states(encoder: Encoder, histories: Histories, users: np.ndarray) -> Tensor:
    ends = histories.offsets[users + 1]
    batch, _ = pack(ends - np.minimum(histories.lengths[users], encoder.maxlen), ends, histories.items)
    return encoder.newest(batch)  # (len(users), D)


def losses_and_states(encoder: Encoder, theirs: Arrays, holdout: Holdout) -> tuple[Tensor, Tensor, Tensor]:
    """Of each batch of windows the loss, and with the pad as one item more; and the first batch's states.

    RecTools' softmax has the pad among its classes, though it is never a target: a term more in every denominator.
    """
    pad = torch.from_numpy(theirs["weights/item_model.item_net_blocks.0.ids_emb.weight"][:1])
    more = nn.Embedding.from_pretrained(torch.cat([encoder.item_table, pad]))
    losses, with_pad, states = [], [], []
    for start in range(0, len(holdout.window_starts), WINDOWS):
        batch = training_batch(holdout, np.arange(start, min(start + WINDOWS, len(holdout.window_starts))))
        states.append(encoder(batch))  # (T, D)
        losses.append(softmax(states[-1], encoder.output_items, batch, defaults().loss))
        with_pad.append(softmax(states[-1], more, batch, defaults().loss))
        if start == 0:
            first = states[0][batch.targets > 0]
    return torch.stack(losses), torch.stack(with_pad), first


def lists_in(theirs: Arrays) -> list[str]:
    return list(dict.fromkeys(key.split("/")[1] for key in theirs if key.startswith("lists/")))


def our_lists(recommender: Recommender, name: str, theirs: Arrays, sequences: Sequences) -> pd.DataFrame:
    """The lists that RecTools' have this name."""
    allowed = theirs["allowed"] if name.endswith("some items allowed") else None
    if allowed is not None:  # an unknown one would only be warned about
        allowed = allowed[np.isin(allowed, theirs["item_ids"])]
    k = int(theirs[f"lists/{name}/rank"].max())
    if name.startswith("items"):
        return recommender.recommend_to_items(theirs["item_ids"], k, allowed, filter_itself="left out" in name)
    users, items = np.repeat(sequences.user_ids, sequences.lengths), sequences.item_ids[sequences.items - 1]
    histories = pd.DataFrame({"user_id": users, "item_id": items, "datetime": np.arange(len(items))})
    return recommender.recommend(theirs["user_ids"], k, histories, "left out" in name, allowed)


def lists_differ(ours: pd.DataFrame, theirs: pd.DataFrame, target: str) -> float:
    """The largest difference of the scores at one rank of one list.

    Infinite where a list has another length, or another item stands at a rank; of two items in one list whose scores
    are within 1e-5 of each other either may come first.
    """
    keys = [target, "rank"]
    both = ours.merge(theirs, on=keys, how="outer", suffixes=("", "_theirs"))
    if both.isna().any(axis=None):
        return float("inf")
    others = both[both["item_id"] != both["item_id_theirs"]]
    if len(others):
        score = ours.set_index([target, "item_id"])["score"]
        swapped = pd.MultiIndex.from_frame(others[[target, "item_id_theirs"]])
        if (np.abs(score.reindex(swapped).to_numpy() - others["score"].to_numpy()) <= WITHIN).sum() < len(others):
            return float("inf")
    return float(np.abs(both["score"] - both["score_theirs"]).max())


def largest(ours: Tensor, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - torch.from_numpy(theirs)).abs().max())


def table(found: dict[str, dict[str, float]]) -> str:
    rows = next(iter(found.values()))
    lines = ["| largest difference | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    lines += [f"| {row} | " + " | ".join(f"{part[row]:.1e}" for part in found.values()) + " |" for row in rows]
    return "\n".join(lines)


# The fixture of tests/test_parity.py: figures only


def write_fixture(path: Path, sequences: Sequences, cfg: ModelConfig, theirs: dict[str, Arrays]) -> None:
    numbers = {
        "cfg": {key: getattr(cfg, key) for key in ("blocks", "dim", "maxlen")},
        "user_ids": sequences.user_ids.tolist(),
        "item_ids": sequences.item_ids.tolist(),
        "histories": [items.tolist() for items in np.split(sequences.items, sequences.offsets[1:-1])],
        "rectools": {name: {key: as_list(x) for key, x in arrays.items()} for name, arrays in theirs.items()},
    }
    with whole(path) as draft:
        draft.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


def read_fixture(path: Path) -> tuple[Sequences, ModelConfig, dict[str, Arrays]]:
    numbers = json.loads(path.read_text())
    items = np.concatenate(numbers["histories"]).astype(np.int32)
    offsets = np.cumsum([0, *map(len, numbers["histories"])])
    ids = np.array(numbers["user_ids"]), np.array(numbers["item_ids"])
    sequences = Sequences(items, offsets, *ids, times=None, weights=None, file="fixture", sha256=None)
    theirs = {name: {key: as_array(x) for key, x in arrays.items()} for name, arrays in numbers["rectools"].items()}
    return with_weights(sequences), replace(defaults().model, **numbers["cfg"]), theirs


def as_list(array: np.ndarray) -> list:
    """Nine digits tell every number of single precision."""
    if array.dtype.kind != "f":
        return array.tolist()
    return [as_list(row) for row in array] if array.ndim > 1 else [float(f"{x:.9g}") for x in array]


def as_array(numbers: list) -> np.ndarray:
    array = np.array(numbers)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


# Both trained


def compare_training(seeds: int, epochs: int) -> str:
    first_users_file(load(["dataset=sasrec_ml_1m"]))
    found: dict[str, list[dict[str, float]]] = {"sasrec_lab": [], "RecTools": []}
    for seed in range(seeds):
        cfg = load([*MODEL, *TRAINED, f"trainer.max_epochs={epochs}", f"seed={seed}"])
        for name, run in (("sasrec_lab", ours_trained), ("RecTools", theirs_trained)):
            folder = FOLDER / f"{name}-{epochs}-epochs-seed-{seed}"
            result = folder / "result.json"
            if not result.exists():
                folder.mkdir(parents=True, exist_ok=True)
                metrics = run(cfg, folder)
                with whole(result) as draft:
                    draft.write_text(json.dumps(metrics))
            found[name].append(json.loads(result.read_text()))
            print(f"{name}, seed {seed}: {found[name][-1]}", file=sys.stderr, flush=True)
    metrics = ("test/ndcg@10", "test/recall@10")
    lines = ["| | NDCG@10 | recall@10 |", "|---|---|---|"]
    for name, results in found.items():
        lines.append(f"| {name} | " + " | ".join(mean_and_spread([x[key] for x in results]) for key in metrics) + " |")
    return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread} ({', '.join(f'{x:.4f}' for x in values)})"


def first_users_file(cfg: TrainConfig) -> None:
    """Users are numbered in the order of their ids, in which the file has them."""
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    rows = sequences.offsets[FIRST_USERS]
    users = np.repeat(sequences.user_ids, sequences.lengths)[:rows]
    lines = [
        f"{user} {item}\n" for user, item in zip(users, sequences.item_ids[sequences.items[:rows] - 1], strict=True)
    ]
    with whole(FOLDER / f"ml_1m_first_{FIRST_USERS}.txt") as draft:
        draft.write_text("".join(lines))


def ours_trained(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    return chosen_metrics(train(cfg, folder)["metrics"])


def theirs_trained(cfg: TrainConfig, folder: Path) -> dict[str, float]:
    """RecTools on the same windows, ranked by our metrics from its states and its items' vectors."""
    sequences = load_sequences(cfg.dataset, cfg.data_dir)
    holdout = hold_out(sequences, cfg.dataset.windows, cfg.dataset.catalogue, cfg.model.maxlen)
    file, out = folder / "interactions.npz", folder / "rectools.npz"
    user, item = rows_of(holdout, holdout.window_users, holdout.window_starts, holdout.window_ends)
    starts, ends = holdout.starts[holdout.users], holdout.val_ends[holdout.users]
    history_user, history_item = rows_of(holdout, holdout.users, starts, ends)
    np.savez(file, user=user, item=item, history_user=history_user, history_item=history_item)
    epochs = cfg.trainer["max_epochs"]
    paths = {"interactions": str(file), "out": str(out)}
    PEER.run(sizes(cfg) | paths | {"epochs": epochs, "key_mask": not cfg.model.pad_keys})
    with np.load(out) as arrays:
        vectors = np.zeros_like(arrays["vectors"])
        vectors[arrays["item_ids"] - 1] = arrays["vectors"]
        states = np.full((len(sequences.user_ids), vectors.shape[1]), np.nan, np.float32)
        states[arrays["user_ids"]] = arrays["states"]
    metrics, states, vectors = HoldoutMetrics(len(vectors), cfg.evaluation), *map(torch.from_numpy, (states, vectors))
    for batch in SequenceData(holdout, cfg).test_dataloader():
        metrics.update(Scores(states[batch.users], vectors), batch)
    return chosen_metrics(metrics.take("test"))


def rows_of(holdout: Holdout, users: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """User and item of each interaction in items[start:end]."""
    batch, places = pack(starts[ends > starts], ends[ends > starts], holdout.items)
    return np.repeat(users[ends > starts], np.diff(batch.offsets)), holdout.items[places].astype(np.int64)


def chosen_metrics(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("test/ndcg@10", "test/recall@10")}


if __name__ == "__main__":
    main()
