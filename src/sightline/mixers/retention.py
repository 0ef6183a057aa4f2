"""Retention: linear attention whose state fades by a fixed factor a head (Sun et al. 2023, arXiv:2307.08621; for vision
ViR, Hatamizadeh et al. 2023, arXiv:2310.19731).

In and out: tokens [B, L, D]. With h heads of width d = D / h, and per head

    S_t = gamma S_{t-1} + k_t^T v_t,     o_t = q_t S_t / sqrt(d),     y = W_o [o of all heads] + b_o

Decays as in the authors' code for ViR: 1 - gamma log-spaced from 1/32 for the first head to 1/512 for the last, so that
heads look back some 32 to 512 tokens. As there, and unlike the retention of language models, there is no rotation of
queries and keys, no norm of the heads' outputs and no output gate. The parallel form of that code passes the scores
through a softmax in which masked ones count as 0: later tokens leak in and the three forms differ. Here the parallel
form has no softmax, so that all three are one function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.mixers.linear_attention import Mode, at_least_single, linear_attention, scan_macs
from sightline.mixers.mixer import CausalMixer


def vision_decays(num_heads: int) -> tuple[float, ...]:
    """The decay of each head: one minus numbers log-spaced from 1/32 to 1/512."""
    steps = max(1, num_heads - 1)
    return tuple(1 - 32 ** -(1 - head / steps) * 512 ** -(head / steps) for head in range(num_heads))


class Retention(CausalMixer):
    """Multi-head retention.

    Args:
        width: D.
        num_heads: h; they divide the width.
        decays: gamma of each head, in (0, 1]; None for those of `vision_decays`.
        mode: form of the computation, "chunked", "parallel" or "recurrent"; the result is the same.
        chunk: tokens of a chunk, None for the default of the kernel.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        decays: Sequence[float] | None = None,
        mode: Mode = "chunked",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise InputError(f"the width {width} cannot be shared by {num_heads} heads of equal width")
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.decays = vision_decays(num_heads) if decays is None else tuple(decays)
        if len(self.decays) != num_heads or not all(0 < decay <= 1 for decay in self.decays):
            raise InputError(f"decays must be {num_heads} numbers above 0 and at most 1, one a head, not {decays}")
        self.mode, self.chunk = mode, chunk
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def retain(self, x: Tensor, state: Tensor | None = None, mode: Mode | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] and the state before them -> outputs [B, L, D] and the state after them."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out, state = linear_attention(
            query * self.head_width**-0.5,
            key,
            value,
            # Not a buffer, which would be rounded to half precision with the weights.
            torch.tensor([math.log(decay) for decay in self.decays], dtype=at_least_single(x), device=x.device),
            mode=mode or self.mode,
            chunk=self.chunk,
            state=state,
        )
        return self.proj(out.transpose(1, 2).flatten(2)), state

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        return self.retain(x)[0]

    def init_state(self, batch: int) -> Tensor:
        return self.qkv.weight.new_zeros(batch, self.num_heads, self.head_width, self.head_width)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, state = self.retain(x[:, None], state, mode="recurrent")
        return out[:, 0], state

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        return len(x) * scan_macs(x.shape[1], self.num_heads, self.head_width, self.head_width)
