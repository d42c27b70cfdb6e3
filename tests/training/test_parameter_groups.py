"""Muon for the matrices of blocks against a reference by singular values, and a learning rate of the item tables."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from small_data import holdout_of, random_users
from small_trainer import small_trainer

from sasrec_lab.config.composition import load
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.errors import InputError
from sasrec_lab.training.lightning_module import SequentialRecommender
from sasrec_lab.training.optimizer import build_optimizer, learning_rate_factor, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")

HOLDOUT = holdout_of(random_users(0, users=60), maxlen=6)
SETTINGS = ["dataset=csv", "dataset.path=x.csv", "model=tiny", "model.maxlen=6", "batch_size=9", "optimizer.lr=.01"]


def config(*settings: str) -> TrainConfig:
    return load([*SETTINGS, *settings])


def model_of(cfg: TrainConfig) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender(HOLDOUT.num_items, cfg)


def fit(cfg: TrainConfig, folder: Path, epochs: int, ckpt: Path | None = None) -> SequentialRecommender:
    pl.seed_everything(0, verbose=False)
    model = SequentialRecommender(HOLDOUT.num_items, cfg)
    trainer = small_trainer(folder, epochs, limit_val_batches=0)
    trainer.fit(model, SequenceData(HOLDOUT, cfg), ckpt_path=ckpt, weights_only=True)
    return model


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Return five iterations of the quintic polynomial, applied to the singular values in double precision."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def test_groups_divide_the_parameters_and_plain_adam_has_none():
    plain = model_of(config())
    assert [id(x) for x in parameter_groups(plain.encoder, plain.cfg.optimizer)] == [
        id(x) for x in plain.encoder.parameters()
    ]
    cfg = config("optimizer.name=muon", "optimizer.lr_items=0.02", "model.share_items=false", "model=ligr")
    encoder = model_of(cfg).encoder
    rest, tables, matrices = parameter_groups(encoder, cfg.optimizer)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    assert {names[id(x)] for x in tables["params"]} == {"input_items.weight", "output_items.weight"}
    found = {names[id(x)].removeprefix("blocks.0.") for x in matrices["params"] if "blocks.0." in names[id(x)]}
    linear = ["query", "key", "value", "output", "attention_gate", "feed_forward_gate"]
    inner = [f"feed_forward.{name}" for name in ("gate", "inner", "outer")]
    assert found == {f"{name}.weight" for name in linear + inner}
    assert all(x.ndim == 2 for x in matrices["params"])
    assert sum(len(group["params"]) for group in (rest, tables, matrices)) == len(names)
    rates = [group["lr"] for group in build_optimizer(encoder, cfg.optimizer, {}).param_groups]
    assert rates == [0.01, 0.02, 0.01]


def test_muon_equals_the_reference_by_singular_values_and_adamw():
    cfg = config("optimizer.name=muon", "optimizer.weight_decay=0.1", "optimizer.lr=0.05")
    found, expected = model_of(cfg), model_of(cfg)
    optimizer = build_optimizer(found.encoder, cfg.optimizer, {})
    matrices = {id(x) for x in parameter_groups(found.encoder, cfg.optimizer)[-1]["params"]}
    pairs = list(zip(found.encoder.parameters(), expected.encoder.parameters(), strict=True))
    reference = torch.optim.AdamW(
        [other for mine, other in pairs if id(mine) not in matrices], lr=0.05, betas=(0.9, 0.98), weight_decay=0.1
    )
    momenta = {id(mine): torch.zeros_like(mine) for mine, _ in pairs}
    torch.manual_seed(1)
    for _ in range(3):
        for mine, other in pairs:
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, other in pairs:
            if id(mine) not in matrices:
                torch.testing.assert_close(mine, other)
                continue
            momentum = momenta[id(mine)] = 0.95 * momenta[id(mine)] + 0.05 * other.grad
            update = newton_schulz(0.05 * other.grad + 0.95 * momentum)
            size = 0.05 * 0.2 * max(mine.shape) ** 0.5
            with torch.no_grad():
                other.mul_(1 - 0.05 * 0.1).sub_(size * update.float())
                # torch's own iterations are in bfloat16
                assert (mine - other).norm() < 0.03 * size * update.norm()
                other.copy_(mine)


@pytest.mark.parametrize(
    "settings",
    [["optimizer.name=muon"], ["optimizer.lr_items=0.03"], ["optimizer.name=muon", "optimizer.lr_items=0.03"]],
    ids=["muon", "lr_items", "both"],
)
def test_resumed_training_equals_uninterrupted_training(settings, tmp_path):
    cfg = config(*settings, "optimizer.warmup_steps=9")
    whole = fit(cfg, tmp_path / "whole", 4)
    fit(cfg, tmp_path / "half", 2)
    resumed = fit(cfg, tmp_path / "half", 4, tmp_path / "half" / "last.ckpt")
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_table_of_items_learns_at_its_own_rate():
    """The first step of Adam moves each number by its learning rate."""
    cfg = config("optimizer.lr_items=0.5")
    model = model_of(cfg)
    before = [parameter.detach().clone() for parameter in model.encoder.parameters()]
    for parameter in model.encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    build_optimizer(model.encoder, cfg.optimizer, {}).step()
    for (name, now), old in zip(model.encoder.named_parameters(), before, strict=True):
        rate = 0.5 if name == "input_items.weight" else 0.01
        torch.testing.assert_close(old - now.detach(), torch.full_like(old, rate), rtol=1e-3, atol=0)


def test_schedules_are_the_literal_ones():
    schedules = {name: config(f"optimizer.schedule={name}").optimizer.schedule for name in ("linear", "flat_linear")}

    def factors(name: str) -> list[float]:
        return [learning_rate_factor(step, 2, 11, schedules[name]) for step in (0, 1, 2, 5, 8, 9, 10, 11, 20)]

    assert factors("linear") == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3, 2 / 9, 1 / 9, 0, 0])
    assert factors("flat_linear") == pytest.approx([0.5, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0])


def test_the_earlier_name_of_the_cosine_is_the_same_setting():
    old, new = config("optimizer.cosine=true"), config("optimizer.schedule=cosine")
    assert old == new
    assert (new.optimizer.schedule.name, new.optimizer.cosine) == ("cosine", True)
    assert config().optimizer.schedule.name == "constant"
    with pytest.raises(InputError) as caught:
        config("optimizer.cosine=true", "optimizer.schedule=linear")
    assert str(caught.value) == (
        "optimizer.cosine=true is the earlier name of optimizer.schedule=cosine, but optimizer.schedule=linear; set"
        " optimizer.cosine=false"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.blocks=0"], "optimizer.name=muon is for the matrices of blocks, which model.blocks=0 does not have"),
        (["model=gru4rec"], "optimizer.name=muon is for the matrices of blocks, which model.block=gru does not have"),
        (["optimizer.lr_items=0"], "optimizer.lr_items=0.0 must be above 0; use null for optimizer.lr"),
        (["optimizer.lr_items=.inf"], "optimizer.lr_items="),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError) as caught:
        config("optimizer.name=muon", *settings)
    assert str(caught.value).startswith(message)
