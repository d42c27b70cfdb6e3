"""RecTools' SASRec on ids only, with the sizes of a task."""

from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet


def make_model(task: dict) -> SASRecModel:
    """Return an untrained model."""
    return SASRecModel(
        n_blocks=task["blocks"],
        n_heads=task["heads"],
        n_factors=task["dim"],
        session_max_len=task["maxlen"],
        dropout_rate=task["dropout"],
        batch_size=task["batch_size"],
        lr=task["lr"],
        epochs=task.get("epochs", 1),
        use_key_padding_mask=task.get("key_mask", False),
        loss="softmax",
        deterministic="epochs" in task,
        item_net_block_types=(IdEmbeddingsItemNet,),
    )
