"""ConvSSM: a linear recurrence over time whose state is a feature map (Smith et al., NeurIPS 2023, arXiv:2310.19694).

Frames u_k [B, U, H, W] in, frames y_k of the same shape out, with a complex state x_k [B, P, H, W]:

    x_k = L x_(k-1) + conv(u_k; B)          L [P] a number for each channel, B a complex k x k kernel U -> P
    y_k = 2 Re conv(x_k; C)                 C a complex k x k kernel P -> U

L is pointwise, so the recurrence is associative with elements of constant size: all frames at once by a parallel scan,
or one frame at a time at constant cost. P is half of the paper's `state_size`: the other half are complex conjugates,
which the factor 2 Re accounts for. In continuous time with steps D = exp(log_step),

    L = exp(lambda D)        B = D phi(lambda D) B~        phi(z) = (exp(z) - 1) / z

(zero-order hold). The official code (NVlabs/ConvSSM) divides by lambda, which training can bring to zero; phi is
computed here by its series near zero. It also lets `scan` start from a state, which the official parallel form
neglects to do. Convolutions run on real and imaginary parts as 2 P real channels, since many backends have no complex
ones; the state is kept in float32 at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.mixers.linear_recurrence import Mode, linear_recurrence


@dataclass(frozen=True)
class Discrete:
    """A discretised layer: what stays the same from frame to frame."""

    decay: Tensor
    """L, complex [P, 1, 1]."""
    kernel_in: Tensor
    """B as real weights [2 P, U, k, k]: the real parts of the P channels, then the imaginary ones."""
    kernel_out: Tensor
    """2 C as real weights [U, 2 P, k, k], for the real and the imaginary parts of the state."""


class ConvSSM(nn.Module):
    """The recurrence, over frames as maps: time first, [T, B, U, H, W].

    Args:
        width: U, channels of a frame in and out.
        state_size: twice P, complex state channels with their conjugates; blocks divide it into even parts.
        kernel_in: side of B, odd.
        kernel_out: side of C, odd.
        blocks: copies of a smaller HiPPO matrix that start the eigenvalues.
        dt_min: smallest step at the start.
        dt_max: largest step at the start.
        clip_eigs: hold the real parts of the eigenvalues at -1e-4 or below, so that the state cannot grow.
        scan: how all frames are computed at once: `loop`, `doubling` or `chunked` (see `linear_recurrence`).
    """

    def __init__(
        self,
        width: int,
        state_size: int,
        *,
        kernel_in: int = 3,
        kernel_out: int = 3,
        blocks: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        clip_eigs: bool = True,
        scan: Mode = "loop",
    ) -> None:
        super().__init__()
        if blocks < 1 or state_size < 2 or state_size % (2 * blocks):
            raise InputError(f"state_size must be a multiple of 2 * blocks, not {state_size} with blocks={blocks}")
        if kernel_in % 2 == 0 or kernel_out % 2 == 0:
            raise InputError(f"the kernels of a ConvSSM need odd sides, not {kernel_in} and {kernel_out}")
        if not 0 < dt_min <= dt_max:
            raise InputError(f"dt_min and dt_max must be positive and in this order, not {dt_min} and {dt_max}")
        if scan not in get_args(Mode):
            raise unknown("scan of a ConvSSM", scan, get_args(Mode))
        self.width, self.channels, self.clip_eigs = width, state_size // 2, clip_eigs
        self.scan_mode: Mode = scan
        values, vectors = hippo_legs(state_size // blocks)
        self.lambda_re = nn.Parameter(torch.tensor(np.tile(values.real, blocks), dtype=torch.float32))
        self.lambda_im = nn.Parameter(torch.tensor(np.tile(values.imag, blocks), dtype=torch.float32))
        self.log_step = nn.Parameter(torch.empty(self.channels).uniform_(math.log(dt_min), math.log(dt_max)))
        basis = torch.tensor(np.kron(np.eye(blocks), vectors), dtype=torch.complex64)
        drawn = he_normal(torch.empty(state_size, width, kernel_in, kernel_in), width * kernel_in**2)
        inward = (basis.mH @ drawn.flatten(1).to(basis.dtype)).view(-1, width, kernel_in, kernel_in)
        drawn = he_normal(torch.empty(width, kernel_out, kernel_out, state_size), state_size * kernel_out**2)
        outward = (drawn.to(basis.dtype) @ basis).permute(0, 3, 1, 2)
        self.B = nn.Parameter(torch.stack([inward.real, inward.imag]))
        """[2, P, U, k, k]: real and imaginary parts of the continuous input kernel."""
        self.C = nn.Parameter(torch.stack([outward.real, outward.imag]))
        """[2, U, P, k, k]: real and imaginary parts of the output kernel."""

    def discretise(self) -> Discrete:
        """The recurrence for frames a step apart; needs computing once for any number of frames."""
        wide = torch.promote_types(self.B.dtype, torch.float32)
        real = self.lambda_re.to(wide)
        if self.clip_eigs:
            real = real.clamp(max=-1e-4)
        step = self.log_step.to(wide).exp()
        exponent = torch.complex(real * step, self.lambda_im.to(wide) * step)
        gain = (step * phi(exponent))[:, None, None, None]
        kernel = gain * torch.complex(self.B[0].to(wide), self.B[1].to(wide))
        kernel_in = torch.cat([kernel.real, kernel.imag])
        kernel_out = 2 * torch.cat([self.C[0], -self.C[1]], dim=1)
        return Discrete(exponent.exp()[:, None, None], kernel_in, kernel_out.to(wide))

    def init_state(self, batch: int, size: tuple[int, int]) -> Tensor:
        """The zero state for maps of a size: complex [B, P, H, W]."""
        state = self.B.new_zeros(batch, self.channels, *size, dtype=torch.promote_types(self.B.dtype, torch.float32))
        return torch.complex(state, state)

    def forward(self, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All frames at once.

        Args:
            u: [T, B, U, H, W].
            state: the state before the first frame, complex [B, P, H, W]; None for zero.

        Returns:
            y [T, B, U, H, W] and the state after the last frame.
        """
        discrete = self.discretise()
        driven = self._drive(u.flatten(0, 1), discrete).unflatten(0, u.shape[:2])
        x = linear_recurrence(discrete.decay[None, None], driven, state, mode=self.scan_mode)
        return self._read(x.flatten(0, 1), discrete).unflatten(0, u.shape[:2]).to(u.dtype), x[-1]

    def step(self, u: Tensor, state: Tensor, discrete: Discrete | None = None) -> tuple[Tensor, Tensor]:
        """One frame [B, U, H, W] and the state before it -> its output and the state after it.

        `discrete` is what `discretise` gave, for callers that take many steps.
        """
        discrete = self.discretise() if discrete is None else discrete
        x = discrete.decay * state + self._drive(u, discrete)
        return self._read(x, discrete).to(u.dtype), x

    def _drive(self, u: Tensor, discrete: Discrete) -> Tensor:
        weight = discrete.kernel_in
        driven = F.conv2d(u.to(weight.dtype), weight, padding=weight.shape[-1] // 2)
        # Under autocast the convolution gives half precision; the state stays wide.
        return torch.complex(*driven.to(weight.dtype).chunk(2, dim=1))

    def _read(self, x: Tensor, discrete: Discrete) -> Tensor:
        weight = discrete.kernel_out
        return F.conv2d(torch.cat([x.real, x.imag], dim=1), weight, padding=weight.shape[-1] // 2)

    def mixing_macs(self, u: Tensor, state: Tensor | None = None) -> int:
        """Multiply-adds of a forward: both convolutions, and four for each complex product of the scan."""
        places = u.numel() // self.width
        taps = self.B[0, 0, 0].numel() + self.C[0, 0, 0].numel()
        return places * self.channels * (2 * taps * self.width + 4)


def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z of complex numbers, 1 at zero, exact to rounding near it, as are its gradients."""
    near = z.abs() < 0.1
    small = torch.where(near, z, 0)
    series = torch.ones_like(z)
    for order in range(10, 1, -1):
        series = 1 + small / order * series
    far = torch.where(near, 1, z)
    return torch.where(near, series, torch.expm1(far) / far)


def hippo_legs(size: int) -> tuple[npt.NDArray[np.complex128], npt.NDArray[np.complex128]]:
    """Eigenvalues [size / 2] with negative imaginary part and eigenvectors [size, size / 2] of HiPPO-LegS, made normal.

    HiPPO-LegS is A_ij = -sqrt((1 + 2i)(1 + 2j)) below the diagonal and -(i + 1) on it; the rank-one term p p^T with
    p_i = sqrt(i + 1/2) makes it a skew-symmetric matrix minus half of the identity.
    """
    root = np.sqrt(1 + 2 * np.arange(size))
    hippo = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(size) + 1.0)
    normal = hippo + np.outer(root, root) / 2
    imaginary, vectors = np.linalg.eigh(-1j * (normal - np.diag(np.diagonal(normal))))
    half = size // 2
    return -0.5 + 1j * imaginary[:half], vectors[:, :half]


def he_normal(weight: Tensor, fan_in: int) -> Tensor:
    """Fills a weight from a normal of variance 2 / fan_in whose tails beyond two deviations are cut."""
    # 0.8796 is the deviation of a unit normal cut at two deviations.
    deviation = math.sqrt(2 / fan_in) / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
