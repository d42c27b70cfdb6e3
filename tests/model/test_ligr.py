"""LiGR against a slow reference, in double precision: one user and one head at a time, with the model's parameters."""

from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from small_models import SEQUENCES, assert_states_depend_on_the_own_past, packed, random_encoder, states_of
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import Activation, BlockName, ModelConfig, PosEmb
from sasrec_lab.model import encoder, transformer
from sasrec_lab.model.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULT = load(["dataset=csv", "dataset.path=x.csv", "model=ligr"]).model
SMALL = replace(DEFAULT, dim=12, maxlen=9, dropout=0.0)
OTHERS = [
    {},
    {"activation": Activation.relu},
    {"activation": Activation.gelu, "ff_dim": 5},
    {"output_projection": False, "ff_dim": 7},
    {"residual": False},
    {"scale_embeddings": True, "final_norm": True},
]


def reference_states(model: Encoder, items: list[int], cfg: ModelConfig) -> Tensor:
    """Return the states (n, D) of one user, by the formulas of RecTools' LiGR."""
    p = dict(model.named_parameters())
    items = items[-cfg.maxlen :]
    n = len(items)
    x = p["input_items.weight"][[item - 1 for item in items]] * (sqrt(cfg.dim) if cfg.scale_embeddings else 1)
    x = x + p["positions.weight"][[n - 1 - place for place in range(n)]]
    stream = 1 if cfg.residual else 0
    for number in range(cfg.blocks):
        own = {key.removeprefix(f"blocks.{number}."): value for key, value in p.items() if f"blocks.{number}." in key}
        gate = torch.sigmoid(x @ own["attention_gate.weight"].T + own["attention_gate.bias"])
        x = stream * x + gate * attention(own, norm(own, "attention_norm", x), cfg)
        gate = torch.sigmoid(x @ own["feed_forward_gate.weight"].T + own["feed_forward_gate.bias"])
        x = stream * x + gate * feed_forward(own, norm(own, "feed_forward_norm", x), cfg)
    return norm(p, "final_norm", x, cfg.final_norm_eps) if cfg.final_norm else x


def norm(own: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    deviation = x - x.mean(1, keepdim=True)
    return (
        deviation / (deviation.pow(2).mean(1, keepdim=True) + eps).sqrt() * own[f"{name}.weight"] + own[f"{name}.bias"]
    )


def attention(own: dict[str, Tensor], x: Tensor, cfg: ModelConfig) -> Tensor:
    q, k, v = (x @ own[f"{name}.weight"].T + own[f"{name}.bias"] for name in ("query", "key", "value"))
    width = cfg.dim // cfg.heads
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(cfg.heads):
            part = slice(h * width, (h + 1) * width)
            weights = torch.softmax(k[: i + 1, part] @ q[i, part] / sqrt(width), 0)
            heads.append(weights @ v[: i + 1, part])
        rows.append(torch.cat(heads))
    out = torch.stack(rows)
    return out @ own["output.weight"].T + own["output.bias"] if cfg.output_projection else out


def feed_forward(own: dict[str, Tensor], x: Tensor, cfg: ModelConfig) -> Tensor:
    if cfg.activation is Activation.swiglu:
        w1, w3, w2 = (own[f"feed_forward.{name}.weight"] for name in ("gate", "inner", "outer"))
        return (x @ w1.T * torch.sigmoid(x @ w1.T) * (x @ w3.T)) @ w2.T
    inner = x @ own["feed_forward.inner.weight"].T + own["feed_forward.inner.bias"]
    inner = F.relu(inner) if cfg.activation is Activation.relu else F.gelu(inner)
    return inner @ own["feed_forward.outer.weight"].T + own["feed_forward.outer.bias"]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
@pytest.mark.parametrize(("heads", "blocks"), list(product((1, 4), (1, 2))))
def test_states_and_gradients_equal_the_reference(heads, blocks, changes):
    cfg = replace(SMALL, heads=heads, blocks=blocks, **changes)
    model = random_encoder(cfg).eval()
    batch = packed(SEQUENCES)
    states = torch.cat(states_of(model(batch), SEQUENCES))
    expected = torch.cat([reference_states(model, items, cfg) for items in SEQUENCES])
    torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.newest(batch), states[batch.last], rtol=1e-9, atol=1e-9)

    weights = torch.randn_like(states)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad((x * weights).sum(), parameters) for x in (states, expected))
    largest = max(grad.norm() for grad in theirs)
    for (key, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-9 * (other.norm() + largest / 100), key


def test_a_gate_of_zero_leaves_the_stream_unchanged():
    model = random_encoder(SMALL).eval()
    for block in model.blocks:
        for gate in (block.attention_gate, block.feed_forward_gate):
            gate.weight.data.zero_()
            gate.bias.data.fill_(-1e9)
    batch = packed(SEQUENCES)
    with torch.no_grad():
        assert torch.equal(model(batch)[: batch.last[-1] + 1], model._embed(batch)[: batch.last[-1] + 1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pos_emb", list(PosEmb))
def test_open_gates_make_a_pre_norm_transformer(pos_emb, causal):
    cfg = replace(SMALL, pos_emb=pos_emb, causal=causal, heads=2)
    model = random_encoder(cfg).eval()
    for block in model.blocks:
        for gate in (block.attention_gate, block.feed_forward_gate):
            gate.weight.data.zero_()
            gate.bias.data.fill_(1e9)
    plain = random_encoder(replace(cfg, block=BlockName.transformer, ff_dim=48)).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "_gate" not in key})
    batch = packed(SEQUENCES)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), plain(batch), rtol=0, atol=1e-12)
        torch.testing.assert_close(model.newest(batch), plain(batch)[batch.last], rtol=0, atol=1e-12)


@pytest.mark.parametrize("changed", [1, 4, 8])
def test_states_depend_on_the_own_past_only(changed):
    assert_states_depend_on_the_own_past(random_encoder(SMALL).eval(), changed)


def test_initial_values_are_those_of_rectools():
    """Xavier normal, with q, k and v as one matrix; biases of attention are zero, those of gates nn.Linear's."""
    torch.manual_seed(0)
    model = Encoder(3000, replace(DEFAULT, dim=80, maxlen=500))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            assert (parameter == (1 if key.endswith("weight") else 0)).all(), key
        elif key.endswith("gate.bias"):
            assert 0.9 / sqrt(80) < parameter.abs().max() <= 1 / sqrt(80), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            packed_qkv = any(part in key for part in ("query", "key", "value"))
            std = sqrt(2 / (3 * 80 + 80)) if packed_qkv else sqrt(2 / sum(parameter.shape))
            assert abs(parameter.std() / std - 1) < 5 / sqrt(2 * parameter.numel()), key


def test_number_of_parameters():
    """Four matrices of attention and two gates with biases, two norms, and 12 D^2 of SwiGLU at width 4 D."""
    d, model = 50, Encoder(3416, replace(DEFAULT, dim=50))
    per_block = 6 * (d * d + d) + 4 * d + 12 * d * d
    assert sum(p.numel() for p in model.parameters()) == (3416 + 200) * d + 2 * per_block


def test_dropout_is_active_only_in_training():
    model = random_encoder(replace(SMALL, dropout=0.3))
    batch = packed(SEQUENCES)
    with torch.no_grad():
        training = [model.train()(batch) for _ in range(2)]
        evaluation = [model.eval()(batch) for _ in range(2)]
    assert not torch.equal(*training)
    assert torch.equal(*evaluation)


def test_each_branch_has_its_dropouts(monkeypatch):
    """On the embedding; per block on attention's output, and inside and after the feed-forward."""
    shapes = []

    def record(x: Tensor, rate: float) -> Tensor:
        shapes.append((x.shape[1], rate))
        return x

    for module in (encoder, transformer):
        monkeypatch.setattr(module, "dropout", record)
    for given, rate in ((None, 0.25), (0.5, 0.5)):
        shapes.clear()
        random_encoder(replace(SMALL, dropout=0.25, dropout_output=given)).train()(packed(SEQUENCES))
        assert shapes == [(12, 0.25), *[(12, rate), (48, 0.25), (12, 0.25)] * 2]
