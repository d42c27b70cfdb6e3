"""The encoder against the padded reference model, and the compiled block against the plain one."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import sqrt

import numpy as np
import pytest
import torch
from reference_model import PaddedSASRec, left_padded, no_dropout, reference_of, sinusoid, to_padded
from small_data import random_users
from small_models import ITEMS, SEQUENCES, packed, random_encoder, states_of
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import Activation, Init, ModelConfig, Norm, PosEmb, PositionsFrom
from sasrec_lab.data.batches import MASK, Labels, PackedBatch
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.ops import block, buckets, library
from sasrec_lab.ops import dropout as dropout_module
from sasrec_lab.ops.dropout import keep_probability
from sasrec_lab.training.losses import ItemTable, softmax

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULT = load(["dataset=csv", "dataset.path=x.csv"]).model  # model=sasrec
SOFTMAX = load(["dataset=csv", "dataset.path=x.csv"]).loss
SMALL = replace(DEFAULT, dim=12, maxlen=9, dropout=0.0)


def labels_of(inputs: PackedBatch, targets: list[list[int]]) -> Labels:
    """Return the labels of the `maxlen` newest items of each sequence, none for dummies."""
    flat = np.concatenate([labels[-9:] for labels in targets])
    padded = np.pad(flat, (0, len(inputs.items) - len(flat)))
    return Labels(torch.from_numpy(padded), counts=np.diff(inputs.offsets))


# The padded reference model


def combinations() -> list[dict]:
    """Return every norm with every kind of position, heads and blocks; the other keys one by one, and at random."""
    grid = [
        {"norm": norm, "pos_emb": pos_emb, "heads": heads, "blocks": count}
        for norm, pos_emb, heads, count in product(Norm, PosEmb, (1, 2), range(4))
    ]
    switches = {
        "output_projection": True,
        "scale_embeddings": False,
        "residual": False,
        "final_norm": False,
        "embedding_norm": True,
        "share_items": False,
        "activation": Activation.gelu,
        "causal": False,
        "ff_dim": 5,
        "norm_eps": 1e-3,
        "final_norm_eps": 1e-3,
    }
    grid += [{key: value, "norm": norm} for (key, value), norm in product(switches.items(), Norm)]
    grid += [{"pad_keys": True, "heads": heads, "blocks": count} for heads, count in product((1, 4), (1, 3))]
    grid += [
        {"positions_from": PositionsFrom.oldest, "pos_emb": pos_emb, "causal": causal}
        for pos_emb, causal in product((PosEmb.learned, PosEmb.sinusoidal), (True, False))
    ]
    grid += [
        {"pos_emb": pos_emb, "causal": False, "heads": heads, "norm": norm}
        for pos_emb, heads, norm in product((PosEmb.rope, PosEmb.relative), (1, 2), (Norm.pre, Norm.post))
    ]
    random = np.random.default_rng(0)
    for _ in range(40):
        chosen = {key: value for key, value in switches.items() if random.random() < 0.5}
        grid.append({**grid[random.integers(3 * len(PosEmb) * 2 * 4)], **chosen})
    return grid


def name(changes: dict) -> str:
    return " ".join(f"{key}={getattr(value, 'name', value)}" for key, value in changes.items())


def assert_same_states(
    model: Encoder, cfg: ModelConfig, within: float, dropout: Callable[[Tensor], Tensor] = no_dropout
) -> tuple[Tensor, Tensor, PaddedSASRec]:
    """Compare the states of all real tokens; return the packed ones, the padded ones and the reference model."""
    reference = reference_of(model, cfg, dropout)
    batch, rows = packed(SEQUENCES), left_padded(SEQUENCES, cfg.maxlen)
    states, padded = model(batch), reference(rows)
    expected = padded[rows > 0]
    states = states[: len(expected)]
    torch.testing.assert_close(states, expected, rtol=within, atol=within)
    torch.testing.assert_close(states[batch.last], padded[:, -1], rtol=within, atol=within)
    if dropout is no_dropout:
        torch.testing.assert_close(model.newest(batch), padded[:, -1], rtol=within, atol=within)
    return states, expected, reference


def assert_same_gradients(model: Encoder, reference: PaddedSASRec, within: float) -> None:
    theirs = dict(reference.named_parameters())
    # relative to the largest gradient too, because that of a key's bias is rounding errors only
    largest = max(p.grad.norm() for p in theirs.values() if p.grad is not None)
    parameters = {key: p for key, p in model.named_parameters() if key != "mask"}  # no input has a mask
    assert parameters.keys() == theirs.keys()
    for key, parameter in parameters.items():
        if parameter.grad is None:  # unused, such as an output table without a loss
            assert theirs[key].grad is None, key
            continue
        difference = (to_padded(key, parameter.grad) - theirs[key].grad).norm()
        assert difference <= within * (theirs[key].grad.norm() + largest / 100), key


@pytest.mark.parametrize("changes", combinations(), ids=name)
def test_states_and_gradients_equal_the_padded_reference(changes):
    cfg = replace(SMALL, **changes)
    model = random_encoder(cfg)
    states, expected, reference = assert_same_states(model, cfg, 1e-9)
    weights = torch.randn_like(states)
    (states * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(model, reference, 1e-9)


@pytest.mark.parametrize("norm", list(Norm))
def test_single_precision_equals_the_padded_reference(norm):
    cfg = replace(SMALL, norm=norm)
    torch.manual_seed(0)
    model = Encoder(ITEMS, cfg)
    states, expected, reference = assert_same_states(model, cfg, 1e-5)
    weights = torch.randn_like(states)
    (states * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(model, reference, 1e-4)


@pytest.mark.parametrize("share_items", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_training_step_equals_the_padded_reference(seed, share_items):
    """Packed tokens and the fast loss against padded rows, all logits and a cross_entropy that ignores target 0."""
    cfg = replace(SMALL, share_items=share_items, output_projection=True)
    torch.manual_seed(seed)
    model = Encoder(ITEMS, cfg)
    reference = reference_of(model, cfg)
    users = [items for items in random_users(seed, items=ITEMS) if len(items) >= 2]
    inputs, targets = [items[:-1] for items in users], [items[1:] for items in users]
    batch = packed(inputs)
    labels = labels_of(batch, targets)
    loss = softmax(model(batch), ItemTable(model.item_table), labels, None, SOFTMAX)
    logits = reference.scores(reference(left_padded(inputs, cfg.maxlen)))
    expected = F.cross_entropy(logits.flatten(0, 1), left_padded(targets, cfg.maxlen).flatten() - 1, ignore_index=-1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(model, reference, 1e-4)


# What a state depends on


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("changed", [1, 4, 8])
def test_a_later_item_leaves_earlier_states_unchanged(norm, changed):
    model = random_encoder(replace(SMALL, norm=norm))
    with torch.no_grad():
        items = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        before = model(packed([[3, 4], items, [5]]))
        items[changed] = 15
        after = model(packed([[3, 4], items, [5]]))
    same = [*range(2 + changed), 11]
    assert torch.equal(before[same], after[same])
    assert (before[2 + changed : 11] - after[2 + changed : 11]).abs().amax(1).min() > 1e-6


def test_a_users_states_do_not_depend_on_the_other_users():
    model = random_encoder(SMALL)
    with torch.no_grad():
        together = states_of(model(packed(SEQUENCES)), SEQUENCES)
        for items, states in zip(SEQUENCES, together, strict=True):
            torch.testing.assert_close(states_of(model(packed([items])), [items])[0], states, rtol=0, atol=1e-12)
        backwards = states_of(model(packed(SEQUENCES[::-1])), SEQUENCES[::-1])
    for one, other in zip(together, backwards[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_positions_count_from_the_newest_item():
    model = random_encoder(replace(SMALL, blocks=0))  # so that a state depends on its own item and position only
    with torch.no_grad():
        long, suffix, prefix = states_of(
            model(packed([[1, 2, 3, 4, 5], [3, 4, 5], [1, 2, 3]])), [[0] * 5, [0] * 3, [0] * 3]
        )
    assert torch.equal(long[2:], suffix)
    assert not torch.isclose(long[:3], prefix).any()


def test_positions_from_the_oldest_keep_the_states_of_a_prefix():
    batch = packed([[7], [1, 2, 3, 4, 5], [3, 4, 5]])
    assert batch.positions_from_oldest()[:9].tolist() == [0, 0, 1, 2, 3, 4, 0, 1, 2]
    assert not batch.positions_from_oldest()[9:].any()
    model = random_encoder(replace(SMALL, positions_from=PositionsFrom.oldest))
    users = [[1, 2, 3, 4, 5], [3, 4, 5], [1, 2, 3]]
    with torch.no_grad():
        long, suffix, prefix = states_of(model(packed(users)), users)
    torch.testing.assert_close(long[:3], prefix, rtol=0, atol=1e-12)
    assert not torch.isclose(long[2:], suffix).any()


@pytest.mark.parametrize("norm", list(Norm))
def test_without_positions_a_prefix_keeps_its_states(norm):
    model = random_encoder(replace(SMALL, norm=norm, pos_emb=PosEmb.none))
    prefixes = [[1, 2, 3, 4, 5][:n] for n in range(1, 6)]
    with torch.no_grad():
        batch = packed(prefixes)
        torch.testing.assert_close(model.newest(batch), model(batch)[10:15], rtol=0, atol=1e-12)


def test_order_matters_only_by_positions_and_causality():
    without = random_encoder(replace(SMALL, pos_emb=PosEmb.none, blocks=1))
    learned = random_encoder(replace(SMALL, blocks=1))
    batch = packed([[1, 2, 3, 4], [3, 1, 2, 4]])
    with torch.no_grad():
        one, other = without.newest(batch)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        one, other = learned.newest(batch)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [7, 12])
def test_sinusoids(dim):
    table = Encoder(ITEMS, replace(SMALL, dim=dim, pos_emb=PosEmb.sinusoidal)).sinusoids
    expected = torch.tensor([sinusoid(position, dim) for position in range(9)])
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


# The compiled block

needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
# several groups of sequences, and lengths that are multiples of neither a tile of queries nor a register
LONG_USERS = [
    [1 + i * j % ITEMS for j in range(length)] for i, length in enumerate([1, 2, 90, 3, 5, 48, 17, 16, 40, 6, 7])
]


def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows by one for each block that the kernel computes."""
    calls, call = [], block._block_kernel
    monkeypatch.setattr(block, "_block_kernel", lambda *arguments: calls.append(True) or call(*arguments))
    return calls


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"residual": False}, {"output_projection": True}, {"ff_dim": 70}], ids=name)
@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("dim", [7, 16, 50, 64])
def test_a_compiled_block_equals_the_plain_one(dim, norm, changes, monkeypatch):
    calls = block_calls(monkeypatch)
    model = random_encoder(replace(SMALL, dim=dim, norm=norm, maxlen=90, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=dim**-0.5)
    batch = packed(LONG_USERS, 90)
    with torch.no_grad():
        every, newest = model(batch), model.newest(batch)  # double precision has no kernel
        assert not calls
        model.float()
        torch.testing.assert_close(
            model(batch)[: batch.offsets[-1]].double(), every[: batch.offsets[-1]], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model.newest(batch).double(), newest, rtol=0, atol=1e-5)
    assert len(calls) == 4


@needs_compiler
@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 4},
        {"activation": Activation.gelu},
        {"activation": Activation.swiglu},
        {"pad_keys": True},
        {"dropout": 0.5},
        {"causal": False},
        {"pos_emb": PosEmb.rope},
        {"pos_emb": PosEmb.relative},
    ],
    ids=name,
)
def test_other_blocks_are_computed_without_the_kernel(changes, monkeypatch):
    calls = block_calls(monkeypatch)
    model = Encoder(ITEMS, replace(SMALL, **changes)).train("dropout" in changes)
    with torch.no_grad():
        model(packed(SEQUENCES))
    assert not calls


@needs_compiler
@pytest.mark.parametrize("norm", list(Norm))
def test_nan_in_a_compiled_block_stays_in_its_sequence(norm):
    model = Encoder(ITEMS, replace(SMALL, norm=norm, maxlen=90)).eval()
    model.input_items.weight.data[ITEMS - 1, 3] = torch.nan
    users = [[1, 2, 3], [4, ITEMS, 5], [6], [7, ITEMS]]
    with torch.no_grad():
        one, other, third, fourth = states_of(model(packed(users)), users)
        newest = model.newest(packed(users))
    assert torch.cat([one, third, newest[[0, 2]]]).isfinite().all()
    assert torch.cat([other[1:], fourth[1:], newest[[1, 3]]]).isnan().all()


@needs_compiler
def test_autocast_leaves_a_compiled_block_in_float32():
    model = Encoder(ITEMS, SMALL).eval()
    with torch.no_grad():
        expected = model.newest(packed(SEQUENCES))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model.newest(packed(SEQUENCES)), expected, rtol=0, atol=0)


# Parameters


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("share_items", [True, False])
def test_the_loss_reaches_every_parameter(norm, share_items):
    # GELU, because some ReLUs have no gradient
    cfg = replace(
        SMALL, norm=norm, share_items=share_items, output_projection=True, heads=3, activation=Activation.gelu
    )
    model = random_encoder(cfg).float()
    users = [[*range(1, 10)], [*range(10, 19)], [19, 20, 1, 2]]
    batch = packed(users)
    labels = labels_of(batch, [[*items[1:], 5] for items in users])
    softmax(model(batch), ItemTable(model.item_table), labels, None, SOFTMAX).backward()
    for key, parameter in model.named_parameters():
        if key.endswith("key.bias"):  # adds the same to all scores of a query, which the softmax ignores
            assert parameter.grad.abs().max() < 1e-6
        else:
            rows = parameter.grad if parameter.ndim > 1 else parameter.grad[:, None]
            assert rows.abs().amax(1).min() > 0, key


def test_one_item_table_or_two():
    shared, apart = (Encoder(ITEMS, replace(SMALL, share_items=share)) for share in (True, False))
    assert shared.item_table is shared.input_items.weight
    assert apart.item_table is apart.output_items.weight
    assert apart.item_table.shape == apart.input_items.weight.shape == (ITEMS, 12)
    assert not torch.equal(apart.item_table, apart.input_items.weight)
    extra = sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters())
    assert extra == ITEMS * 12


def test_the_papers_number_of_parameters():
    """d = 50, 3,416 items, 200 positions; a block has Q, K, V and two d x d layers with biases, and two norms."""
    model = Encoder(3416, replace(DEFAULT, dim=50))
    per_block = 5 * (50 * 50 + 50) + 2 * 100
    assert sum(p.numel() for p in model.parameters()) == (3416 + 200) * 50 + 2 * per_block + 100


@pytest.mark.parametrize("init", [init for init in Init if init is not Init.meta])  # of HSTU
def test_initial_values(init):
    torch.manual_seed(0)
    model = Encoder(3000, replace(DEFAULT, dim=80, maxlen=500, init=init, ff_dim=160, output_projection=True))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            assert (parameter == (1 if key.endswith("weight") else 0)).all()
        elif key.endswith("bias"):
            if init is Init.torch or (init is Init.xavier_packed and "feed_forward" in key):  # nn.Linear's own
                bound = 1 / sqrt(160 if "outer" in key else 80)
                assert 0.9 * bound < parameter.abs().max() <= bound
            else:
                assert not parameter.any()
        else:
            is_packed = init in (Init.xavier_packed, Init.normal_packed)
            is_packed = is_packed and any(part in key for part in ("query", "key", "value"))
            std = 0.02 if init in (Init.normal, Init.normal_packed) else sqrt(2 / sum(parameter.shape))
            if is_packed:
                std = sqrt(2 / (3 * 80 + 80))  # for one matrix (240, 80)
            is_uniform = init is Init.xavier_uniform or (is_packed and init is Init.normal_packed)
            if init is Init.torch:
                is_uniform = "items" not in key and "positions" not in key
                std = 1 / sqrt(3 * parameter.shape[1]) if is_uniform else 1
            assert abs(parameter.std() / std - 1) < 5 / sqrt(2 * parameter.numel()), key
            assert abs(parameter.mean() / std) < 5 / sqrt(parameter.numel()), key
            largest = parameter.abs().max() / std
            assert largest <= sqrt(3) + 1e-6 if is_uniform else largest > 3


# Dropout


@pytest.mark.parametrize(
    "others", [{}, {"dropout_output": 0.3}, {"dropout_output": 0.3, "dropout_inner": 0.0, "norm": Norm.post}]
)
def test_dropout_is_where_the_authors_have_it(monkeypatch, others):
    """A mask of the elements' own digits replaces chance, in the reference model too."""

    def mask_by_digits(x: Tensor, rate: float) -> Tensor:
        assert rate == 0.3
        return ((x * 997.3).floor() % 3 > 0).to(x.dtype)

    cfg = replace(SMALL, dropout=0.3, heads=2, output_projection=True, **others)
    model = random_encoder(cfg)
    for module in (buckets, dropout_module):
        monkeypatch.setattr(module, "keep_mask", mask_by_digits)
    reference_dropout = lambda x: x * mask_by_digits(x, 0.3) / keep_probability(0.3)  # noqa: E731
    states, expected, reference = assert_same_states(model.train(), cfg, 1e-9, reference_dropout)
    weights = torch.randn_like(states)
    (states * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(model, reference, 1e-9)


@pytest.mark.parametrize("place", ["attention", "input"])
def test_dropout_can_be_off_in_one_place(monkeypatch, place):
    def mask_by_digits(x: Tensor, rate: float) -> Tensor:
        assert rate == 0.3
        return ((x * 997.3).floor() % 3 > 0).to(x.dtype)

    calls = 0

    def reference_dropout(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        is_off = x.shape[-1] == SMALL.maxlen if place == "attention" else calls == 1  # weights are (B, L, L)
        return x if is_off else x * mask_by_digits(x, 0.3) / keep_probability(0.3)

    cfg = replace(SMALL, dropout=0.3, heads=2, **{f"dropout_{place}": 0.0})
    model = random_encoder(cfg)
    for module in (buckets, dropout_module):
        monkeypatch.setattr(module, "keep_mask", mask_by_digits)
    assert_same_states(model.train(), cfg, 1e-9, reference_dropout)


def test_rates_of_dropout_that_are_null_are_that_of_dropout():
    given = {"dropout": 0.4, "dropout_attention": 0.4, "dropout_input": 0.4}
    states = []
    for cfg in (replace(SMALL, dropout=0.4), replace(SMALL, **given), replace(SMALL, **given | {"dropout": 0.1})):
        model = random_encoder(cfg).train()
        torch.manual_seed(1)
        states.append(model(packed(SEQUENCES)))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_token_dropout_omits_whole_items_in_training_only():
    """What is left of an item without a vector is its position."""
    cfg = replace(SMALL, blocks=0, final_norm=False, token_dropout=0.25)
    model, batch = random_encoder(cfg), packed([[*range(1, 10)]] * 200)
    with torch.no_grad():
        whole, part = model.eval()(batch), model.train()(batch)
        positions = model.positions.weight[batch.positions]
    is_omitted = (part == positions).all(1)
    assert torch.equal(part[~is_omitted], whole[~is_omitted])
    assert 0.2 < is_omitted.double().mean() < 0.3


def test_dropout_of_items_is_one_mask_for_inputs_and_scores():
    """Without blocks and positions a state is its item's vector, so states are rows of the table of a step."""
    cfg = replace(SMALL, blocks=0, final_norm=False, scale_embeddings=False, pos_emb=PosEmb.none, dropout_items=0.25)
    model, batch = random_encoder(cfg).train(), packed([[*range(1, ITEMS + 1)]])
    weights = model.input_items.weight
    zeros = 0
    for _ in range(50):
        states, table = model.states_and_table(batch)
        assert torch.equal(states, table[batch.items - 1])
        is_zero = table == 0
        assert torch.allclose(table, torch.where(is_zero, 0, weights / 0.75))
        (gradient,) = torch.autograd.grad((states.sum() + table.square()).sum(), weights)
        assert torch.equal(gradient == 0, is_zero)
        zeros += int(is_zero.sum())
    assert 0.2 < zeros / (50 * weights.numel()) < 0.3
    first, second = model.states_and_table(batch, passes=2)[0]
    assert torch.equal(first, second)
    assert torch.equal(model.item_vectors(), weights)
    assert torch.equal(model.eval()(batch), weights[batch.items - 1])


def test_dropout_of_items_is_also_that_of_the_mask():
    cfg = replace(SMALL, blocks=0, final_norm=False, scale_embeddings=False, pos_emb=PosEmb.none, dropout_items=0.5)
    model = random_encoder(replace(cfg, causal=False))
    items = packed([[3, 1, 5, 1]])
    batch = replace(items, items=torch.where(items.items == 1, MASK, items.items))
    assert torch.equal(model.eval()(batch)[1], model.mask[0])
    first, second = (model.train()(batch)[[1, 3]] for _ in range(2))
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(first[0], torch.where(first[0] == 0, 0, 2 * model.mask[0]))


def test_dropout_is_active_only_in_training():
    model = random_encoder(replace(SMALL, dropout=0.2))
    batch = packed(SEQUENCES)
    with torch.no_grad():
        training = [model.train()(batch) for _ in range(2)]
        evaluation = [model.eval()(batch) for _ in range(2)]
        model.rate = 0.0
        for each in model.blocks:
            each.attention_rate = each.feed_forward.inner_rate = each.feed_forward.rate = 0.0
        without = model.train()(batch)
    assert not torch.equal(*training)
    assert torch.equal(*evaluation)
    assert torch.equal(evaluation[0], without)
    assert all(not torch.equal(states, without) for states in training)


def test_the_encoder_has_no_padding_item():
    """Its first item is a row like any other, and items that do not occur get a gradient of zero."""
    model = random_encoder(SMALL)
    batch = packed([[1, 2, 3], [2, 4, 4, 4, 4]])
    model(batch)[:8].sum().backward()
    used = model.input_items.weight.grad.abs().sum(1) > 0
    assert used.nonzero().flatten().tolist() == [0, 1, 2, 3]
