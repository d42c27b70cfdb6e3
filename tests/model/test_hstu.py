"""HSTU against a slow reference, in double precision: one user, one head and one pair of items at a time."""

import re
from dataclasses import replace
from itertools import product
from math import sqrt

import pytest
import torch
from commands import in_a_fresh_process
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
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import ModelConfig, PosEmb, PositionsFrom, TimeBias
from sasrec_lab.errors import InputError
from sasrec_lab.model import encoder, hstu
from sasrec_lab.model.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ["dataset=csv", "dataset.path=x.csv", "dataset.time=ts"]
DEFAULT, META = (load([*DATA, f"model={name}"]).model for name in ("hstu", "hstu_meta"))
SMALL = replace(DEFAULT, dim=12, maxlen=9, dropout=0.0)
TIMES, ASKED = random_times(SEQUENCES)
BATCH = timed(packed(SEQUENCES), TIMES, ASKED)
OTHERS = [
    {},
    {"position_bias": False},
    {"time_bias": TimeBias.none},
    {"time_bias": TimeBias.none, "position_bias": False},
    {"norm_affine": False, "divisor": 20.0, "positions_from": PositionsFrom.oldest},
    {"qk_dim": 2, "v_dim": 7},
    {"pos_emb": PosEmb.none, "final_norm": True, "scale_embeddings": False},
]


def reference_states(model: Encoder, items: list[int], times: list[int], asked: list[int], cfg: ModelConfig) -> Tensor:
    """Return the states (n, D) of one user, by the formulas of RecTools' STULayer."""
    p = dict(model.named_parameters())
    items = items[-cfg.maxlen :]
    n = len(items)
    x = p["input_items.weight"][[item - 1 for item in items]] * (sqrt(cfg.dim) if cfg.scale_embeddings else 1)
    if cfg.pos_emb is PosEmb.learned:
        places = range(n) if cfg.positions_from is PositionsFrom.oldest else range(n)[::-1]
        x = x + p["positions.weight"][list(places)]
    for number in range(cfg.blocks):
        own = {key.removeprefix(f"blocks.{number}."): value for key, value in p.items() if f"blocks.{number}." in key}
        x = layer(own, x, times, asked, cfg)
    return norm(p, "final_norm", x, cfg.final_norm_eps) if cfg.final_norm else x


def norm(own: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    deviation = x - x.mean(1, keepdim=True)
    normed = deviation / (deviation.pow(2).mean(1, keepdim=True) + eps).sqrt()
    return normed * own[f"{name}.weight"] + own[f"{name}.bias"] if f"{name}.weight" in own else normed


def layer(own: dict[str, Tensor], x: Tensor, times: list[int], asked: list[int], cfg: ModelConfig) -> Tensor:
    qk, wide = (width or cfg.dim // cfg.heads for width in (cfg.qk_dim, cfg.v_dim))
    mixed = norm(own, "input_norm", x) @ own["projection.weight"].T
    u, q, v, k = (mixed * torch.sigmoid(mixed)).split([cfg.heads * wide, cfg.heads * qk] * 2, 1)
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(cfg.heads):
            total = torch.zeros(wide, dtype=torch.double)
            for j in range(i + 1):
                score = q[i, h * qk : (h + 1) * qk] @ k[j, h * qk : (h + 1) * qk]
                if cfg.position_bias:
                    score = score + own["position_bias"][i - j]
                if cfg.time_bias is TimeBias.buckets:
                    score = score + own["time_bias"][time_bucket(asked[i] - times[j])]
                total = total + score * torch.sigmoid(score) * v[j, h * wide : (h + 1) * wide]
            heads.append(total / (cfg.divisor or cfg.maxlen))
        rows.append(torch.cat(heads))
    gated = u * norm(own, "output_norm", torch.stack(rows))
    return x + gated @ own["output.weight"].T + own["output.bias"]


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
    with torch.no_grad():
        every, newest = model(BATCH), model.newest(BATCH)
        torch.testing.assert_close(newest, model.head(every[BATCH.last]), rtol=0, atol=1e-12)
        single = model.float().newest(BATCH)
        torch.testing.assert_close(single.double(), newest, rtol=0, atol=1e-5)


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


def test_a_query_time_changes_the_state_of_its_token_only():
    model = random_encoder(replace(SMALL, blocks=1)).eval()
    later = [[*times[:-1], times[-1] + 10**9] for times in ASKED]
    with torch.no_grad():
        before, after = (states_of(model(timed(packed(SEQUENCES), TIMES, x)), SEQUENCES) for x in (ASKED, later))
    for one, changed in zip(before, after, strict=True):
        assert torch.equal(one[:-1], changed[:-1])
        assert (one[-1] - changed[-1]).abs().max() > 1e-6


def test_initial_values_are_those_of_rectools():
    """Xavier normal, with u, v, q and k as one matrix; biases of scores N(0, 0.02), that of the output nn.Linear's."""
    torch.manual_seed(0)
    model = Encoder(3000, replace(DEFAULT, dim=80, maxlen=500))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            assert (parameter == (1 if key.endswith("weight") else 0)).all(), key
        elif key.endswith("output.bias"):
            assert 0.9 / sqrt(80) < parameter.abs().max() <= 1 / sqrt(80), key
        else:
            std = 0.02 if key.endswith("_bias") else sqrt(2 / sum(parameter.shape))
            assert abs(parameter.std() / std - 1) < 5 / sqrt(2 * parameter.numel()), key


def test_initial_values_are_those_of_the_authors():
    torch.manual_seed(0)
    model = Encoder(3000, replace(META, dim=80, maxlen=500))
    truncated = sqrt(0.7737)  # variance of N(0, 1) between -2 and 2
    stds = {
        "input_items.weight": 0.02 * truncated,
        "positions.weight": truncated / sqrt(80),
        "projection.weight": 0.02,
        "output.weight": sqrt(2 / 160),  # Xavier uniform
        "output.bias": 1 / sqrt(80) / sqrt(3),
        "position_bias": 0.02,
        "time_bias": 0.02,
    }
    found = {key.removeprefix("blocks.0."): value for key, value in model.named_parameters() if "blocks.1" not in key}
    assert set(found) == set(stds)  # no norm has weights
    for key, std in stds.items():
        assert abs(found[key].std() / std - 1) < 5 / sqrt(2 * found[key].numel()), key
    assert found["input_items.weight"].abs().max() <= 0.04
    assert found["positions.weight"].abs().max() <= 2 / sqrt(80)


def test_number_of_parameters():
    """Of a block: four projections, the output with a bias, two norms, positions and 129 buckets."""
    d, model = 50, Encoder(3416, replace(DEFAULT, dim=50))
    per_block = 4 * d * d + (d * d + d) + 4 * d + 200 + 129
    assert sum(p.numel() for p in model.parameters()) == (3416 + 200) * d + 2 * per_block


def test_dropout_is_on_the_embedding_and_before_the_output(monkeypatch):
    shapes = []

    def record(x: Tensor, rate: float) -> Tensor:
        shapes.append((x.shape[1], rate))
        return x

    for module in (encoder, hstu):
        monkeypatch.setattr(module, "dropout", record)
    model = random_encoder(replace(SMALL, dropout=0.25, v_dim=5, heads=3))
    model.train()(BATCH)
    model.eval()(BATCH)
    assert shapes == [(12, 0.25), (15, 0.25), (15, 0.25), (12, 0.0), (15, 0.0), (15, 0.0)]


def test_equal_biases_act_as_a_shift_of_the_scores():
    """With one head, a constant added to every bucket is one added to every position's number."""
    model = random_encoder(replace(SMALL, blocks=1)).eval()
    block = model.blocks[0]
    block.time_bias.data.fill_(0.3)
    with torch.no_grad():
        by_time = model(BATCH)
        block.time_bias.data.zero_()
        block.position_bias.data.add_(0.3)
        torch.testing.assert_close(model(BATCH), by_time, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "model.norm=post": "model.norm=post does not apply to model.block=hstu; set it to pre",
        "model.causal=false objective=masked_items": (
            "model.causal=false does not apply to model.block=hstu; set it to true"
        ),
        "model.ff_dim=8": "model.ff_dim=8 does not apply to model.block=hstu; set it to null",
        "model.pos_emb=relative": (
            "model.pos_emb=relative does not go with model.block=hstu; set it to learned, sinusoidal or none: the bias"
            " by distance is model.position_bias=true there"
        ),
        "model.time_bias=decay": ("model.time_bias=decay does not go with model.block=hstu; use buckets or none"),
        "model.divisor=0": "model.divisor=0.0 must be above 0; use null for model.maxlen",
        "model.v_dim=0": "model.v_dim=0 must be at least 1",
        "tensorboard.attention_users=1": (
            "tensorboard.attention_users=1 draws the softmax of attention, which model.block=hstu does not have; set it"
            " to 0"
        ),
        "dataset.time=null": (
            "model.time_bias=buckets reads times, but dataset=csv has none; set dataset.time to the timestamps' column,"
            " or model.time_bias=none"
        ),
        "model=gru4rec model.time_bias=decay": ("model.time_bias=decay does not go with model.block=gru; use none"),
        "model=sasrec model.time_bias=buckets": (
            "model.time_bias=buckets does not go with model.block=transformer; use decay or none"
        ),
        "model=sasrec model.position_bias=true": (
            "model.position_bias=true only applies to model.block=hstu and fuxi; set it to false, or use"
            " model.pos_emb=relative"
        ),
        "model=sasrec model.init=meta": "model.init=meta only applies to model.block=hstu and fuxi; set it to normal",
        "model=sasrec model.time_bias=decay model.pad_keys=true": (
            "model.time_bias=decay requires model.pad_keys=false; set that, or model.time_bias=none"
        ),
        "model=bert4rec model.time_bias=decay": (
            "model.time_bias=decay requires model.causal=true; set that, or model.time_bias=none"
        ),
    }.items(),
)
def test_combinations_without_a_meaning_are_refused(words, message):
    with pytest.raises(InputError) as caught:
        load([*DATA, "model=hstu", *words.split()] if "model=" not in words else [*DATA, *words.split()])
    assert str(caught.value) == message


def test_the_presets_differ_in_the_keys_that_their_headers_name():
    changed = {name for name, value in vars(META).items() if value != getattr(DEFAULT, name)}
    assert changed == {"positions_from", "norm_affine", "divisor", "init"}
    losses = [load([*DATA, f"model={name}"]).loss for name in ("hstu", "hstu_meta")]
    assert [(x.name.name, x.negatives, x.sampler.name) for x in losses] == [
        ("sampled_softmax", 128, "uniform"),
        ("sampled_softmax", 128, "others"),
    ]
    assert load([*DATA, "model=hstu_meta", "loss=softmax"]).loss.name.name == "softmax"


def test_a_cosine_is_divided_by_the_temperature():
    model = random_encoder(SMALL).eval()
    with torch.no_grad():
        scores = model.newest(BATCH) @ model.item_table.T
        states = model(BATCH)[BATCH.last]
        expected = F.cosine_similarity(states[:, None], model.output_items.weight[None], dim=2) / 0.05
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_training_and_lists_work_in_fresh_processes(tmp_path):
    words = ["dataset=synthetic", "dataset.synthetic.users=60", "dataset.synthetic.items=40", "model=hstu"]
    words += ["model.dim=8", "model.maxlen=12", "model.heads=2", "trainer=cpu", "trainer.max_epochs=2"]
    done = in_a_fresh_process("sasrec_lab.train", tmp_path)(*words, "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^Test: last item of 5\d users, asked at the target's own time, ranked", done.stdout, re.M)
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    assert state["encoder.blocks.1.time_bias"].shape == (129,)
    lists = in_a_fresh_process("sasrec_lab.recommend", tmp_path)("run=run", "users=all", "k=3", "output=lists.csv")
    assert (lists.returncode, lists.stderr) == (0, "")
    assert re.fullmatch(
        r"wrote 60 lists to lists.csv, asked at 202\d-\d\d-\d\d \d\d:\d\d:\d\d, the newest time of the histories;"
        r" query_time=\.\.\. sets another\n",
        lists.stdout,
    )
