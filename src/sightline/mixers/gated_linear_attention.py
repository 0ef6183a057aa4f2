"""Gated linear attention: the state fades by a factor that each token chooses for each key channel (Yang et al., ICML
2024, arXiv:2312.06635), along the tokens or, as in ViG (Liao et al. 2024, arXiv:2405.18425), in both directions.

In and out: tokens [B, L, D]. With h heads of key width dk = expand_k D / h and value width dv = expand_v D / h:

    q, k, v  = W_qkv x                                       (shared by the directions)
    log a    = log sigmoid(W_2 W_1 x + b) / 16               (a gate a direction; W_1 has 16 rows)
    S_t      = diag(a_t) S_{t-1} + k_t v_t^T,     o_t = S_t^T q_t / sqrt(dk)
    o        = (forward + backward) / 2                      (if in both directions; a token is in both sums)
    y        = W_o (SiLU(W_g x + b_g) * RMSNorm_dv(o))       (norm head by head, its weights shared by the heads)

The backward scan reads the tokens from the last to the first, and its gate of a token acts when it comes to that token.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers.linear_attention import Mode, at_least_single, linear_attention, scan_macs
from sightline.mixers.mixer import CausalMixer


class GatedLinearAttention(CausalMixer):
    """Gated linear attention in one direction (causal) or both.

    Args:
        width: D.
        num_heads: h.
        bidirectional: scan in both directions; `step` is then refused.
        expand_k: width of all keys together, over D.
        expand_v: width of all values together, over D.
        gate_logit_normalizer: what the logarithms of the gates are divided by: the larger, the slower the state fades.
        gate_low_rank_dim: width between the two linear maps that give the gates.
        eps: of the norm.
        mode: form of the computation, "chunked", "parallel" or "recurrent"; the result is the same.
        chunk: tokens of a chunk, None for the default of the kernel.
    """

    GAIN: ClassVar[float] = 2**-2.5
    """Of the uniform Xavier distribution that the weights start from."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        bidirectional: bool = False,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_logit_normalizer: float = 16.0,
        gate_low_rank_dim: int = 16,
        eps: float = 1e-6,
        mode: Mode = "chunked",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.key_width, self.value_width = int(width * expand_k), int(width * expand_v)
        if num_heads < 1 or any(wide < 1 or wide % num_heads for wide in (self.key_width, self.value_width)):
            raise InputError(
                f"keys of width {self.key_width} and values of width {self.value_width} cannot be shared by "
                f"{num_heads} heads of equal width"
            )
        if gate_logit_normalizer <= 0 or gate_low_rank_dim < 1:
            raise InputError(
                "gate_logit_normalizer must be above 0 and gate_low_rank_dim 1 or more, not "
                f"{gate_logit_normalizer} and {gate_low_rank_dim}"
            )
        self.num_heads, self.bidirectional = num_heads, bidirectional
        self.gate_logit_normalizer = gate_logit_normalizer
        self.mode, self.chunk = mode, chunk
        self.qkv_proj = nn.Linear(width, 2 * self.key_width + self.value_width, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(width, gate_low_rank_dim, bias=False),
            nn.Linear(gate_low_rank_dim, self.key_width * (2 if bidirectional else 1)),
        )
        self.g_proj = nn.Linear(width, self.value_width)
        self.g_norm = nn.RMSNorm(self.value_width // num_heads, eps=eps)
        self.o_proj = nn.Linear(self.value_width, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the weights as the authors of both papers do."""
        for part in (self.qkv_proj, *self.gk_proj, self.g_proj, self.o_proj):
            nn.init.xavier_uniform_(part.weight, gain=self.GAIN)

    def scan(self, x: Tensor, state: Tensor | None = None, mode: Mode | None = None) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] -> what the heads read [B, L, h, dv], and the state of the forward scan [B, h, dk, dv]."""
        widths = [self.key_width, self.key_width, self.value_width]
        query, key, value = (self._by_head(part) for part in self.qkv_proj(x).split(widths, dim=-1))
        query = query * query.shape[-1] ** -0.5
        gates = F.logsigmoid(self.gk_proj(x).to(at_least_single(x))) / self.gate_logit_normalizer
        first, *second = (self._by_head(gate) for gate in gates.split(self.key_width, dim=-1))
        form = mode or self.mode
        out, state = linear_attention(query, key, value, first, mode=form, chunk=self.chunk, state=state)
        if second:
            backward = (part.flip(2) for part in (query, key, value, second[0]))
            out = (out + linear_attention(*backward, mode=form, chunk=self.chunk)[0].flip(2)) / 2
        return out.transpose(1, 2), state

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge(self, out: Tensor, x: Tensor) -> Tensor:
        """Normed and gated: what the heads read [B, L, h, dv] and the tokens [B, L, D] -> [B, L, D]."""
        return self.o_proj(F.silu(self.g_proj(x)) * self.g_norm(out).flatten(2))

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        return self.merge(self.scan(x)[0], x)

    def init_state(self, batch: int) -> Tensor:
        heads = self.num_heads
        return self.o_proj.weight.new_zeros(batch, heads, self.key_width // heads, self.value_width // heads)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.bidirectional:
            raise InputError("gated linear attention in both directions reads later tokens and has no step")
        out, state = self.scan(x[:, None], state, mode="recurrent")
        return self.merge(out, x[:, None])[:, 0], state

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        one = scan_macs(
            x.shape[1], self.num_heads, self.key_width // self.num_heads, self.value_width // self.num_heads
        )
        return len(x) * one * (2 if self.bidirectional else 1)
