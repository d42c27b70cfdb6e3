"""RecTools' models on ids only, with the sizes of a task."""

from rectools.models import BERT4RecModel, HSTUModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.ligr import LiGRLayers


def make_model(task: dict) -> SASRecModel | BERT4RecModel | HSTUModel:
    """Return an untrained model: SASRec, with the blocks of eSASRec if the task's model is ligr, BERT4Rec, or HSTU."""
    settings = {
        "n_blocks": task["blocks"],
        "n_heads": task["heads"],
        "n_factors": task["dim"],
        "session_max_len": task["maxlen"],
        "dropout_rate": task["dropout"],
        "batch_size": task["batch_size"],
        "lr": task["lr"],
        "epochs": task.get("epochs", 1),
        "loss": task.get("loss", "softmax"),
        "deterministic": "epochs" in task,
        "item_net_block_types": (IdEmbeddingsItemNet,),
    }
    if settings["loss"] == "sampled_softmax":
        settings["n_negatives"] = task["negatives"]
    kind = task.get("model", "sasrec")
    if kind == "bert4rec":
        return BERT4RecModel(**settings, mask_prob=task["mask_share"])
    if kind == "hstu":
        biases = {"relative_time_attention": task["time_bias"], "relative_pos_attention": task["position_bias"]}
        return HSTUModel(**settings, **biases, lightning_module_kwargs={"logits_t": task["temperature"]})
    settings["use_key_padding_mask"] = task.get("key_mask", False)
    if kind == "ligr":
        blocks = {"ff_factors_multiplier": task["ff_dim"] // task["dim"]}
        return SASRecModel(**settings, transformer_layers_type=LiGRLayers, transformer_layers_kwargs=blocks)
    return SASRecModel(**settings)
