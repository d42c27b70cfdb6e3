"""FuXi-alpha against a slow reference, in double precision: one user, one head and one pair of items at a time."""

from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from small_models import (
    SEQUENCES,
    assert_states_and_gradients,
    packed,
    random_encoder,
    random_times,
    states_of,
    time_bucket,
    timed,
)
from torch import Tensor

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import ModelConfig, PosEmb, PositionsFrom, TimeBias
from sasrec_lab.errors import InputError
from sasrec_lab.model import encoder, fuxi
from sasrec_lab.model.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ["dataset=csv", "dataset.path=x.csv", "dataset.time=ts"]
DEFAULT, HSTU = (load([*DATA, f"model={name}"]).model for name in ("fuxi", "hstu_meta"))
SMALL = replace(DEFAULT, dim=12, maxlen=9, dropout=0.0, divisor=20.0)
TIMES, ASKED = random_times(SEQUENCES)
BATCH = timed(packed(SEQUENCES), TIMES, ASKED)
OTHERS = [
    {},
    {"position_bias": False},
    {"time_bias": TimeBias.none},
    {"time_bias": TimeBias.none, "position_bias": False},
    {"divisor": None, "positions_from": PositionsFrom.newest, "ff_dim": 7},
    {"qk_dim": 2, "v_dim": 7},
    {"pos_emb": PosEmb.none, "positions_from": PositionsFrom.newest, "final_norm": True, "scale_embeddings": False},
]


def reference_states(model: Encoder, items: list[int], times: list[int], asked: list[int], cfg: ModelConfig) -> Tensor:
    """Return the states (L, D) of one user in a row padded on the right, as the authors' code has it."""
    p = dict(model.named_parameters())
    items = items[-cfg.maxlen :]
    n = len(items)
    x = torch.zeros(cfg.maxlen, cfg.dim, dtype=torch.double)
    x[:n] = p["input_items.weight"][[item - 1 for item in items]] * (sqrt(cfg.dim) if cfg.scale_embeddings else 1)
    if cfg.pos_emb is PosEmb.learned:
        places = range(n) if cfg.positions_from is PositionsFrom.oldest else range(n)[::-1]
        x[:n] = x[:n] + p["positions.weight"][list(places)]
    ends = [rows + [rows[-1]] * (cfg.maxlen - n) for rows in (times, asked)]
    for number in range(cfg.blocks):
        own = {key.removeprefix(f"blocks.{number}."): value for key, value in p.items() if f"blocks.{number}." in key}
        x = layer(own, x, *ends, cfg)
    if cfg.final_norm:
        x = torch.nn.functional.layer_norm(
            x, [cfg.dim], p["final_norm.weight"], p["final_norm.bias"], cfg.final_norm_eps
        )
    return x[:n]


def layer(own: dict[str, Tensor], x: Tensor, times: list[int], asked: list[int], cfg: ModelConfig) -> Tensor:
    heads = cfg.heads
    qk, wide = (width or cfg.dim // heads for width in (cfg.qk_dim, cfg.v_dim))
    maps = 1 + cfg.position_bias + (cfg.time_bias is TimeBias.buckets)
    mixed = silu(norm(x) @ own["projection.weight"].T)
    u, q, v, k = mixed.split([maps * heads * wide, heads * qk, heads * wide, heads * qk], 1)
    out = []
    for i in range(len(x)):
        sums = []
        for h in range(heads):
            by_distance, by_time, by_product = torch.zeros(3, wide, dtype=torch.double).unbind()
            for j in range(i + 1):
                value = v[j, h * wide : (h + 1) * wide]
                score = q[i, h * qk : (h + 1) * qk] @ k[j, h * qk : (h + 1) * qk]
                by_product = by_product + silu(score) / (cfg.divisor or cfg.maxlen) * value
                if cfg.position_bias:
                    by_distance = by_distance + own["position_weights"][i - j] * value
                if cfg.time_bias is TimeBias.buckets:
                    by_time = by_time + own["time_weights"][time_bucket(asked[i] - times[j])] * value
            sums += [by_distance] * cfg.position_bias + [by_time] * (cfg.time_bias is TimeBias.buckets) + [by_product]
        out.append(torch.cat(sums))
    y = x + (u * norm(torch.stack(out))) @ own["output.weight"].T + own["output.bias"]
    inner = silu(norm(y) @ own["feed_forward.gate.weight"].T) * (norm(y) @ own["feed_forward.inner.weight"].T)
    return y + inner @ own["feed_forward.outer.weight"].T


def norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("changes", OTHERS, ids=str)
@pytest.mark.parametrize(("heads", "blocks"), list(product((1, 3), (1, 2))))
def test_states_and_gradients_equal_the_reference(heads, blocks, changes):
    cfg = replace(SMALL, heads=heads, blocks=blocks, **changes)
    model = random_encoder(cfg).eval()
    states = torch.cat(states_of(model(BATCH), SEQUENCES))
    given = zip(SEQUENCES, TIMES, ASKED, strict=True)
    expected = torch.cat([reference_states(model, *user, cfg) for user in given])
    assert_states_and_gradients(model, states, expected)


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_the_newest_states_are_those_of_all_tokens(changes):
    model = random_encoder(replace(SMALL, heads=3, **changes)).eval()
    rows = BATCH.last.flip(0)
    with torch.no_grad():
        every, newest = model(BATCH), model.newest(BATCH)
        torch.testing.assert_close(newest, model.head(every[BATCH.last]), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(BATCH, rows), every[rows], rtol=0, atol=1e-12)
        model.float()
        torch.testing.assert_close(model.newest(BATCH).double(), newest, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(BATCH).double(), every, rtol=1e-4, atol=1e-4)


def test_states_do_not_depend_on_later_items_and_other_users():
    model = random_encoder(SMALL).eval()
    other = [[*items[:-1], items[-1] % 20 + 1] for items in SEQUENCES]
    with torch.no_grad():
        before, after = (states_of(model(timed(packed(x), TIMES, ASKED)), SEQUENCES) for x in (SEQUENCES, other))
        alone = model(timed(packed(SEQUENCES[2:3]), TIMES[2:3], ASKED[2:3]))
    for one, changed in zip(before, after, strict=True):
        assert torch.equal(one[:-1], changed[:-1])
        assert (one[-1] - changed[-1]).abs().max() > 1e-6
    torch.testing.assert_close(alone[:9], before[2], rtol=0, atol=1e-12)


def test_initial_values_are_those_of_the_authors():
    torch.manual_seed(0)
    model = Encoder(3000, replace(DEFAULT, dim=80, maxlen=500))
    truncated = sqrt(0.7737)  # variance of N(0, 1) between -2 and 2
    stds = {
        "input_items.weight": 0.02 * truncated,
        "positions.weight": truncated / sqrt(80),
        "projection.weight": 0.02,
        "position_weights": 0.02,
        "time_weights": 0.02,
        "output.weight": sqrt(2 / (80 + 240)),  # Xavier uniform, and so are the next but the bias
        "output.bias": 1 / sqrt(240) / sqrt(3),
        **{f"feed_forward.{name}.weight": sqrt(2 / 160) for name in ("gate", "inner", "outer")},
    }
    found = {key.removeprefix("blocks.0."): value for key, value in model.named_parameters() if "blocks.1" not in key}
    assert set(found) == set(stds)  # no norm has weights
    for key, std in stds.items():
        assert abs(found[key].std() / std - 1) < 5 / sqrt(2 * found[key].numel()), key


def test_number_of_parameters():
    """Of a block: gates, three times as wide, v, q, k; the output with a bias; the feed-forward; two tables."""
    d, model = 50, Encoder(3416, replace(DEFAULT, dim=50))
    per_block = 6 * d * d + (3 * d * d + d) + 3 * d * d + 200 + 129
    assert sum(p.numel() for p in model.parameters()) == (3416 + 200) * d + 2 * per_block


def test_dropout_is_before_the_output_and_the_feed_forward(monkeypatch):
    shapes = []

    def record(x: Tensor, rate: float) -> Tensor:
        shapes.append((x.shape[1], rate))
        return x

    for module in (encoder, fuxi):
        monkeypatch.setattr(module, "dropout", record)
    model = random_encoder(replace(SMALL, dropout=0.25, v_dim=5, heads=3, blocks=1))
    model.train()(BATCH)
    model.eval()(BATCH)
    assert model.blocks[0].feed_forward.rate == 0
    assert shapes == [(12, 0.25), (45, 0.25), (12, 0.25), (12, 0.0), (45, 0.0), (12, 0.0)]


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "model.activation=relu": "model.activation=relu does not apply to model.block=fuxi; set it to swiglu",
        "model.norm_affine=true": "model.norm_affine=true does not apply to model.block=fuxi; set it to false",
        "model.norm=post": "model.norm=post does not apply to model.block=fuxi; set it to pre",
        "model.pos_emb=rope": (
            "model.pos_emb=rope does not go with model.block=fuxi; set it to learned, sinusoidal or none: the bias"
            " by distance is model.position_bias=true there"
        ),
        "model.time_bias=decay": "model.time_bias=decay does not go with model.block=fuxi; use buckets or none",
        "model.qk_dim=0": "model.qk_dim=0 must be at least 1",
        "tensorboard.attention_users=1": (
            "tensorboard.attention_users=1 draws the softmax of attention, which model.block=fuxi does not have; set it"
            " to 0"
        ),
    }.items(),
)
def test_combinations_without_a_meaning_are_refused(words, message):
    with pytest.raises(InputError) as caught:
        load([*DATA, "model=fuxi", *words.split()])
    assert str(caught.value) == message


def test_the_preset_differs_from_hstu_in_the_block_only():
    changed = {name for name, value in vars(DEFAULT).items() if value != getattr(HSTU, name)}
    assert changed == {"block", "activation"}
    losses = [load([*DATA, f"model={name}"]).loss for name in ("fuxi", "hstu_meta")]
    assert losses[0] == losses[1]
