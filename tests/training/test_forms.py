"""Descriptions of the forms in which a run computes."""

import pytest
import torch

from sasrec_lab.config.composition import load
from sasrec_lab.ops import library, packed_attention, softmax_products
from sasrec_lab.training.forms import attention_form, softmax_form
from sasrec_lab.training.trainer import build_trainer


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["model.dim=48", "model.heads=2"], (torch.float32, 24, False)),
        (["trainer.precision=bf16-mixed"], (torch.bfloat16, 64, False)),
        (["model.pos_emb=relative"], (torch.float32, 64, True)),
        (["model=gru4rec"], None),
        (["model=hstu"], None),
        (["model.time_bias=decay"], (torch.float32, 64, True)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_attention_is_described_for_precision_and_width(words, asked, monkeypatch, tmp_path):
    def described(device: torch.device, width: int, has_bias: bool) -> tuple:
        assert device.type == "cuda"
        is_half = torch.is_autocast_enabled("cpu")  # the Trainer's own device
        return torch.get_autocast_dtype("cpu") if is_half else torch.get_default_dtype(), width, has_bias

    monkeypatch.setattr(packed_attention, "describe", described)
    cfg = load(["model.dim=64", "trainer.accelerator=cpu", *words])
    trainer = build_trainer(cfg, tmp_path)
    assert attention_form(trainer, cfg.model) is None  # on a CPU
    monkeypatch.setattr(trainer.strategy, "_parallel_devices", None, raising=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("cuda"))
    assert attention_form(trainer, cfg.model) == asked


HALF_FORM = "CPU kernel" if softmax_products.has_bf16_products() else "torch, in chunks"


@pytest.mark.parametrize(
    ("words", "form"),
    [
        ([], "CPU kernel"),
        (["loss.exclude=history"], "CPU kernel"),
        (["loss.rdrop=1"], "torch and a CPU kernel"),
        (["loss.rdrop=1", "trainer.precision=bf16-mixed"], "torch and a CPU kernel"),
        (["loss=sampled_softmax"], "CPU kernel"),
        (["trainer.precision=bf16-mixed"], HALF_FORM),
        (["trainer.precision=bf16-mixed", "loss.exclude=history"], HALF_FORM),
        (["loss=bce"], None),
        (["loss=sampled_softmax", "loss.sampler=uniform"], None),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
@pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
def test_the_softmax_of_a_cpu_is_described(words, form, monkeypatch, tmp_path):
    cfg = load(["trainer.accelerator=cpu", *words])
    trainer = build_trainer(cfg, tmp_path)
    assert softmax_form(trainer, cfg.model, cfg.loss) == form
    monkeypatch.setattr(library, "supports", lambda *tensors: False)
    assert softmax_form(trainer, cfg.model, cfg.loss) == (form and "torch, in chunks")


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["model.output_bias=true"], (1, 65, torch.float32, False, False)),
        (["loss=sampled_softmax", "trainer.precision=bf16-mixed"], (1, 64, torch.bfloat16, True, False)),
        (["loss.exclude=history"], (1, 64, torch.float32, False, True)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_triton_is_asked_for_the_width_and_type_of_the_states(words, asked, monkeypatch, tmp_path):
    calls = []

    def triton_form(states, table, dtype, is_sampled, has_mask):
        calls.append((*states.shape, dtype, is_sampled, has_mask))
        return len(calls) == 1 or None

    monkeypatch.setattr(softmax_products, "_triton_form", triton_form)
    monkeypatch.setattr(library, "supports", lambda *tensors: False)
    cfg = load(["model.dim=64", "trainer.accelerator=cpu", *words])
    trainer = build_trainer(cfg, tmp_path)
    found = [softmax_form(trainer, cfg.model, cfg.loss) for _ in range(2)]
    assert found == ["Triton kernels", "torch, in chunks"]
    assert calls == [asked] * 2
