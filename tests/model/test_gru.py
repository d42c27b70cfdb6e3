"""GRU4Rec against torch's GRU on padded rows, and what its states depend on."""

from dataclasses import replace

import pytest
import torch
from small_models import SEQUENCES, assert_states_depend_on_the_own_past, packed, random_encoder, states_of
from torch import nn

from sasrec_lab.config.composition import load
from sasrec_lab.errors import InputError
from sasrec_lab.model import encoder, gru
from sasrec_lab.model.encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULT = load(["dataset=csv", "dataset.path=x.csv", "model=gru4rec"]).model
SMALL = replace(DEFAULT, dim=12, maxlen=9)


def on_padded_rows(model: Encoder, layers: int) -> list[torch.Tensor]:
    """Return each user's states (n, D) by one nn.GRU of several layers, on rows padded on the right."""
    gru = nn.GRU(12, 12, layers, batch_first=True).to(model.item_table.dtype)
    for number in range(layers):
        for name, parameter in model.blocks[number].gru.named_parameters():
            getattr(gru, name.replace("_l0", f"_l{number}")).data.copy_(parameter.data)
    histories = [items[-9:] for items in SEQUENCES]
    rows = torch.tensor([items + [1] * (9 - len(items)) for items in histories])
    states, _ = gru(model.item_table[rows - 1])
    return [row[: len(items)] for row, items in zip(states, histories, strict=True)]


@pytest.mark.parametrize("layers", [1, 3])
def test_states_equal_torchs_gru_on_padded_rows(layers):
    model = random_encoder(replace(SMALL, blocks=layers)).eval()
    batch = packed(SEQUENCES)
    with torch.no_grad():
        expected = torch.cat(on_padded_rows(model, layers))
        states = torch.cat(states_of(model(batch), SEQUENCES))
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.newest(batch), expected[batch.last], rtol=0, atol=1e-12)
        single = torch.cat(states_of(model.float()(batch), SEQUENCES))
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)


def test_gradients_equal_those_of_finite_differences():
    model = random_encoder(replace(SMALL, dim=3, blocks=2)).eval()
    batch = packed([[1, 2, 3], [4], [2, 5]])

    def states(table: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {"input_items.weight": table}, (batch,))[: batch.offsets[-1]]

    assert torch.autograd.gradcheck(states, model.item_table.detach().requires_grad_())


@pytest.mark.parametrize("changed", [1, 4, 8])
def test_states_depend_on_the_own_past_only(changed):
    assert_states_depend_on_the_own_past(random_encoder(SMALL).eval(), changed)


def test_only_the_table_is_initialized_by_the_config():
    torch.manual_seed(0)
    model = Encoder(3000, replace(DEFAULT, dim=64))
    assert abs(model.item_table.std() / 0.02 - 1) < 0.01
    for name, parameter in model.blocks.named_parameters():
        assert 0.9 / 8 < parameter.abs().max() <= 1 / 8, name
    assert sum(p.numel() for p in model.parameters()) == 3000 * 64 + 3 * 2 * (64 * 64 + 64)


def test_dropout_is_on_the_input_of_each_layer(monkeypatch):
    rates = []
    monkeypatch.setattr(encoder, "dropout", lambda x, rate: x)
    monkeypatch.setattr(gru, "dropout", lambda x, rate: (rates.append(rate), x)[1])
    model = random_encoder(replace(SMALL, blocks=2, dropout=0.3))
    model.train()(packed(SEQUENCES))
    assert rates == [0.3, 0.3]
    assert model.rate == 0
    model.eval()(packed(SEQUENCES))
    assert rates[2:] == [0, 0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.heads=2", "model.heads=2 does not apply to model.block=gru; set it to 1"),
        ("model.norm=pre", "model.norm=pre does not apply to model.block=gru; set it to sasrec"),
        ("model.ff_dim=8", "model.ff_dim=8 does not apply to model.block=gru; set it to null"),
        ("model.residual=false", "model.residual=false does not apply to model.block=gru; set it to true"),
        ("model.norm_eps=0.1", "model.norm_eps=0.1 does not apply to model.block=gru; set it to 1e-08"),
        (
            "tensorboard.attention_users=2",
            "tensorboard.attention_users=2 draws attention, which model.block=gru does not have; set it to 0",
        ),
    ],
)
def test_keys_of_attention_are_refused(override, message):
    with pytest.raises(InputError) as caught:
        load(["model=gru4rec", override])
    assert str(caught.value) == message
