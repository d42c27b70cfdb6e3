"""Record and log, as a run begins, the model, the machine, and the forms in which the run computes on its device."""

import logging

import pytorch_lightning as pl
import torch

from sasrec_lab.config.model import ModelConfig, PosEmb
from sasrec_lab.config.training import Exclude, LossConfig, LossName, SamplerName
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.ops import divergence, packed_attention, softmax_products
from sasrec_lab.ops.backend import choose_matmul
from sasrec_lab.run.machine import describe_machine
from sasrec_lab.run.record import RunRecord
from sasrec_lab.run.summary import kernel_change_warning, model_line
from sasrec_lab.training.lightning_module import SequentialRecommender

log = logging.getLogger(__name__)


def report_model(run: RunRecord, trainer: pl.Trainer, model: SequentialRecommender, data: SequenceData) -> None:
    """Record and log the model's size, the machine, and the forms in which both compute."""
    device = trainer.strategy.root_device
    matmul = choose_matmul(device, run.previous.get("matmul"))
    run.info |= describe_machine(device, matmul) | describe_forms(trainer, model, data)
    run.info["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    log.info(model_line(model.cfg, model.loss.describe(model.cfg.loss), run.info))
    if warning := kernel_change_warning(run.previous, run.info):
        log.warning(warning)


def describe_forms(trainer: pl.Trainer, model: SequentialRecommender, data: SequenceData) -> dict[str, str]:
    """Return the forms in the Trainer's precision, without those that the run does not have.

    With `capture=true` a step is tried on the first batch. If that fails, the model trains as without capture.
    """
    cfg = model.cfg
    if cfg.capture:
        _try_capture(trainer, model, data)
    forms = {
        "attention": attention_form(trainer, cfg.model),
        "softmax": softmax_form(trainer, cfg.model, cfg.loss),
        "capture": capture_form(model),
    }
    return {name: form for name, form in forms.items() if form is not None}


def attention_form(trainer: pl.Trainer, model: ModelConfig) -> str | None:
    """Return how a GPU will compute attention; None without a GPU or a softmax in attention."""
    device = trainer.strategy.root_device
    if device.type != "cuda" or not model.has_softmax:
        return None
    has_bias = model.pos_emb is PosEmb.relative or model.reads_times
    with trainer.precision_plugin.forward_context():
        return packed_attention.describe(device, model.dim // model.heads, has_bias)


def softmax_form(trainer: pl.Trainer, model: ModelConfig, loss: LossConfig) -> str | None:
    """Return who will compute the softmax of a loss; None for losses of a few items per position."""
    is_sampled = loss.name is LossName.sampled_softmax and loss.sampler in (SamplerName.shared, SamplerName.sequence)
    if loss.name is not LossName.softmax and not is_sampled:
        return None
    device, dim = trainer.strategy.root_device, model.dim + model.output_bias
    with trainer.precision_plugin.forward_context():
        dtype = packed_attention.computing_dtype(device, torch.get_default_dtype())
        if loss.rdrop:
            return divergence.describe(device, dtype)
        has_mask = loss.exclude is Exclude.history
        return softmax_products.describe(device, dtype, dim, is_sampled=is_sampled, has_mask=has_mask)


def capture_form(model: SequentialRecommender) -> str | None:
    """Return whether training steps are captured; None if the config does not ask for it."""
    if not model.cfg.capture:
        return None
    if model.capture_fault is None:
        return "a CUDA graph for each size of batch"
    return f"failed, steps are launched one operation at a time: {model.capture_fault}"


def _try_capture(trainer: pl.Trainer, model: SequentialRecommender, data: SequenceData) -> None:
    device = trainer.strategy.root_device
    batch = next(iter(data.train_dataloader())).to(device)
    with trainer.precision_plugin.forward_context(), torch.cuda.device_of(batch.inputs.items):
        steps = model.to(device).captured_steps()
        steps.loss(batch)
    model.capture_fault = steps.fault
    model.cpu()  # until training starts
