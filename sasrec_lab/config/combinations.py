"""Which values of different sections of the config go together; those that do not are refused in one line."""

from sasrec_lab.config.closed_form import ClosedFormConfig
from sasrec_lab.config.dataset import Target
from sasrec_lab.config.evaluation import LOSS, metric_names
from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.model import BlockName, ItemVectors, ModelConfig, PosEmb, Similarity
from sasrec_lab.config.model_rules import check_model
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.config.training import Exclude, LossName, ObjectiveName, OptimizerName, SamplerName, Schedule
from sasrec_lab.errors import InputError, nearest


def check_combinations(cfg: TrainConfig) -> None:
    """Raise InputError for the first combination of values that makes no sense, with the key to change."""
    if isinstance(cfg.model, ModelConfig):
        check_model(cfg.model)
    schedule = cfg.optimizer.schedule
    if schedule is not Schedule.constant and cfg.trainer.get("max_epochs") in (None, -1):
        raise InputError(f"optimizer.schedule={schedule.name} needs the length of training; set trainer.max_epochs")
    least, most = cfg.trainer.get("min_epochs"), cfg.trainer.get("max_epochs")
    if least is not None and most not in (None, -1) and least > most:
        raise InputError(f"trainer.min_epochs={least} must be at most trainer.max_epochs={most}; lower it")
    if cfg.cluster is not None:
        _check_cluster(cfg)
    _check_metrics(cfg)
    _check_objective(cfg)
    if cfg.model.reads_times and cfg.dataset.time is None:
        raise InputError(
            f"model.time_bias={cfg.model.time_bias.name} reads times, but dataset={cfg.dataset.name} has none;"
            " set dataset.time to the timestamps' column, or model.time_bias=none"
        )
    _check_tensorboard(cfg)
    if isinstance(cfg.model, ClosedFormConfig):
        _check_closed_form(cfg, cfg.model.name)
    else:
        _check_encoder(cfg)


def _check_encoder(cfg: TrainConfig) -> None:
    if cfg.init_from is not None and cfg.ckpt not in (None, "last"):
        raise InputError(
            f"init_from={cfg.init_from} and ckpt={cfg.ckpt} both give the weights to start with; remove one"
        )
    if cfg.model.items is not ItemVectors.ids and cfg.dataset.features is None:
        raise InputError(
            f"model.items={cfg.model.items.name} needs a file of item features; set dataset.features.path=...,"
            " or model.items=ids"
        )
    if cfg.loss.rdrop and not cfg.model.has_dropout:
        raise InputError(
            f"loss.rdrop={cfg.loss.rdrop} compares two passes that differ by dropout, but the model's do not, so"
            " that their divergence is 0; set model.dropout=0.2, for example, or loss.rdrop=0"
        )
    if cfg.optimizer.name is OptimizerName.rowwise_adam:
        _check_rowwise_adam(cfg)
    if cfg.optimizer.name is OptimizerName.muon and (cfg.model.block is BlockName.gru or not cfg.model.blocks):
        key = "block=gru" if cfg.model.blocks else "blocks=0"
        raise InputError(
            f"optimizer.name=muon is for the matrices of blocks, which model.{key} does not have; use adamw"
        )
    if cfg.capture:
        _check_capture(cfg)


def _check_tensorboard(cfg: TrainConfig) -> None:
    users, logger = cfg.tensorboard.attention_users, cfg.logger
    if not users and not cfg.tensorboard.projector:
        return
    key = f"attention_users={users}" if users else "projector=true"
    if isinstance(cfg.model, ClosedFormConfig):
        name = cfg.model.name
        raise InputError(f"tensorboard.{key} draws the parts of an encoder, which model={name} lacks; remove it")
    if logger.tensorboard is None:
        names = ",".join(["tensorboard", *logger.chosen])
        raise InputError(f"tensorboard.{key} needs TensorBoard among the trackers; set logger=[{names}]")
    if users and not cfg.model.has_softmax:
        drawn = "attention" if cfg.model.block is BlockName.gru else "the softmax of attention"
        raise InputError(
            f"tensorboard.attention_users={users} draws {drawn}, which"
            f" model.block={cfg.model.block.name} does not have; set it to 0"
        )


def _check_closed_form(cfg: TrainConfig, name: str) -> None:
    if cfg.ckpt not in (None, "last"):
        raise InputError(f"ckpt={cfg.ckpt}: model={name} has no epochs to continue from; remove ckpt")
    if cfg.init_from is not None:
        raise InputError(f"init_from={cfg.init_from}: model={name} has no initial weights; remove init_from")
    if cfg.callbacks:
        raise InputError(
            f"callbacks.{next(iter(cfg.callbacks))} is for models trained in steps, which model={name} is not;"
            " remove it"
        )
    if cfg.capture:
        raise InputError(f"capture=true is for models trained in steps, which model={name} is not; remove it")
    part = cfg.trainer.get("limit_val_batches", 1.0)
    if part not in (0, 1.0) or (part == 1 and isinstance(part, int)):
        raise InputError(
            f"trainer.limit_val_batches={part} must be 1.0 (all users), or 0 (none), for model={name}, whose"
            " validation takes one pass"
        )


def _check_metrics(cfg: TrainConfig) -> None:
    evaluation = cfg.evaluation
    if cfg.dataset.target is Target.all and evaluation.sampled:
        raise InputError(
            f"evaluation.sampled={evaluation.sampled} ranks one target at a time, but dataset.time_split.target=all"
            " has several in one list; set evaluation.sampled=0"
        )
    names = metric_names(evaluation.k, evaluation.sampled, cfg.dataset.target, evaluation.metrics)
    measured, monitor = [f"val/{name}" for name in names], evaluation.monitor
    if not isinstance(cfg.model, ClosedFormConfig):
        measured.append(f"val/{LOSS}")
    if monitor in measured:
        return
    if monitor.startswith("test/"):
        raise InputError(
            f"evaluation.monitor={monitor} would choose by the test, which must choose nothing; set"
            f" evaluation.monitor=val/{monitor.removeprefix('test/')}"
        )
    similar = next((name for name in measured if monitor in name), measured[0])
    raise InputError(
        f"evaluation.monitor={monitor} is not measured at evaluation.k={list(evaluation.k)} and"
        f" evaluation.sampled={evaluation.sampled}; set evaluation.monitor={nearest(monitor, measured) or similar},"
        " for example"
    )


def _check_objective(cfg: TrainConfig) -> None:
    if cfg.dataset.overlap >= cfg.model.maxlen:
        raise InputError(
            f"dataset.overlap={cfg.dataset.overlap} must be below model.maxlen={cfg.model.maxlen}, which includes"
            " it; lower it"
        )
    if isinstance(cfg.objective.name, Foreign):
        return  # what it asks of a model is its own matter
    predicts_masks = cfg.objective.name is ObjectiveName.masked_items
    is_causal = getattr(cfg.model, "causal", True)
    if is_causal and predicts_masks:
        blocks = (BlockName.transformer, BlockName.ligr)
        has_key = isinstance(cfg.model, ModelConfig) and cfg.model.block in blocks
        raise InputError(
            "objective=masked_items needs a model that also attends to later items"
            f"{': model.causal=false' if has_key else ''}; use model=bert4rec, or objective=next_item"
        )
    if predicts_masks and cfg.dataset.overlap:
        raise InputError(
            f"dataset.overlap={cfg.dataset.overlap} is for objective=next_item, whose first labels see few items;"
            " set it to 0 for objective=masked_items"
        )
    if predicts_masks and cfg.loss.horizon:
        raise InputError(
            f"loss.horizon={cfg.loss.horizon} is for items that follow each other, which the labels of"
            " objective=masked_items do not; set it to 0"
        )
    if not is_causal and not predicts_masks:
        raise InputError(
            f"objective={cfg.objective.name.name} would be given away by model.causal=false, which attends to"
            " later items; use objective=masked_items, or model.causal=true"
        )
    if predicts_masks and cfg.model.maxlen < 2:
        raise InputError(
            f"model.maxlen={cfg.model.maxlen} must be at least 2 for objective=masked_items: an item, and the mask"
            " behind it"
        )


def _check_rowwise_adam(cfg: TrainConfig) -> None:
    if cfg.loss.name is LossName.softmax:
        raise InputError(
            "optimizer.name=rowwise_adam is for losses that touch few rows of the item table, not for loss=softmax;"
            " use adam, or loss=sampled_softmax"
        )
    for part in (cfg.loss.name, cfg.model.head):
        if isinstance(part, Foreign):
            raise InputError(
                f"optimizer.name=rowwise_adam updates only the rows of a batch, and {part.key}={part.name} may"
                " touch others; use adam"
            )
    dense = {
        "output_bias=true": cfg.model.output_bias,
        "similarity=cosine": cfg.model.similarity is Similarity.cosine,
        f"dropout_items={cfg.model.dropout_items}": cfg.model.dropout_items > 0,
        f"items={cfg.model.items.name}": cfg.model.items is not ItemVectors.ids,
    }
    if key := next((key for key, is_set in dense.items() if is_set), None):
        raise InputError(
            f"model.{key} changes every item vector in each step, but optimizer.name=rowwise_adam updates only the"
            " rows of a batch; use adam"
        )
    if cfg.trainer.get("gradient_clip_val") is not None:
        raise InputError(
            f"trainer.gradient_clip_val={cfg.trainer['gradient_clip_val']} must be null for"
            " optimizer.name=rowwise_adam, whose row gradients are not clipped; set it to null, or use adam"
        )


def _check_cluster(cfg: TrainConfig) -> None:
    if isinstance(cfg.model, ClosedFormConfig):
        raise InputError(f"cluster=ray shares out training steps, which model={cfg.model.name} lacks; remove it")
    if cfg.ckpt not in (None, "last"):
        raise InputError(f"ckpt={cfg.ckpt}: cluster=ray resumes a run in its own folder; set ckpt=last")
    for flag, default in {"devices": 1, "num_nodes": 1, "strategy": "auto"}.items():
        if (value := cfg.trainer.get(flag, default)) != default:
            raise InputError(
                f"trainer.{flag}={value} and cluster=ray both say where the processes run; set cluster.workers and"
                f" remove trainer.{flag}"
            )


def _check_capture(cfg: TrainConfig) -> None:
    model, loss = cfg.model, cfg.loss
    for part in (cfg.objective.name, loss.name, model.block, model.head):
        if isinstance(part, Foreign):
            raise InputError(
                f"capture=true repeats a step for other batches of the same size, and the operations of"
                f" {part.key}={part.name} may depend on a batch; set capture=false"
            )
    reasons = {
        f"model.block={model.block.name}": not model.has_softmax,
        "model.pos_emb=relative": model.pos_emb is PosEmb.relative,
        "model.time_bias=decay": model.reads_times,
        "model.pad_keys=true": model.pad_keys,
        "loss.sampler=sequence": loss.sampler is SamplerName.sequence,
        "loss.exclude=history": loss.exclude is Exclude.history,
        f"loss.horizon={loss.horizon}": loss.horizon > 0,
        "optimizer.name=rowwise_adam": cfg.optimizer.name is OptimizerName.rowwise_adam,
    }
    for key in (key for key, applies in reasons.items() if applies):
        raise InputError(
            f"capture=true repeats a step for other batches of the same size, but with {key} its operations depend"
            " on the lengths or the items of a batch; set capture=false"
        )
