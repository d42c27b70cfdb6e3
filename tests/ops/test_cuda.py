"""The CUDA path. With a GPU: its numbers against the CPU's, and the commands.

Without a GPU, if torch is a CUDA build: no operation mixes devices, by torch's fake tensors, which have a shape and a
device but no numbers.
"""

import gc
import json
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from small_data import holdout_of, hourly, random_users
from timed_layouts import layout_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sasrec_lab.config.composition import load
from sasrec_lab.config.model import QueryTime
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import EvaluationBatch, Labels, Negatives, PackedBatch, TrainingBatch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.evaluation.ranks import sampled_ranks
from sasrec_lab.ops import attention, ranking
from sasrec_lab.ops.buckets import bucketed_attention
from sasrec_lab.ops.divergence import two_pass_cross_entropy
from sasrec_lab.ops.dropout import dropout
from sasrec_lab.ops.layout import BatchLayout, Segments
from sasrec_lab.ops.packed_attention import MAX_ERROR, OPERATORS, choose, packed_attention
from sasrec_lab.ops.pointwise import attend_pointwise, attend_pointwise_newest
from sasrec_lab.ops.ranking import Scores, top_k_items
from sasrec_lab.ops.relative_sums import relative_sums, relative_sums_newest
from sasrec_lab.ops.time_buckets import NUM_BUCKETS
from sasrec_lab.training.lightning_module import SequentialRecommender

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
CONFIGS = [
    [],
    ["model.heads=2"],
    ["model.blocks=0"],
    ["model.norm=pre", "model.pos_emb=sinusoidal"],
    ["model.pos_emb=rope"],
    ["model.heads=2", "model.pos_emb=relative"],
    ["model=bert4rec"],
    ["model=bert4rec", "model.pos_emb=relative"],
    ["model=ligr", "model.heads=2", "model.positions_from=oldest"],
    ["model=sasrec_rectools", "model.pad_keys=true"],
    ["loss=bce"],
    ["loss=gbce", "loss.negatives=5"],
    ["loss=sampled_softmax", "loss.negatives=8"],
    ["loss=sampled_softmax", "loss.negatives=8", "optimizer.name=rowwise_adam"],
    ["loss=sampled_softmax", "loss.negatives=8", "loss.sampler=uniform"],
    ["evaluation.sampled=5"],
    ["model.time_bias=decay"],
    ["model=ligr", "model.heads=2", "model.time_bias=decay", "model.pos_emb=relative"],
    ["model=hstu", "model.heads=2"],
    ["model=hstu_meta"],
    ["model=hstu", "model.time_bias=none", "model.position_bias=false"],
    ["model=fuxi", "model.heads=2"],
]
configs = pytest.mark.parametrize("overrides", CONFIGS, ids=" ".join)
# These need a GPU: torch's GRU and the losses of sequences read sizes from memory
READ_BACK = [
    ["model=gru4rec", "model.blocks=2"],
    ["loss=sampled_softmax", "loss.negatives=8", "loss.sampler=sequence"],
    ["loss.exclude=history"],
]
CAPTURED = [
    [],
    ["model.heads=2", "model.norm=pre", "model.pos_emb=sinusoidal"],
    ["model.pos_emb=rope"],
    ["model=bert4rec"],
    ["model=ligr", "model.heads=2", "model.positions_from=oldest"],
    ["loss=bce"],
    ["loss=gbce", "loss.negatives=5"],
    ["loss=bpr"],
    ["loss=sampled_softmax", "loss.negatives=8"],
    ["loss=sampled_softmax", "loss.negatives=8", "loss.sampler=uniform"],
]
captured_configs = pytest.mark.parametrize("overrides", CAPTURED, ids=" ".join)
all_configs = pytest.mark.parametrize("overrides", [*CONFIGS, *READ_BACK], ids=" ".join)
FakedBatch = TrainingBatch | EvaluationBatch | PackedBatch | Labels | Negatives | Segments
TINY = ["dataset=synthetic", "dataset.synthetic.users=300", "dataset.synthetic.items=60", "model=tiny"]


USERS = random_users(seed=1)
HOLDOUT = holdout_of(USERS, times=hourly(USERS), query_time=QueryTime.target)


def job(overrides: list[str]) -> TrainConfig:
    return load(["dataset=synthetic", "model.maxlen=50", *overrides])


def model_of(overrides: list[str]) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(HOLDOUT.num_items, job(overrides))


def batches_of(overrides: list[str]) -> tuple[TrainingBatch, EvaluationBatch]:
    cfg = job(overrides)
    data = SequenceData(HOLDOUT, cfg)
    return next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))


@needs_gpu
@all_configs
def test_losses_and_gradients_equal_the_cpus(overrides):
    model, (batch, _) = model_of(["model.dropout=0", *overrides]), batches_of(overrides)
    there = deepcopy(model).cuda()
    for each, own in ((model, batch), (there, batch.to("cuda"))):
        optimizer = each.configure_optimizers()["optimizer"]
        each.batch_loss(own).backward()
        optimizer.step()
        optimizer.zero_grad()
        each.batch_loss(own).backward()
    torch.testing.assert_close(there.train_loss.compute().cpu(), model.train_loss.compute(), rtol=1e-5, atol=0)
    for (name, expected), parameter in zip(model.encoder.named_parameters(), there.encoder.parameters(), strict=True):
        gradients = (x.grad.to_dense().cpu() for x in (parameter, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@needs_gpu
@all_configs
def test_states_of_the_newest_items_equal_the_cpus(overrides):
    model, (_, batch) = model_of(overrides), batches_of(overrides)
    there = deepcopy(model).cuda().eval()
    with torch.no_grad():
        expected, states = model.eval().scores(batch).states, there.scores(batch.to("cuda")).states
    torch.testing.assert_close(states.cpu(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_gpu
@pytest.mark.parametrize("losses", [["loss=softmax"], ["loss=gbce", "loss.negatives=5"]], ids=" ".join)
def test_bfloat16_losses_and_gradients_are_close(losses):
    model, (batch, _) = model_of(["model.dropout=0", *losses]), batches_of(losses)
    there = deepcopy(model).cuda()
    model.batch_loss(batch).backward()
    with torch.autocast("cuda", torch.bfloat16):
        loss = there.batch_loss(batch.to("cuda"))
    loss.backward()
    torch.testing.assert_close(there.train_loss.compute().cpu(), model.train_loss.compute(), rtol=0.01, atol=0)
    pairs = zip(there.encoder.named_parameters(), model.encoder.parameters(), strict=True)
    norms = {name: (x.grad.cpu() - own.grad).norm() / own.grad.norm().clamp(min=0.02) for (name, x), own in pairs}
    assert max(norms.values()) < 0.1, norms  # the gradient of a key's bias is zero


@needs_gpu
@pytest.mark.parametrize("at_once", [2**26, 2**14])
def test_ranks_and_lists_equal_the_cpus(at_once, monkeypatch):
    """Products of integers are exact on both; all items at once and in blocks."""
    monkeypatch.setitem(ranking.MAX_SCORES_PER_BLOCK, "cuda", at_once)
    monkeypatch.setitem(ranking.ITEMS_PER_BLOCK, "cuda", at_once // 32)
    random = torch.Generator().manual_seed(0)
    states, table = (torch.randint(-9, 10, shape, generator=random).float() for shape in ((70, 16), (9000, 16)))
    rows = torch.randint(70, (500,), generator=random).sort().values
    seen, targets = (torch.randint(1, 9001, (count,), generator=random) for count in (500, 70))
    counts, lists = [], []
    for device in ("cpu", "cuda"):
        s, t, r, i, wanted = (x.to(device) for x in (states, table, rows, seen, targets))
        counts.append(Scores(s, t).count_not_below_target(wanted, r, i).cpu())
        best = top_k_items(s, t, 10, r, i)
        lists.append((best.items.cpu(), best.scores.cpu()))
    assert torch.equal(*counts)
    assert torch.equal(lists[0][0], lists[1][0])
    assert torch.equal(lists[0][1], lists[1][1])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 25, 32, 50, 64, 128, 256])
def test_an_operator_computes_attention_in_one_launch(dtype, width):
    assert choose(torch.device("cuda", 0), dtype, width).operator == next(
        name for name, operator in OPERATORS.items() if dtype in operator.dtypes
    )


@needs_gpu
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (64, 2), (50, 1), (10, 5)])
@pytest.mark.parametrize("lengths", [[1], [200, 0, 3], list(range(1, 60))], ids=["one", "long", "many"])
def test_packed_attention_is_the_bucketed_one(name, causal, dim, heads, lengths):
    dtype = OPERATORS[name].dtypes[0]
    layout, plain = (
        BatchLayout(np.append(0, np.cumsum(own)), sum(lengths) + 9, torch.device("cuda"))
        for own in (lengths, [length for length in lengths if length])
    )
    x = torch.randn(3, layout.num_tokens, dim, device="cuda").to(dtype).requires_grad_().unbind()
    out = packed_attention(name, *x, layout, heads, 0.0, causal=causal)
    exact = bucketed_attention(*(each.double() for each in x), plain.buckets, heads, 0.0, causal=causal)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, x, grad), torch.autograd.grad(exact, x, grad.double())
    for found, expected in ((out, exact), *zip(*gradients, strict=True)):
        assert not found[sum(lengths) :].any()
        assert (found.double() - expected.double()).norm() < MAX_ERROR[dtype] * expected.double().norm()


@needs_gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_packed_attention_drops_weights_at_the_rate(name):
    """Equal scores, and values that are the identity: each output is a weight, 1 / (64 * 0.8) if it is kept."""
    layout = BatchLayout(np.arange(0, 64 * 257, 64), 64 * 256, torch.device("cuda"))
    values = torch.eye(64, device="cuda", dtype=OPERATORS[name].dtypes[0]).repeat(256, 1)
    out = packed_attention(name, torch.zeros_like(values), values, values, layout, 1, 0.2, causal=False).float()
    assert float((out > 0).float().mean()) == pytest.approx(0.8, abs=5e-3)
    assert out[out > 0].mean().item() == pytest.approx(1 / (64 * 0.8), rel=1e-2)


@needs_gpu
@pytest.mark.parametrize("form", ["decay", "pointwise", "sums"])
def test_attention_by_time_equals_the_cpus(form):
    layout, found = layout_of([200, 1, 33]), []
    there = replace(
        layout, device=torch.device("cuda"), times=layout.times.cuda(), query_times=layout.query_times.cuda()
    )
    random = torch.Generator().manual_seed(0)
    shapes = (layout.num_tokens, 64), (layout.num_tokens, 64), (layout.num_tokens, 64), (1, 200), (NUM_BUCKETS,), (2,)
    given = [torch.rand(shape, generator=random) for shape in shapes]
    for own in (layout, there):
        *x, bias, table, decay = (each.to(own.device).requires_grad_() for each in given)
        newest = own.offsets_tensor.to(own.device)[1:] - 1
        if form == "decay":
            out = attention.attend(*x, own, 2, 0.0, bias=bias, decay=decay)
            of_newest = attention.attend_newest_to(x[0][newest], *x[1:], own, 2, bias=bias, decay=decay)
        elif form == "sums":
            out = torch.cat(relative_sums(x[2], own, bias[0], table), 1)
            of_newest = torch.cat(relative_sums_newest(x[2], own, bias[0], table), 1)
        else:
            out = attend_pointwise(*x, own, 2, 200.0, bias[0], table)
            of_newest = attend_pointwise_newest(x[0][newest], *x[1:], own, 2, 200.0, bias[0], table)
        used = [*x, bias, decay if form == "decay" else table]
        grads = torch.autograd.grad(out.square().sum(), used, allow_unused=True, materialize_grads=True)
        found.append([each.cpu() for each in (out, of_newest, *grads)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@needs_gpu
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_keeps_the_mean(rate):
    dropped = dropout(torch.ones(2**20, device="cuda"), rate)
    assert float(dropped.mean()) == pytest.approx(1, abs=5e-3)
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=5e-3)


@needs_gpu
def test_the_loss_of_two_passes_equals_the_cpus():
    torch.manual_seed(0)
    states, table = torch.randn(2, 70, 8), torch.randn(30, 8)
    targets, weights = torch.randint(0, 30, (70,)), torch.rand(70)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in (states, table)]
        loss = two_pass_cross_entropy(*inputs, targets.to(device), weights.to(device), 1.5)
        found.append([x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, inputs))])
    for expected, result in zip(*found, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@needs_gpu
@captured_configs
def test_captured_steps_equal_those_launched_one_by_one(overrides):
    cfg = job(["model.dropout=0", "batch_size=8", "capture=true", *overrides])
    model = model_of(["model.dropout=0", *overrides]).cuda()
    steps, batches = model.captured_steps(), list(SequenceData(HOLDOUT, cfg).train_dataloader())
    for batch in (batch.to("cuda") for batch in 2 * batches):
        results = []
        for loss_of in (steps.loss, model.batch_loss):
            loss = loss_of(batch)
            gradients = torch.autograd.grad(loss, list(model.encoder.parameters()), allow_unused=True)
            results.append((loss.detach(), *gradients))
            del loss  # with its graph, which would be alive when the next step is recorded
        for found, expected in zip(*results, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (steps.fault, len(steps.steps) > 0) == (None, True)


@needs_gpu
@pytest.mark.parametrize("words", [[], ["loss.rdrop=2"]], ids=" ".join)
def test_a_captured_step_drops_other_weights_each_time(words):
    cfg = job(["model.dropout=0.5", "batch_size=8", "capture=true", *words])
    model = model_of(["model.dropout=0.5", *words]).cuda()
    steps, batch = model.captured_steps(), next(iter(SequenceData(HOLDOUT, cfg).train_dataloader())).to("cuda")
    losses = []
    for loss_of in (steps.loss, steps.loss, model.batch_loss):
        torch.manual_seed(3)  # as when an epoch begins
        losses.append([loss_of(batch).item() for _ in range(3)])
    assert len(set(losses[0])) == 3
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["capture=true"],
        ["capture=true", "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", "optimizer.ema=0.9"],
        ["trainer.gradient_clip_val=1"],
        ["trainer.precision=bf16-mixed"],
        ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", "optimizer.ema=0.9"],
        ["trainer.deterministic=true"],
    ],
    ids=" ".join,
)
def test_the_commands_train_and_recommend_on_a_gpu(flags, train_command, recommend_command, tmp_path):
    settings = ["optimizer.lr=0.01", "trainer.max_epochs=15", "hydra.run.dir=run"]
    done = train_command(*TINY, *settings, *flags, "trainer.accelerator=gpu", "trainer.devices=1")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["metrics"]["test/ndcg@10"] > 1.2 * written["baselines"]["popularity"]["test/ndcg@10"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["device"].startswith("cuda")
    lists = {}
    for device in ("cuda", "cpu"):
        done = recommend_command("run=run", "users=all", f"output={device}.csv", f"device={device}")
        assert done.returncode == 0, done.stderr
        lists[device] = np.genfromtxt(tmp_path / f"{device}.csv", delimiter=",", names=True)
    np.testing.assert_allclose(lists["cuda"]["score"], lists["cpu"]["score"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_test_every_user_once(train_command, tmp_path):
    done = train_command(*TINY, "hydra.run.dir=run", "trainer.max_epochs=2", "trainer=gpu", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    ranks = np.load(tmp_path / "run" / "ranks.npz")
    held_out = json.loads((tmp_path / "run" / "metrics.json").read_text())["protocol"]["held_out_users"]
    assert len(set(ranks["user"])) == len(ranks["user"]) == held_out


@pytest.fixture
def kept_garbage():
    """Leave what a test made to the end of the process: torch 2.13 crashes if Python collects fake tensors' graphs."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@needs_cuda_build
@pytest.mark.usefixtures("kept_garbage")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("operator", [None, *OPERATORS])
@configs
def test_no_operation_mixes_devices(overrides, operator, monkeypatch):
    """Batches move to the GPU, and everything they meet up to a loss, a score and a rank is there as well.

    Without a GPU torch cannot run the backward pass of fake tensors, nor shapes that depend on numbers.
    """
    monkeypatch.setattr(attention, "operator_for", lambda *inputs: operator)  # fake tensors cannot be compared
    batch, held_out = batches_of(overrides)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device("cuda"):
            model = model_of(overrides)
        batch, held_out = fake(batch, mode), fake(held_out, mode)
        loss = model.batch_loss(batch)
        assert loss.is_cuda
        with torch.no_grad():
            scores = model.eval().scores(held_out)
            assert scores._count_at_once(held_out.targets, held_out.seen_rows, held_out.seen_items).is_cuda
            if held_out.candidates is not None:
                assert sampled_ranks(scores, held_out).is_cuda


@needs_cuda_build
@pytest.mark.usefixtures("kept_garbage")
@pytest.mark.parametrize("operator", OPERATORS)
@captured_configs
def test_a_captured_step_needs_nothing_of_the_host(overrides, operator, monkeypatch):
    """Tensors that are not on the GPU are refused, and so is what depends on numbers; the optimizer's step too.

    The backward pass is in tests/training/test_captured_steps.py, on a device without numbers.
    """
    monkeypatch.setattr(attention, "operator_for", lambda *inputs: operator)
    overrides = [*overrides, "capture=true"]
    batch, _ = batches_of(overrides)
    with FakeTensorMode() as mode:
        with torch.device("cuda"):
            model = model_of(overrides)
        batch = fake(batch, mode)
        batch = replace(batch, inputs=replace(batch.inputs, offsets=None), labels=replace(batch.labels, counts=None))
        loss = model.batch_loss(batch)
        assert loss.is_cuda
        for parameter in model.encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model.configure_optimizers()["optimizer"].step()


def fake(batch: FakedBatch, mode: FakeTensorMode) -> FakedBatch:
    """Return the batch as `batch.to("cuda")` would."""
    there = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            there[field.name] = mode.from_tensor(value).to("cuda")
        elif isinstance(value, (PackedBatch, Labels, Negatives, Segments)):
            there[field.name] = fake(value, mode)
    return replace(batch, **there)
