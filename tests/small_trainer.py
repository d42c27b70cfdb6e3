"""A small Lightning Trainer on the CPU, which keeps the last epoch."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint


def small_trainer(folder: Path, epochs: int, callbacks: list[Callback] | None = None, **flags) -> pl.Trainer:
    """Return a Trainer without logger, progress bar or sanity check; it writes folder/last.ckpt after each epoch."""
    keeps = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[keeps, *(callbacks or [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **flags,
    )
