"""ConvLSTM (Shi et al., NeurIPS 2015, arXiv:1506.04214) as the baseline of ConvS5 in NVlabs/ConvSSM.

    [i, f, o, g] = conv([u_k; h_(k-1)]; A)          A a k x k kernel U + P -> 4 P, no bias, no peepholes
    c_k = sigmoid(f) c_(k-1) + sigmoid(i) tanh(g)
    h_k = sigmoid(o) tanh(c_k)

The recurrence is not linear, so frames can only be computed one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.convolutional_state import he_normal

State = tuple[Tensor, Tensor]
"""Cells c and outputs h, each [B, P, H, W]."""


class ConvLSTM(nn.Module):
    """The recurrence, over frames as maps: time first, [T, B, U, H, W] -> [T, B, P, H, W].

    Args:
        width: U, channels of a frame.
        channels: P, channels of the state and of the output; the width if None.
        kernel_size: side of A, odd.
    """

    def __init__(self, width: int, channels: int | None = None, *, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise InputError(f"the kernel of a ConvLSTM needs an odd side, not {kernel_size}")
        self.width, self.channels = width, width if channels is None else channels
        inputs = self.width + self.channels
        weight = torch.empty(4 * self.channels, inputs, kernel_size, kernel_size)
        self.weight = nn.Parameter(he_normal(weight, inputs * kernel_size**2))

    def discretise(self) -> None:
        """Nothing stays to be computed once for all frames; there for the sake of `ConvSSM`'s callers."""

    def init_state(self, batch: int, size: tuple[int, int]) -> State:
        """The zero state for maps of a size."""
        zeros = self.weight.new_zeros(batch, self.channels, *size)
        return zeros, zeros

    def forward(self, u: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """All frames, one after the other; the input's share of the gates is computed at once.

        Args:
            u: [T, B, U, H, W].
            state: the state before the first frame, None for zero.

        Returns:
            h [T, B, P, H, W] and the state after the last frame.
        """
        state = self.init_state(u.shape[1], (u.shape[-2], u.shape[-1])) if state is None else state
        weight = self.weight[:, : self.width]
        driven = F.conv2d(u.flatten(0, 1), weight, padding=weight.shape[-1] // 2).unflatten(0, u.shape[:2])
        outputs = []
        for gates in driven:
            state = self._advance(gates, state)
            outputs.append(state[1])
        return torch.stack(outputs), state

    def step(self, u: Tensor, state: State, discrete: None = None) -> tuple[Tensor, State]:
        """One frame [B, U, H, W] and the state before it -> its output and the state after it."""
        weight = self.weight[:, : self.width]
        state = self._advance(F.conv2d(u, weight, padding=weight.shape[-1] // 2), state)
        return state[1], state

    def _advance(self, driven: Tensor, state: State) -> State:
        cell, output = state
        weight = self.weight[:, self.width :]
        gates = driven + F.conv2d(output, weight, padding=weight.shape[-1] // 2)
        take, keep, give, new = gates.chunk(4, dim=1)
        cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
        return cell, give.sigmoid() * cell.tanh()

    def mixing_macs(self, u: Tensor, state: State | None = None) -> int:
        """Multiply-adds of a forward: the convolutions, and three products for each number of the state."""
        return u.numel() // self.width * (self.weight.numel() + 3 * self.channels)
