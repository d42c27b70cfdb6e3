"""The decay of attention with time, model.time_bias=decay, against a slow reference in double precision."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest
import torch
from small_models import SEQUENCES, packed, random_encoder, random_times, states_of, timed
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import PosEmb, TimeBias
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.training.tensorboard import attention_weights

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ["dataset=csv", "dataset.path=x.csv", "dataset.time=ts", "model.time_bias=decay"]
MODELS = {name: load([*DATA, f"model={name}"]).model for name in ("sasrec", "ligr")}
TIMES, ASKED = random_times(SEQUENCES, seed=1)
BATCH = timed(packed(SEQUENCES), TIMES, ASKED)


def small(name: str, **changes):
    return replace(MODELS[name], dim=12, maxlen=9, dropout=0.0, **changes)


def as_bias(model: Encoder, block: int, times: list[int], asked: list[int]) -> torch.Tensor:
    """Return what is added to the scores of each pair of a user's tokens (n, n)."""
    c, b = F.softplus(model.blocks[block].time_decay)
    days = torch.tensor(np.subtract.outer(asked, times) / 86_400).clamp(min=0)
    return -c * days**b


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [{}, {"heads": 3}, {"pos_emb": PosEmb.relative}, {"pos_emb": PosEmb.rope}], ids=str)
def test_attention_has_the_decay_in_its_softmax(name, changes):
    cfg = small(name, blocks=1, **changes)
    model = random_encoder(cfg).eval()
    plain = random_encoder(replace(cfg, time_bias=TimeBias.none)).eval()
    plain.load_state_dict({key: x for key, x in model.state_dict().items() if "time_decay" not in key})
    for items, times, asked in zip(SEQUENCES, TIMES, ASKED, strict=True):
        batch = timed(packed([items]), [times], [asked])
        (weights,) = attention_weights(model, batch)
        (without,) = attention_weights(plain, packed([items]))
        biased = without.double().log() + as_bias(model, 0, times, asked).detach()
        torch.testing.assert_close(weights.double(), biased.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_attention_equals_a_loop_over_users(name):
    model = random_encoder(small(name, blocks=1, heads=2)).eval()
    seen = {}
    for part in ("query", "key", "value", "output"):
        layer = getattr(model.blocks[0], part)
        layer.register_forward_hook(lambda _layer, given, out, part=part: seen.update({part: (given[0], out)}))
    states = model(BATCH)
    outputs = states_of(seen["output"][0], SEQUENCES)
    parts = [states_of(seen[part][1], SEQUENCES) for part in ("query", "key", "value")]
    for times, asked, output, *projected in zip(TIMES, ASKED, outputs, *parts, strict=True):
        q, k, v = (x.unflatten(1, (2, 6)).transpose(0, 1) for x in projected)  # (H, n, D / H)
        scores = q @ k.mT / sqrt(6) + as_bias(model, 0, times, asked)
        future = torch.ones(len(times), len(times), dtype=torch.bool).triu(1)
        expected = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        torch.testing.assert_close(output, expected.transpose(0, 1).flatten(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.newest(BATCH), states[BATCH.last], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_decay_equal_differences(name):
    model = random_encoder(small(name, heads=2, pos_emb=PosEmb.relative)).eval()
    weights = torch.randn(sum(map(len, TIMES)), 12, dtype=torch.double)

    def loss() -> torch.Tensor:
        return (torch.cat(states_of(model(BATCH), SEQUENCES)) * weights).sum()

    for block in model.blocks:
        (grad,) = torch.autograd.grad(loss(), [block.time_decay])
        for place in range(2):
            values = []
            for step in (1e-5, -1e-5):
                block.time_decay.data[place] += step
                with torch.no_grad():
                    values.append(float(loss()))
                block.time_decay.data[place] -= step
            assert abs((values[0] - values[1]) / 2e-5 - float(grad[place])) < 1e-5 * max(1.0, abs(float(grad[place])))


def test_the_decay_starts_at_half_the_weight_after_48_days():
    model = Encoder(5, small("sasrec"))
    c, b = model.blocks[0].decay().tolist()
    assert (round(c, 6), round(b, 6)) == (0.1, 0.5)
    assert abs((log(2) / c) ** (1 / b) - 48) < 0.1


def test_without_a_decay_times_change_nothing():
    model = random_encoder(replace(small("sasrec"), time_bias=TimeBias.none)).eval()
    with torch.no_grad():
        assert torch.equal(model(BATCH), model(packed(SEQUENCES)))
