"""Rotary positions against complex numbers, and what scores depend on."""

import pytest
import torch
from torch import Tensor

from sasrec_lab.ops.rotary import rotate, rotations


def complex_rotate(x: Tensor, positions: Tensor, heads: int) -> Tensor:
    """Return x (T, D) with each pair of columns as one complex number, times e^(i angle)."""
    out, width = x.clone(), x.shape[1] // heads
    for token, position in enumerate(positions.tolist()):
        for head in range(heads):
            for pair in range(width // 2):
                one, other = head * width + 2 * pair, head * width + 2 * pair + 1
                turn = torch.exp(torch.tensor(-1j * position * 10000 ** (-2 * pair / width)))
                number = complex(x[token, one], x[token, other]) * turn
                out[token, one], out[token, other] = number.real, number.imag
    return out


@pytest.mark.parametrize(("dim", "heads"), [(2, 1), (8, 1), (8, 2), (12, 3)])
def test_rotations_equal_complex_products(dim, heads):
    positions = torch.tensor([0, 1, 2, 199])
    x = torch.randn(4, dim, generator=torch.Generator().manual_seed(0))
    found = rotate(x, rotations(positions, dim // heads), heads)
    torch.testing.assert_close(found, complex_rotate(x, positions, heads), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0], x[0])  # the newest token is not rotated


def test_a_quarter_turn():
    quarter = torch.tensor([[1j, 1]])  # of the first pair of each head
    x = torch.tensor([[3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]])
    assert rotate(x, quarter, 2).tolist() == [[-4.0, 3.0, 5.0, 6.0, -8.0, 7.0, 9.0, 10.0]]
    assert rotations(torch.tensor([1]), 4).real.tolist() == [pytest.approx([0.54030, 0.99995], abs=1e-5)]
    assert rotations(torch.tensor([1]), 4).imag.tolist() == [pytest.approx([-0.84147, -0.01000], abs=1e-5)]


def test_scores_depend_on_distances_only():
    """Of one query and one key at all pairs of places: the same distance gives the same score, from either end."""
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 30, 16)

    def scores(positions: Tensor) -> Tensor:
        turns = rotations(positions, 16)
        return rotate(q, turns, 1) @ rotate(k, turns, 1).T

    from_newest = scores(torch.arange(30).flip(0))
    for distance in range(-29, 30):
        same = from_newest.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-4)
    assert from_newest[0].std() > 0.1  # other distances have other scores
    assert (from_newest[0, 1] - from_newest[1, 0]).abs() > 0.1  # as have later tokens
    torch.testing.assert_close(scores(torch.arange(30).flip(0) + 170), from_newest, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores(-torch.arange(30)), from_newest, rtol=1e-4, atol=1e-4)  # from the oldest


def test_lengths_and_the_type_are_kept():
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    turns = rotations(torch.arange(9), 4)
    norms = [one.unflatten(1, (6, 2)).norm(dim=2) for one in (x, rotate(x, turns, 3))]
    torch.testing.assert_close(*norms)
    assert rotate(x.bfloat16(), turns, 3).dtype == torch.bfloat16


def test_gradients_are_rotated_back():
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    turns = rotations(torch.arange(9), 4)
    (grad,) = torch.autograd.grad(rotate(x[0], turns, 3), x, rotate(x[1], turns, 3).detach())
    torch.testing.assert_close(grad[0], x[1])


def test_an_exported_rotation_is_the_same(tmp_path):
    class Rotation(torch.nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return rotate(x, self.table.index_select(0, positions), 2)

    module = Rotation()
    module.register_buffer("table", rotations(torch.arange(20), 4), persistent=False)
    x, positions = torch.randn(5, 8), torch.arange(5).flip(0)
    tokens = {0: torch.export.Dim("tokens", min=1, max=20)}
    torch.export.save(torch.export.export(module, (x, positions), dynamic_shapes=(tokens, tokens)), tmp_path / "x.pt2")
    loaded = torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 5):
        torch.testing.assert_close(loaded(x[:count], positions[:count]), module(x[:count], positions[:count]))


def test_a_pair_needs_two_columns():
    with pytest.raises(ValueError, match="even width, not 5"):
        rotations(torch.arange(3), 5)
