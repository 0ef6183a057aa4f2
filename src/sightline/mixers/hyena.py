"""The Hyena operator on grids of any number of axes: gates and long convolutions in place of attention.

Zimerman and Wolf, "Multi-Dimensional Hyena for Spatial Inductive Bias", AISTATS 2024, arXiv:2309.13600; official code
Itamarzimm/HyenaND (`hyena2d.py`). In and out: tokens [B, L, D] on a grid of N axes. For order o (2 as published):

    x^0, ..., x^{o-1}, v = split(depthwise 3 x ... x 3 convolution(W_in x))
    v   := h_j * (v . x^{o-j}) + bias_j . (v . x^{o-j})        j = 1 .. o-1
    out  = W_out (v . x^0)

h * u is the linear (not circular) convolution with a filter on the non-negative quadrant, so that (h * u)[p] reads u at
and before p along every axis: sum over q <= p of h[q] u[p - q]. It is computed by FFT on twice the length of each axis.

The filter of a channel is a small sine network of the position, under a window that decays exponentially:

    product   h[a, b] = f_1(z_a) w_1(a) . f_2(z_b) w_2(b)             one network an axis: rank 1 per channel
    full      h[a, b] = f([z_a, z_b]) . w(a, b)                       one network of all axes
    direct    h free                                                  the paper's ablation
    z_a = [t, cos(f_i w), -sin(f_i w)],  t = a / (L - 1),  w = 2 pi a / L;  learned from there on
    w_1(a) = exp(-t |delta|) + shift,  delta from ln(0.01) / 1.5 to ln(0.01) / 0.3 over the channels

A quadrant filter looks one way only. `direction` says what is done about it:

    standard   nothing
    rotated    the grid is turned by 180 degrees around the first long convolution (a model alternates the two: "seq")
    4dir       all 2^N flips, mixed by one linear map 2^N -> 1 that all channels share; 4dirp: by one 2^N D -> D
    parallel   the short convolution makes 2^N times the channels, W_out reads all of them; none is flipped

Where the official code differs: it divides the convolution by 2 L (the bias path is right), which `released_scale`
repeats; it allots the direct form one filter more than it reads, left out here; it takes only square grids of the
length that it was built for. Here L is the longest axis of the grid that the operator was built for, and all axes count
positions in patches from one table. Other grids keep the filter tap by tap: shorter axes read its first rows (as the
official slicing means to do), longer ones positions beyond the table, by its formula. Transforms are in float32 or
better, filters are made outside autocast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from sightline.errors import InputError, unknown
from sightline.mixers.mixer import Mixer

FilterKind = Literal["product", "full", "direct"]
WindowMode = Literal["standard", "learn", "symmetric", "none"]
Direction = Literal["standard", "rotated", "4dir", "4dirp", "parallel"]

SHORT = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def fft_convolution(u: Tensor, h: Tensor, bias: Tensor | None = None) -> Tensor:
    """h * u + bias . u, channel by channel, over any number of axes.

    Args:
        u: [B, D, *grid].
        h: [D, *taps]: the filter on the non-negative quadrant, on no axis longer than `u`.
        bias: [D], of the path around the convolution.

    Returns:
        [B, D, *grid] in the type of `u`; computed in float32, or float64 where `u` has it.
    """
    return _convolved(u, filter_spectrum(h, u.shape[2:]), bias)


def filter_spectrum(h: Tensor, grid: Sequence[int]) -> Tensor:
    """The transform of filters [..., *taps] padded with zeros to twice each axis of `grid`."""
    axes = list(range(-len(grid), 0))
    return torch.fft.rfftn(_precise(h), s=[2 * side for side in grid], dim=axes)


def _convolved(u: Tensor, spectrum: Tensor, bias: Tensor | None) -> Tensor:
    grid = u.shape[2:]
    axes = list(range(-len(grid), 0))
    sizes = [2 * side for side in grid]
    work = _precise(u)
    out = torch.fft.irfftn(torch.fft.rfftn(work, s=sizes, dim=axes) * spectrum, s=sizes, dim=axes)
    out = out[(..., *(slice(side) for side in grid))]
    if bias is not None:
        out = out + work * bias.reshape(-1, *[1] * len(grid))
    return out.to(u.dtype)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Window(nn.Module):
    """The decay that a filter is multiplied by: values [*axes, C] -> [*axes, C].

    Args:
        width: C.
        axes: axes of the values.
        mode: `standard`: fixed; `learn`: delta of each axis and one shift learned; `symmetric`: one learned delta on
            the sum of the positions in patches, exp(-(a + b) |delta|), and a learned shift; `none`.
        root: take the square root of the decay.
    """

    def __init__(self, width: int, axes: int, mode: WindowMode, root: bool) -> None:
        super().__init__()
        self.axes, self.mode, self.root = axes, mode, root
        # The device by name: while it loads a model, transformers has linspace make tensors on the CPU.
        here = torch.get_default_device()
        deltas = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, width, device=here)
        self.deltas = nn.ParameterList()
        self.shift = nn.Parameter(torch.rand(width)) if mode in ("learn", "symmetric") else None
        if mode == "standard":
            self.register_buffer("fixed", deltas, persistent=False)
        elif mode != "none":
            self.deltas.extend(nn.Parameter(deltas.clone()) for _ in range(axes if mode == "learn" else 1))

    def forward(self, values: Tensor, steps: Sequence[Tensor], scale: float) -> Tensor:
        """`steps`: the positions along each axis, in patches; `scale`: what one patch is in t."""
        if self.mode == "none":
            return values
        exponent = values.new_zeros(())
        for axis, step in enumerate(steps):
            fixed = self.mode == "standard"
            delta = self.get_buffer("fixed") if fixed else self.deltas[axis % len(self.deltas)]
            along = step if self.mode == "symmetric" else step * scale
            shape = [len(step) if axis == other else 1 for other in range(self.axes)]
            exponent = exponent - along.reshape(*shape, 1) * delta.abs()
        decay = torch.exp(exponent / 2 if self.root else exponent)
        return values * (decay if self.shift is None else decay + self.shift)


class ImplicitFilter(nn.Module):
    """Filters that a small sine network makes from positions: grid -> [C, *grid].

    Args:
        width: C, channels of all filters together.
        grid: the grid that it is built for; its longest axis is L.
        kind: `product` or `full`.
        filter_width: hidden units of the network.
        emb_dim: features of a position: t, and (emb_dim - 1) / 2 cosines and sines. With 3, as published, the only
            frequency is 1e-4, so that the network sees t alone; take 5 or more for real Fourier features.
        inner_layers: hidden layers after the first.
        window: see `Window`.
        sqrt_decay: take the square root of the decay (full filters only).
    """

    def __init__(
        self,
        width: int,
        grid: Sequence[int],
        *,
        kind: FilterKind = "product",
        filter_width: int = 64,
        emb_dim: int = 3,
        inner_layers: int = 2,
        window: WindowMode = "standard",
        sqrt_decay: bool = False,
    ) -> None:
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise InputError(f"emb_dim of a Hyena filter must be odd and 3 or more, not {emb_dim}")
        if kind == "product" and (window == "symmetric" or sqrt_decay):
            what = "the symmetric window" if window == "symmetric" else "sqrt_decay"
            raise InputError(f"{what} of a Hyena filter is for filter='full', not 'product'")
        self.kind, self.axes, self.length, self.emb_dim = kind, len(grid), max(grid), emb_dim
        self.positions = nn.Parameter(self.table(torch.arange(self.length)))
        self.frequency = nn.Parameter(torch.ones(filter_width))
        networks = self.axes if kind == "product" else 1
        sizes = [emb_dim * self.axes // networks, *[filter_width] * (inner_layers + 1), width]
        self.networks = nn.ModuleList(
            nn.ModuleList(
                nn.Linear(size, after, bias=layer <= inner_layers)
                for layer, (size, after) in enumerate(itertools.pairwise(sizes))
            )
            for _ in range(networks)
        )
        self.windows = nn.ModuleList(Window(width, self.axes // networks, window, sqrt_decay) for _ in range(networks))

    def table(self, steps: Tensor) -> Tensor:
        """The features [n, emb_dim] of positions in patches."""
        bands = (self.emb_dim - 1) // 2
        frequencies = torch.linspace(1e-4, bands - 1, bands, device=steps.device)
        angle = 2 * math.pi * steps[:, None] / self.length * frequencies
        return torch.cat([steps[:, None] / max(1, self.length - 1), angle.cos(), -angle.sin()], dim=1)

    def rows(self, count: int) -> Tensor:
        """The features of the first `count` positions: the learned table, and its formula beyond."""
        if count <= self.length:
            return self.positions[:count]
        beyond = self.table(torch.arange(self.length, count, device=self.positions.device))
        return torch.cat([self.positions, beyond.to(self.positions.dtype)])

    def forward(self, grid: Sequence[int]) -> Tensor:
        rows = [self.rows(side) for side in grid]
        steps = [torch.arange(side, device=self.positions.device).to(self.positions.dtype) for side in grid]
        scale = 1 / max(1, self.length - 1)
        if self.kind == "full":
            features = torch.cat([self._spread(row, axis, grid) for axis, row in enumerate(rows)], dim=-1)
            return self.windows[0](self._network(0, features), steps, scale).movedim(-1, 0)
        along = [
            self.windows[axis](self._network(axis, row), [step], scale).mT
            for axis, (row, step) in enumerate(zip(rows, steps, strict=True))
        ]
        taps = along[0]
        for axis, factor in enumerate(along[1:], start=1):
            taps = taps.unsqueeze(-1) * factor.reshape(len(factor), *[1] * axis, -1)
        return taps

    def _spread(self, row: Tensor, axis: int, grid: Sequence[int]) -> Tensor:
        """The features of one axis [n, emb_dim] repeated along the others: [*grid, emb_dim]."""
        shape = [side if axis == other else 1 for other, side in enumerate(grid)]
        return row.reshape(*shape, self.emb_dim).expand(*grid, self.emb_dim)

    def _network(self, index: int, x: Tensor) -> Tensor:
        layers = list(self.networks[index].children())
        for layer in layers[:-1]:
            x = torch.sin(self.frequency * layer(x))
        return layers[-1](x)


class DirectFilter(nn.Module):
    """Filters whose taps are parameters: grid -> [C, *taps], no tap lies beyond the grid that it is built for."""

    def __init__(self, width: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(width, *grid))

    def forward(self, grid: Sequence[int]) -> Tensor:
        return self.taps[(slice(None), *(slice(side) for side in grid))]


class Hyena(Mixer):
    """The Hyena operator.

    In eval mode and without gradients the transforms of the filters are kept from call to call, as long as grid,
    parameters, type and device stay the same.

    Args:
        width: D.
        grid: the grid of one, two or three axes that it is built for; others with as many axes are taken too.
        order: o, 2 or more.
        filter: `product`, `full` or `direct`.
        direction: `standard`, `rotated`, `4dir`, `4dirp` or `parallel`.
        window: `standard`, `learn`, `symmetric` or `none`.
        filter_width, emb_dim, sqrt_decay: see `ImplicitFilter`.
        drop: dropout of what enters a long convolution.
        released_scale: divide each long convolution by twice the longest axis, as the released code does.
    """

    def __init__(
        self,
        width: int,
        grid: Sequence[int],
        *,
        order: int = 2,
        filter: FilterKind = "product",
        direction: Direction = "standard",
        window: WindowMode = "standard",
        filter_width: int = 64,
        emb_dim: int = 3,
        sqrt_decay: bool = False,
        drop: float = 0.0,
        released_scale: bool = False,
    ) -> None:
        super().__init__()
        for what, value, allowed in (
            ("filter", filter, FilterKind),
            ("direction", direction, Direction),
            ("window", window, WindowMode),
        ):
            if value not in get_args(allowed):
                raise unknown(f"{what} of Hyena", value, get_args(allowed))
        if len(grid) not in SHORT or min(grid) < 1:
            raise InputError(f"the grid of Hyena must have one, two or three axes of 1 or more, not {tuple(grid)}")
        if order < 2:
            raise InputError(f"the order of Hyena must be 2 or more, not {order}")
        self.width, self.order, self.direction, self.released_scale = width, order, direction, released_scale
        self.axes = len(grid)
        self.flips = _flips(self.axes)
        inner, copies = width * (order + 1), len(self.flips) if direction == "parallel" else 1
        self.in_proj = nn.Linear(width, inner)
        self.short_filter = SHORT[self.axes](inner, inner * copies, kernel_size=3, padding=1, groups=inner)
        self.filter: nn.Module
        if filter == "direct":
            self.filter = DirectFilter(width * (order - 1), grid)
        else:
            self.filter = ImplicitFilter(
                width * (order - 1),
                grid,
                kind=filter,
                filter_width=filter_width,
                emb_dim=emb_dim,
                window=window,
                sqrt_decay=sqrt_decay,
            )
        self.bias = nn.Parameter(torch.randn(order - 1, width))
        self.drop = nn.Dropout(drop)
        if direction in ("4dir", "4dirp"):
            flips = len(self.flips)
            self.mix = nn.Linear(flips, 1) if direction == "4dir" else nn.Linear(flips * width, width)
        self.out_proj = nn.Linear(width * copies, width)
        self._kept: tuple[Any, list[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        if len(grid) != self.axes or math.prod(grid) != x.shape[1]:
            raise InputError(
                f"this Hyena takes the tokens of a grid of {self.axes} axes and no others; {x.shape[1]} tokens on the "
                f"grid {tuple(grid)} do not fit"
            )
        values = self.short_filter(self.in_proj(x).mT.unflatten(2, grid))
        if self.direction == "parallel":
            values = values.unflatten(1, (len(self.flips), -1)).flatten(0, 1)
        elif self.direction in ("4dir", "4dirp"):
            values = torch.cat([self._flipped(values, flip) for flip in self.flips])
        last, *gates, value = values.split(self.width, dim=1)
        spectra = self.spectra(grid)
        every = tuple(range(self.axes))
        for step, gate in enumerate(reversed(gates)):
            turned = every if self.direction == "rotated" and step == 0 else ()
            value = self._flipped(self.drop(value * gate), turned)
            value = self._flipped(_convolved(value, spectra[step], self.bias[step]), turned)
        return self.out_proj(self._merged(value * last).flatten(2).mT)

    def spectra(self, grid: tuple[int, ...]) -> Tensor:
        """The transforms [o - 1, D, ...] of the filters on a grid."""
        reading = list(self.filter.parameters())
        keep = not self.training and not torch.is_grad_enabled() and not any(part.is_inference() for part in reading)
        if not keep:
            return self._spectra(grid)
        state = [(part.data_ptr(), part._version, part.dtype, part.device) for part in reading]
        key = (grid, state)
        if self._kept is None or self._kept[0] != key:
            # The parameters' memory is held, so that no other tensor can come to lie at the same address.
            self._kept = (key, [part.detach() for part in reading], self._spectra(grid))
        return self._kept[2]

    def train(self, mode: bool = True) -> Self:
        self._kept = None
        return super().train(mode)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        """Gates, transforms and products of spectra, the filters' own transforms among them.

        A transform of P real points counts as P log2 P multiply-adds.
        """
        length, points = math.prod(grid), math.prod(2 * side for side in grid)
        transform = int(points * math.log2(points))
        runs = len(x) * (1 if self.direction in ("standard", "rotated") else len(self.flips))
        step = runs * (2 * transform + 2 * points + 2 * length) + transform
        return self.width * ((self.order - 1) * step + runs * length)

    def _spectra(self, grid: tuple[int, ...]) -> Tensor:
        with torch.autocast("cpu" if self.bias.is_meta else self.bias.device.type, enabled=False):
            taps = self.filter(grid)
            if self.released_scale:
                taps = taps / (2 * max(grid))
            return filter_spectrum(taps.unflatten(0, (self.order - 1, self.width)), grid)

    def _flipped(self, values: Tensor, axes: Iterable[int]) -> Tensor:
        """[B, C, *grid] with some axes of the grid reversed."""
        dims = [2 + axis for axis in axes]
        return values.flip(dims) if dims else values

    def _merged(self, values: Tensor) -> Tensor:
        """The directions [2^N B, D, *grid] as one map of the width that `out_proj` reads."""
        count = len(self.flips)
        if self.direction == "parallel":
            return values.unflatten(0, (-1, count)).flatten(1, 2)
        if self.direction not in ("4dir", "4dirp"):
            return values
        parts = values.chunk(count)
        back = torch.stack([self._flipped(part, flip) for part, flip in zip(parts, self.flips, strict=True)], dim=-1)
        back = back.movedim(1, -2)
        return self.mix(back if self.direction == "4dir" else back.flatten(-2)).flatten(self.axes + 1).movedim(-1, 1)


def _flips(axes: int) -> list[tuple[int, ...]]:
    """Which axes each of the 2^N directions reverses; for two axes in the released order: none, both, second, first."""
    sets = [list(itertools.combinations(range(axes), size))[::-1] for size in range(axes, 0, -1)]
    return [(), *itertools.chain.from_iterable(sets)]
