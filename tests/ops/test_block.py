"""Which blocks have a kernel; tests/model/test_model.py compares what it computes with the layers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sasrec_lab.config.composition import load
from sasrec_lab.model.transformer import TransformerBlock
from sasrec_lab.ops import library
from sasrec_lab.ops.block import apply_block
from sasrec_lab.ops.layout import BatchLayout
from sasrec_lab.ops.rotary import rotations

needs_compiler = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
LAYOUT = BatchLayout(np.array([0, 3, 5]), 5, torch.device("cpu"))


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "layout", "has_kernel"),
    [
        ({}, LAYOUT, True),
        ({}, replace(LAYOUT, rotations=rotations(torch.arange(5), 8)), False),
        ({"heads": 2}, LAYOUT, False),
        ({"is_relu": False}, LAYOUT, False),
        ({"pad_keys": True}, LAYOUT, False),
        ({"causal": False}, LAYOUT, False),
        ({"has_bias": True}, LAYOUT, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_only_plain_causal_blocks_of_one_head_have_a_kernel(changes, layout, has_kernel):
    layers = replace(TransformerBlock(load(["model.dim=8"]).model).layers(), **changes)
    block = SimpleNamespace(training=False, layers=lambda: layers, transform=lambda *given: "layer by layer")
    with torch.no_grad():
        states = apply_block(block, torch.randn(5, 8), layout)
    assert isinstance(states, torch.Tensor) == has_kernel
