"""Captured training steps: on a CPU, with functions in the place of CUDA graphs and of attention in one launch.

What a GPU does with a graph is compared in tests/ops/test_cuda.py.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import MagicMock, Mock, create_autospec

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from small_data import holdout_of, random_users
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import to_plain
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.batches import TrainingBatch
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.model import transformer
from sasrec_lab.ops import attention, cross_entropy, library, lookup_loss, packed_attention, softmax_products
from sasrec_lab.run.resume import other_keys
from sasrec_lab.training import captured_steps
from sasrec_lab.training.captured_steps import CapturedSteps, Outputs, Step
from sasrec_lab.training.forms import capture_form, describe_forms
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.trainer import build_trainer

pytestmark = pytest.mark.usefixtures("one_thread")
MAXLEN = 6
HOLDOUT = holdout_of(random_users(seed=2, users=41, items=30), maxlen=MAXLEN)
CONFIGS = [
    [],
    ["model.heads=2", "model.blocks=1", "model.positions_from=oldest"],
    ["model.pos_emb=rope"],
    ["model=bert4rec"],
    ["model=ligr"],
    ["loss=bce"],
    ["loss=gbce", "loss.negatives=5"],
    ["loss=bpr"],
    ["loss=sampled_softmax", "loss.negatives=8"],
    ["loss=sampled_softmax_uniform", "loss.negatives=8"],
]
RDROP = ["loss.rdrop=2"]  # needs dropout, which most tests here have not
configs = pytest.mark.parametrize("words", CONFIGS, ids=" ".join)


@cache
def config(*words: str) -> TrainConfig:
    sizes = ["dataset=synthetic", "model.dim=8", f"model.maxlen={MAXLEN}", "batch_size=8", "capture=true"]
    return load([*sizes, *words])


def model_of(cfg: TrainConfig) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(HOLDOUT.num_items, cfg)


def batches_of(cfg: TrainConfig) -> list[TrainingBatch]:
    return list(SequenceData(HOLDOUT, cfg).train_dataloader())


@pytest.fixture(autouse=True)
def attention_in_one_launch(monkeypatch) -> None:
    """Have attention read nothing but the segments, as on a GPU."""

    def efficient(query, key, value, cu_seqlens_q, dropout_p, custom_mask_type, scale, max_seqlen_q, **_) -> Any:
        segments = torch.searchsorted(cu_seqlens_q, torch.arange(query.shape[1], device=query.device), right=True)
        is_visible = segments[:, None] == segments
        is_visible = is_visible.tril() if custom_mask_type else is_visible
        scores = torch.einsum("ihe,jhe->hij", query[0], key[0]) * scale
        weights = scores.masked_fill(~is_visible, float("-inf")).softmax(-1)
        weights = torch.nn.functional.dropout(weights, dropout_p)
        return torch.einsum("hij,jhe->ihe", weights, value[0])[None], None

    def attend(q, k, v, layout, heads, rate, *, causal, bias, decay) -> Tensor:
        assert (bias, decay) == (None, None)
        return packed_attention.packed_attention("efficient", q, k, v, layout, heads, rate, causal=causal)

    monkeypatch.setattr(packed_attention, "_overload", lambda name: efficient)
    monkeypatch.setattr(transformer, "attend", attend)


def record(step: Step) -> tuple[Outputs, Callable[[], None]]:
    """Return what a graph would: results, and a function that writes new ones to the same memory."""
    loss, gradients = step()
    memory = loss.clone(), [None if x is None else x.clone() for x in gradients]

    def repeat() -> None:
        new_loss, new_gradients = step()
        memory[0].copy_(new_loss)
        for place, gradient in zip(memory[1], new_gradients, strict=True):
            if place is not None:
                place.copy_(gradient)

    for place in (memory[0], *(x for x in memory[1] if x is not None)):
        place.fill_(float("nan"))  # recording a graph computes nothing
    return memory, repeat


def record_operations(step: Step) -> tuple[Outputs, Callable[[], None]]:
    """Return what a graph would, from a list of a step's operations: repeating it runs none of the code again."""
    operations = make_fx(step)()

    def repeated() -> tuple[Outputs, Callable[[], None]]:
        with torch.no_grad():
            return operations()

    return record(repeated)


def gradients(model: SequentialRecommender, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.encoder.parameters()), allow_unused=True)
    return [torch.zeros(()) if x is None else x for x in found]


# Segments


@configs
def test_segments_change_neither_loss_nor_gradient(words, monkeypatch):
    """By attention that reads the segments, and by a CPU's, which reads the offsets."""
    cfg = config("model.dropout=0", *words)
    model, batches = model_of(cfg), zip(batches_of(cfg), batches_of(replace(cfg, capture=False)), strict=True)
    attends = transformer.attend, attention.attend
    for i, (with_segments, plain) in enumerate(batches):
        assert len(with_segments.inputs.items) >= len(plain.inputs.items)
        monkeypatch.setattr(transformer, "attend", attends[i % 2])
        losses = [model.batch_loss(batch) for batch in (with_segments, plain)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        for found, expected in zip(*(gradients(model, loss) for loss in losses), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# Repeating


@configs
def test_captured_steps_equal_those_that_are_not(words):
    cfg = config("model.dropout=0", *words)
    model, batches = model_of(cfg), batches_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record)
    for batch in 2 * batches:
        loss, expected = steps.loss(batch), model.batch_loss(batch)
        assert torch.equal(loss, expected)
        for found, other in zip(gradients(model, 2 * loss), gradients(model, 2 * expected), strict=True):
            assert torch.equal(found, other)
    assert steps.fault is None
    full = [batch for batch in batches if len(batch.inputs.last) == 8]
    assert len(batches) > len(full)  # the last one is smaller
    shapes = {tuple(x.shape for x in batch.tensors()) for batch in full}
    assert steps.steps.keys() == shapes
    assert 1 <= len(shapes) <= len(full)


@pytest.mark.parametrize("words", [CONFIGS[i] for i in (0, 1, 5, 8)], ids=" ".join)
def test_operations_of_one_batch_serve_others_of_its_shape(words, monkeypatch):
    """No number of the batch that was recorded is among them, and no copy of its tensors."""
    monkeypatch.setattr(library, "supports", lambda *tensors: False)  # kernels are called with pointers
    for module in (cross_entropy, lookup_loss):  # as on a GPU
        monkeypatch.setattr(module, "scale_gradient", lambda gradient, factor: gradient * factor)
    cfg = config("model.dropout=0", *words)
    model = model_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record_operations)
    batches = [batch for batch in batches_of(cfg) if len(batch.inputs.last) == 8]
    for batch in batches:
        loss, expected = steps.loss(batch), model.batch_loss(batch)
        assert torch.equal(loss, expected)
        for found, other in zip(gradients(model, loss), gradients(model, expected), strict=True):
            assert torch.equal(found, other)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.add_(0.01)  # in place, as an optimizer does
    assert (steps.fault, len(steps.steps) < len(batches)) == (None, True)


def test_results_of_a_step_outlast_the_next_one():
    cfg = config("model.dropout=0")
    model, (batch, *_) = model_of(cfg), batches_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record)
    other = replace(batch, labels=replace(batch.labels, targets=batch.labels.targets.flip(0)))
    first, second = steps.loss(batch), steps.loss(other)
    assert torch.equal(first, model.batch_loss(batch))
    assert torch.equal(second, model.batch_loss(other))
    assert not torch.equal(first, second)
    second.backward()
    kept = [x.grad for x in model.encoder.parameters()]
    copies = [x.clone() for x in kept]
    steps.loss(batch).backward()  # accumulates
    assert all(not torch.equal(x, y) for x, y in zip(kept, copies, strict=True) if y.any())
    steps.loss(other)
    expected = [a + b for a, b in zip(copies, gradients(model, model.batch_loss(batch)), strict=True)]
    for found, each in zip(kept, expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-6, atol=1e-9)


def test_shapes_beyond_the_limit_are_not_captured(monkeypatch):
    monkeypatch.setattr(captured_steps, "MAX_SHAPES", 1)
    cfg = config("model.dropout=0")
    model = model_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record)
    for batch in batches_of(cfg):
        assert torch.equal(steps.loss(batch), model.batch_loss(batch))
    assert (len(steps.steps), steps.fault) == (1, None)


@pytest.mark.parametrize("words", [[], RDROP], ids=" ".join)
def test_recording_draws_no_random_numbers(words):
    cfg = config("model.dropout=0.5", *words)
    model, (batch, *_) = model_of(cfg), batches_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record)
    losses = []
    for loss_of in (steps.loss, steps.loss, model.batch_loss):
        torch.manual_seed(5)
        losses += [loss_of(batch).item(), loss_of(batch).item()]
    assert losses[:2] == losses[2:4] == losses[4:]
    assert losses[0] != losses[1]


def test_autocast_keeps_no_copies_of_parameters():
    cfg = config("model.dropout=0")
    model, (batch, *_) = model_of(cfg), batches_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record)
    with torch.autocast("cpu", torch.bfloat16):
        steps.loss(batch)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.mul_(1.5)
        found = steps.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.batch_loss(batch)
    assert torch.equal(found, expected)


# Failing


def failing(step: Step) -> Any:
    raise RuntimeError("operation not permitted\nwhile a stream is capturing")


def test_a_failure_is_reported_once_and_training_continues(caplog):
    calls = []

    def fail_later(step: Step) -> Any:
        calls.append(step)
        return record(step) if len(calls) == 1 else failing(step)

    cfg = config("model.dropout=0")
    model = model_of(cfg)
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), fail_later)
    for batch in batches_of(cfg):
        assert torch.equal(steps.loss(batch), model.batch_loss(batch))
    assert (len(calls), steps.steps, steps.fault) == (2, {}, "operation not permitted")
    (message,) = caplog.messages
    assert message == "capture failed, steps are launched one operation at a time: operation not permitted"


@pytest.mark.parametrize("breaks_at", [None, 2, 3])
def test_a_graph_is_recorded_after_two_steps_that_prepare(breaks_at, monkeypatch):
    """Without a GPU, by functions with the signatures of torch's: a failing step leaves the modes as they were."""
    cuda = create_autospec(torch.cuda)
    cuda.get_sync_debug_mode.return_value, cuda.current_device.return_value = 0, 0
    cuda.default_generators = [Mock()]
    cuda.stream.return_value, cuda.graph.return_value = MagicMock(), MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    modes = []

    def step() -> Outputs:
        modes.append([call.args[0] for call in cuda.set_sync_debug_mode.call_args_list][-1:])
        if len(modes) == breaks_at:
            raise RuntimeError("no")
        return torch.ones(()), (None,)

    recorder = captured_steps.GraphRecorder()
    if breaks_at is None:
        outputs, repeat = recorder(step)
        assert outputs == (torch.ones(()), (None,))
        assert repeat is cuda.CUDAGraph.return_value.replay
    else:
        with pytest.raises(RuntimeError, match="no"):
            recorder(step)
    assert modes == [[], ["error"], [0]][:breaks_at]
    assert cuda.set_sync_debug_mode.call_args.args == (0,)
    assert cuda.graph.call_count == (breaks_at != 2)
    assert cuda.default_generators[0].graphsafe_set_state.called == (breaks_at == 3)


@pytest.mark.parametrize("recorder", [record, failing])
def test_a_run_tries_a_step_before_it_trains(recorder, tmp_path):
    cfg = config()
    model = model_of(cfg)
    model.captured_steps = lambda: CapturedSteps(model.batch_loss, list(model.encoder.parameters()), recorder)
    trainer = build_trainer(replace(cfg, capture=False), tmp_path)
    form = describe_forms(trainer, model, SequenceData(HOLDOUT, cfg))["capture"]
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    model.on_train_start()
    if recorder is record:
        assert form == "a CUDA graph for each size of batch"
        assert model.captured is not None
    else:
        assert form == "failed, steps are launched one operation at a time: operation not permitted"
        assert model.captured is None


# Training


class Recorder(pl.Callback):
    """Count the steps that a training has captured, and mark the autograd nodes of each step."""

    captured = 0

    def on_before_backward(self, trainer: pl.Trainer, module: SequentialRecommender, loss: Tensor) -> None:
        for parameter in module.encoder.parameters():
            get_gradient_edge(parameter).node.metadata["step"] = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, module: SequentialRecommender) -> None:
        self.captured = len(module.captured.steps) if module.captured else 0


def trained(cfg: TrainConfig, folder: Any, counter: pl.Callback | None = None) -> SequentialRecommender:
    model = model_of(cfg)
    parameters = list(model.encoder.parameters())

    def record_alone(step: Step) -> tuple[Outputs, Callable[[], None]]:
        assert not any(get_gradient_edge(x).node.metadata for x in parameters), "the nodes of an earlier step are alive"
        return record(step)

    model.captured_steps = lambda: CapturedSteps(model.batch_loss, parameters, record_alone)
    flags = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": 2, "limit_val_batches": 0}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=counter, **flags, **quiet)
    # with dropout, other sizes of batches would draw other masks
    data = SequenceData(HOLDOUT, replace(cfg, capture=True) if cfg.model.dropout else cfg)
    trainer.fit(model, data)
    return model


@pytest.mark.parametrize(
    "words", [["model.dropout=0"], ["model.dropout=0.3", "loss=bce"], ["model.dropout=0.3", *RDROP]], ids=" ".join
)
def test_training_with_captured_steps_is_the_same(words, tmp_path):
    """Two epochs with clipped gradients of two batches at a time, and with dropout."""
    cfg, counter = config(*words), Recorder()
    captured, other = trained(cfg, tmp_path, counter), trained(replace(cfg, capture=False), tmp_path)
    assert counter.captured >= 1
    assert captured.captured is None  # its memory is free
    assert (capture_form(captured), capture_form(other)) == ("a CUDA graph for each size of batch", None)
    before = model_of(cfg).encoder
    pairs = zip(captured.encoder.parameters(), other.encoder.parameters(), before.parameters(), strict=True)
    for found, expected, start in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, start) or not start.any()


# Nothing that waits for the host


class OnDevice(TorchDispatchMode):
    """Fail at an operation with a tensor of the CPU among its inputs or results, which a graph cannot contain."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{function} with a tensor of the CPU"
        return result


@pytest.fixture
def gpu_without_numbers(monkeypatch) -> None:
    """Have the code take the device meta, whose tensors have shapes only, for a GPU.

    What depends on a number in a tensor fails there: .item(), .tolist(), bool(x), nonzero, unique, masks as indices.
    Torch's fake tensors on `cuda` would have no backward pass without a GPU.
    """
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    monkeypatch.setattr(softmax_products, "_import_triton_form", lambda: None)  # it needs numbers, once
    monkeypatch.setattr(torch, "autocast", lambda *x, **y: nullcontext())  # the device has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda *device: torch.bfloat16)


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.tolist, bool, Tensor.nonzero, Tensor.unique, lambda x: x[x > 0]])
def test_the_device_without_numbers_refuses_to_wait(wait, gpu_without_numbers):
    with pytest.raises(RuntimeError), OnDevice():
        wait(torch.ones(1, device="meta"))
    with pytest.raises(AssertionError, match="with a tensor of the CPU"), OnDevice():
        torch.from_numpy(np.ones(1)).to("meta")


@pytest.mark.parametrize("words", [*CONFIGS, RDROP], ids=" ".join)
def test_a_captured_step_does_not_wait_for_the_host(words, gpu_without_numbers):
    cfg = config(*words)
    model, batch = model_of(cfg), batches_of(cfg)[0].to("meta")
    model.encoder.to("meta")
    steps = CapturedSteps(model.batch_loss, list(model.encoder.parameters()), record)
    with OnDevice():
        loss = steps.loss(batch)
        loss.backward()
    assert steps.fault is None
    assert len(steps.steps) == 1
    for parameter in model.encoder.parameters():
        assert parameter.grad is None or parameter.grad.device.type == "meta"
    assert model.encoder.input_items.weight.grad is not None


# Refusing


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model=gru4rec"], "model.block=gru"),
        (["model=hstu"], "model.block=hstu"),
        (["model=fuxi"], "model.block=fuxi"),
        (["model.pos_emb=relative"], "model.pos_emb=relative"),
        (["model.time_bias=decay"], "model.time_bias=decay"),
        (["model=sasrec_rectools", "model.pad_keys=true"], "model.pad_keys=true"),
        (["loss=sampled_softmax", "loss.negatives=4", "loss.sampler=sequence"], "loss.sampler=sequence"),
        (["loss.exclude=history"], "loss.exclude=history"),
        (["loss=bce", "optimizer.name=rowwise_adam"], "optimizer.name=rowwise_adam"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_captured_is_refused(words, key):
    with pytest.raises(InputError) as caught:
        load([*words, "capture=true"])
    assert str(caught.value) == (
        f"capture=true repeats a step for other batches of the same size, but with {key} its operations depend on the"
        " lengths or the items of a batch; set capture=false"
    )


def test_runs_with_and_without_capture_are_the_same():
    """Also with the record of a version that lacks the key."""
    plain = to_plain(config())
    assert plain.pop("capture") is True
    assert other_keys(plain, to_plain(config("capture=false"))) == []


def test_models_without_steps_are_refused():
    with pytest.raises(InputError, match=r"^capture=true is for models trained in steps, which model=ease is not"):
        load(["model=ease", "capture=true"])
