"""The gated delta rule over a prompt as products of matrices, for a GPU."""

from __future__ import annotations

import torch

# Tokens whose updates become one system of equations.
CHUNK = 64
# Tokens whose chunks are in memory at once: 0.6 GB for 32 heads of 128 × 128.
_SEGMENT = 4096


def chunked_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    scaling: float,
    unit_keys: bool,
) -> torch.Tensor:
    """query, key [sequences, tokens, key heads, size], value [.., heads, value size], decay (its
    logarithm) and beta [.., heads]; changes ``state`` [sequences, heads, size, value size]. Returns
    value's shape in float32."""
    outs = []
    for first in range(0, value.shape[1], _SEGMENT):
        part = slice(first, first + _SEGMENT)
        q, k, v, g, b = (
            each[:, part].transpose(1, 2).float() for each in (query, key, value, decay, beta)
        )
        if unit_keys:
            q, k = _unit(q), _unit(k)
        outs.append(_segment(q * scaling, k, v, g, b, state).transpose(1, 2))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    squares = x.square().sum(-1, keepdim=True)
    return x * torch.rsqrt(squares + 1e-6)


def _chunks(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """[sequences, heads, tokens, …] as [sequences, heads, chunks, CHUNK, …], filled up by zeros."""
    missing = -tokens % CHUNK
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], 2)
    chunks: torch.Tensor = x.unflatten(2, (-1, CHUNK))
    return chunks


def _segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """All [sequences, heads, tokens, …]; returns value's shape."""
    tokens, shares = value.shape[2], value.shape[1] // key.shape[1]
    query, key, value = (_chunks(each, tokens) for each in (query, key, value))
    decay, beta = (_chunks(each, tokens)[..., None] for each in (decay, beta))
    # The products of keys are the same for all heads that share them.
    products, scores = (each @ key.mT for each in (key, query))
    query, key, products, scores = (
        each.repeat_interleave(shares, 1) if shares > 1 else each
        for each in (query, key, products, scores)
    )
    total = decay.cumsum(3)
    between = (total - total.mT).tril_().exp_().tril_()
    # New values of a chunk's tokens depend on each other: (I + system) · new = beta · value - …
    system = (products * between * beta).tril_(-1)
    known = torch.cat([value * beta, key * (beta * total.exp())], -1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    new, reads = solved.split([value.shape[-1], key.shape[-1]], -1)
    last = total[..., -1:, :]
    writes = (key * (last - total).exp()).mT
    # From chunk to chunk the state goes through one product: S = carry · S + writes · new.
    carry = -(writes @ reads)
    carry.diagonal(dim1=-2, dim2=-1).add_(last.exp()[..., 0])
    added = writes @ new
    before = torch.empty_like(added)
    held = state.flatten(0, 1).float()
    for chunk in range(added.shape[2]):
        before[:, :, chunk] = held.view(before[:, :, chunk].shape)
        held = torch.baddbmm(
            added[:, :, chunk].flatten(0, 1), carry[:, :, chunk].flatten(0, 1), held
        )
    state.copy_(held.view(state.shape))
    new = new - reads @ before
    out: torch.Tensor = (query * total.exp()) @ before + (scores * between) @ new
    return out.flatten(2, 3)[:, :, :tokens]
