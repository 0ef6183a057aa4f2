"""mLSTM: linear attention with an exponential input gate, a sigmoid forget gate and a normaliser that is held at 1 or
more (Beck et al., "xLSTM", NeurIPS 2024, arXiv:2405.04517), and the layer that Vision-LSTM makes of it (Alkin et al.,
arXiv:2406.04303).

A head keeps a matrix C_t and a vector n_t, both scaled by exp(-m_t) so that the exponential gate cannot overflow:

    m_t = max(log f_t + m_{t-1}, i_t)                          with log f = logsigmoid of what `forget_gate` gives
    C_t = exp(log f_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T          n_t likewise, with v_t = 1
    h_t = C_t^T q_t / (max(|n_t^T q_t|, exp(-m_t)) + eps)      with q_t already divided by sqrt(d), eps = 1e-6

Writing F for the running sum of log f and u_t = i_t - F_t, the forget gate leaves the recurrence: token s weighs
exp(u_s - M_t) at token t >= s, where M_t = m_t - F_t is just the running maximum of u. This is what the parallel form
(one L x L matrix) and the chunked form (one c x c matrix a chunk, one T x T matrix of the states between) compute.

B batch, H heads, L tokens, K and V the widths of keys and values, E inner width, D width, c tokens a chunk, T chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.machine_code import in_loops
from sightline.mixers.mixer import CausalMixer
from sightline.mixers.mlstm_loops import STEEPEST, layer_in_loops

Mode = Literal["chunked", "parallel", "recurrent"]

CHUNK = 48
"""Tokens a chunk, about: the fastest on processors at heads of about 48 channels."""

LOOP_CHUNK = 64
"""The same for a layer in machine code."""

LOOP_THREADS = 4
"""Up to so many threads the loops, which one of them runs, take the place of tensor operations, which all share: 1.7
times as fast on one thread and 1.5 times on two, they would be overtaken on about eight."""

LOOP_NUMBERS = 1 << 14
"""Of several samples, how many numbers u of each has to have for the loops, which take one after the other, to be
faster than tensor operations, which take them together."""

_STRETCH = 16
"""Chunks that are worked on at once, so few that what they need stays in a processor's cache."""

WIDEST_GROUP = 128
"""Channels of a group of blocks up to which one product costs less than putting several side by side."""


class MLSTMState(NamedTuple):
    """What a head remembers of the tokens so far."""

    memory: Tensor
    """[B, H, K, V]: C exp(-maximum)."""
    normaliser: Tensor
    """[B, H, K]: n exp(-maximum)."""
    maximum: Tensor
    """[B, H]: m, minus infinity before the first token."""


def mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    *,
    mode: Mode = "chunked",
    chunk: int | None = None,
    state: MLSTMState | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, MLSTMState]:
    """The mLSTM of a sequence; the three modes give the same.

    Half precision is computed in float32; the gates are summed in float64 where the device has it.

    Args:
        query: [B, H, L, K]; divided by sqrt(K) here.
        key: [B, H, L, K].
        value: [B, H, L, V].
        input_gate: [B, H, L], before the exponential.
        forget_gate: [B, H, L], before the sigmoid.
        mode: "chunked" costs L c (K + V) + 2 L K V a head, "parallel" L^2 (K + V), "recurrent" 2 L K V in L steps.
        chunk: tokens a chunk, `CHUNK` where left out; for the chunked mode only.
        state: the state before the first token, None for the empty one.
        eps: added to the normaliser.

    Returns:
        [B, H, L, V] in the type of the values, and the state after the last token.

    Raises:
        InputError: an unknown mode, shapes that do not belong together, a chunk below 1.
    """
    if mode not in ("chunked", "parallel", "recurrent"):
        raise unknown("mode", mode, ("chunked", "parallel", "recurrent"))
    shape = query.shape[:-1]
    fits = query.ndim == 4 and key.shape == query.shape and value.shape[:-1] == shape
    if not fits or input_gate.shape != shape or forget_gate.shape != shape or shape[2] == 0:
        given = [list(part.shape) for part in (query, key, value, input_gate, forget_gate)]
        raise InputError(
            "mlstm takes queries and keys [B, H, L, K], values [B, H, L, V] and two gates [B, H, L] with one token or "
            f"more, not {', '.join(map(str, given))}"
        )
    length = shape[2]
    chunk = _fitting(length) if chunk is None else min(chunk, length)
    if mode == "parallel":
        chunk = length
    if chunk < 1:
        raise InputError(f"chunk must be 1 token or more, not {chunk}")
    kind = torch.promote_types(value.dtype, torch.float32)
    # Sums of thousands of logarithms keep their differences only in float64, which Apple's devices do not have.
    wide = torch.float32 if query.device.type == "mps" else torch.float64
    with full_precision(query):
        parts = [part.to(kind) for part in (query, key, value)]
        parts += [input_gate.to(wide), F.logsigmoid(forget_gate.to(wide))]
        after = empty_state(query.to(kind), value.shape[-1], wide) if state is None else state
        if mode == "recurrent":
            mixed, after = _recurrent(parts, after, eps)
        else:
            pieces = []
            for stretch in zip(*(part.split(_STRETCH * chunk, dim=2) for part in parts), strict=True):
                piece, after = _chunked(stretch, after, eps, chunk)
                pieces.append(piece)
            mixed = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return mixed.to(value.dtype), after


def _fitting(length: int, best: int = CHUNK) -> int:
    """Tokens a chunk: about `best`, and a divisor of the length where there is one, which saves copies."""
    near = (size for size in range(best - 16, best + 25) if length % size == 0)
    return min(near, key=lambda size: abs(size - best), default=min(best, length))


def empty_state(like: Tensor, value_width: int, wide: torch.dtype = torch.float64) -> MLSTMState:
    """The state before the first token, for queries `like` [B, H, L, K]."""
    batch, heads, _, width = like.shape
    return MLSTMState(
        like.new_zeros(batch, heads, width, value_width),
        like.new_zeros(batch, heads, width),
        like.new_full((batch, heads), -math.inf, dtype=wide),
    )


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast does not touch what is computed on the device of `like`."""
    kind = like.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def _normalised(mixed: Tensor, total: Tensor, lower: Tensor, eps: Tensor | float, width: int) -> Tensor:
    """C q / (max(|n q|, exp(-m)) + eps), given C q and n q without the division by sqrt(K), and -m as `lower`."""
    scale = width**-0.5
    # The exponential is held within the type; there the output is zero to all digits.
    floor = lower.clamp(max=math.log(torch.finfo(mixed.dtype).max) - 8).exp().to(mixed.dtype)
    return mixed * (scale / (torch.maximum(total.abs() * scale, floor) + eps)).unsqueeze(-1)


def _recurrent(parts: Sequence[Tensor], state: MLSTMState, eps: float) -> tuple[Tensor, MLSTMState]:
    """Token by token, as the equations stand."""
    memory, normaliser, maximum = state
    outputs = []
    for q, k, v, i, f in zip(*(part.unbind(2) for part in parts), strict=True):
        kept, maximum = f + maximum, torch.maximum(f + maximum, i)
        forget, put = ((part - maximum).exp().to(k.dtype).unsqueeze(-1) for part in (kept, i))
        normaliser = forget * normaliser + put * k
        memory = forget.unsqueeze(-1) * memory + (put * k).unsqueeze(-1) * v.unsqueeze(-2)
        mixed = (q.unsqueeze(-2) @ memory).squeeze(-2)
        outputs.append(_normalised(mixed, (q * normaliser).sum(-1), -maximum, eps, q.shape[-1]))
    return torch.stack(outputs, dim=2), MLSTMState(memory, normaliser, maximum)


def _chunked(parts: Sequence[Tensor], state: MLSTMState, eps: float, chunk: int) -> tuple[Tensor, MLSTMState]:
    """A few chunks at once."""
    query, key, value, input_gate, log_forget = parts
    length, width, kind = query.shape[2], query.shape[3], query.dtype
    decay = log_forget.cumsum(-1)
    gain = input_gate - decay
    top = torch.maximum(gain.cummax(-1).values, state.maximum.unsqueeze(-1))
    maximum = decay + top
    spare = -length % chunk
    rows = top
    if spare:
        # Keys and values of zero add nothing, whatever they weigh.
        query, key, value = (F.pad(part, (0, 0, 0, spare)) for part in (query, key, value))
        last = top[..., -1:].expand(-1, -1, spare)
        gain, rows = torch.cat([gain, last], -1), torch.cat([top, last], -1)
    # Contiguous, since each product of chunks would else copy them again; keys become so below.
    query, value = query.contiguous(), value.contiguous()
    query, key, value = (part.unflatten(2, (-1, chunk)) for part in (query, key, value))
    gain, rows = (part.unflatten(2, (-1, chunk)) for part in (gain, rows))  # [B, H, T, c]
    end = rows[..., -1:]
    start = torch.cat([state.maximum[..., None, None], end[:, :, :-1]], dim=2)
    gain, rows = gain - end, rows - end

    factors = not rows.is_meta and bool((rows > -STEEPEST).all())
    if factors:
        # exp(u_s - M_t) is in proportion to exp(u_s - M_end), and the proportion cancels in the division.
        weighted = kept = (key * gain.exp().to(kind).unsqueeze(-1)).contiguous()
        scores = (query @ weighted.mT).tril_()
        reader, base = query, torch.zeros_like(rows)
    else:
        # Whole parts go to the matrix, where float32 subtracts them without error, and fractions to the keys.
        whole, base = gain.detach().round(), rows.detach().round()
        weighted = (key * (gain - whole).exp().to(kind).unsqueeze(-1)).contiguous()
        future = torch.ones(chunk, chunk, dtype=torch.bool, device=key.device).triu(1)
        gaps = whole.to(kind).unsqueeze(-2) - base.to(kind).unsqueeze(-1)
        scores = (query @ weighted.mT).mul_(gaps.masked_fill_(future, -math.inf).exp_())
        kept = weighted * whole.exp().to(kind).unsqueeze(-1)
        # Row t is scaled by exp(-base_t) beside what its chunk is scaled by.
        reader = query * (start - end - base).exp().to(kind).unsqueeze(-1)
    # Minus infinity would leave its difference to itself undefined; no state is scaled by it.
    scale = state.maximum.to(end.dtype).clamp(min=-1e30).unsqueeze(-1)
    ends = end.squeeze(-1)
    memories, memory = _states(kept.mT @ value, ends, state.memory, scale, faded=factors)
    normalisers, normaliser = _states(kept.sum(-2), ends, state.normaliser, scale, faded=factors)
    mixed = (reader @ memories).flatten(0, 2).baddbmm_(scores.flatten(0, 2), value.flatten(0, 2))
    total = scores.sum(-1) + (reader @ normalisers.unsqueeze(-1)).squeeze(-1)
    mixed = mixed.view_as(value)
    mixed, total = mixed.flatten(2, 3)[:, :, :length], total.flatten(2)[..., :length]
    scaled_by = (end + base).flatten(2)[..., :length]
    out = _normalised(mixed, total, -decay - scaled_by, eps * (top - scaled_by).exp().to(kind), width)
    return out, MLSTMState(memory, normaliser, maximum[..., -1])


def _states(added: Tensor, end: Tensor, first: Tensor, scale: Tensor, *, faded: bool) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B, H, T, ...] and after the last [B, H, ...].

    Args:
        added: [B, H, T, ...], what each chunk adds, scaled by `end`.
        end: [B, H, T], M at the end of each chunk.
        first: [B, H, ...], the state before the first chunk, scaled by `scale`.
        scale: [B, H, 1], M there.
        faded: scale the state before a chunk by M at the end of that chunk, instead of the one before.
    """
    before = end if faded else torch.cat([scale, end[..., :-1]], dim=-1)
    flat, start = added.flatten(3), first.flatten(2).unsqueeze(2).to(added.dtype)

    def summed(wanted: Tensor, last: int) -> Tensor:
        """States scaled by `wanted` of the chunks up to `last` steps before it."""
        gaps = (end.unsqueeze(-2) - wanted.unsqueeze(-1)).clamp(max=0).exp().tril(last).to(added.dtype)
        return (gaps @ flat).addcmul_((scale - wanted).exp().to(added.dtype).unsqueeze(-1), start)

    states, after = summed(before, -1), summed(end[..., -1:], end.shape[-1]).squeeze(2)
    return states.unflatten(-1, added.shape[3:]), after.unflatten(-1, added.shape[3:])


class OffsetNorm(nn.Module):
    """LayerNorm whose scale is 1 + weight, so that weight decay draws it to 1; over each head's channels on its own."""

    def __init__(self, width: int, *, heads: int = 1, bias: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if self.heads == 1:
            return F.layer_norm(x, x.shape[-1:], 1 + self.weight, self.bias, self.eps)
        parts = x.unflatten(-1, (self.heads, -1))
        normal = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * (1 + self.weight)
        return normal if self.bias is None else normal + self.bias


class BlockLinear(nn.Module):
    """A linear map whose matrix has blocks of a few channels on its diagonal and zeros elsewhere."""

    def __init__(self, width: int, block_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width // block_size, block_size, block_size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        mixed = self._groups(x.flatten(0, -2), math.gcd(len(self.weight), 8))
        mixed = mixed.transpose(0, 1).reshape(x.shape)
        return mixed if self.bias is None else mixed + self.bias

    def by_head(self, x: Tensor, heads: int) -> Tensor:
        """[B, L, width] -> [B, heads, L, d]."""
        blocks, size = self.weight.shape[:2]
        if blocks % heads:  # a block lies in two heads
            return self(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        each = blocks // heads
        joined = max(part for part in range(1, each + 1) if each % part == 0 and part * size <= max(size, WIDEST_GROUP))
        mixed = self._groups(x.flatten(0, 1), joined).unflatten(0, (heads, -1)).unflatten(2, x.shape[:2])
        mixed = mixed.permute(2, 0, 3, 1, 4).flatten(3)
        return mixed if self.bias is None else mixed + self.bias.view(heads, 1, -1)

    def before(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        """The linear map [n, width] after this one, as one map of what goes in: its weight, and its bias if any."""
        through = torch.einsum("nbo,boi->nbi", weight.unflatten(1, (len(self.weight), -1)), self.weight).flatten(1)
        return through, 0.0 if self.bias is None else weight @ self.bias

    def _groups(self, x: Tensor, joined: int) -> Tensor:
        """[N, width] -> [groups, N, channels of a group], without the bias. So many blocks make one larger matrix with
        zeros: products of 4 x 4 matrices are slow everywhere."""
        apart = torch.eye(joined, dtype=self.weight.dtype, device=self.weight.device)[:, None, :, None]
        matrix = (self.weight.unflatten(0, (-1, joined)).unsqueeze(3) * apart).flatten(3, 4).flatten(1, 2)
        return x.unflatten(-1, (len(matrix), -1)).transpose(0, 1) @ matrix.mT


class _TokenConv(nn.Conv1d):
    """A causal convolution of each channel along the tokens, [B, L, E] -> [B, L, E]."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, width, size, groups=width)

    def forward(self, input: Tensor) -> Tensor:
        # As a picture of one row whose channels lie innermost, which is where the fast kernels are.
        row = F.pad(input, (0, 0, self.kernel_size[0] - 1, 0)).mT.unsqueeze(2)
        row = row.contiguous(memory_format=torch.channels_last)
        return F.conv2d(row, self.weight.unsqueeze(2), self.bias, groups=self.groups).squeeze(2).mT


class MLSTM(CausalMixer):
    """The layer of Vision-LSTM around an mLSTM.

        u, z = W_up x;   c = SiLU(conv(u));   q, k = blocks(c);   v = blocks(u)
        y = W_down ((norm(mLSTM(q, k, v)) + skip * c) * SiLU(z))

    Input and forget gates are linear in [q, k, v], one number a head each.

    Args:
        width: D.
        num_heads: heads of the mLSTM.
        expansion: E over D.
        block_size: channels of a block of the projections to q, k and v.
        conv: "causal", along the tokens, or "grid", 3 x 3 over rows and columns; only the first can stream.
        conv_size: kernel of the convolution, 4 for the causal one and 3 for that on the grid where left out.
        bias: whether the projections have biases.
        norm_bias: whether the norm of the heads has one.
        reverse: read from the last token to the first, the convolution too.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        expansion: int = 2,
        block_size: int = 4,
        conv: Literal["causal", "grid"] = "causal",
        conv_size: int | None = None,
        bias: bool = False,
        norm_bias: bool = False,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        inner = width * expansion
        if inner < 1 or inner % block_size or inner % num_heads:
            raise InputError(
                f"an mLSTM layer of width {width} has {inner} inner channels, which {num_heads} heads and blocks of "
                f"{block_size} cannot share"
            )
        if conv not in ("causal", "grid"):
            raise unknown("conv", conv, ("causal", "grid"))
        size = conv_size if conv_size is not None else 4 if conv == "causal" else 3
        if size < 1 or (conv == "grid" and size % 2 == 0):
            raise InputError(f"conv_size must be 1 or more, and odd on the grid, not {size}")
        self.width, self.inner, self.num_heads, self.reverse = width, inner, num_heads, reverse
        self.proj_up = nn.Linear(width, 2 * inner, bias=bias)
        self.q_proj = BlockLinear(inner, block_size, bias=bias)
        self.k_proj = BlockLinear(inner, block_size, bias=bias)
        self.v_proj = BlockLinear(inner, block_size, bias=bias)
        self.conv: nn.Module
        if conv == "causal":
            self.conv = _TokenConv(inner, size)
        else:
            self.conv = nn.Conv2d(inner, inner, size, padding=size // 2, groups=inner)
        self.igate = nn.Linear(3 * inner, num_heads)
        self.fgate = nn.Linear(3 * inner, num_heads)
        self.outnorm = OffsetNorm(inner, heads=num_heads, bias=norm_bias)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, width, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start of the official code: a gate that mostly remembers, and small projections."""
        for part in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(part.weight, std=math.sqrt(2 / (5 * self.width)))
        nn.init.normal_(self.proj_down.weight, std=2 / math.sqrt(self.width))
        for part in (self.proj_up, self.proj_down):
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        for gate in (self.igate, self.fgate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3, 6, self.num_heads, device=self.fgate.bias.device))

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        if (done := self._in_loops(x)) is not None:
            return done
        if self.reverse:
            x = x.flip(1)
        u, z = self.proj_up(x).chunk(2, dim=-1)
        c = F.silu(self.convolve(u, grid))
        mixed, _ = mlstm(*self.heads(u, c))
        out = self.finish(mixed.transpose(1, 2).flatten(2), c, z)
        return out.flip(1) if self.reverse else out

    def residual(self, x: Tensor, norm: nn.Module, grid: tuple[int, ...] = ()) -> Tensor:
        """x + layer(norm(x))."""
        done = self._in_loops(x, norm) if _bare(norm, OffsetNorm) and _bare(self, MLSTM) else None
        return x + self(norm(x), grid) if done is None else done

    def _in_loops(self, x: Tensor, norm: nn.Module | None = None) -> Tensor | None:
        """`forward`, or with a norm `residual`, in machine code, where that can be."""
        chunk = _fitting(x.shape[1], LOOP_CHUNK)
        fits = (
            not torch.is_grad_enabled()
            and isinstance(self.conv, _TokenConv)
            and x.shape[1] % chunk == 0
            and (len(x) == 1 or x.shape[1] * self.inner >= LOOP_NUMBERS)
            and in_loops(x, self.proj_up.weight)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and torch.get_num_threads() <= LOOP_THREADS
            and type(self) is MLSTM
            and all(_bare(part, _OWN.get(name)) for name, part in self.named_children())
        )
        return layer_in_loops(self, x, norm, chunk) if fits else None

    def convolve(self, u: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The convolution of tokens [B, L, E]."""
        if isinstance(self.conv, _TokenConv):
            return self.conv(u)
        if len(grid) != 2 or grid[0] * grid[1] != u.shape[1]:
            raise InputError(f"a convolution on the grid takes rows x columns tokens, not {u.shape[1]} of {grid}")
        field = u.mT.unflatten(2, grid).contiguous(memory_format=torch.channels_last)
        return self.conv(field).flatten(2).mT

    def heads(self, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values [B, H, L, d] and both gates [B, H, L]."""
        heads = self.num_heads
        query, key, value = self.q_proj.by_head(c, heads), self.k_proj.by_head(c, heads), self.v_proj.by_head(u, heads)
        if type(self.igate) is type(self.fgate) is nn.Linear:
            gates = self._gates(u, c)
        else:  # what stands in their place, an adapter say, is to be asked
            read = torch.cat([part.transpose(1, 2).flatten(2) for part in (query, key, value)], dim=-1)
            gates = torch.cat([self.igate(read), self.fgate(read)], dim=-1)
        input_gate, forget_gate = gates.mT.chunk(2, dim=1)
        return query, key, value, input_gate, forget_gate

    def _gates(self, u: Tensor, c: Tensor) -> Tensor:
        """Both gates [B, L, 2 H], linear in [q, k, v], which are linear in c and u: their [B, L, 3 E] is not made."""
        of_c, of_u, bias = self.gate_maps()
        return F.linear(c, of_c, bias) + F.linear(u, of_u)

    def gate_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The maps of c and of u, [2 H, E] each, that the gates are the sum of, and their bias [2 H]."""
        weight = torch.cat([self.igate.weight, self.fgate.weight])
        parts = zip((self.q_proj, self.k_proj, self.v_proj), weight.chunk(3, dim=1), strict=True)
        (of_q, bias_q), (of_k, bias_k), (of_v, bias_v) = (proj.before(part) for proj, part in parts)
        return of_q + of_k, of_v, torch.cat([self.igate.bias, self.fgate.bias]) + bias_q + bias_k + bias_v

    def finish(self, mixed: Tensor, c: Tensor, z: Tensor) -> Tensor:
        """Norm, skip, gate and projection of what the heads gave, [..., E] -> [..., D]."""
        return self.proj_down((self.outnorm(mixed) + self.learnable_skip * c) * F.silu(z))

    def init_state(self, batch: int) -> tuple[Tensor, MLSTMState]:
        """No tokens seen: the convolution's last inputs [B, k - 1, E] and the mLSTM's state."""
        if self.reverse or not isinstance(self.conv, _TokenConv):
            raise InputError("only an mLSTM layer that reads forwards, with a causal convolution, goes token by token")
        weight, head = self.proj_down.weight, self.inner // self.num_heads
        like = weight.new_zeros(batch, self.num_heads, 1, head)
        return weight.new_zeros(batch, self.conv.kernel_size[0] - 1, self.inner), empty_state(like, head)

    def step(self, x: Tensor, state: tuple[Tensor, MLSTMState]) -> tuple[Tensor, tuple[Tensor, MLSTMState]]:
        window, memory = state
        u, z = self.proj_up(x).unsqueeze(1).chunk(2, dim=-1)
        window = torch.cat([window, u], dim=1)
        c = F.silu(self.conv(window)[:, -1:])
        mixed, memory = mlstm(*self.heads(u, c), mode="recurrent", state=memory)
        out = self.finish(mixed.transpose(1, 2).flatten(2), c, z)
        return out[:, 0], (window[:, 1:], memory)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        batch, length, _ = x.shape
        head, chunk = self.inner // self.num_heads, _fitting(length)
        a_channel = 3 * self.q_proj.weight.shape[-1] + 4 * self.num_heads + 2 * chunk + 2 * head
        return batch * length * self.inner * a_channel


_OWN: Mapping[str, type[nn.Module]] = {
    **dict.fromkeys(("proj_up", "proj_down", "igate", "fgate"), nn.Linear),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), BlockLinear),
    "conv": _TokenConv,
    "outnorm": OffsetNorm,
}
"""The parts of a layer in machine code."""


def _bare(part: nn.Module, kind: type[nn.Module] | None) -> bool:
    """Whether a module's weights are all there is to it: nobody has put another in its place (an adapter, say), or
    hooks on it."""
    return type(part) is kind and not (part._forward_hooks or part._forward_pre_hooks)
