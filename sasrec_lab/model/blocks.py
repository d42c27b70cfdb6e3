"""The kinds of blocks that an encoder can have; each file of a kind says what its block computes."""

from torch import nn

from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import load
from sasrec_lab.config.model import BlockName, ModelConfig
from sasrec_lab.model.fuxi import FuXiBlock
from sasrec_lab.model.gru import GRULayer
from sasrec_lab.model.hstu import HSTUBlock
from sasrec_lab.model.ligr import LiGRBlock
from sasrec_lab.model.transformer import TransformerBlock

BLOCKS: dict[BlockName, type[nn.Module]] = {
    BlockName.transformer: TransformerBlock,
    BlockName.ligr: LiGRBlock,
    BlockName.gru: GRULayer,
    BlockName.hstu: HSTUBlock,
    BlockName.fuxi: FuXiBlock,
}


def build_blocks(cfg: ModelConfig) -> nn.ModuleList:
    """Return the blocks of an encoder, which may be of a class of the user's."""
    block = load(cfg.block) if isinstance(cfg.block, Foreign) else BLOCKS[cfg.block]
    return nn.ModuleList(block(cfg) for _ in range(cfg.blocks))
