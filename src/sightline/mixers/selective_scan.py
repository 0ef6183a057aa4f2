"""The selective scan S6 of Mamba (Gu and Dao 2023, arXiv:2312.00752): a recurrence whose step sizes the input chooses.

In: u, delta [B, E, L], A [E, N] (negative), B and C [B, N, L], D [E]. Out: y [B, E, L] and the last state [B, E, N].

    delta := softplus(delta + bias)
    h_t[e, n] = exp(delta_t[e] A[e, n]) h_{t-1}[e, n] + delta_t[e] B_t[n] u_t[e]
    y_t[e] = sum_n C_t[n] h_t[e, n] + D[e] u_t[e]

A is discretised exactly and B by Euler's rule, in float32 at least, as in the official code (state-spaces/mamba,
`selective_scan_ref`); its gate z is left to the caller. With B and C of shape [B, G, N, L] the channels fall into G
groups of equal size, each with its own.

Three backends: a loop of torch operations over the tokens, for every device and dtype; the same in chunks, some
2 sqrt(L) operations instead of L, which is what pays where starting an operation takes longer than the operation; and
compiled loops on the CPU by numba (`pip install 'sightline[cpu]'`), forward and gradient. The states of a pass are
L E N numbers: the torch loop keeps them all for the gradient, the chunks make several tensors of that size, the
compiled loop keeps each 32nd, and computes the others again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.machine_code import has_numba
from sightline.mixers.linear_recurrence import linear_recurrence
from sightline.mixers.selective_scan_kernels import kernels

Backend = Literal["auto", "torch", "chunked", "numba"]

KEPT_EVERY = 32
"""Tokens between two states that the compiled scan keeps for its gradient."""
WIDEST, NARROWEST = 384, 32
"""Channels of a block of the compiled scan: its states and rates shall fit the first cache, and be worth a thread."""


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    state: Tensor | None = None,
    gap: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Scans tokens from the first to the last.

    Args:
        u: [B, E, L], any strides; the compiled scan is spared a copy where the channels lie side by side.
        delta: [B, E, L], the steps; before bias and softplus.
        A: [E, N].
        B: [B, N, L], or [B, G, N, L] for G groups of channels.
        C: as B.
        D: [E], the weight of u itself.
        delta_bias: [E], added to delta.
        softplus: whether delta passes through softplus.
        state: [B, E, N], the state before the first token; zeros if None.
        gap: that broadcasts to [B, E, L]: further time over which the state decays before each token, without input;
            what tokens that have been left out would have taken.
        backend: `numba` for the compiled loops (CPU only, differentiable once), `torch` for the plain loop, `chunked`
            for chunks; `auto` takes the first on a CPU where it can, the last on other devices.

    Returns:
        y [B, E, L] in the dtype of u, and the state after the last token [B, E, N] in float32 or float64.

    Raises:
        InputError: shapes that do not fit each other, an unknown backend, or `numba` where it is not installed or the
            tensors lie on another device.
    """
    if backend not in get_args(Backend):
        raise unknown("backend of selective_scan", backend, get_args(Backend))
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    _check(u, delta, A, B, C, state)
    dtype = torch.promote_types(u.dtype, torch.float32)
    step = _step_size(delta.to(dtype), None if delta_bias is None else delta_bias[:, None], softplus)
    if u.is_meta:
        return u.mT.new_empty(u.mT.shape).mT, step.new_empty(*u.shape[:2], A.shape[1])
    times = step if gap is None else step + gap
    start = step.new_zeros(*u.shape[:2], A.shape[1]) if state is None else state.to(dtype)
    values = (times, step * u, A.to(dtype), B.to(dtype), C.to(dtype), start)
    if _use_kernels(backend, u):
        wanted = torch.is_grad_enabled() and any(value.requires_grad for value in values)
        y, last = _Compiled.apply(*values, wanted)  # type: ignore[no-untyped-call]
    elif backend == "chunked" or (backend == "auto" and u.device.type != "cpu"):
        y, last = _chunked(*values)
    else:
        y, last = _loop(*values)
    if D is not None:
        y = torch.addcmul(y, D.to(dtype)[:, None], u.to(dtype))
    return y.to(u.dtype), last


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    softplus: bool = True,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: u and delta [B, E], B and C [B, N], or [B, G, N]; state [B, E, N] -> y, state."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    step = _step_size(delta.to(dtype), delta_bias, softplus)
    if B.ndim == 2:
        B, C = B[:, None], C[:, None]
    repeats = u.shape[1] // B.shape[1]
    B, C = B.to(dtype).repeat_interleave(repeats, 1), C.to(dtype).repeat_interleave(repeats, 1)
    state = torch.exp(step[..., None] * A) * state + (step * u)[..., None] * B
    y = (state * C).sum(-1)
    return (y if D is None else y + D * u).to(u.dtype), state


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        delta = delta + bias
    return F.softplus(delta) if softplus else delta


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None) -> None:
    def refuse(what: str, given: Tensor, wanted: str) -> InputError:
        return InputError(f"{what} of selective_scan must be {wanted}, not of shape {list(given.shape)}")

    if u.ndim != 3 or u.shape[2] == 0:
        raise refuse("u", u, "[B, E, L] with a token at least")
    batch, channels, length = u.shape
    if delta.shape != u.shape:
        raise refuse("delta", delta, f"{list(u.shape)} like u")
    if A.ndim != 2 or A.shape[0] != channels:
        raise refuse("A", A, f"[{channels}, N]")
    states = A.shape[1]
    wanted = f"[{batch}, {states}, {length}], or [{batch}, G, {states}, {length}] with G a divisor of {channels}"
    for name, given in (("B", B), ("C", C)):
        if given.ndim != 4 or given.shape[0] != batch or given.shape[2:] != (states, length):
            raise refuse(name, given, wanted)
        if channels % given.shape[1] or given.shape != B.shape:
            raise refuse(name, given, wanted)
    if state is not None and state.shape != (batch, channels, states):
        raise refuse("state", state, f"{[batch, channels, states]}")


def _loop(times: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: times and x [B, E, L], B and C [B, G, N, L] -> y [B, E, L], state [B, E, N]."""
    groups = B.shape[1]
    h = state.unflatten(1, (groups, -1))
    rates = A.unflatten(0, (groups, -1))
    outputs = []
    along = (times.unflatten(1, (groups, -1)), x.unflatten(1, (groups, -1)), B[:, :, None], C[:, :, None])
    for time, value, b, c in zip(*(tensor.unbind(-1) for tensor in along), strict=True):
        h = torch.exp(time[..., None] * rates) * h + value[..., None] * b
        outputs.append((h * c).sum(-1).flatten(1))
    return torch.stack(outputs, dim=1).mT, h.flatten(1, 2)


def _chunked(times: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_loop`, with the states of all tokens at once."""
    groups = B.shape[1]
    times, x = (tensor.unflatten(1, (groups, -1)).movedim(-1, 0)[..., None] for tensor in (times, x))
    B, C = (tensor.movedim(-1, 0)[:, :, :, None] for tensor in (B, C))
    decays = torch.exp(times * A.unflatten(0, (groups, -1)))
    states = linear_recurrence(decays, x * B, state.unflatten(1, (groups, -1)), mode="chunked")
    return (states * C).sum(-1).flatten(2).movedim(0, -1), states[-1].flatten(1, 2)


def _use_kernels(backend: Backend, u: Tensor) -> bool:
    """Whether the compiled scan is to be taken."""
    if backend in ("torch", "chunked"):
        return False
    if backend == "auto":
        return u.device.type == "cpu" and has_numba()
    if u.device.type != "cpu":
        raise InputError(f"the backend numba of selective_scan is for tensors on the CPU, not on {u.device}")
    if not has_numba():
        raise InputError("the backend numba of selective_scan needs numba: pip install 'sightline[cpu]'")
    return True


class _Compiled(torch.autograd.Function):
    """The recurrence of `_loop` by the kernels."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, wanted = inputs
        times, x, A, B, C, start = (tensor.detach() for tensor in tensors)
        step, x, rates, start = (tensor.mT.contiguous() for tensor in (times, x, A, start))
        B, C = B.mT.contiguous(), C.mT.contiguous()
        batch, length, channels = x.shape
        states = len(rates)
        y, last = torch.empty_like(x), torch.empty_like(start)
        kept = x.new_empty(batch, -(-length // KEPT_EVERY) if wanted else 0, states, channels)
        ctx.save_for_backward(step, x, rates, B, C, kept)
        arrays = [tensor.numpy() for tensor in (step, x, rates, B, C, start, y, last, kept)]

        def run(row: int, group: int, first: int, end: int) -> None:
            step, x, rates, B, C, start, y, last, kept = arrays
            of_row = (step[row], x[row], rates, B[row, group], C[row, group], start[row], y[row], last[row], kept[row])
            kernels().scan(*of_row, KEPT_EVERY, first, end)

        _share(run, _blocks(batch, B.shape[1], channels))
        return y.mT, last.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor, of_last: Tensor) -> tuple[Tensor | None, ...]:
        step, x, rates, B, C, kept = ctx.saved_tensors
        of_y, of_last = of_y.mT.contiguous(), of_last.mT.contiguous()
        batch, groups = B.shape[:2]
        of_step, of_x, of_start = torch.empty_like(step), torch.empty_like(x), torch.empty_like(of_last)
        of_rates = torch.empty_like(of_last)
        blocks = _blocks(batch, groups, x.shape[2])
        of_B, of_C = (x.new_empty(len(blocks), *B.shape[2:]) for _ in range(2))
        numbers = {block: number for number, block in enumerate(blocks)}
        given = [tensor.numpy() for tensor in (step, x, rates, B, C, kept, of_y, of_last)]
        found = [tensor.numpy() for tensor in (of_step, of_x, of_rates, of_B, of_C, of_start)]

        def run(row: int, group: int, first: int, end: int) -> None:
            step, x, rates, B, C, kept, of_y, of_last = given
            of_step, of_x, of_rates, of_B, of_C, of_start = found
            number = numbers[row, group, first, end]
            inputs = (step[row], x[row], rates, B[row, group], C[row, group], kept[row], KEPT_EVERY)
            outputs = (of_step[row], of_x[row], of_rates[row], of_B[number], of_C[number], of_start[row])
            kernels().gradient(*inputs, of_y[row], of_last[row], *outputs, first, end)

        _share(run, blocks)
        of_B, of_C = (shares.unflatten(0, (batch, groups, -1)).sum(2).mT for shares in (of_B, of_C))
        return of_step.mT, of_x.mT, of_rates.sum(0).mT, of_B, of_C, of_start.mT, None


def _blocks(batch: int, groups: int, channels: int) -> list[tuple[int, int, int, int]]:
    """(row, group, first channel, last channel + 1) of pieces of work, equally many of each row and group, in order."""
    size = channels // groups
    for_threads = min(math.ceil(torch.get_num_threads() / (batch * groups)), max(1, size // NARROWEST))
    pieces = max(math.ceil(size / WIDEST), for_threads)
    bounds = [size * piece // pieces for piece in range(pieces + 1)]
    return [
        (row, group, group * size + first, group * size + end)
        for row in range(batch)
        for group in range(groups)
        for first, end in itertools.pairwise(bounds)
    ]


def _share(run: Callable[[int, int, int, int], None], blocks: list[tuple[int, int, int, int]]) -> None:
    """Runs all blocks, by as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(blocks))
    if threads == 1:
        for block in blocks:
            run(*block)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(run, *block) for block in blocks]:
                done.result()
