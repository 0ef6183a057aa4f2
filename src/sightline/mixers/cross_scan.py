"""Selective scans over maps: SS2D of VMamba (Liu et al., NeurIPS 2024, arXiv:2401.10166) and the multi-scale scan of
MSVMamba (Shi et al., NeurIPS 2024, arXiv:2405.14174).

In and out: tokens [B, L, D] on a grid H x W. Inside, width E = ratio * D, N states a channel, R = ceil(D / 16).

A route r of length L is scanned with its own set of parameters:

    (d, B, C) = W_x r;   delta = softplus(W_d d + b);   A = -exp(A_log)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t r_t;   y_t = C_t h_t + D r_t           (channel by channel)

SS2D:   x = SiLU(conv3x3(u)), u = in_proj(tokens);  y = LN(merge of the scans of four routes);  out_proj(y [* SiLU(z)])
MS2D:   one route on x = SiLU(conv3x3(u)) and three on l = SiLU(conv7x7, stride 2(u)); the three are one sequence of
        length 3 hw, h = ceil(H / 2), w = ceil(W / 2), scanned with one set of parameters, so that a route starts in the
        state that the one before it ended in; y = full + upsampled(sum of the three), then squeeze and excite,
        [* SiLU(z)], out_proj.

The arXiv models of MSVMamba normalise each scan before the sum and upsample bilinearly, those of NeurIPS normalise the
sum and upsample to the nearest (`norm_routes`, `upsample`). The official NeurIPS code can give another route the full
resolution, but puts two of the four together wrongly; here all four are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.layers import to_map, to_tokens
from sightline.errors import InputError, unknown
from sightline.mixers.mixer import Mixer
from sightline.mixers.scan_orders import (
    CROSS_ROUTES,
    chain,
    check_grid,
    cross_merge,
    cross_scan,
    low_routes,
    roll,
    unchain,
    unroll,
)
from sightline.mixers.selective_scan import selective_scan

UPSAMPLINGS = ("bilinear", "nearest")


class RouteParameters(nn.Module):
    """The parameters of selective scans along routes, one set a route, and the scans.

    Args:
        width: D, from which the rank of the step sizes follows.
        inner: E.
        d_state: N.
        sets: how many.
    """

    def __init__(self, width: int, inner: int, d_state: int, sets: int) -> None:
        super().__init__()
        if d_state < 1:
            raise InputError(f"d_state must be 1 or more, not {d_state}")
        self.inner, self.d_state, self.rank = inner, d_state, math.ceil(width / 16)
        self.x_proj = nn.Parameter(torch.empty(sets, self.rank + 2 * d_state, inner))
        self.dt_proj = nn.Parameter(torch.empty(sets, inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(sets, inner))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().expand(sets, inner, -1).contiguous())
        self.D = nn.Parameter(torch.ones(sets, inner))
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            # softplus(dt_bias) is log-uniform in [0.001, 0.1], as in Mamba.
            step = torch.empty(sets, inner).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def scan(self, sequences: Tensor, first: int = 0) -> Tensor:
        """Scans sequences [B, K, E, L], number k with the parameters of set `first + k`: [B, K, E, L]."""
        used = slice(first, first + sequences.shape[1])
        states = self.d_state
        projected = torch.einsum("bkel,kce->bkcl", sequences, self.x_proj[used])
        low, B, C = projected.split([self.rank, states, states], dim=2)
        delta = torch.einsum("bkrl,ker->bkel", low, self.dt_proj[used])
        # The state sums up hundreds of tokens: half precision would lose the early ones.
        exact = torch.promote_types(sequences.dtype, torch.float32)
        scanned, _ = selective_scan(
            sequences.flatten(1, 2).to(exact),
            delta.flatten(1, 2).to(exact),
            -self.A_log[used].flatten(0, 1).to(exact).exp(),
            B.to(exact),
            C.to(exact),
            self.D[used].flatten().to(exact),
            delta_bias=self.dt_bias[used].flatten().to(exact),
        )
        return scanned.to(sequences.dtype).unflatten(1, sequences.shape[1:3])

    def macs(self, tokens: int) -> int:
        """Multiply-adds for so many scanned tokens; the scan itself is counted as in the official code, 9 E N + E."""
        projections = self.inner * (2 * self.rank + 2 * self.d_state)
        return tokens * (projections + 9 * self.inner * self.d_state + self.inner)


class SS2D(Mixer):
    """VMamba's two-dimensional selective scan.

    Args:
        width: D.
        ssm_ratio: E / D.
        d_state: N, states a channel.
        gated: whether a second half of the input projection gates the output.
        conv_bias: whether the 3 x 3 convolution has a bias.
        routes: routes along which to scan, of `CROSS_ROUTES`; one may come several times, with other weights.
    """

    def __init__(
        self,
        width: int,
        *,
        ssm_ratio: float = 2.0,
        d_state: int = 16,
        gated: bool = True,
        conv_bias: bool = True,
        routes: Sequence[str] = CROSS_ROUTES,
    ) -> None:
        super().__init__()
        inner = int(width * ssm_ratio)
        if inner < 1:
            raise InputError(f"ssm_ratio {ssm_ratio} leaves no channels of a width of {width}")
        if not routes:
            raise InputError(f"routes must name one or more of {', '.join(CROSS_ROUTES)}")
        for route in routes:
            if route not in CROSS_ROUTES:
                raise unknown("route", route, CROSS_ROUTES)
        self.inner, self.gated, self.routes = inner, gated, tuple(routes)
        self.in_proj = nn.Linear(width, 2 * inner if gated else inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.ssm = RouteParameters(width, inner, d_state, self.sets)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    @property
    def sets(self) -> int:
        """How many sets of scan parameters there are."""
        return len(self.routes)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        check_grid(x, grid, axes=2)
        x = self.in_proj(x)
        gate = None
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        y = self.scan(to_map(x, grid))
        return self.out_proj(y if gate is None else y * F.silu(gate))

    def scan(self, values: Tensor) -> Tensor:
        """Convolution, scans and what follows them up to the gate: a map [B, E, H, W] -> tokens [B, L, E]."""
        grid = (values.shape[2], values.shape[3])
        scanned = self.ssm.scan(cross_scan(F.silu(self.conv(values)), self.routes))
        return self.out_norm(to_tokens(cross_merge(scanned, grid, self.routes)))

    def scanned_tokens(self, grid: tuple[int, ...]) -> int:
        """Tokens that the scans step over for one picture."""
        return len(self.routes) * math.prod(grid)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        return len(x) * self.ssm.macs(self.scanned_tokens(grid))


class SqueezeExcite(nn.Module):
    """Scales the channels of tokens [B, L, E] by sigmoid(W2 relu(W1 mean over the tokens))."""

    def __init__(self, width: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(1, width // reduction)
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean(dim=1, keepdim=True)).relu()).sigmoid()


class MS2D(SS2D):
    """MSVMamba's multi-scale scan: one route at full resolution, the three others on a map of half the sides.

    Args:
        width: D.
        ssm_ratio: E / D.
        d_state: N, states a channel.
        gated: whether a second half of the input projection gates the output.
        conv_bias: whether the two convolutions have biases.
        full_route: the route that is walked at full resolution.
        norm_routes: normalise each scan before the sum (the arXiv models), or the sum (those of NeurIPS).
        upsample: `bilinear` (arXiv) or `nearest` (NeurIPS).
        squeeze_excite: whether channels are rescaled before the gate.
        reset_between_routes: start each of the three routes from an empty state. Off in the paper's models: the second
            and third start from where the one before ended.
    """

    def __init__(
        self,
        width: int,
        *,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        gated: bool = True,
        conv_bias: bool = True,
        full_route: str = "raster",
        norm_routes: bool = True,
        upsample: str = "bilinear",
        squeeze_excite: bool = True,
        reset_between_routes: bool = False,
    ) -> None:
        if upsample not in UPSAMPLINGS:
            raise unknown("upsample of MS2D", upsample, UPSAMPLINGS)
        super().__init__(
            width, ssm_ratio=ssm_ratio, d_state=d_state, gated=gated, conv_bias=conv_bias, routes=CROSS_ROUTES
        )
        self.full_route, self.low_routes = full_route, low_routes(full_route)
        self.norm_routes, self.upsample, self.reset_between_routes = norm_routes, upsample, reset_between_routes
        self.conv_low = nn.Conv2d(self.inner, self.inner, 7, stride=2, padding=3, groups=self.inner, bias=conv_bias)
        self.se = SqueezeExcite(self.inner) if squeeze_excite else nn.Identity()

    @property
    def sets(self) -> int:
        return 2  # number 0 for full resolution, 1 for the three low routes

    def scan(self, values: Tensor) -> Tensor:
        grid = (values.shape[2], values.shape[3])
        low = F.silu(self.conv_low(values))
        low_grid = (low.shape[2], low.shape[3])
        full = self.ssm.scan(unroll(F.silu(self.conv(values)), self.full_route)[:, None])[:, 0]
        chained = self._scan_low(low)
        if self.norm_routes:
            full, chained = self._normed(full), self._normed(chained)
        merged = unchain(chained, low_grid, self.low_routes)
        if self.upsample == "bilinear":
            merged = F.interpolate(merged, size=grid, mode="bilinear", align_corners=False)
        else:
            merged = F.interpolate(merged, size=grid, mode="nearest")
        y = to_tokens(roll(full, self.full_route, grid) + merged)
        return self.se(y if self.norm_routes else self.out_norm(y))

    def _normed(self, sequence: Tensor) -> Tensor:
        return self.out_norm(sequence.mT).mT

    def _scan_low(self, low: Tensor) -> Tensor:
        """The scanned routes [B, E, 3 hw] of the small map [B, E, h, w]."""
        if not self.reset_between_routes:
            return self.ssm.scan(chain(low, self.low_routes)[:, None], first=1)[:, 0]
        routes = cross_scan(low, self.low_routes)
        scanned = self.ssm.scan(routes.flatten(0, 1)[:, None], first=1)[:, 0]
        return scanned.unflatten(0, routes.shape[:2]).transpose(1, 2).flatten(2)

    def scanned_tokens(self, grid: tuple[int, ...]) -> int:
        return math.prod(grid) + 3 * math.prod(math.ceil(side / 2) for side in grid)
