"""The name of a run's model in tables, as its paper calls it."""

from typing import Any

_OF_BLOCK = {"transformer": "SASRec", "ligr": "LiGR", "gru": "GRU4Rec", "hstu": "HSTU", "fuxi": "FuXi-alpha"}
_OF_CLOSED_FORM = {"ease": "EASE", "itemknn": "ItemKNN"}


def model_name(config: dict[str, Any]) -> str:
    """Return the name of the model that a plain config describes; older configs lack keys that have a default.

    gSASRec and eSASRec are an architecture with their paper's loss; the others are named by their architecture.
    """
    model = config["model"]
    if name := _OF_CLOSED_FORM.get(str(model.get("name"))):
        return name
    if not model.get("causal", True):
        return "BERT4Rec"
    block: str = model.get("block", "transformer")
    loss = config.get("loss") or {}
    if block == "transformer" and loss.get("name") == "gbce" and loss.get("calibration"):
        return "gSASRec"
    if block == "ligr" and (loss.get("name"), loss.get("sampler")) == ("sampled_softmax", "uniform"):
        return "eSASRec"
    return _OF_BLOCK.get(block, block)
