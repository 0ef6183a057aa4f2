"""Mamba's mixer (Gu and Dao 2023, arXiv:2312.00752), and Vision Mamba's in both directions (arXiv:2401.09417, "v2").

In and out: tokens [B, L, D]. E = expand D channels, N = d_state numbers of state a channel, R = ceil(D / 16).

    u, z = in_proj(x)                                     shared by the directions
    u := SiLU(causal depthwise convolution of u);  (r, B, C) = x_proj(u);  step = softplus(dt_proj(r))
    y = S6(u, step, A, B, C, D)                           forwards, and with other weights over the reversed tokens
    out = out_proj((y_forward + y_backward) SiLU(z) / 2)

The official code (hustvl/Vim, `mamba_simple.py`) gates each direction before the sum, which is the same. Its weights of
the backward direction are called `conv1d_b` and so on; here they are those of `back`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.mixer import CausalMixer, Mixer
from sightline.mixers.selective_scan import selective_scan, selective_scan_step

MambaState = tuple[Tensor, Tensor]
"""The last d_conv - 1 inputs of the convolution [B, d_conv - 1, E], and the state of the scan [B, E, N]."""

STEP_FROM, STEP_TO, STEP_FLOOR = 1e-3, 0.1, 1e-4


class ScanInputs(NamedTuple):
    """What a direction's scan reads, in the order in which it does."""

    u: Tensor
    """[B, L, E]"""
    step: Tensor
    """[B, L, E]: after softplus."""
    B: Tensor
    """[B, L, N]"""
    C: Tensor
    """[B, L, N]"""


class SelectiveBranch(nn.Module):
    """The weights of one direction, and what they do to its tokens in their order.

    Args:
        channels: E.
        d_state: N.
        d_conv: tokens under the convolution.
        dt_rank: R.
        spread_steps: start with step sizes between 0.001 and 0.1; otherwise with a bias of 0, which is steps of 0.69.
    """

    def __init__(self, channels: int, d_state: int, d_conv: int, dt_rank: int, *, spread_steps: bool) -> None:
        super().__init__()
        self.d_state, self.dt_rank = d_state, dt_rank
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels, padding=d_conv - 1)
        self.x_proj = nn.Linear(channels, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        nn.init.zeros_(self.dt_proj.bias)
        if spread_steps:
            low, high = math.log(STEP_FROM), math.log(STEP_TO)
            step = torch.empty(channels).uniform_(low, high).exp().clamp_min(STEP_FLOOR)
            with torch.no_grad():
                self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def read(self, u: Tensor) -> ScanInputs:
        """Inputs [B, L, E] -> what the scan reads."""
        # A map of one row, its channels side by side as the linear layers and the scan have them: on a CPU this takes a
        # quarter of the time of the same convolution in one dimension.
        rows, weight = u.mT[:, :, None], self.conv1d.weight[:, :, None]
        padding = (0, weight.shape[-1] - 1)
        convolved = F.conv2d(rows, weight, self.conv1d.bias, padding=padding, groups=len(weight))
        u = F.silu(convolved[:, :, 0, : u.shape[1]].mT)
        return ScanInputs(u, *self.selected(u))

    def selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """step, B and C of convolved inputs [..., E]."""
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # The bias is added in float32 at least, also under autocast.
        step = F.linear(low, self.dt_proj.weight)
        step = F.softplus(step.to(torch.promote_types(step.dtype, torch.float32)) + self.dt_proj.bias)
        return step, B, C

    def rates(self) -> Tensor:
        """A [E, N], negative."""
        return -torch.exp(self.A_log)

    def scan(self, inputs: ScanInputs, gap: Tensor | None = None) -> Tensor:
        """[B, L, E]; `gap` [B, L, E] is further time of decay before each token."""
        u, step, B, C = (tensor.mT for tensor in inputs)
        gap = None if gap is None else gap.mT
        return selective_scan(u, step, self.rates(), B, C, self.D, softplus=False, gap=gap)[0].mT

    def init_state(self, batch: int) -> MambaState:
        channels, _, d_conv = self.conv1d.weight.shape
        zeros = self.A_log.new_zeros
        return zeros(batch, d_conv - 1, channels), zeros(batch, channels, self.d_state)

    def step(self, u: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One token [B, E] -> its output and the state after it."""
        window = torch.cat([state[0], u[:, None]], dim=1)
        assert self.conv1d.bias is not None
        u = F.silu((window * self.conv1d.weight[:, 0].T).sum(1) + self.conv1d.bias)
        step, B, C = self.selected(u)
        y, h = selective_scan_step(u, step, self.rates(), B, C, self.D, softplus=False, state=state[1])
        return y, (window[:, 1:], h)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for so many tokens, without those of `x_proj`: the convolution, the steps, and four a number
        of state (the decay's exponent, its product with the state, the input's, the output's)."""
        channels = len(self.D)
        return tokens * channels * (self.conv1d.kernel_size[0] + self.dt_rank + 4 * self.d_state)


class Mamba(CausalMixer):
    """One direction, first token to last.

    Args:
        width: D.
        d_state: N, numbers of state a channel.
        d_conv: tokens under the convolution.
        expand: E / D.
    """

    def __init__(self, width: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        _check(width, d_state, d_conv, expand)
        self.in_proj = nn.Linear(width, 2 * expand * width, bias=False)
        self.ahead = SelectiveBranch(expand * width, d_state, d_conv, math.ceil(width / 16), spread_steps=True)
        self.out_proj = nn.Linear(expand * width, width, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.ahead.scan(self.ahead.read(u)) * F.silu(z))

    def init_state(self, batch: int) -> MambaState:
        return self.ahead.init_state(batch)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y, state = self.ahead.step(u, state)
        return self.out_proj(y * F.silu(z)), state

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        return self.ahead.macs(x.shape[0] * x.shape[1])


class BidirectionalMamba(Mixer):
    """Both directions, with shared projections.

    Args:
        width: D.
        d_state: N, numbers of state a channel.
        d_conv: tokens under the convolutions.
        expand: E / D.
        symmetric_init: start the backward direction with the forward one's kind of steps. The official code leaves its
            bias at 0, so that at the start it forgets within two tokens.
    """

    def __init__(
        self, width: int, *, d_state: int = 16, d_conv: int = 4, expand: int = 2, symmetric_init: bool = False
    ) -> None:
        super().__init__()
        _check(width, d_state, d_conv, expand)
        self.in_proj = nn.Linear(width, 2 * expand * width, bias=False)
        sizes = (expand * width, d_state, d_conv, math.ceil(width / 16))
        self.ahead = SelectiveBranch(*sizes, spread_steps=True)
        self.back = SelectiveBranch(*sizes, spread_steps=symmetric_init)
        self.out_proj = nn.Linear(expand * width, width, bias=False)

    def read(self, u: Tensor) -> list[ScanInputs]:
        """What the scan of each direction reads of inputs [B, L, E]."""
        return [self.ahead.read(u), self.back.read(u.flip(1))]

    def scan(self, inputs: Sequence[ScanInputs], gaps: Sequence[Tensor | None] = (None, None)) -> list[Tensor]:
        """The output of each direction [B, L, E], before the gate, in the order of the tokens; gaps in that of the
        direction."""
        return [self.ahead.scan(inputs[0], gaps[0]), self.back.scan(inputs[1], gaps[1]).flip(1)]

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        ahead, back = self.scan(self.read(u))
        return self.out_proj((ahead + back) * F.silu(z) / 2)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        tokens = x.shape[0] * x.shape[1]
        return self.ahead.macs(tokens) + self.back.macs(tokens)


def _check(width: int, d_state: int, d_conv: int, expand: int) -> None:
    if min(width, d_state, d_conv, expand) < 1:
        raise InputError(
            "width, d_state, d_conv and expand of a Mamba mixer must be 1 or more, not "
            f"{width}, {d_state}, {d_conv} and {expand}"
        )
