"""Training steps as CUDA graphs: the loss of a batch and its gradients in one launch, recorded for each shape of batch.

A small step costs a GPU less than its launches. The optimizer is not in the graph: it is a launch or two, and the
learning rate stays a number of the program. Not run on a GPU yet.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sasrec_lab.data.batches import TrainingBatch, mapped

log = logging.getLogger(__name__)
MAX_SHAPES = 16  # each has gradients of its own on the device

Outputs = tuple[Tensor, tuple[Tensor | None, ...]]  # the loss, and the gradient of each parameter
Step = Callable[[], Outputs]
Record = Callable[[Step], tuple[Outputs, Callable[[], None]]]


class RecordedStep(NamedTuple):
    """A step that reads and writes the same memory whenever it is repeated."""

    inputs: list[Tensor]  # of a batch, in the order of its `tensors`
    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    repeat: Callable[[], None]


class CapturedSteps:
    """The loss of batches by recorded steps; of a shape that is not recorded, by `loss_of`.

    Batches must have segments. Only those with as many sequences as the first one are recorded, because the last one of
    an epoch, which may have fewer, is not worth it. After the first failure, whose reason is `fault`, none is used.
    """

    def __init__(self, loss_of: Callable[[TrainingBatch], Tensor], parameters: Sequence[nn.Parameter], record: Record):
        self.loss_of, self.parameters, self.record = loss_of, parameters, record
        self.sequences: int | None = None
        self.steps: dict[tuple[torch.Size, ...], RecordedStep] = {}
        self.fault: str | None = None

    def loss(self, batch: TrainingBatch) -> Tensor:
        """Return the loss of a batch, to call `backward` on."""
        tensors = batch.tensors()
        step = self._step_for(batch, tuple(tensor.shape for tensor in tensors))
        if step is None:
            return self.loss_of(batch)
        for place, tensor in zip(step.inputs, tensors, strict=True):
            place.copy_(tensor)
        step.repeat()
        loss: Tensor = _Repeated.apply(step, *self.parameters)
        return loss

    def _step_for(self, batch: TrainingBatch, shape: tuple[torch.Size, ...]) -> RecordedStep | None:
        assert batch.inputs.segments is not None
        self.sequences = self.sequences or batch.inputs.segments.sequences
        is_usual = batch.inputs.segments.sequences == self.sequences
        if shape not in self.steps and is_usual and not self.fault and len(self.steps) < MAX_SHAPES:
            try:
                self.steps[shape] = self._recorded(batch)
            except Exception as error:  # of a driver, a compiler or a library; training continues without
                self.steps.clear()
                self.fault = (str(error).strip().splitlines() or [type(error).__name__])[0]
                log.warning(f"capture failed, steps are launched one operation at a time: {self.fault}")
        return self.steps.get(shape)

    def _recorded(self, batch: TrainingBatch) -> RecordedStep:
        # without offsets and counts, which are on the CPU and would stay those of this batch
        batch = mapped(batch, torch.clone)
        inputs, labels = replace(batch.inputs, offsets=None), replace(batch.labels, counts=np.empty(0, np.int64))
        batch = replace(batch, inputs=inputs, labels=labels)
        device = batch.inputs.items.device

        def step() -> Outputs:
            with _autocast_without_cache(device):
                loss = self.loss_of(batch)
            with torch.autocast(device.type, enabled=False):  # as in Lightning's backward pass
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            return loss.detach(), gradients

        # dropout must not depend on which shapes are recorded, so that a resumed run draws as an uninterrupted one
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            (loss, gradients), repeat = self.record(step)
        return RecordedStep(batch.tensors(), loss, gradients, repeat)


class _Repeated(torch.autograd.Function):
    """The loss of a step that has just been repeated; its gradients are there already."""

    @staticmethod
    def forward(ctx: Any, step: RecordedStep, *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = step.gradients
        return step.loss.clone()  # the next step writes to the same memory

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return copies of the gradients, so that several batches can be accumulated."""
        scaled = iter(torch._foreach_mul([x for x in ctx.gradients if x is not None], grad_output))
        return None, *(None if gradient is None else next(scaled) for gradient in ctx.gradients)


def _autocast_without_cache(device: torch.device) -> torch.autocast:
    """Return the present autocast, without its copies of parameters, which a repeated step would not make again."""
    is_enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return torch.autocast(device.type, dtype, enabled=is_enabled, cache_enabled=False)


class GraphRecorder:
    """Record what functions launch as CUDA graphs that share memory: their results are kept, all else is reused."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, step: Step) -> tuple[Outputs, Callable[[], None]]:
        """Return the results of a step, and a function that launches it again, into the same results.

        No autograd graph of the parameters may be alive from an earlier step, or its stream would have to wait.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step()  # libraries prepare themselves, and kernels are compiled
            with _no_waiting():  # a clear error here, instead of one that breaks a recording
                step()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with _usable_afterwards(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            outputs = step()
        return outputs, graph.replay


@contextmanager
def _usable_afterwards() -> Iterator[None]:
    """Restore what a recording that fails leaves behind: its stream, and random numbers that only a graph may draw."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):
            yield
    except Exception:
        generator.graphsafe_set_state(generator.clone_state())
        raise


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError for operations that wait for the GPU, which cannot be recorded."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
