"""Linear attention with decay: the scan that retention, gated linear attention and their relatives share.

In: queries and keys [B, H, L, K], values [B, H, L, V], log decays; out: [B, H, L, V] and the last state [B, H, K, V].

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,     o_t = S_t^T q_t,     a_t = exp(log_decay_t)

with a_t one number (retention: the same for all tokens; Mamba-2: another for each) or one a key channel (GLA, Yang et
al., ICML 2024, arXiv:2312.06635). Queries come scaled. Three forms of the same numbers:

- recurrent: the lines above, token by token; no more memory than one state;
- parallel: o_i = sum_{j <= i} (sum_d q_i[d] k_j[d] exp(c_i[d] - c_j[d])) v_j, c the running sum of the log decays;
- chunked: the parallel form inside chunks of C tokens, many chunks at once, and the states between chunks in a short
  loop: L C (K + V) + 2 L K V multiply-adds, so linear in L.

Where no chunk fades by more than e^-40, exp(c_i - c_j) is split into a factor exp(c_i) of the query and exp(-c_j) of
the key, c counted from the start of the chunk, and one product of matrices does it. Elsewhere the split would overflow
or lose digits: then the chunk is halved until it holds; between two halves all exponents are sums up to the border,
never above 0. So the result is exact for any decay from 1 down to 0 (a log decay of minus infinity).

On CUDA, where flash-linear-attention is installed, the same call runs its Triton kernels.

Shapes: B sequences, H heads, L tokens, K key and V value channels a head, N chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError, unknown

Mode = Literal["recurrent", "parallel", "chunked"]
Backend = Literal["auto", "torch", "fla"]

CHUNK = 64
SPAN = 40.0
"""Largest sum of log decays of a chunk that is split in two factors: float32 holds e^40 easily, and rounding the sums
changes a weight by 4e-6 of itself at most."""
TOGETHER = 48
"""How many chunks of all heads a CPU's thread has before it at once: as many as its caches hold."""


def linear_attention(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLV: Tensor,
    log_decay: Tensor | None = None,
    *,
    mode: Mode = "chunked",
    chunk: int | None = None,
    state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay.

    Args:
        query_BHLK: queries, scaled.
        key_BHLK: keys.
        value_BHLV: values.
        log_decay: logarithms of the decays, at most 0: [H] for one a head, [B, H, L] for one a head and token,
            [B, H, L, K] for one a key channel too, None for no decay. A token's decay acts on the state before the
            token is added.
        mode: the form of the computation; the result is the same.
        chunk: tokens of a chunk in the chunked form, None for 64.
        state: [B, H, K, V], the state before the first token; None for zeros.
        backend: "fla" for the kernels of flash-linear-attention, "torch" for the code here, "auto" for the former where
            the tensors are on CUDA, the mode is chunked and the package is installed. Its products of float32 are
            TF32's, with 10 bits after the point.

    Returns:
        The outputs [B, H, L, V], in the type of the values; and the state after the last token, in float32 or wider.

    Raises:
        InputError: shapes that do not fit each other, an unknown mode or backend, a chunk below 1, or fla asked for
            where it is not installed.
    """
    _check(query_BHLK, key_BHLK, value_BHLV, log_decay, mode, chunk, state, backend)
    kernels = _fla() if backend == "fla" or (backend == "auto" and _suits_fla(query_BHLK, mode)) else None
    if backend == "fla" and kernels is None:
        raise InputError(
            "backend 'fla' needs the package flash-linear-attention and a Triton that works (pip install "
            "flash-linear-attention)"
        )
    if kernels is not None:
        return _by_fla(kernels, query_BHLK, key_BHLK, value_BHLV, log_decay, state)

    device = query_BHLK.device.type
    dtype = torch.promote_types(at_least_single(query_BHLK), key_BHLK.dtype)
    query, key, value = (x.to(dtype) for x in (query_BHLK, key_BHLK, value_BHLV))
    decay = None if log_decay is None else _as_channels(log_decay.to(dtype))
    state = query.new_zeros(*key.shape[:2], key.shape[3], value.shape[3]) if state is None else state.to(dtype)
    # Decays and sums of many terms do not bear the half precision that autocast would choose.
    mixed = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if mixed else nullcontext():
        if mode == "recurrent":
            out, state = _recurrent(query, key, value, decay, state)
        else:
            length = query.shape[2]
            out, state = _chunked(query, key, value, decay, state, length if mode == "parallel" else chunk or CHUNK)
    return out.to(value_BHLV.dtype), state


def scan_macs(length: int, heads: int, key_width: int, value_width: int) -> int:
    """Multiply-adds of the recurrent form for one sequence, the way published counts have it: decay, outer product and
    read-out, each once an entry of the state and token."""
    return 3 * length * heads * key_width * value_width


def at_least_single(x: Tensor) -> torch.dtype:
    """The type of a tensor, or float32 where that is of half precision: what decays are computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def _as_channels(decay: Tensor) -> Tensor:
    """Log decays as [1 or B, H, 1 or L, 1 or K]."""
    if decay.ndim == 1:
        return decay[None, :, None, None]
    return decay[..., None] if decay.ndim == 3 else decay


def _recurrent(query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    length = query.shape[2]
    fading = None if decay is None else decay.exp().expand(-1, -1, length, -1)[..., None]
    outs = []
    for t in range(length):
        added = key[:, :, t, :, None] * value[:, :, t, None, :]
        state = state + added if fading is None else fading[:, :, t] * state + added
        outs.append((query[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(outs, dim=2), state


def _chunked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Some chunks at a time, then what is left as one shorter chunk."""
    length = query.shape[2]
    chunk = min(chunk, length)
    whole = length - length % chunk
    tokens = whole
    if query.device.type == "cpu":
        tokens = chunk * max(1, TOGETHER * torch.get_num_threads() // (query.shape[0] * query.shape[1]))
    borders = [*range(0, whole, tokens), whole, *([length] if whole < length else [])]
    outs = []
    for start, stop in pairwise(borders):
        part = slice(start, stop)
        out, state = _whole_chunks(
            query[:, :, part],
            key[:, :, part],
            value[:, :, part],
            decay if decay is None or decay.shape[2] == 1 else decay[:, :, part],
            state,
            min(chunk, stop - start),
        )
        outs.append(out)
    return torch.cat(outs, dim=2), state


def _whole_chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    heads, count = query.shape[:2], query.shape[2] // chunk
    query, key, value = (x.unflatten(2, (count, chunk)) for x in (query, key, value))
    inside = _inside_chunks(query, key, None if decay is None else _per_chunk(decay, count, chunk))
    value_MCV = value.flatten(0, 2)
    added = torch.bmm(inside.key.mT, value_MCV).unflatten(0, (*heads, count)).unbind(2)
    left = None if inside.left is None else inside.left.expand(-1, -1, count, -1, -1).unbind(2)
    before = []
    for index in range(count):
        before.append(state)
        if left is None:
            state = state + added[index]
        elif inside.split:
            state = (state + added[index]) * left[index]
        else:
            state = torch.addcmul(added[index], left[index], state)
    states = torch.stack(before, dim=2).flatten(0, 2)
    out = torch.bmm(inside.weights, value_MCV).baddbmm_(inside.query, states)
    return out.unflatten(0, (*heads, count)).flatten(2, 3), state


def _per_chunk(decay: Tensor, count: int, chunk: int) -> Tensor:
    """Log decays [1 or B, H, 1 or N, C, 1 or K]; one that is the same for all tokens has one chunk."""
    if decay.shape[2] == 1 and count * chunk > 1:
        return decay[:, :, None].expand(-1, -1, 1, chunk, -1)
    return decay.unflatten(2, (count, chunk))


class _Inside(NamedTuple):
    """What the chunks, M = B H N of them, need: their own weights, and how they read and write the state."""

    weights: Tensor
    """[M, C, C]."""
    query: Tensor
    """[M, C, K]; times the state before the chunk, what its queries read of it."""
    key: Tensor
    """[M, C, K]; times the values, what the chunk adds to the state."""
    left: Tensor | None = None
    """[.., N, K, 1]: what is left of the state at the end of the chunk, of 1; None for all of it."""
    split: bool = False
    """Whether the keys are counted from the start of the chunk, so that what they add fades with the state."""


def _inside_chunks(query: Tensor, key: Tensor, decay: Tensor | None) -> _Inside:
    if decay is None:
        query, key = query.flatten(0, 2), key.flatten(0, 2)
        return _Inside(torch.bmm(query, key.mT).tril_(), query, key)
    total = decay.cumsum(dim=-2)
    fading = total.exp()
    left = fading[..., -1:, :].mT
    if _splits(total):
        query, key = (query * fading).flatten(0, 2), (key / fading).flatten(0, 2)
        return _Inside(torch.bmm(query, key.mT).tril_(), query, key, left, split=True)
    weights = _halved_weights(query, key, decay).flatten(0, 2)
    query, key = query * fading, key * _until_end(decay).exp()
    return _Inside(weights, query.flatten(0, 2), key.flatten(0, 2), left)


def _splits(total: Tensor) -> bool:
    """Whether running sums of log decays are small enough for two factors."""
    return total.is_meta or bool(total.detach().amin() >= -SPAN)


def _until_end(decay: Tensor) -> Tensor:
    """Sums of the log decays after each token. Not the total less the running sum: that would lose digits."""
    later = F.pad(decay[..., 1:, :], (0, 0, 0, 1))
    return later.flip(-2).cumsum(dim=-2).flip(-2)


def _halved_weights(query: Tensor, key: Tensor, decay: Tensor) -> Tensor:
    """Weights [..., C, C] of a chunk in halves, each in halves of its own unless its decays can be split."""
    length = query.shape[-2]
    if length == 1:
        return (query * key).sum(dim=-1, keepdim=True)
    total = decay.cumsum(dim=-2)
    if _splits(total):
        fading = total.exp()
        return ((query * fading) @ (key / fading).mT).tril()
    half = length // 2
    first, second = slice(half), slice(half, None)
    upper = _halved_weights(query[..., first, :], key[..., first, :], decay[..., first, :])
    lower = _halved_weights(query[..., second, :], key[..., second, :], decay[..., second, :])
    reading = query[..., second, :] * decay[..., second, :].cumsum(dim=-2).exp()
    across = reading @ (key[..., first, :] * _until_end(decay[..., first, :]).exp()).mT
    nothing = across.new_zeros(()).expand(*across.shape[:-2], half, length - half)
    return torch.cat([torch.cat([upper, nothing], dim=-1), torch.cat([across, lower], dim=-1)], dim=-2)


def _suits_fla(query: Tensor, mode: str) -> bool:
    return query.is_cuda and mode == "chunked" and query.dtype != torch.float64


@cache
def _fla() -> _Kernels | None:
    """The kernels of flash-linear-attention, None where they cannot be imported: without the package, or without a
    Triton and a driver that work."""
    try:
        gla, simple = import_module("fla.ops.gla"), import_module("fla.ops.simple_gla")
    except (ImportError, RuntimeError):
        return None
    return _Kernels(gla.chunk_gla, simple.chunk_simple_gla)


class _Kernels(NamedTuple):
    by_channel: Callable[..., tuple[Tensor, Tensor]]
    by_head: Callable[..., tuple[Tensor, Tensor]]


def _by_fla(
    kernels: _Kernels, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by kernels whose tensors are [B, L, H, ...], with decays a channel or a head."""
    tokens_first = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    options = dict(scale=1.0, initial_state=None if state is None else state.float(), output_final_state=True)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None, :, None].expand(query.shape[:3])
    gate = None if log_decay is None else log_decay.float().transpose(1, 2).contiguous()
    kernel = kernels.by_channel if gate is not None and gate.ndim == 4 else kernels.by_head
    out, state = kernel(*tokens_first, g=gate, **options)
    return out.transpose(1, 2).to(value.dtype), state


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    mode: str,
    chunk: int | None,
    state: Tensor | None,
    backend: str,
) -> None:
    if mode not in get_args(Mode):
        raise unknown("mode of linear attention", mode, get_args(Mode))
    if backend not in get_args(Backend):
        raise unknown("backend of linear attention", backend, get_args(Backend))
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be a number of tokens from 1, or None for {CHUNK}, not {chunk}")
    if query.ndim != 4 or query.shape != key.shape or value.ndim != 4 or value.shape[:3] != key.shape[:3]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise InputError(f"queries and keys must be [B, H, L, K] and values [B, H, L, V], not {shapes}")
    if query.shape[2] == 0:
        raise InputError("linear attention needs at least one token")
    batch, heads, length, width = query.shape
    allowed = [[heads], [batch, heads, length], [batch, heads, length, width]]
    if log_decay is not None and list(log_decay.shape) not in allowed:
        raise InputError(
            f"log_decay must be of shape {allowed[0]}, {allowed[1]} or {allowed[2]}, not {list(log_decay.shape)}"
        )
    wanted = [batch, heads, width, value.shape[3]]
    if state is not None and list(state.shape) != wanted:
        raise InputError(f"state must be of shape {wanted}, not {list(state.shape)}")
