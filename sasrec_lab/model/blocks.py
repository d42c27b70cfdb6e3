"""The kinds of blocks that an encoder can have; each file of a kind says what its block computes."""

from torch import nn

from sasrec_lab.config.model import BlockName
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
