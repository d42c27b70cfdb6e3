"""Rotary positions: scores of rotated queries and keys depend on the distance of their tokens. T tokens, H heads.

Source: Su et al. 2021 (arXiv 2104.09864), 3.2.
"""

import torch
from torch import Tensor

BASE = 10000.0  # the longest wave has almost 2 pi times as many tokens


def rotations(positions: Tensor, width: int) -> Tensor:
    """Return the complex factors (T, width / 2) that rotate tokens at these positions (T,), for heads of this width.

    Positions are counted from the newest token. The angles are those of positions counted from the oldest, up to a
    constant of the sequence that no score depends on. Sines are slow: keep those of all positions, and look them up.

    Raises:
        ValueError: the width is odd.
    """
    if width % 2:
        raise ValueError(f"rotary positions need heads of even width, not {width}")
    pairs = torch.arange(width // 2, device=positions.device)
    angles = positions[:, None] * -(BASE ** (-2 * pairs / width))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, factors: Tensor, heads: int) -> Tensor:
    """Return queries or keys x (T, D) with neighboring columns rotated, in each head, by `rotations` (T, D / H / 2)."""
    if torch.compiler.is_exporting():  # ONNX has few operations on complex numbers
        real, imaginary = torch.view_as_real(factors)[:, None].unbind(-1)
        one, other = x.unflatten(1, (heads, -1, 2)).unbind(-1)
        return torch.stack([one * real - other * imaginary, one * imaginary + other * real], -1).flatten(1)
    pairs = torch.view_as_complex(x.to(factors.real.dtype).unflatten(1, (heads, -1, 2)))  # (T, H, D / H / 2)
    return torch.view_as_real(pairs * factors[:, None]).flatten(1).to(x.dtype)
