"""Cross-entropies between token states and item vectors, without ever storing (T, V) logits. T tokens, D dim, V items."""

from collections.abc import Callable, Iterator
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from sasrec_lab.ops import library as kernels

# Logits at once. Torch's products reach their rate from some hundred rows on (MovieLens-1M on two cores: 79 ms with 64,
# 56 to 60 with 256, 54 with 512, 56 to 60 with 1,024); of a long catalogue 2 ** 22 logits, 16 MiB, still lie in the
# last-level cache. The compiled form writes and reads them once and does as well with half of that.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26, "compiled": 2**21}
CHUNK_ROWS = {"cpu": 512, "cuda": 2**20, "compiled": 512}
PAIR_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # of vectors looked up at once: 2 MiB


def linear_cross_entropy(states: Tensor, table: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """Return the sum of token_weights (T,) * cross_entropy(states @ table', targets).

    `states` (T, D), `table` (V, D), `targets` (T,) rows of the table; a token of weight 0 may have any target.
    """
    return _LinearCrossEntropy.apply(states, table, targets, token_weights)


def sampled_cross_entropy(
    states: Tensor, vectors: Tensor, excluded_columns: Tensor, log_weights: Tensor, token_weights: Tensor
) -> Tensor:
    """Return the sum of token_weights (T,) * cross-entropy of each token's target against N shared negatives.

    `vectors` (T + N, D) are the targets' vectors, then the negatives'. `log_weights` (N,) are added to the negatives'
    logits; `excluded_columns` (T,) is the negative that does not count for a token, N for none.
    """
    return _SampledCrossEntropy.apply(states, vectors, excluded_columns, log_weights, token_weights)


def linear_binary_cross_entropy(
    states: Tensor, table: Tensor, rows: Tensor, beta: float, token_weights: Tensor
) -> Tensor:
    """Return the sum of token_weights (T,) * (beta softplus(-s_0) + softplus(s_1) + ... + softplus(s_N)).

    s = table[rows] @ states: `rows` (T, 1 + N) are each token's target and its N negatives.
    """
    return _LinearBinaryCrossEntropy.apply(states, table, rows, beta, token_weights)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum of shares * cross_entropy(states @ item_table', targets), gradients made in the forward pass.

    A chunk of tokens at a time its logits are made, turned into probabilities and used up for both gradients while they
    lie in the cache, so (T, V) logits never exist: half the time of logits and autograd, and memory that does not
    grow with T * V. Compiled (cpp/loss.cpp) a step is another 1.1 (MovieLens-1M) to 1.3 times as fast (KION). The plain
    twin is in tests/training/test_losses.py.
    """

    @staticmethod
    def forward(ctx, states: Tensor, item_table: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        matmul_dtype = _matmul_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states, shares = states.detach().contiguous(), shares[:, None]
            own = item_table.index_select(0, targets)  # (T, D)
            if kernels.supports(states, item_table, own) and matmul_dtype == torch.float32:
                log_p, expected, table_grad = _compiled_products(states, item_table, own, shares)
            else:
                log_p, expected, table_grad = _log_p_and_products(
                    states, item_table, targets, shares, _product, matmul_dtype=matmul_dtype
                )
            states_grad = (expected - own).to(states.dtype) * shares
            table_grad.index_add_(0, targets, (states * -shares).to(table_grad.dtype))
        ctx.save_for_backward(states_grad, table_grad)
        return -(shares * log_p).sum()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states_grad, table_grad = ctx.saved_tensors
        return _scaled(states_grad, grad_output), _scaled(table_grad, grad_output), None, None


class _SampledCrossEntropy(torch.autograd.Function):
    """sum of shares * cross_entropy of each token's target among itself and the N negatives, as LinearCrossEntropy.

    `rows` are the targets' vectors and behind them the negatives'. The target's logit is one column more, behind the
    negatives'; `hits` are the columns to leave out, that one where there is none.
    """

    @staticmethod
    def forward(ctx, states: Tensor, rows: Tensor, hits: Tensor, log_weights: Tensor, shares: Tensor) -> Tensor:
        matmul_dtype = _matmul_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            states, shares = states.detach().contiguous(), shares[:, None]
            own, negatives = rows.detach().split([len(states), len(log_weights)])  # (T, D), (N, D)
            if kernels.supports(states, own, negatives, log_weights) and matmul_dtype == torch.float32:
                log_p, expected, table_grad = _compiled_products(
                    states, negatives, own, shares, biases=log_weights, hits=hits, own_counts=True
                )
            else:
                own_logits, log_weights = (states * own).sum(1), F.pad(log_weights, (0, 1))  # (T,), (N + 1,)

                def logits(h: Tensor, columns: Tensor, chunk: slice, out: Tensor) -> Tensor:
                    out = _product(h, columns, chunk, out).add_(log_weights)
                    out.scatter_(1, hits[chunk, None], float("-inf"))
                    out[:, -1] = own_logits[chunk]
                    return out

                log_p, expected, table_grad = _log_p_and_products(
                    states,
                    F.pad(negatives, (0, 0, 0, 1)),
                    torch.full_like(hits, len(negatives)),
                    shares,
                    logits,
                    matmul_dtype=matmul_dtype,
                )
            missing = -torch.expm1(log_p) * shares  # (T, 1): what the target's probability lacks to 1
            states_grad = (expected * shares - own * missing).to(states.dtype)
            rows_grad = torch.cat([states * -missing, table_grad[: len(negatives)]])
        ctx.save_for_backward(states_grad, rows_grad)
        return -(shares * log_p).sum()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        states_grad, rows_grad = ctx.saved_tensors
        return _scaled(states_grad, grad_output), _scaled(rows_grad, grad_output), None, None, None


class _LinearBinaryCrossEntropy(torch.autograd.Function):
    """sum of shares * (beta softplus(-s_0) + softplus(s_1) + ... + softplus(s_N)), s = table[places] @ states.

    Looked up a chunk of tokens at a time, so (T, 1 + N, D) vectors never exist: memory grows with T * N, as the
    negatives themselves do, and no more. Half the time of one lookup and autograd. The plain twin is in the tests.
    """

    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, places: Tensor, beta: float, shares: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            h, table = states.detach().to(table.dtype), table.detach()
            slopes = table.new_empty(places.shape)  # (T, 1 + N) the loss's by each logit
            states_grad = torch.empty_like(h)
            losses = []
            for chunk in _chunks_of_pairs(places, h):
                rows = F.embedding(places[chunk], table)  # (t, 1 + N, D)
                logits = torch.bmm(rows, h[chunk, :, None]).squeeze(2)
                share = shares[chunk, None].expand_as(logits).contiguous()
                share[:, 0] *= beta
                logits[:, 0].neg_()
                losses.append(torch.sum(F.softplus(logits) * share))
                slope = torch.mul(logits.sigmoid_(), share, out=slopes[chunk])
                slope[:, 0].neg_()
                torch.bmm(slope[:, None], rows, out=states_grad[chunk, None])
        ctx.save_for_backward(h, slopes, states_grad, places)
        ctx.items, ctx.states_dtype = len(table), states.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """The table's gradient is made only here: to scale it would be one more pass over the catalogue."""
        h, slopes, states_grad, places = ctx.saved_tensors
        slopes = slopes * grad_output
        table_grad = h.new_zeros(ctx.items, h.shape[1])
        for chunk in _chunks_of_pairs(places, h):
            table_grad.index_add_(0, places[chunk].flatten(), (slopes[chunk, :, None] * h[chunk, None]).flatten(0, 1))
        return (states_grad * grad_output).to(ctx.states_dtype), table_grad, None, None, None


def _chunks_of_pairs(places: Tensor, states: Tensor) -> Iterator[slice]:
    """Tokens of which all vectors looked up, (1 + N, D) each, together have at most PAIR_ELEMENTS elements."""
    most = PAIR_ELEMENTS["cuda" if states.is_cuda else "cpu"]
    rows = max(1, most // (places.shape[1] * states.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(states), rows))


def _scaled(gradient: Tensor, by: Tensor) -> Tensor:
    """By nothing, most often: that spares a pass over the catalogue. A GPU would have to be waited for to know."""
    return gradient if by.device.type == "cpu" and by == 1 else gradient * by


def _matmul_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _log_p_and_products(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    shares: Tensor,
    logits: Callable[[Tensor, Tensor, slice, Tensor], Tensor],
    *,
    matmul_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(target), p table and p' (states * shares), where p is the softmax of `logits(h, columns, chunk, out)`."""
    grad_dtype, table = table.dtype, table.detach().to(matmul_dtype)
    columns = table.T.contiguous()  # (D, V): with table and gradient this way round products are a fifth faster
    columns_grad = torch.zeros_like(columns, dtype=grad_dtype)
    expected = torch.empty_like(states, dtype=matmul_dtype)
    precise = torch.promote_types(matmul_dtype, torch.float32)
    log_p = torch.empty_like(shares, dtype=precise)
    rows = _chunk_rows(len(states), len(table), "cuda" if states.is_cuda else "cpu")
    buffer = table.new_empty(rows, len(table), dtype=precise)  # one for all chunks: it is in the cache
    for start in range(0, len(states), rows):
        chunk = slice(start, start + rows)
        h, target, share = states[chunk].to(matmul_dtype), targets[chunk, None].contiguous(), shares[chunk]
        p = logits(h, columns, chunk, buffer[: len(h)])  # (rows, V)
        log_p[chunk] = softmax_and_log_p(p, target)
        p = p.to(matmul_dtype)
        torch.mm(p, table, out=expected[chunk])
        _add_product(columns_grad, (h * share.to(matmul_dtype)).T, p)
    return log_p, expected, columns_grad.T.contiguous()  # (T, 1), (T, D), (V, D)


def _compiled_products(
    states: Tensor,
    table: Tensor,
    own: Tensor,
    shares: Tensor,
    *,
    biases: Tensor | None = None,
    hits: Tensor | None = None,
    own_counts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_log_p_and_products` gives, where each token's target has the vector `own`.

    Biases are added to the logits, `hits` left out, and with `own_counts` the target is one column more. Tokens without
    a share, dummies among them, are passed over.
    """
    every, nothing = len(states), states.new_empty(0)
    real = shares[:, 0].nonzero().squeeze(1)
    if len(real) < every:
        states, own, shares = states[real], own[real], shares[real]
        hits = None if hits is None else hits[real]
    log_p, expected, table_grad = torch.empty_like(shares), torch.empty_like(states), torch.empty_like(table)
    if len(real):
        rows = ceil(_chunk_rows(len(states), len(table), "compiled") / 16) * 16  # whole registers
        vectors = (biases if biases is not None else nothing, hits if hits is not None else nothing)
        sizes = (*states.shape, table, len(table))
        outputs = (log_p, expected, table_grad)
        kernels.call("softmax_products", states, *sizes, *vectors, own, int(own_counts), shares, rows, *outputs)
    else:
        table_grad.zero_()
    if len(real) < every:
        log_p, expected = (x.new_zeros(every, x.shape[1]).index_copy_(0, real, x) for x in (log_p, expected))
    return log_p, expected, table_grad


def softmax_and_log_p(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (R, V) into probabilities in place; gives the logarithm of each target's (R, 1), however small.

    The compiled form is a pass less and knows the sum: half the time of this part of a step in bf16. Single precision
    has `_compiled_products`.
    """
    if kernels.supports(logits):
        log_p = logits.new_empty(len(logits), 1)
        kernels.call("softmax_and_log_p", logits, *logits.shape, targets, log_p)
        return log_p
    target_logits, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    p = torch.softmax(logits, 1, out=logits)
    return target_logits - largest + p.amax(1, keepdim=True).log()


def _product(states: Tensor, columns: Tensor, chunk: slice, out: Tensor) -> Tensor:
    """A chunk's logits, states @ columns, in `out`, which may be of a wider type than they."""
    return torch.mm(states, columns, out=out) if out.dtype == states.dtype else out.copy_(states @ columns)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b"""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunk_rows(tokens: int, items: int, form: str) -> int:
    """Tokens a chunk: all chunks about alike, which keeps shapes few."""
    rows = min(max(16, CHUNK_ELEMENTS[form] // items), CHUNK_ROWS[form])
    return ceil(tokens / ceil(tokens / rows))
