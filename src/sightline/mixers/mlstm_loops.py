"""The layer of Vision-LSTM on the CPU, without gradients: what lies between its products is loops in machine code,
which numba compiles (`pip install 'sightline[cpu]'`).

Tensor operations would go over the layer's inner channels some thirty times, and over memory each time. Here a few
chunks of a sample are taken from the first product to the last while they lie in a processor's cache. Tokens lie
innermost: every channel of a convolution, of a block of a projection and of a norm is then a vector along the tokens,
whatever the blocks' size.

Equations and letters as in `sightline.mixers.mlstm`; n tokens in T chunks of c, heads of d channels, blocks of s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sightline.machine_code import ONE, compiled, fast_exp

if TYPE_CHECKING:
    from sightline.mixers.mlstm import MLSTM

CHUNKS = 4
"""Chunks that are worked on at once."""

STEEPEST = 40.0
"""How far M may rise within a chunk for exp(u_s - M_t) to be split in a factor of s and one of t in float32."""

EPS = np.float32(1e-6)
HIGHEST = math.log(np.finfo(np.float32).max) - 8
"""What the exponent of the normaliser's lower bound is held at: there the output is zero to all digits."""


def layer_in_loops(layer: MLSTM, x: Tensor, norm: nn.Module | None, chunk: int) -> Tensor | None:
    """The layer's output for tokens.

    Args:
        layer: with a causal convolution; its weights are float32 on the CPU.
        x: [B, L, D], float32.
        norm: if given, x + layer(norm(x)) is computed instead.
        chunk: c, which divides L.

    Returns:
        [B, L, D]; None if the input gates rise too steeply for this form.
    """
    weights, output = _weights(layer), torch.empty_like(x)
    starts = range(0, x.shape[1], CHUNKS * chunk)
    for sample, done in zip(x, output, strict=True):
        state = _State(layer, x)
        for start in reversed(starts) if layer.reverse else starts:
            place = slice(start, start + CHUNKS * chunk)
            tokens = sample[place].flip(0) if layer.reverse else sample[place]
            y = _inner(weights, tokens if norm is None else norm(tokens), state, chunk)
            if y is None:
                return None
            out = y.mT @ weights.down if norm is None else torch.addmm(tokens, y.mT, weights.down)
            out = out if weights.down_bias is None else out.add_(weights.down_bias)
            done[place] = out.flip(0) if layer.reverse else out
    return output


class _Weights(NamedTuple):
    """A layer's weights as the products and the loops take them."""

    up: Tensor
    """[2 E + 2 H, D], to u, z and u's share of the gates."""
    up_bias: Tensor | None
    """[2 E + 2 H, 1]"""
    conv: tuple[Any, Any]
    """Weight [E, 1, k] and bias [E], as arrays."""
    maps: list[tuple[Any, Any]]
    """Of query, key and value, weight [E / s, s, s] and bias [E], as arrays."""
    of_c: Tensor
    """[2 H, E], to c's share of the gates."""
    gate_bias: Tensor
    """[2 H, 1]"""
    finish: tuple[Any, ...]
    """The norm's weight and bias, [E], and eps, and the weight of c, [E], as arrays."""
    down: Tensor
    """[E, D]"""
    down_bias: Tensor | None
    """[D]"""


def _weights(layer: MLSTM) -> _Weights:
    def with_bias(part: Any) -> tuple[Any, Any]:
        bias = part.weight.new_zeros(layer.inner) if part.bias is None else part.bias
        return part.weight.numpy(), bias.numpy()

    of_c, of_u, gate_bias = layer.gate_maps()
    up, up_bias, down = layer.proj_up.weight, layer.proj_up.bias, layer.proj_down
    _, norm_bias = with_bias(layer.outnorm)
    return _Weights(
        torch.cat([up, of_u @ up[: layer.inner]]),
        None if up_bias is None else torch.cat([up_bias, of_u @ up_bias[: layer.inner]])[:, None],
        with_bias(layer.conv),
        [with_bias(part) for part in (layer.q_proj, layer.k_proj, layer.v_proj)],
        of_c,
        gate_bias[:, None],
        ((1 + layer.outnorm.weight).numpy(), norm_bias, np.float32(layer.outnorm.eps), layer.learnable_skip.numpy()),
        down.weight.mT,
        down.bias,
    )


class _State:
    """What a sample's tokens so far have left: nothing at first."""

    def __init__(self, layer: MLSTM, like: Tensor) -> None:
        heads, width = layer.num_heads, layer.inner // layer.num_heads
        conv: Any = layer.conv
        self.before = like.new_zeros(layer.inner, conv.kernel_size[0] - 1)
        """The last inputs of the convolution."""
        self.memory = like.new_zeros(heads, width, width)
        """C exp(-m)"""
        self.normaliser = like.new_zeros(heads, width)
        """n exp(-m)"""
        self.maximum = like.new_full((heads,), -math.inf, dtype=torch.float64)
        """m"""


def _inner(weights: _Weights, tokens: Tensor, state: _State, chunk: int) -> Tensor | None:
    """A few chunks of tokens, [n, D], up to the last product, [E, n]; None where the gates rise too steeply."""
    loops, heads = kernels(), len(state.maximum)
    inner, width = len(state.before), state.memory.shape[-1]
    scale = width**-0.5
    wide = weights.up @ tokens.mT
    wide = wide if weights.up_bias is None else wide.add_(weights.up_bias)
    u, z, gates = wide.split([inner, inner, 2 * heads])
    c, y = torch.empty_like(u), torch.empty_like(u)
    loops.convolved(u.numpy(), state.before.numpy(), *weights.conv, c.numpy())
    state.before = u[:, len(tokens) - state.before.shape[1] :].contiguous()
    query, key, value = made = u.new_empty(3, heads, len(tokens) // chunk, width, chunk)
    for part, of_part, mapped in zip((c, c, u), weights.maps, made, strict=True):
        loops.mapped(part.numpy(), *of_part, mapped.numpy())

    gates.addmm_(weights.of_c, c).add_(weights.gate_bias)
    started, ends = state.maximum.numpy().copy(), np.empty(made.shape[1:3])
    keys, floor, slack = u.new_empty(3, *ends.shape, chunk)
    rise = loops.gates(gates.numpy(), state.maximum.numpy(), ends, keys.numpy(), floor.numpy(), slack.numpy())
    if not rise < STEEPEST:
        return None
    key.mul_(keys.unsqueeze(2))
    scores = (query.mT @ key).tril_()
    states, sums = key @ value.mT, key.sum(-1)
    loops.carried(started, ends, states.numpy(), state.memory.numpy(), sums.numpy(), state.normaliser.numpy())
    mixed = (states.mT @ query).flatten(0, 1).baddbmm_(value.flatten(0, 1), scores.mT.flatten(0, 1))
    total = scores.sum(-1).add_((sums.unsqueeze(2) @ query).squeeze(2)).abs_().mul_(scale)
    share = scale / torch.maximum(total, floor).add_(slack)
    loops.gated(mixed.view_as(value).numpy(), share.numpy(), *weights.finish, c.numpy(), z.numpy(), y.numpy())
    return y


def _convolved(u: Any, before: Any, weight: Any, bias: Any, c: Any) -> None:
    """c = SiLU(conv(u)), causal: u, c [E, n], before [E, k - 1] the tokens ahead, weight [E, 1, k], bias [E]."""
    channels, tokens = u.shape
    taps = weight.shape[2]
    row = np.empty(tokens + taps - 1, np.float32)
    for e in range(channels):
        row[: taps - 1] = before[e]
        row[taps - 1 :] = u[e]
        of_channel, factor, offset = c[e], weight[e, 0, 0], bias[e]
        for t in range(tokens):
            of_channel[t] = offset + factor * row[t]
        for j in range(1, taps):
            factor, shifted = weight[e, 0, j], row[j:]
            for t in range(tokens):
                of_channel[t] += factor * shifted[t]
        for t in range(tokens):
            value = of_channel[t]
            of_channel[t] = value / (ONE + fast_exp(-value))


def _mapped(x: Any, weight: Any, bias: Any, output: Any) -> None:
    """A map in blocks, by chunk: x [E, n], weight [E / s, s, s], bias [E] -> output [H, T, d, c]."""
    _, chunks, width, length = output.shape
    size = weight.shape[1]
    fours = size - size % 4
    for e in range(x.shape[0]):
        row, first, offset = weight[e // size, e % size], e - e % size, bias[e]
        for chunk in range(chunks):
            of_channel, begin = output[e // width, chunk, e % width], chunk * length
            of_channel[:] = offset
            for i in range(0, fours, 4):
                w0, w1, w2, w3 = row[i], row[i + 1], row[i + 2], row[i + 3]
                x0, x1, x2, x3 = x[first + i], x[first + i + 1], x[first + i + 2], x[first + i + 3]
                for t in range(length):
                    half = w0 * x0[begin + t] + w1 * x1[begin + t]
                    of_channel[t] += half + w2 * x2[begin + t] + w3 * x3[begin + t]
            for i in range(fours, size):
                factor, values = row[i], x[first + i]
                for t in range(length):
                    of_channel[t] += factor * values[begin + t]


def _gates(gates: Any, maximum: Any, ends: Any, keys: Any, floor: Any, slack: Any) -> Any:
    """What follows from the gates [2 H, n], first those of the input.

    `maximum` [H] goes from m before the first token to m after the last, `ends` [H, T] gets M at the end of each chunk;
    `keys` exp(u_s - M_end), what keys weigh, and `floor` and `slack` the normaliser's lower bound and eps in proportion
    to it, all [H, T, c]. Returns how far M rises within a chunk at most.
    """
    heads, chunks, length = keys.shape
    gain, top, decay = np.empty(length), np.empty(length), np.empty(length)
    most = 0.0
    for head in range(heads):
        faded, highest = 0.0, maximum[head]
        for chunk in range(chunks):
            for t in range(length):
                forget = float(gates[heads + head, chunk * length + t])
                faded += min(forget, 0.0) - math.log1p(math.exp(-abs(forget)))
                decay[t] = faded
                gain[t] = gates[head, chunk * length + t] - faded
                highest = max(highest, gain[t])
                top[t] = highest
            ends[head, chunk] = highest
            most = max(most, highest - top[0])
            for t in range(length):
                keys[head, chunk, t] = fast_exp(np.float32(gain[t] - highest))
                floor[head, chunk, t] = fast_exp(np.float32(min(-decay[t] - highest, HIGHEST)))
                slack[head, chunk, t] = EPS * fast_exp(np.float32(top[t] - highest))
        maximum[head] = faded + highest
    return most


def _carried(maximum: Any, ends: Any, states: Any, memory: Any, sums: Any, normaliser: Any) -> None:
    """Puts in the place of what each chunk adds, `states` [H, T, K, V] and `sums` [H, T, K], the state before it,
    scaled by M at its end, `ends` [H, T]; and takes `memory` [H, K, V] and `normaliser` [H, K] from before the first
    chunk, where M is `maximum` [H], to after the last."""
    heads, chunks, width, channels = states.shape
    for head in range(heads):
        before = maximum[head]
        for chunk in range(chunks):
            left = np.float32(math.exp(before - ends[head, chunk]))
            before = ends[head, chunk]
            for k in range(width):
                added, kept = states[head, chunk, k], memory[head, k]
                for v in range(channels):
                    faded = left * kept[v]
                    kept[v] = faded + added[v]
                    added[v] = faded
                faded = left * normaliser[head, k]
                normaliser[head, k] = faded + sums[head, chunk, k]
                sums[head, chunk, k] = faded


def _gated(mixed: Any, share: Any, weight: Any, bias: Any, eps: Any, skip: Any, c: Any, z: Any, y: Any) -> None:
    """y = (norm(mixed share) weight + bias + skip c) SiLU(z), the norm over each head's channels of a token: mixed [H,
    T, d, c], share [H, T, c], the rest [E, n] or [E]."""
    heads, chunks, width, length = mixed.shape
    mean, scale = np.empty(length, np.float32), np.empty(length, np.float32)
    for head in range(heads):
        for chunk in range(chunks):
            values, times, begin = mixed[head, chunk], share[head, chunk], chunk * length
            mean[:] = 0
            scale[:] = 0
            for i in range(width):
                for t in range(length):
                    mean[t] += values[i, t]
            for t in range(length):
                mean[t] /= np.float32(width)
            for i in range(width):
                for t in range(length):
                    scale[t] += (values[i, t] - mean[t]) * (values[i, t] - mean[t])
            for t in range(length):
                variance = scale[t] / np.float32(width) * times[t] * times[t]
                scale[t] = times[t] / np.sqrt(variance + eps)
            for i in range(width):
                e = head * width + i
                by, plus, passed = weight[e], bias[e], skip[e]
                for t in range(length):
                    gate = z[e, begin + t] / (ONE + fast_exp(-z[e, begin + t]))
                    normal = (values[i, t] - mean[t]) * scale[t]
                    y[e, begin + t] = gate * (by * normal + plus + passed * c[e, begin + t])


class Kernels(NamedTuple):
    """The compiled loops."""

    convolved: Callable[..., None]
    mapped: Callable[..., None]
    gates: Callable[..., float]
    carried: Callable[..., None]
    gated: Callable[..., None]


@functools.cache
def kernels() -> Kernels:
    """The compiled loops.

    Raises:
        ImportError: numba is not installed.
    """
    return Kernels(*(compiled(loops, {"contract"}) for loops in (_convolved, _mapped, _gates, _carried, _gated)))
