"""Item vectors behind `rows` and `table`: another kind of table takes the place of the usual one."""

from dataclasses import replace

import pytest
import torch
from small_data import holdout_of, random_users
from torch import Tensor, nn

from sasrec_lab.config.composition import load
from sasrec_lab.data.datamodule import SequenceData
from sasrec_lab.training.lightning_module import SequentialRecommender

HOLDOUT = holdout_of(random_users(0, users=40), maxlen=20)


class DividedTable(nn.Module):
    """The rows of a table in two halves, odd and even, as two devices would have them."""

    def __init__(self, whole: Tensor):
        super().__init__()
        self.parts = nn.ParameterList([whole[start::2].clone() for start in range(2)])

    def rows(self, indices: Tensor, vectors: Tensor | None = None) -> Tensor:
        found = [part[(indices // 2).clamp(max=len(part) - 1)] for part in self.parts]
        return torch.where((indices % 2 == 0)[:, None], *found)

    def table(self) -> Tensor:
        count = sum(map(len, self.parts))
        return self.rows(torch.arange(count))


@pytest.mark.parametrize("loss", ["softmax", "bce", "sampled_softmax"])
def test_a_divided_table_takes_the_place_of_the_usual_one(loss):
    cfg = load(["dataset=csv", "dataset.path=x.csv", "model=tiny", "model.dropout=0", f"loss={loss}"])
    cfg = replace(cfg, batch_size=9)
    batch = next(iter(SequenceData(HOLDOUT, cfg).train_dataloader()))
    torch.manual_seed(0)
    model = SequentialRecommender(HOLDOUT.num_items, cfg)
    expected = model.batch_loss(batch)
    expected.backward()
    whole = model.encoder.input_items.weight
    states = model.encoder.newest(batch.inputs).detach()
    divided = DividedTable(whole.detach())
    model.encoder.input_items = model.encoder.output_items = divided
    found = model.batch_loss(batch)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for start, part in enumerate(divided.parts):
        torch.testing.assert_close(part.grad, whole.grad[start::2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.encoder.newest(batch.inputs), states)
    scores = model.scores(next(iter(SequenceData(HOLDOUT, cfg).val_dataloader())))
    first = torch.ones((len(scores.states), 1), dtype=torch.long)
    assert scores.for_items(first).isfinite().all()
