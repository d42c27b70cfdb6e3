"""The Triton kernels of ops/triton_softmax_products.py, in the order in which it launches them.

Comments say which shape the tensor of a pointer has. Where one may be None, None makes another form of the kernel.
T tokens, D dim, V items, G groups of tokens, S splits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "items", "length"])
def expectation_kernel(
    states: tl.tensor,  # (T, D)
    table: tl.tensor,  # (V, D)
    biases: tl.tensor,  # (V,) or None
    excluded: tl.tensor,  # (T,) or None
    is_masked: tl.tensor,  # (G, V + 1) or None
    owners: tl.tensor,  # (T,) or None
    targets: tl.tensor,  # (T,) or None
    target_vectors: tl.tensor,  # (T, D)
    target_scores: tl.tensor,  # (T,)
    largest: tl.tensor,  # (S, T)
    totals: tl.tensor,  # (S, T)
    sums: tl.tensor,  # (S, T, D)
    tokens: int,
    items: int,
    length: int,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LIFT: tl.constexpr,
    HAS_TARGET_COLUMN: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Write each split's largest score, sum of e^(score - largest), and sum of the items' vectors times this."""
    split, d, column = tl.program_id(1), tl.arange(0, WIDTH), tl.arange(0, ITEMS)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    at = token.to(tl.int64)[:, None] * DIM + d[None, :]
    is_there = is_token[:, None] & (d < DIM)[None, :]
    h = tl.load(states + at, mask=is_there, other=0.0)  # (TOKENS, WIDTH)
    target_score = tl.sum(h.to(tl.float32) * tl.load(target_vectors + at, mask=is_there, other=0.0).to(tl.float32), 1)
    is_first = HAS_TARGET_COLUMN & (split == 0)  # the target's own column is in the first split
    most = tl.where(is_first, target_score, float("-inf"))
    total = tl.where(is_first, tl.full((TOKENS,), 1.0, tl.float32), 0.0)
    vector_sum = tl.zeros((TOKENS, WIDTH), tl.float32)
    begin = split * length
    rows = table + begin.to(tl.int64) * DIM + column[:, None] * DIM + d[None, :]
    for start in range(begin, tl.minimum(begin + length, items), ITEMS):
        item = start + column
        vectors = tl.load(rows, mask=(item < items)[:, None] & (d < DIM)[None, :], other=0.0)  # (ITEMS, WIDTH)
        if biases is None:
            bias = tl.where(item < items, 0.0, float("-inf"))
        else:
            bias = tl.load(biases + item, mask=item < items, other=float("-inf"))
        scores = tl.dot(h, tl.trans(vectors), input_precision="ieee") + bias[None, :]
        scores = _counted(*(scores, token[:, None], item[None, :], tokens, items, excluded, is_masked, owners, targets))
        larger = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp(scores - shift[:, None])
        rescale = tl.exp(most - shift)
        total = total * rescale + tl.sum(p, 1)
        vector_sum = tl.dot((p * LIFT).to(h.dtype), vectors, vector_sum * rescale[:, None], input_precision="ieee")
        most = larger
        rows += ITEMS * DIM
    part = split.to(tl.int64) * tokens
    tl.store(target_scores + token, target_score, mask=is_token)
    tl.store(largest + part + token, most, mask=is_token)
    tl.store(totals + part + token, total, mask=is_token)
    tl.store(sums + part * DIM + at, vector_sum, mask=is_there)


@triton.jit(do_not_specialize=["tokens", "splits"])
def combination_kernel(
    target_scores: tl.tensor,  # (T,)
    weights: tl.tensor,  # (T,)
    largest: tl.tensor,  # (S, T)
    totals: tl.tensor,  # (S, T)
    sums: tl.tensor,  # (S, T, D)
    log_p: tl.tensor,  # (T,)
    expected: tl.tensor,  # (T, D)
    shifts: tl.tensor,  # (T,)
    scales: tl.tensor,  # (T,)
    tokens: int,
    splits: int,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    LIFT: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Combine the splits to log p(target), p @ table, the largest score, and weight / sum of e^(score - largest)."""
    token, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    is_token = token < tokens
    part = token.to(tl.int64)
    shift = tl.full((TOKENS,), float("-inf"), tl.float32)
    for _ in range(splits):
        shift = tl.maximum(shift, tl.load(largest + part, mask=is_token, other=0.0))
        part += tokens
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    total = tl.zeros((TOKENS,), tl.float32)
    vector_sum = tl.zeros((TOKENS, WIDTH), tl.float32)
    is_there = is_token[:, None] & (d < DIM)[None, :]
    part = token.to(tl.int64)
    for _ in range(splits):
        rescale = tl.exp(tl.load(largest + part, mask=is_token, other=0.0) - shift)
        total += rescale * tl.load(totals + part, mask=is_token, other=1.0)
        vector_sum += rescale[:, None] * tl.load(sums + part[:, None] * DIM + d[None, :], mask=is_there, other=0.0)
        part += tokens
    below = tl.load(target_scores + token, mask=is_token, other=0.0) - shift
    # the target is one of the columns; only because sums are in another order may its score exceed the largest
    tl.store(log_p + token, tl.where(below > 0.0, 0.0, below) - tl.log(total), mask=is_token)
    mean = vector_sum / (total * LIFT)[:, None]
    tl.store(expected + token.to(tl.int64)[:, None] * DIM + d[None, :], mean, mask=is_there)
    tl.store(shifts + token, shift, mask=is_token)
    tl.store(scales + token, tl.load(weights + token, mask=is_token, other=0.0) / total, mask=is_token)


@triton.jit(do_not_specialize=["tokens", "items", "length"])
def table_grad_kernel(
    states: tl.tensor,  # (T, D)
    table: tl.tensor,  # (V, D)
    biases: tl.tensor,  # (V,) or None
    excluded: tl.tensor,  # (T,) or None
    is_masked: tl.tensor,  # (G, V + 1) or None
    owners: tl.tensor,  # (T,) or None
    targets: tl.tensor,  # (T,) or None
    shifts: tl.tensor,  # (T,)
    scales: tl.tensor,  # (T,)
    sums: tl.tensor,  # (S, V, D)
    tokens: int,
    items: int,
    length: int,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Write each split's sum of the states times e^(score - shift) * scale.

    In the last block, rows that are not items may overflow; they are not written.
    """
    split, d, row = tl.program_id(1), tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_item = item < items
    at = item.to(tl.int64)[:, None] * DIM + d[None, :]
    is_there = is_item[:, None] & (d < DIM)[None, :]
    vectors = tl.load(table + at, mask=is_there, other=0.0)  # (ITEMS, WIDTH)
    if biases is not None:
        bias = tl.load(biases + item, mask=is_item, other=0.0)
    state_sum = tl.zeros((ITEMS, WIDTH), tl.float32)
    begin = split * length
    rows = states + begin.to(tl.int64) * DIM + row[:, None] * DIM + d[None, :]
    for start in range(begin, tl.minimum(begin + length, tokens), TOKENS):
        token = start + row
        is_token = token < tokens
        h = tl.load(rows, mask=is_token[:, None] & (d < DIM)[None, :], other=0.0)  # (TOKENS, WIDTH)
        shift = tl.load(shifts + token, mask=is_token, other=float("inf"))
        scale = tl.load(scales + token, mask=is_token, other=0.0)
        scores = tl.dot(vectors, tl.trans(h), input_precision="ieee")
        if biases is not None:
            scores += bias[:, None]
        scores = _counted(*(scores, token[None, :], item[:, None], tokens, items, excluded, is_masked, owners, targets))
        p = tl.exp(scores - shift[None, :]) * scale[None, :]
        state_sum = tl.dot(p.to(h.dtype), h, state_sum, input_precision="ieee")
        rows += TOKENS * DIM
    tl.store(sums + split.to(tl.int64) * items * DIM + at, state_sum, mask=is_there)


@triton.jit
def _counted(
    scores: tl.tensor,
    token: tl.tensor,
    item: tl.tensor,
    tokens: int,
    items: int,
    excluded: tl.tensor,
    is_masked: tl.tensor,
    owners: tl.tensor,
    targets: tl.tensor,
) -> tl.tensor:
    """Return the scores of tokens and items, whose shapes are theirs or 1, with -inf where an item does not count."""
    if excluded is not None:
        out = tl.load(excluded + token, mask=token < tokens, other=-1).to(tl.int32)
        scores = tl.where(item == out, float("-inf"), scores)
    if is_masked is not None:
        row = is_masked + tl.load(owners + token, mask=token < tokens, other=0) * (items + 1)
        target = tl.load(targets + token, mask=token < tokens, other=0).to(tl.int32)
        is_out = tl.load(row + item, mask=item < items, other=0) != 0
        scores = tl.where(is_out & (item != target), float("-inf"), scores)
    return scores
