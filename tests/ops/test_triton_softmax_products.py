"""The softmax losses by Triton kernels: results on a GPU or by Triton's interpreter, and code for an H100 without one.

The interpreter must be chosen before Triton is imported, so one test runs those named test_kernels_ in a new process.
Its arrays have no bfloat16, which therefore is compared on a GPU only.
"""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops import library, softmax_products
from sasrec_lab.ops.cross_entropy import linear_cross_entropy, sampled_cross_entropy

triton = pytest.importorskip("triton", reason="needs Triton")
from sasrec_lab.ops import triton_kernels  # noqa: E402  it imports Triton
from sasrec_lab.ops import triton_softmax_products as kernels  # noqa: E402

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU; the interpreter runs it in another test"
)
H100_SHARED_MEMORY = 227 * 1024  # bytes that one program can have


def test_the_interpreter_finds_the_right_results():
    if IS_INTERPRETED:
        pytest.skip("runs the others")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-k", "test_kernels_", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


# Results


@pytest.fixture
def by_triton(monkeypatch) -> None:
    """Have the losses use the kernels, whatever the device."""
    monkeypatch.setattr(softmax_products, "_triton_form", lambda *tensors, is_sampled, has_mask: kernels)
    monkeypatch.setattr(library, "supports", lambda *tensors: False)


@pytest.fixture(params=["whole", "in splits"])
def splits(request, monkeypatch) -> None:
    """Read what a program reads in one piece, or have a program for each block."""
    if request.param == "in splits":
        monkeypatch.setattr(kernels, "BLOCKS_PER_SPLIT", 1)


def example(tokens: int, items: int, dim: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, table, targets and weights, some of which are 0 as those of dummies."""
    random = torch.Generator().manual_seed(tokens + items + dim)
    states = scale * torch.randn(tokens, dim, generator=random) / dim**0.5
    table, targets = torch.randn(items, dim, generator=random), torch.randint(items, (tokens,), generator=random)
    weights = 3 * torch.rand(tokens, generator=random)
    weights[tokens // 2 :: 5] = 0
    states, table, targets, weights = (x.to(DEVICE) for x in (states, table, targets, weights))
    return states.requires_grad_(), table.requires_grad_(), targets, weights


def plain_softmax(states: Tensor, table: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the reference from all logits, by autograd in float64."""
    logits = states.double() @ table.double().T
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def plain_sampled_softmax(
    states: Tensor, vectors: Tensor, excluded: Tensor, log_weights: Tensor, weights: Tensor
) -> Tensor:
    """Return the reference: for each token, cross_entropy of its target among itself and the negatives that count."""
    states, vectors = states.double(), vectors.double()
    total, negatives = states.sum() * 0, vectors[len(states) :]
    for t, column in enumerate(excluded.tolist()):
        counts = torch.arange(len(negatives), device=states.device) != column
        target = vectors[t] @ states[t]
        others = negatives[counts] @ states[t] + log_weights[counts]
        total = total + (torch.cat([target[None], others]).logsumexp(0) - target) * weights[t]
    return total


def check(loss: Tensor, expected: Tensor, *inputs: Tensor, within: float = 1e-5) -> None:
    """Compare losses and their gradients."""
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.double(), rtol=within, atol=1e-9)
    gradients = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.is_contiguous()
        assert (mine - theirs).norm() <= within * theirs.norm()


@runs_kernels
@pytest.mark.usefixtures("by_triton", "splits")
@pytest.mark.parametrize(("tokens", "items", "dim"), [(1, 1, 1), (70, 150, 50), (40, 130, 256)])
def test_kernels_compute_softmax(tokens, items, dim):
    states, table, targets, weights = example(tokens, items, dim)
    weights[0] = 1
    loss = linear_cross_entropy(states, table, targets, weights)
    check(loss, plain_softmax(states, table, targets, weights), states, table)


def sampled_example(tokens: int, count: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return states, vectors, excluded columns, log weights and weights; some negatives are surplus, of weight -inf."""
    states, _, _, weights = example(tokens, count, dim)
    random = torch.Generator().manual_seed(1)
    vectors, log_weights = torch.randn(tokens + count, dim, generator=random), torch.randn(count, generator=random)
    log_weights[count - count // 3 :] = float("-inf")
    excluded = torch.randint(count + 1, (tokens,), generator=random)
    excluded[::2] = count
    vectors, excluded, log_weights = (x.to(DEVICE) for x in (vectors, excluded, log_weights))
    return states, vectors.requires_grad_(), excluded, log_weights, weights


@runs_kernels
@pytest.mark.usefixtures("by_triton", "splits")
@pytest.mark.parametrize(("tokens", "count", "dim"), [(1, 1, 4), (70, 150, 100)])
def test_kernels_compute_sampled_softmax(tokens, count, dim):
    states, vectors, *rest = sampled_example(tokens, count, dim)
    check(
        sampled_cross_entropy(states, vectors, *rest),
        plain_sampled_softmax(states, vectors, *rest),
        states,
        vectors,
    )


@runs_kernels
@pytest.mark.usefixtures("by_triton", "splits")
@pytest.mark.parametrize(("tokens", "items", "dim"), [(1, 2, 1), (70, 150, 50)])
def test_kernels_compute_softmax_without_masked_items(tokens, items, dim):
    states, table, targets, weights = example(tokens, items, dim)
    random = torch.Generator().manual_seed(1)
    rows = torch.randint(-1, items, (3, items // 2), generator=random).to(DEVICE)
    rows[0] = targets[0]  # a target counts, masked or not
    owners = torch.arange(tokens) // 30
    mask = softmax_products.Mask(rows, owners)
    loss = linear_cross_entropy(states, table, targets, weights, mask)
    is_masked = torch.zeros(len(rows), items + 1, dtype=torch.bool, device=DEVICE).scatter(1, rows + 1, True)
    is_masked = is_masked[owners.to(DEVICE), 1:].scatter(1, targets[:, None], False)
    logits = (states.double() @ table.double().T).masked_fill(is_masked, float("-inf"))
    check(loss, (F.cross_entropy(logits, targets, reduction="none") * weights).sum(), states, table)


@runs_kernels
def test_kernels_compute_softmax_of_a_target_without_other_items():
    states, table, targets, weights = (x.detach() for x in example(5, 200, 8))
    masked = torch.arange(200, device=DEVICE)[None], torch.zeros(5, dtype=torch.int64), targets
    found = kernels.softmax_products(states, table, table[targets], weights[:, None], torch.float32, masked=masked)
    torch.testing.assert_close(found[0], torch.zeros(5, 1, device=DEVICE))
    torch.testing.assert_close(found[1], table[targets])
    expected = torch.zeros_like(table).index_add_(0, targets, states * weights[:, None])
    torch.testing.assert_close(found[2], expected)


@runs_kernels
def test_kernels_compute_softmax_of_negatives_without_weights():
    states, table, _, weights = (x.detach() for x in example(20, 30, 8))
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = kernels.softmax_products(states, table, vectors, weights[:, None], torch.float32, (None, None))
    p = torch.cat([states @ table.T, (states * vectors).sum(1, keepdim=True)], 1).double().softmax(1)
    expected = p[:, -1:].log(), p[:, :-1] @ table.double(), (p[:, :-1] * weights[:, None]).T @ states.double()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


@runs_kernels
@pytest.mark.usefixtures("by_triton", "splits")
@pytest.mark.parametrize("scale", [1.0, 1e-6])  # of the weights, which may be tiny in float16
@pytest.mark.parametrize("dtype", [torch.float16] if IS_INTERPRETED else [torch.float16, torch.bfloat16])
def test_kernels_are_close_in_lower_precision(dtype, scale):
    states, table, targets, weights = example(70, 150, 50)
    with torch.autocast(DEVICE, dtype):
        loss = linear_cross_entropy(states, table, targets, scale * weights)
    check(loss, plain_softmax(states, table, targets, scale * weights), states, table, within=1e-2)
    states, vectors, excluded, log_weights, weights = sampled_example(40, 70, 16)
    inputs = states, vectors, excluded, log_weights, scale * weights
    with torch.autocast(DEVICE, dtype):
        loss = sampled_cross_entropy(*inputs)
    check(loss, plain_sampled_softmax(*inputs), states, vectors, within=1e-2)


@runs_kernels
@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("scale", [50, 200])
def test_kernels_compute_large_logits_and_small_probabilities(scale):
    states, table, targets, weights = example(40, 70, 16, scale)
    with torch.no_grad():
        logits = states @ table.T
        targets[:20] = logits[:20].argmin(1)  # below e^-87, the smallest number of single precision
        targets[20:] = logits[20:].argmax(1)
    loss = linear_cross_entropy(states, table, targets, weights)
    # a score of 500 has an error of 3e-5 in float32, by which its exponential is off
    check(loss, plain_softmax(states, table, targets, weights), states, table, within=1e-4)


@runs_kernels
@pytest.mark.usefixtures("by_triton")
def test_kernels_are_exact_if_one_item_has_probability_1():
    states = torch.tensor([[200.0], [-200.0]], device=DEVICE, requires_grad=True)
    table = torch.tensor([[1.0], [-1.0], [0.0]], device=DEVICE, requires_grad=True)
    weights = torch.ones(2, device=DEVICE)
    assert linear_cross_entropy(states, table, torch.tensor([0, 1], device=DEVICE), weights).item() == 0
    loss = linear_cross_entropy(states, table, torch.tensor([1, 0], device=DEVICE), weights)
    assert loss.item() == 800
    found = torch.autograd.grad(loss, (states, table))
    assert [g.tolist() for g in found] == [[[2.0], [-2.0]], [[400.0], [-400.0], [0.0]]]


@runs_kernels
def test_kernels_keep_nan_in_its_token():
    states, table, targets, weights = (x.detach() for x in example(5, 70, 16))
    states[3, 2] = float("nan")
    for sampled in (None, (None, None)):
        found = kernels.softmax_products(states, table, table[targets], weights[:, None], torch.float32, sampled)
        assert found[0].isnan().flatten().tolist() == [False, False, False, True, False]
        assert found[1].isnan().all(1).tolist() == [False, False, False, True, False]


@runs_kernels
@pytest.mark.usefixtures("splits")
def test_kernels_give_the_same_bits_each_time():
    states, table, targets, weights = (x.detach() for x in example(150, 200, 16))
    inputs = states, table, table[targets], weights[:, None], torch.float32
    first, second = (kernels.softmax_products(*inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@runs_kernels
def test_kernels_that_are_wrong_are_found(monkeypatch, caplog):
    size = torch.device(DEVICE), torch.float32, 8
    case = *size, True, False
    assert all(kernels._is_correct.__wrapped__(*form) for form in ((*size, False, False), (*size, False, True), case))
    assert not caplog.messages
    right = kernels.softmax_products
    for factor, error in ((1.001, "1.0e-03"), (float("nan"), "nan")):
        caplog.clear()
        monkeypatch.setattr(
            kernels, "softmax_products", lambda *inputs, factor=factor: [factor * x for x in right(*inputs)]
        )
        assert not kernels._is_correct.__wrapped__(*case)
        (message,) = caplog.messages
        assert message.endswith(f"(dim 8, torch.float32): relative errors of its results: {', '.join([error] * 6)}")


# Choosing them


def test_what_the_kernels_cannot_take_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "_is_correct", lambda *case: True)
    x = torch.randn(3, 8)
    assert not kernels.supports(x, x, torch.float32, False, False)
    assert softmax_products._triton_form(x, x, torch.float32, is_sampled=False, has_mask=False) is None


def test_failing_kernels_are_reported_in_one_line(monkeypatch, caplog):
    def fail(*inputs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(kernels, "softmax_products", fail)
    with caplog.at_level(logging.WARNING):
        assert not kernels._is_correct.__wrapped__(torch.device("cpu"), torch.float32, 8, False, False)
    (message,) = caplog.messages
    assert message.endswith("on cpu (dim 8, torch.float32): no compiler")


# Compiling them

POINTERS = {"states": None, "table": None, "target_vectors": None, "is_masked": "*i1"}
POINTERS |= dict.fromkeys(("excluded", "owners", "targets"), "*i64")
ABSENT = {  # arguments that are None in a form of the kernels
    "softmax": ("biases", "excluded", "is_masked", "owners", "targets"),
    "masked": ("biases", "excluded"),
    "sampled": ("is_masked", "owners", "targets"),
}


def compile_for_h100(function, dtype: str, dim: int, form: str):
    """Compile a kernel as a launch with aligned tensors would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    width, number = kernels.padded_width(dim), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    blocks = kernels.blocks_for(number, width, form == "masked")
    tokens, items = blocks.held, blocks.streamed
    if function is triton_kernels.table_grad_kernel:
        tokens, items = items, tokens
    elif function is triton_kernels.combination_kernel:
        tokens = 16
    constants = {"DIM": dim, "WIDTH": width, "LIFT": 1.0, "HAS_TARGET_COLUMN": form == "sampled"}
    constants |= {"TOKENS": tokens, "ITEMS": items} | dict.fromkeys(ABSENT[form])
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name in ("tokens", "items", "length", "splits"):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, "*fp32") or f"*{dtype}"
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def registers_and_stack(cubin: bytes, folder: Path) -> tuple[int, int] | None:
    """Return the registers of a thread, and the bytes that did not fit them, by the tool in Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    (folder / "kernel.cubin").write_bytes(cubin)
    done = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("dtype", "dim", "form"),
    [("bf16", 256, "sampled"), ("fp32", 128, "sampled"), ("bf16", 256, "masked"), ("fp32", 128, "masked")],
)
def test_an_h100_has_room_for_the_compiled_code(dtype, dim, form, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function in (
        triton_kernels.expectation_kernel,
        triton_kernels.combination_kernel,
        triton_kernels.table_grad_kernel,
    ):
        compiled = compile_for_h100(function, dtype, dim, form)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= H100_SHARED_MEMORY
        uses_tensor_cores = dtype == "bf16" and function is not triton_kernels.combination_kernel
        assert ("wgmma" in compiled.asm["ptx"]) == uses_tensor_cores
        assert "tf32" not in compiled.asm["ptx"]
        usage = registers_and_stack(compiled.asm["cubin"], tmp_path)
        print(function.__name__, dtype, dim, form, f"{compiled.metadata.shared} bytes, registers and stack:", usage)
        assert usage is None or usage[1] <= 256
