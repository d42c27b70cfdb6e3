"""Encoders with random parameters, and packed sequences for them."""

import numpy as np
import torch
from torch import Tensor

from sasrec_lab.config.model import ModelConfig
from sasrec_lab.data.batches import PackedBatch, pack, with_times
from sasrec_lab.model.encoder import Encoder

ITEMS, MAXLEN = 20, 9
# lengths from 1 to more than MAXLEN, and at least 33 tokens in all, so that there are dummies and several buckets
SEQUENCES = [[3], [5, 1, 5], [*range(1, 10)], [7, 7], [*range(2, 16)], [4, 20, 6, 2, 11, 3], [19, 18, 17, 16], [8]]


def random_encoder(cfg: ModelConfig) -> Encoder:
    """Return an encoder in double precision without equal parameters, zeros or ones, biases and norms included."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.double)  # for tables of positions too
    try:
        model = Encoder(ITEMS, cfg)
    finally:
        torch.set_default_dtype(torch.float)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def packed(sequences: list[list[int]], maxlen: int = MAXLEN) -> PackedBatch:
    """Return the `maxlen` newest items of each sequence as one batch."""
    sequences = [items[-maxlen:] for items in sequences]
    ends = np.cumsum([len(items) for items in sequences])
    batch, _ = pack(np.append(0, ends[:-1]), ends, np.concatenate(sequences))
    return batch


def states_of(states: Tensor, sequences: list[list[int]], maxlen: int = MAXLEN) -> list[Tensor]:
    """Return each sequence's part of the states, without those of dummies."""
    lengths = [min(len(items), maxlen) for items in sequences]
    return list(states[: sum(lengths)].split(lengths))


assert len(packed(SEQUENCES).items) > sum(min(len(items), MAXLEN) for items in SEQUENCES)


def assert_states_depend_on_the_own_past(model: Encoder, changed: int) -> None:
    """Check that another item at this place changes the states from there on, and none of another sequence."""
    items = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    with torch.no_grad():
        before = model(packed([[3, 4], items, [5]]))
        items[changed] = 15
        after = model(packed([[3, 4], items, [5]]))
        alone = model(packed([items]))
    same = [*range(2 + changed), 11]
    assert torch.equal(before[same], after[same])
    assert (before[2 + changed : 11] - after[2 + changed : 11]).abs().amax(1).min() > 1e-6
    torch.testing.assert_close(after[2:11], alone[:9], rtol=0, atol=1e-12)


def random_times(sequences: list[list[int]], maxlen: int = MAXLEN, seed: int = 0) -> tuple[list, list]:
    """Return when each item was taken and when the next one is asked for: gaps from none to years, none negative."""
    random = np.random.default_rng(seed)
    times, asked = [], []
    for items in sequences:
        gaps = np.rint(np.exp(random.uniform(-2, 18, min(len(items), maxlen) + 1))).astype(np.int64)
        moments = 1_500_000_000 + np.cumsum(gaps)
        times.append(moments[:-1].tolist())
        asked.append(moments[1:].tolist())
    return times, asked


def timed(batch: PackedBatch, times: list[list[int]], asked: list[list[int]]) -> PackedBatch:
    """Return the batch with these times of each sequence's tokens, and when the item after each is asked for."""
    return with_times(batch, np.concatenate(times), np.concatenate(asked))


def time_bucket(difference: int) -> int:
    """Return the bucket of a difference in seconds, by the formula of HSTU's authors in single precision."""
    return int(np.log(np.float32(max(1, abs(difference)))) / np.float32(0.301))


def assert_states_and_gradients(model: Encoder, states: Tensor, expected: Tensor) -> None:
    """Check that states in double precision, and the gradients of a weighted sum of them, equal the expected ones."""
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)

    weights = torch.randn_like(states)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters) for x in (states, expected))
    largest = max(grad.norm() for grad in theirs)
    for (key, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-8 * (other.norm() + largest / 100), key
