"""Measure RecTools' newer SASRec network in the fastest of its settings: python rectools_flat_job.py '{"windows": ...}'

RecTools has the network, the sequences and their data set, but no training loop for them, so the loop is here: as
its loop for the network's relative UniSRec, without Lightning.
"""

import json
import sys
import time
import warnings

import numpy as np
import torch
from rectools.fast_transformers import FlatSASRecNet, SequenceBatchDataset, build_sequences
from stopwatch import Stopwatch, peak_rss_mb
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

WARM_UP = 2  # steps
USERS_PER_BATCH = 256  # in ranking, as RecTools' recommend
SETTINGS = {  # whether logits are computed for padding too, as the network's forward does; precision of products
    "all logits": (True, "highest"),
    "all logits, fast products": (True, "medium"),
    "logits of real positions": (False, "highest"),
    "logits of real positions, fast products": (False, "medium"),
}


def main() -> None:
    """Print the measured speeds as JSON."""
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    print(json.dumps(train_and_rank(task)))


def train_and_rank(task: dict) -> dict:
    """Return the speed of training in the best setting, of lists, and peak memory."""
    x, y, items = read_windows(task)
    speeds, peaks = {}, {}
    for name, (with_padding, precision) in SETTINGS.items():
        torch.set_float32_matmul_precision(precision)
        net = FlatSASRecNet(
            len(items), task["dim"], task["blocks"], task["heads"], task["maxlen"], dropout=task["dropout"]
        )
        speeds[name] = train(net, x, y, task, with_padding)
        peaks[name] = peak_rss_mb()
    users = min(len(x), task["ranked_users"])
    start = time.perf_counter()
    rank(net, x[:users], y[:users])
    seconds = time.perf_counter() - start
    best = max(speeds, key=speeds.get)
    return {
        "positions_per_s": speeds[best],
        "users_per_s": users / seconds,
        "lists_per_s": users / seconds,  # it ranks by making lists
        "peak_rss_mb": peaks["all logits"],  # of one network
        "ranking_peak_rss_mb": peak_rss_mb(),
        "ranked_users": users,
        "items": len(items),
        "settings": speeds,
        "note": f"{best}; feed-forward of 4 dim",
    }


def read_windows(task: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs and targets (W, L), and the ids of the items, by RecTools' own function."""
    arrays = np.load(task["windows"])
    lengths = np.diff(arrays["offsets"])
    users = np.repeat(np.arange(len(lengths)), lengths)
    columns = (torch.from_numpy(column) for column in (users, arrays["items"], np.arange(len(users))))
    x, y, items, _ = build_sequences(*columns, max_len=task["maxlen"])
    return x, y, items


def train(net: FlatSASRecNet, x: Tensor, y: Tensor, task: dict, with_padding: bool) -> float:
    """Return useful positions per second."""
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=task["lr"], betas=(0.9, 0.98))
    batches = DataLoader(SequenceBatchDataset(x, y), batch_size=task["batch_size"], shuffle=True)
    stopwatch = Stopwatch(WARM_UP)
    device = next(net.parameters()).device
    while True:
        for cpu_batch in batches:
            batch = {name: column.to(device) for name, column in cpu_batch.items()}
            is_real = batch["y"] != 0
            if with_padding:
                logits = net(batch).flatten(0, 1)
                loss = F.cross_entropy(logits, batch["y"].flatten() - 1, ignore_index=-1)
            else:
                logits = net.encode(batch["x"])[is_real] @ net.all_item_embeddings().T
                loss = F.cross_entropy(logits, batch["y"][is_real] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            stopwatch.step_ended(int(is_real.sum()))
            if stopwatch.steps == WARM_UP + task["steps"]:
                return stopwatch.positions_per_s


@torch.no_grad()
def rank(net: FlatSASRecNet, x: Tensor, y: Tensor) -> None:
    """Make the lists of the ten best unseen items after the whole windows."""
    net.eval()
    table = net.all_item_embeddings()
    for inputs, targets in zip(x.split(USERS_PER_BATCH), y.split(USERS_PER_BATCH), strict=True):
        history = torch.cat([inputs[:, 1:], targets[:, -1:]], 1)
        scores = net.encode_last(history) @ table.T
        seen = torch.cat([inputs, targets[:, -1:]], 1)
        padded = F.pad(scores, (1, 0))  # column 0 for the padding
        padded.scatter_(1, seen, float("-inf"))
        padded[:, 1:].topk(10)


if __name__ == "__main__":
    main()
