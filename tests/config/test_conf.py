"""Every file of conf/ composes and is valid; a mistake gives one line with the nearest existing name."""

import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from sasrec_lab.config.checks import TRAINER_FLAGS
from sasrec_lab.config.command_line import check_command_line, grid_jobs
from sasrec_lab.config.composition import load
from sasrec_lab.config.convert import completed, flatten, to_plain
from sasrec_lab.config.dataset import SyntheticConfig, WeightConfig
from sasrec_lab.config.overrides import format_override, normalize
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.errors import InputError


def names_in(group: str) -> list[str]:
    folder = Path(CONF_DIR) / group
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


@cache
def composed(*words: str) -> TrainConfig:
    """Return the typed config for these overrides, composed once; no test changes it."""
    return load(list(words))


GROUPS = ("model", "objective", "loss", "trainer", "experiment", "ablation", "dross", "sweep")


@pytest.mark.parametrize(
    "override",
    [f"{group}={name}" for group in GROUPS for name in names_in(group)],
)
def test_every_file_composes(override):
    composed(override, *(["model.causal=false"] if override == "objective=masked_items" else []))


def test_experiment_headers_name_protocol_and_command():
    for name in names_in("experiment"):
        header = (Path(CONF_DIR) / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
        assert f"# Command: python -m sasrec_lab.train experiment={name}" in header
        assert "# Protocol: " in header


def test_the_paper_preset_turns_later_additions_off():
    cfg = composed("experiment=sasrec_paper/ml_1m")
    optimizer = cfg.optimizer
    assert (optimizer.name.name, optimizer.lr, optimizer.betas) == ("adam", 1e-3, [0.9, 0.98])
    assert (optimizer.weight_decay, optimizer.warmup_steps, optimizer.cosine, optimizer.ema) == (0, 0, False, None)
    assert cfg.trainer["gradient_clip_val"] is None
    assert (cfg.model.dim, cfg.model.blocks, cfg.model.heads, cfg.model.maxlen, cfg.model.dropout) == (
        50,
        2,
        1,
        200,
        0.2,
    )
    assert (cfg.loss.name.name, cfg.loss.negatives, cfg.evaluation.sampled, cfg.evaluation.draw.name) == (
        "bce",
        1,
        100,
        "paper",
    )


@pytest.mark.parametrize("name", [name for name in names_in("experiment") if name.startswith("sasrec_paper/")])
def test_every_row_of_an_ablation_has_its_published_cell(name):
    cfg = composed(f"experiment={name}")
    assert set(names_in("ablation")) <= set(cfg.published.cells)
    assert cfg.published.dataset == cfg.dataset.name


@pytest.mark.parametrize("name", [name for name in names_in("experiment") if name.startswith("dross/")])
def test_rows_of_turning_dross_have_model_loss_and_cell(name):
    rows = {row: load([f"experiment={name}", f"dross={row}"]) for row in names_in("dross")}
    assert {row: (cfg.row, cfg.objective.name.name, cfg.loss.name.name) for row, cfg in rows.items()} == {
        "sasrec": ("sasrec", "next_item", "bce"),
        "sasrec_plus": ("sasrec_plus", "next_item", "softmax"),
        "sasrec_plus_3000": ("sasrec_plus_3000", "next_item", "sampled_softmax"),
        "bert4rec": ("bert4rec", "masked_items", "softmax"),
        "gru4rec": ("gru4rec", "next_item", "softmax"),
    }
    (published,) = {tuple(cfg.published.cells) for cfg in rows.values()}
    assert set(rows) - set(published) <= {"gru4rec"}
    own = {cfg.evaluation.patience: cfg.trainer["max_epochs"] for cfg in rows.values()}
    assert own == {10: 100, 20: 200}
    assert composed(f"experiment={name}") == rows["sasrec_plus"]  # what the experiment is without a row


def test_a_model_with_a_loss_of_its_own_chooses_it():
    for word, loss, model in (("gsasrec", "gbce", "transformer"), ("esasrec", "sampled_softmax", "ligr")):
        cfg = composed(f"model={word}")
        assert (cfg.loss.name.name, cfg.loss.sampler.name, cfg.loss.negatives) == (loss, "uniform", 256)
        assert cfg.model.block.name == model
        assert load([f"model={word}", "loss=bce"]).loss.name.name == "bce"


def test_bert4rec_chooses_its_objective_in_sweeps_too():
    jobs = check_command_line(["-m", "model=sasrec,bert4rec", "loss=softmax,bce"]).jobs
    assert [job.cfg.objective.name.name for job in jobs] == 2 * ["next_item"] + 2 * ["masked_items"]


def test_an_ablation_changes_one_key_of_any_experiment():
    without = flatten(to_plain(load(["experiment=sasrec_paper/beauty", "dataset=synthetic"])))
    changed = {}
    for name in names_in("ablation"):
        cfg = flatten(to_plain(load(["experiment=sasrec_paper/beauty", "dataset=synthetic", f"ablation={name}"])))
        assert cfg["row"] == name
        changed[name] = {key: value for key, value in cfg.items() if value != without[key] and key != "row"}
    assert changed == {
        "default": {},
        "no_pos_emb": {"model/pos_emb": "none"},
        "unshared_items": {"model/share_items": False},
        "no_residual": {"model/residual": False},
        "no_dropout": {"model/dropout": 0.0},
        "blocks_0": {"model/blocks": 0},
        "blocks_1": {"model/blocks": 1},
        "blocks_3": {"model/blocks": 3},
        "heads_2": {"model/heads": 2},
    }


def test_ablations_apply_to_other_blocks_or_name_the_key():
    refused = {
        "blocks_0": "model.blocks=0 must be at least 1 for model.block=gru",
        "heads_2": "model.heads=2 does not apply to model.block=gru; set it to 1",
        "no_residual": "model.residual=false does not apply to model.block=gru; set it to true",
    }
    for name in names_in("ablation"):
        load(["model=ligr", f"ablation={name}"])
        if name in refused:
            with pytest.raises(InputError) as caught:
                load(["model=gru4rec", f"ablation={name}"])
            assert str(caught.value) == refused[name]
        else:
            load(["model=gru4rec", f"ablation={name}"])


@pytest.mark.parametrize("word", names_in("loss"))
def test_a_record_without_a_sampler_has_the_usual_one(word):
    recorded = to_plain(composed(f"loss={word}"))
    old = recorded | {"loss": {key: value for key, value in recorded["loss"].items() if key != "sampler"}}
    usual = {"softmax": "none", "sampled_softmax": "shared", "bce": "unseen", "gbce": "uniform", "bpr": "unseen"}
    assert completed(old) == recorded | {"loss": recorded["loss"] | {"sampler": usual[recorded["loss"]["name"]]}}


def test_trainer_flags_are_those_of_lightning():
    import pytorch_lightning as pl

    from sasrec_lab.config.checks import _MANAGED_FLAGS

    real = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert set(TRAINER_FLAGS) | set(_MANAGED_FLAGS) == real


MISTAKES = {
    "objective=masked_items": (
        "objective=masked_items needs a model that also attends to later items: model.causal=false; use model=bert4rec,"
        " or objective=next_item"
    ),
    "objective.mask_share=0.3": (
        "objective.mask_share=0.3 only applies to objective=masked_items; use model=bert4rec, or remove it"
    ),
    "objective.mask=0.3": "unknown key 'objective.mask'; did you mean objective.mask_share?",
    "objective.replace=mixed": (
        "objective.replace=mixed only applies to objective=masked_items; use model=bert4rec, or remove it"
    ),
    "model.head=2": "model.head=2 must be package.module:Name; did you mean model.heads?",
    "+model.head=2": "model.head=2 must be package.module:Name; did you mean model.heads?",
    "modle.dim=2": "unknown key 'modle.dim'; did you mean model.dim?",
    "model.dim=abc": "model.dim=abc must be an integer",
    "model.pos_emb=learnt": (
        "model.pos_emb=learnt is not one of learned, sinusoidal, rope, relative, none; did you mean learned?"
    ),
    "model.causal=false": (
        "objective=next_item would be given away by model.causal=false, which attends to later items; use"
        " objective=masked_items, or model.causal=true"
    ),
    "model.block=ligr": "model.norm=sasrec must be pre for model.block=ligr; set it to pre",
    "model={pos_emb: rope, heads: 64}": (
        "model.pos_emb=rope rotates pairs of columns, so model.dim=64 / model.heads=64 must be even"
    ),
    "model={pos_emb: rope, pad_keys: true}": (
        "model.pos_emb=rope does not go with model.pad_keys=true; set model.pad_keys=false, or model.pos_emb=learned"
    ),
    "model={pos_emb: relative, pad_keys: true}": (
        "model.pos_emb=relative does not go with model.pad_keys=true; set model.pad_keys=false, or"
        " model.pos_emb=learned"
    ),
    "model={pos_emb: none, positions_from: oldest}": (
        "model.positions_from=oldest only applies to pos_emb=learned and sinusoidal; set it to newest for pos_emb=none"
    ),
    "model={positions_from: oldest, pad_keys: true}": "model.positions_from=oldest requires model.pad_keys=false",
    "model.heads=3": "model.dim=64 is not a multiple of model.heads=3; use heads 1, 2, 4, 8, 16, 32, 64",
    "model.maxlen=0": "model.maxlen=0 must be at least 1",
    "model.dropout=1": "model.dropout=1.0 must be at least 0 and below 1",
    "model=sasrecc": (
        f"model=sasrecc does not exist; did you mean sasrec? (model is one of: {', '.join(names_in('model'))})"
    ),
    "loss=nothing": f"loss=nothing does not exist (loss is one of: {', '.join(names_in('loss'))})",
    "loss.negatives=5": (
        "loss.negatives=5 must be 0 for loss=softmax, which scores every item; set it to 0, or use loss=sampled_softmax"
    ),
    "loss.sampler=usual": (
        "loss.sampler=usual is not one of none, shared, sequence, unseen, uniform, others; a sampler of your own is"
        " package.module:Name"
    ),
    "loss.calibration=.5": "loss.calibration=0.5 only applies to loss=gbce; set it to 0 for loss=softmax",
    "loss.calibration=2": "loss.calibration=2.0 must be from 0 to 1",
    "optimizer.name=rowwise_adam": (
        "optimizer.name=rowwise_adam is for losses that touch few rows of the item table, not for loss=softmax;"
        " use adam, or loss=sampled_softmax"
    ),
    "optimizer.lr=0": "optimizer.lr=0.0 must be above 0",
    "optimizer.ema=1": "optimizer.ema=1.0 must be above 0 and below 1; use null for no averaging",
    "trainer.max_epoch=3": "unknown key 'trainer.max_epoch'; did you mean trainer.max_epochs?",
    "+trainer.max_epoch=3": "trainer.max_epoch is not a Lightning Trainer flag; did you mean max_epochs?",
    "trainer.profiler=simple": (
        "unknown key 'trainer.profiler': it is a Lightning Trainer flag that the config does not set;"
        " add it as +trainer.profiler=..."
    ),
    "+trainer.logger=false": (
        "trainer.logger cannot be set: train.py manages it: choose trackers as in logger=[tensorboard,wandb]"
    ),
    "trainer.logger=": (
        "unknown key 'trainer.logger': train.py manages it: choose trackers as in logger=[tensorboard,wandb]"
    ),
    "optimizer.lr=inf": "optimizer.lr=inf must be a finite number",
    "optimizer.weight_decay=inf": "optimizer.weight_decay=inf must be a finite number",
    "trainer.max_epochs=abc": "trainer.max_epochs=abc must be an integer of at least 1, or -1 for no limit",
    "evaluation.monitor=val/ndgc@10": (
        "evaluation.monitor=val/ndgc@10 is not measured at evaluation.k=[5, 10, 20] and evaluation.sampled=0;"
        " set evaluation.monitor=val/ndcg@10, for example"
    ),
    "logger=[]": "logger has no choice; write logger=... (logger is one of: csv, mlflow, none, tensorboard, wandb)",
    "dataset=csv": "dataset.path has no value; set it on the command line (dataset.path=...) or in a config file",
    "dataset.separator=''": (
        "dataset.separator='' must be text without quotes and line ends; set the text between columns, such as ',' or"
        " '\\t'"
    ),
    "dataset.weight.above=5": (
        "dataset.weight.above=5.0 is not read with dataset.weight.column=null; set dataset.weight.column=..., or remove"
        " dataset.weight.above"
    ),
    "dataset.titles={title: name, path: null}": (
        "dataset.titles.title=name is not read with dataset.titles.path=null; set dataset.titles.path=..., or remove"
        " dataset.titles.title"
    ),
    "dataset.until_stable=true": (
        "dataset.until_stable=true is not read with dataset.min_user=0 and dataset.min_item=0; set dataset.min_user=5"
        " dataset.min_item=5, or remove dataset.until_stable"
    ),
    "evaluation.draw=unseen": (
        "evaluation.draw=unseen is not read with evaluation.sampled=0; set evaluation.sampled=100, or remove"
        " evaluation.draw"
    ),
    "dataset.synthetic.users=9": "dataset.synthetic.users=9 is not read for dataset=ml_100k; use dataset=synthetic",
    "trainer.min_epochs=300": "trainer.min_epochs=300 must be at most trainer.max_epochs=100; lower it",
    "dataset.weight={column: a, then: -1}": "dataset.weight.then=-1.0 must be at least 0",
    "dataset.weight={column: a, then: 3}": (
        "dataset.weight.then=3.0 needs a number that 'a' is compared with; set dataset.weight.above=..., or remove"
        " dataset.weight.then"
    ),
    "dataset.user=item_id": "dataset.user and dataset.item must be different columns, but both are 'item_id'",
    "dataset.time=item_id": "dataset.item and dataset.time must be different columns, but both are 'item_id'",
    "hydra.sweep.dir=x": "hydra.sweep.dir=x has an effect only with -m; for one run write hydra.run.dir=<folder>",
    "dataset.name=a/b": (
        "dataset.name='a/b' names the folder and cache of the data set; use only letters, digits, '_', '-'"
    ),
    "dataset.name=..": (
        "dataset.name='..' names the folder and cache of the data set; use only letters, digits, '_', '-'"
    ),
    "evaluation.seed=-1": "evaluation.seed=-1 must be from 0 to 4294967295",
    "evaluation.k=[10,10]": "evaluation.k=[10, 10] must not repeat a length; remove the duplicates",
    "model.norm_eps=inf": "model.norm_eps=inf must be a finite number",
    "model.final_norm_eps=inf": "model.final_norm_eps=inf must be a finite number",
    "model.temperature=inf": "model.temperature=inf must be a finite number",
    "model.norm_eps=-1": "model.norm_eps=-1.0 must be above 0",
    "model.divisor=-1": "model.divisor=-1.0 only applies to model.block=hstu and fuxi; set it to null",
    "model.qk_dim=0": "model.qk_dim=0 only applies to model.block=hstu and fuxi; set it to null",
    "model.dim='${nothing}'": (
        "model.dim: Interpolation key 'nothing' not found; ${...} must name another key that exists;"
        " correct it, or write the value"
    ),
    "trainer.max_epochs=true": "trainer.max_epochs=true must be an integer of at least 1, or -1 for no limit",
    "trainer.deterministic=abc": "trainer.deterministic=abc is not one of true, false, warn, null",
    "trainer.gradient_clip_val=-1": "trainer.gradient_clip_val=-1 must be above 0; use null for no clipping",
    "trainer.precision=64-true": (
        "trainer.precision=64-true is not one of 32-true, 32, bf16-mixed; did you mean 32-true?"
    ),
    "trainer.accelerator=cpus": "trainer.accelerator=cpus is not one of auto, cpu, gpu, cuda, mps; did you mean cpu?",
    "+trainer.strategy=ddpp": (
        "trainer.strategy=ddpp is not one of auto, ddp,"
        " ddp_find_unused_parameters_false, ddp_find_unused_parameters_true; did you mean ddp?"
    ),
    "trainer.devices=0": (
        "trainer.devices=0 must be a number of devices, a list of device indices, or -1 or auto for all;"
        " set it to 1, for example"
    ),
    "trainer.limit_train_batches=0": (
        "trainer.limit_train_batches=0 must be a fraction above 0 and up to 1.0, such as 0.1, or an integer of at least"
        " 1, the number of batches"
    ),
    "trainer.limit_train_batches=abc": (
        "trainer.limit_train_batches=abc must be a fraction above 0 and up to 1.0, such as 0.1, or an integer of at"
        " least 1, the number of batches"
    ),
    "trainer.limit_test_batches=0.5": (
        "unknown key 'trainer.limit_test_batches': testing on part of the users would not be comparable"
    ),
    "+trainer.limit_test_batches=0.5": (
        "trainer.limit_test_batches cannot be set: testing on part of the users would not be comparable"
    ),
    "+trainer.fast_dev_run=true": (
        "trainer.fast_dev_run cannot be set: it writes no checkpoint to test; for a quick run use trainer=fast"
    ),
    "+trainer.overfit_batches=1": (
        "trainer.overfit_batches cannot be set: it would validate on training data;"
        " to train on few batches use trainer.limit_train_batches"
    ),
    "+trainer.val_check_interval=7": (
        "trainer.val_check_interval cannot be set: validation follows an epoch;"
        " to validate less often use trainer.check_val_every_n_epoch"
    ),
    "hydra.run.dir=": "hydra.run.dir must not be empty; set it to a folder, or omit it",
    "name=имя": ("name=имя needs quotes around the value, and quotes around these for the shell; write 'name=\"имя\"'"),
    "name=a=b": "name=a=b needs quotes around the value, and quotes around these for the shell; write 'name=\"a=b\"'",
    "evaluation.k=[ж,ц]": (
        "evaluation.k=[ж,ц] needs quotes around the value, and quotes around these for the shell; write"
        """ 'evaluation.k=["ж","ц"]'"""
    ),
    "name=[a,": "name=[a, has an unclosed bracket; close it, or quote the whole word if it contains spaces",
    "model.dim": "model.dim is not of the form key=value; write model.dim=<value>",
    "=1": "=1 has no key before the '='; write <key>=1",
    "seed==1": "seed==1 has more than one '='; write seed=1",
    "seed=range(3)": "seed=range(3) has several values; add -m to run one job per value, or write [...] for a list",
    "loss=": f"loss= does not exist (loss is one of: {', '.join(names_in('loss'))})",
    "experiment=games": (
        "experiment=games does not exist; did you mean sasrec_paper/games?"
        f" (experiment is one of: {', '.join(names_in('experiment'))})"
    ),
    "--config-name=foo": "--config-name foo must be train; to choose a file of a config group, write group=file",
    "experiment=quality/sasrec_ml1m": (
        "experiment=quality/sasrec_ml1m does not exist; did you mean quality/sasrec_ml_1m?"
        f" (experiment is one of: {', '.join(names_in('experiment'))})"
    ),
    "seed=1,2": "seed=1,2 has several values; add -m to run one job per value, or write [...] for a list",
    "seed=-1": "seed=-1 must be from 0 to 4294967295",
    "seed=99999999999": "seed=99999999999 must be from 0 to 4294967295",
    "+experiment=sasrec_paper/beauty": (
        "experiment has a choice already; to replace it, write experiment=... without '+'"
    ),
    "optimizer.betas=[1]": "optimizer.betas=[1.0] must be two numbers from 0 to below 1",
    "optimizer.warmup_steps=-1": "optimizer.warmup_steps=-1 must be at least 0",
    "evaluation.k=[]": "evaluation.k must not be empty; set it to the list lengths to measure at, such as [10]",
    "dataset.path=null": "dataset.path=null must name the file to read; set dataset.path=my/interactions.csv",
    "dataset.sources=[{}]": "dataset.sources: url=None, pip=None: each source must have either url or pip",
    "+model=tiny": "model has a choice already; to replace it, write model=... without '+'",
    "+loss=softmax": "loss has a choice already; to replace it, write loss=... without '+'",
    "--config-dir=nowhere": "--config-dir nowhere is not a folder; pass the one that contains your config groups",
    "name=../up": "name='../up' names a folder below outputs/; use only letters, digits, '_', '-', '/'",
}


OF_OTHER_MODELS = {
    "model=ease model.regularizaton=2": "unknown key 'model.regularizaton'; did you mean model.regularization?",
    "model=ease model.dim=2": "unknown key 'model.dim'; model has name, regularization",
    "model=ease +model.dim=2": "unknown key 'model.dim'; model has name, regularization",
    "model=ease model.regularization=0": "model.regularization=0.0 must be above 0",
    "model=ease model.name=itemknn": ("model.name=itemknn must be ease; to choose another model, write model=<name>"),
    "model=itemknn model.neighbors=0": "model.neighbors=0 must be at least 1",
    "model=itemknn model.shrink=-1": "model.shrink=-1.0 must be at least 0",
    "model=itemknn model.weighting=bm25 model.shrink=1": (
        "model.shrink=1.0 must be 0 for model.weighting=bm25, whose similarities are not normalized"
    ),
    "model=ease trainer.limit_val_batches=0.5": (
        "trainer.limit_val_batches=0.5 must be 1.0 (all users), or 0 (none), for model=ease, whose validation takes one"
        " pass"
    ),
}


@pytest.mark.parametrize(("words", "message"), OF_OTHER_MODELS.items(), ids=OF_OTHER_MODELS)
def test_a_mistake_in_the_keys_of_another_model_gives_one_line(words, message):
    with pytest.raises(InputError) as caught:
        check_command_line(words.split())
    assert str(caught.value) == message


@pytest.mark.parametrize(("override", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_gives_one_line(override, message):
    with pytest.raises(InputError) as caught:
        check_command_line([override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model=bert4rec", "objective=next_item"],
            "objective=next_item would be given away by model.causal=false, which attends to later items; use"
            " objective=masked_items, or model.causal=true",
        ),
        (
            ["model=bert4rec", "model.maxlen=1"],
            "model.maxlen=1 must be at least 2 for objective=masked_items: an item, and the mask behind it",
        ),
        (["model=ligr", "model.norm=post"], "model.norm=post must be pre for model.block=ligr; set it to pre"),
        (["model=gru4rec", "model.blocks=0"], "model.blocks=0 must be at least 1 for model.block=gru"),
        (
            ["model=gru4rec", "model.pos_emb=rope"],
            "model.pos_emb=rope is a part of attention, which model.block=gru does not have; set it to none",
        ),
        (
            ["model=bert4rec", "model.pad_keys=true"],
            "model.pad_keys=true does not go with model.causal=false; set model.pad_keys=false",
        ),
        (
            ["model=ligr", "model.pad_keys=true"],
            "model.pad_keys=true does not go with model.block=ligr; set model.pad_keys=false",
        ),
        (
            ["model=gru4rec", "objective=masked_items"],
            "objective=masked_items needs a model that also attends to later items; use model=bert4rec, or"
            " objective=next_item",
        ),
        (["model=bert4rec", "objective.mask_share=0"], "objective.mask_share=0.0 must be above 0 and below 1"),
        (["model=bert4rec", "objective.last_share=2"], "objective.last_share=2.0 must be from 0 to 1"),
        (
            ["model=ease", "objective=masked_items"],
            "objective=masked_items needs a model that also attends to later items; use model=bert4rec, or"
            " objective=next_item",
        ),
        (
            ["dataset=csv", "dataset.path=x.csv", "dataset.min_rating=3"],
            "dataset.min_rating=3.0 needs the ratings' column; set dataset.rating=...",
        ),
        (
            ["dataset=csv", "dataset.path=x.csv", "dataset.time=null", "dataset.since=2020-01-01"],
            "dataset.since and dataset.until need the timestamps' column; set dataset.time=...",
        ),
        (
            ["dataset.format=synthetic", "dataset.synthetic=null"],
            "dataset.format=synthetic needs users, items, mean_length and seed in dataset.synthetic",
        ),
        (
            ["dataset=synthetic", "dataset.rating=r", "dataset.min_rating=3"],
            "dataset.rating=r: generated interactions have no such column; set it to null",
        ),
        (
            ["dataset=synthetic", "dataset.weight.column=w"],
            "dataset.weight.column=w: generated interactions have no such column; set it to null",
        ),
        (
            ["dataset.overlap=200", "dataset.windows=all", "objective.name=my_package.rest:Next"],
            "dataset.overlap=200 must be below model.maxlen=200, which includes it; lower it",
        ),
        (
            ["model=ease", "tensorboard.projector=true"],
            "tensorboard.projector=true draws the parts of an encoder, which model=ease lacks; remove it",
        ),
        (
            ["+trainer.limit_predict_batches=3"],
            "trainer.limit_predict_batches cannot be set: lists are made by sasrec_lab.recommend, without Lightning",
        ),
        (
            ["dataset=synthetic", "dataset.synthetic.seed=-1"],
            "dataset.synthetic.seed=-1 must be from 0 to 4294967295",
        ),
        (["dataset.val_users=0"], "dataset.val_users=0 must be at least 1"),
        (
            ["dataset.val_users=5", "dataset.holdout=none"],
            "dataset.val_users=5 is of dataset.holdout=last, not none; set it to null",
        ),
        (
            ["dataset.overlap=3"],
            "dataset.overlap=3 is of windows over the whole history; set dataset.windows=all, or dataset.overlap=0",
        ),
        (
            ["dataset.overlap=200", "dataset.windows=all"],
            "dataset.overlap=200 must be below model.maxlen=200, which includes it; lower it",
        ),
        (
            ["dataset.overlap=3", "dataset.windows=all", "model=bert4rec"],
            "dataset.overlap=3 is for objective=next_item, whose first labels see few items; set it to 0 for"
            " objective=masked_items",
        ),
        (["model.token_dropout=1"], "model.token_dropout=1.0 must be at least 0 and below 1"),
        (["model.dropout_input=-0.1"], "model.dropout_input=-0.1 must be at least 0 and below 1"),
        (["model.dropout_output=1"], "model.dropout_output=1.0 must be at least 0 and below 1"),
        (["model.dropout_items=1"], "model.dropout_items=1.0 must be at least 0 and below 1"),
        (
            ["model.dropout_items=0.1", "model.share_items=false"],
            "model.dropout_items=0.1 is one mask for inputs and outputs, but model.share_items=false has two tables;"
            " set it to 0, or model.share_items=true",
        ),
        (
            ["model.dropout_items=0.1", "optimizer.name=rowwise_adam", "loss=bce"],
            "model.dropout_items=0.1 changes every item vector in each step, but optimizer.name=rowwise_adam updates"
            " only the rows of a batch; use adam",
        ),
        (
            ["model=gru4rec", "model.dropout_attention=0.1"],
            "model.dropout_attention=0.1 does not apply to model.block=gru; set it to null",
        ),
        (
            ["model=hstu", "model.dropout_output=0.1"],
            "model.dropout_output=0.1 does not apply to model.block=hstu; set it to null",
        ),
        (
            ["model=bert4rec", "model.token_dropout=0.1"],
            "model.token_dropout=0.1 would hide items next to those that objective=masked_items hides; set it to 0 for"
            " model.causal=false, or raise objective.mask_share",
        ),
        (
            ["model.pad_keys=true", "model.norm=pre"],
            "model.pad_keys=true requires model.norm=sasrec (as in RecTools), not pre; set model.pad_keys=false",
        ),
        (
            ["optimizer.cosine=true", "trainer.max_epochs=-1"],
            "optimizer.schedule=cosine needs the length of training; set trainer.max_epochs",
        ),
        (
            ["optimizer.name=rowwise_adam", "loss=bce", "optimizer.weight_decay=0.1"],
            "optimizer.weight_decay=0.1 must be 0 for optimizer.name=rowwise_adam, which updates only the rows of a"
            " batch; set it to 0, or use adam",
        ),
        (
            ["optimizer.name=rowwise_adam", "loss=bce", "+trainer.gradient_clip_val=1"],
            "trainer.gradient_clip_val=1 must be null for optimizer.name=rowwise_adam, whose row gradients are not"
            " clipped; set it to null, or use adam",
        ),
        (
            ["name=" + "a" * 201],
            f"name={'a' * 50}... names a folder below outputs/; use at most 200 characters",
        ),
        (["seed=", "1"], "1 is not of the form key=value; remove the space: seed=1"),
        (["-m", "seed=1,2", "--help"], "help shows the config of one run; remove seed=1,2"),
        (["model=none", "--help"], f"model=none does not exist (model is one of: {', '.join(names_in('model'))})"),
    ],
)
def test_a_mistake_of_several_words_gives_one_line(words, message):
    with pytest.raises(InputError) as caught:
        check_command_line(words)
    assert str(caught.value) == message


def test_flags_are_moved_before_overrides():
    assert normalize(["seed=1", "-m", "model.dim=8,16"]) == ["-m", "seed=1", "model.dim=8,16"]
    assert normalize(["a=1", "--config-dir", "mine", "b=2"]) == ["--config-dir", "mine", "a=1", "b=2"]
    assert normalize(["a=1", "b=2", "-m"]) == ["-m", "a=1", "b=2"]
    assert normalize(["a=1", "--info"]) == ["--info", "all", "a=1"]
    assert normalize(["-m", "a=1", "--cfg", "job"]) == ["-m", "--cfg", "job", "a=1"]
    assert normalize(["a=1", "--unknown", "b=1"]) == ["a=1", "--unknown", "b=1"]


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("run=s/0-model.dim=8,seed=1", 'run="s/0-model.dim=8,seed=1"'),
        ("hydra.run.dir=a,b", 'hydra.run.dir="a,b"'),
        ("hydra.run.dir=${name}/a=b", 'hydra.run.dir="${name}/a=b"'),
        ("ckpt=s/0-seed=1/last.ckpt", 'ckpt="s/0-seed=1/last.ckpt"'),
        *[(word, word) for word in ("run='a=b'", "run=outputs/a", "hydra.run.dir=${name}/a", "dataset.path=a,b")],
        *[(word, word) for word in ("name=a=b", "users=[1,2]", "-m")],
    ],
)
def test_a_path_is_quoted_for_hydra(word, quoted):
    assert normalize([word]) == [quoted]
    if word.startswith("hydra"):
        assert check_command_line(normalize([word])).jobs[0].folder == Path(word[14:].replace("${name}", "ml_100k"))


def test_a_formatted_override_is_read_as_its_value():
    assert format_override("run", "outputs/a/20260101-120000-000001") == "run=outputs/a/20260101-120000-000001"
    assert format_override("run", "a/0-seed=1") == 'run="a/0-seed=1"'


def test_an_unknown_launcher_is_answered_with_the_known_ones():
    """The presets of conf/, and the launchers of Hydra and its installed plugins."""
    with pytest.raises(InputError) as caught:
        check_command_line(["hydra/launcher=foo"])
    text, _, names = str(caught.value).removesuffix(")").partition(" (hydra/launcher is one of: ")
    assert text == "hydra/launcher=foo does not exist"
    assert {"basic", "joblib_shared", "ray_shared", "slurm"} <= set(names.split(", "))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\nmodle:\n  dim: 5\n", "unknown key 'modle'; did you mean model?"),
        ("# @package _global_\nmodel:\n  dmi: 5\n", "unknown key 'model.dmi'; did you mean model.dim?"),
        (
            "# @package _global_\nmodel:\n  dim: abc\n",
            "model.dim=abc must be an integer",
        ),
        (
            "# @package _global_\ndefaults:\n  - override /datset: ml_1m\n",
            "unknown key 'datset'; did you mean dataset?",
        ),
        (
            "seed: 3\n",
            "it sets keys of the whole config; its first line must be '# @package _global_'",
        ),
    ],
)
def test_a_mistake_in_a_file_names_the_file_and_the_key(tmp_path, text, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        check_command_line(["--config-dir", str(tmp_path), "experiment=mine"])
    assert str(caught.value) == f"experiment/mine.yaml: {message}"


def test_files_in_the_config_dir_are_found(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults:\n  - sasrec\n\ndim: 32\n")
    (job,) = check_command_line(["--config-dir", str(tmp_path), "model=mine"]).jobs
    assert job.cfg.model.dim == 32


def test_a_file_with_an_unknown_base_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults:\n  - sasrecc\n")
    with pytest.raises(InputError) as caught:
        check_command_line(["--config-dir", str(tmp_path), "model=mine"])
    names = ", ".join(names_in("model"))
    assert str(caught.value) == (
        f"model/mine.yaml: model=sasrecc does not exist; did you mean sasrec? (model is one of: {names})"
    )


def test_a_file_without_its_base_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("dim: 32\n")
    with pytest.raises(InputError) as caught:
        check_command_line(["--config-dir", str(tmp_path), "model=mine"])
    assert str(caught.value) == (
        "model/mine.yaml: it names no kind of model; begin the file with 'defaults: [sasrec]', or the name of another"
        " model, to inherit what it does not change"
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        (
            "dataset.weight={column: watched_pct, above: 10, then: 3, otherwise: 1}",
            WeightConfig("watched_pct", 10, 3, 1),
        ),
        ("dataset.weight.column=watched_pct", WeightConfig("watched_pct")),
        ("dataset.weight=null", None),
    ],
)
def test_weights_are_set_on_the_command_line(override, value):
    assert load(["dataset=csv", "dataset.path=x.csv", override]).dataset.weight == value


def test_a_generated_data_set_is_set_on_the_command_line():
    cfg = load(["dataset=synthetic", "dataset.synthetic={users: 10, items: 5, mean_length: 4, seed: 1}"])
    assert cfg.dataset.synthetic == SyntheticConfig(users=10, items=5, mean_length=4, seed=1)


def test_a_separator_typed_as_backslash_t_is_a_tab():
    assert load(["dataset=csv", "dataset.path=x.tsv", r"dataset.separator='\t'"]).dataset.separator == "\t"
    assert load(["dataset=csv", "dataset.path=x.tsv", r"dataset.separator=\t"]).dataset.separator == "\t"


def test_every_job_of_a_sweep_is_composed_and_checked():
    command = check_command_line(["-m", "hydra.sweep.dir=s", "seed=range(2)", "model.heads=1,3", "name=a/b"])
    assert [str(job.folder) for job in command.jobs] == [
        "s/0-model.heads=1,seed=0",
        "s/1-model.heads=3,seed=0",
        "s/2-model.heads=1,seed=1",
        "s/3-model.heads=3,seed=1",
    ]
    assert [str(job.cfg)[:40] for job in command.jobs if isinstance(job.cfg, InputError)] == [
        "model.dim=64 is not a multiple of model."
    ] * 2
    with pytest.raises(InputError, match="model=none does not exist"):
        check_command_line(["-m", "model=sasrec,none"])


def test_jobs_with_different_names_share_the_sweep_folder():
    """The folder is named after the first job."""
    command = check_command_line(["-m", "dataset=synthetic,ml_1m"])
    assert command.sweep_folder.parent == Path("outputs/synthetic")
    assert {job.folder.parent for job in command.jobs} == {command.sweep_folder}


def test_grid_jobs_are_those_of_the_command_line():
    jobs = check_command_line(["-m", "sweep=dim", "ablation=glob(no_*)", "model.dim=8,16"]).jobs
    words = grid_jobs(["sweep=dim", "ablation=glob(no_*)", "model.dim=8,16"], {"model.dim": "10,20"})
    assert words[:2] == [
        ["model.dim=8", "sweep=dim", "ablation=no_dropout"],
        ["model.dim=8", "sweep=dim", "ablation=no_pos_emb"],
    ]
    assert [f"model.dim={job.cfg.model.dim}" for job in jobs] == [job[0] for job in words]
    assert [f"ablation={job.cfg.row}" for job in jobs] == [job[2] for job in words]


def test_a_plain_config_has_only_json_types():
    tree = to_plain(load(["dataset=kion"]))
    assert tree["dataset"]["weight"] == vars(WeightConfig("watched_pct", 10.0, 3.0, 1.0))
    assert flatten(tree)["model/pos_emb"] == "learned"
    assert all(isinstance(value, (int, float, str, list, type(None))) for value in flatten(tree).values())


def test_help_lists_choices_and_leaves_no_files(tmp_path):
    code = "import sys; from sasrec_lab import train; sys.argv = ['train', '--help']; train.entry()"
    done = subprocess.run(
        [sys.executable, "-c", code + "\n"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0
    for word in ("dataset: bert4rec_beauty, csv,", "loss: bce,", "python -m sasrec_lab.train", "blocks: 2"):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sweep=dim,maxlen", "sweep=dim,maxlen: choose one sweep at a time; run the command once for each"),
        (
            "ablation=glob(noo*)",
            "ablation=glob(noo*) gives no job to run; --help lists the choices of each group",
        ),
        (
            "model.dim=interval(8,16)",
            "interval(...) needs a search: list the values instead, or run python -m sasrec_lab.search",
        ),
    ],
)
def test_a_sweep_without_a_grid_is_rejected(override, message):
    with pytest.raises(InputError) as caught:
        check_command_line(["-m", override])
    assert str(caught.value) == message
