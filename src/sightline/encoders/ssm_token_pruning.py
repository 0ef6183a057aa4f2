"""ToP-ViM: fewer tokens in a vision state space model (Zhan et al., NeurIPS 2024, arXiv:2409.18962), here in Vim.

In: pictures [B, C, H, W]. Out: tokens [B, N, D], those that were dropped as they were when they left, and the class
token's feature [B, D].

After some blocks, the patch tokens of the least importance leave for good; importance is the mean over channels of the
positive part of what the block's scans gave (after the gate, before `out_proj`), without gradient:

    S_t = mean_e max(0, y_t[e])

Of n patches, k - 1 stay, where k = ceil(keep_ratio n), plus 1 if that is even, as in the official code
(ZLKong/ToP-ViM). The scans after it keep the distances that tokens had: a dropped token p brings no input, yet the
state decays by its step, so that between the neighbours q' and q that stay

    h_q = exp(A (step_q + sum of step_p for q' < p < q)) h_q' + step_q B_q u_q

The code of this alignment is not public. Where step_p comes from is a choice (`alignment`): what softplus(bias) gives a
zero token, the default; the steps of the block after which the token was dropped; or that of the token that stays
before it. The convolution inside the mixers sees the tokens that stay as neighbours.

Where the official code differs: it reads the importance from the backward direction in reversed order, and without the
positive part; it protects the class token only for the first picture of a batch, and puts it back in the middle of
what stays (`class_place`). Names and depths are those of its scripts; its code as published has (5, 10, 15) and 0.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import Features, register_encoder
from sightline.encoders.vim import SIZES, Vim, VimBlock
from sightline.errors import InputError, unknown
from sightline.mixers.bidirectional_mamba import BidirectionalMamba, ScanInputs, SelectiveBranch
from sightline.mixers.mixer import Mixer

Importance = Literal["clip", "mean", "l1", "l2"]
ScoreFrom = Literal["both", "forward", "backward"]
Alignment = Literal["zero token", "frozen", "previous", "none"]
ClassAfter = Literal["in order", "middle"]


@register_encoder
class TopVim(Vim):
    """Vim that drops tokens.

    Args:
        prune_layers: numbers of the blocks, from 1, after which tokens are dropped.
        keep_ratio: share of the patches that stays each time, in (0, 1]; 1 is Vim.
        importance: `clip` for the mean of the positive part; or of the values (`mean`), or of their sizes (`l1`), or
            their root mean square (`l2`).
        score_from: whose output is scored: the sum of `both` directions, or one.
        alignment: the step of a dropped token: of a `zero token`, `frozen` at what it was, as of the `previous` one
            that stays; `none` closes the gaps.
        class_place: where the class token goes: it stays `in order`, or moves to the `middle` of what stays, which
            leaves gaps undefined and so needs alignment `none`.
        **options: as of `Vim`, whose directions are 2.
    """

    paper: ClassVar[str] = "ssm_token_pruning"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "top_vim_nano": {**SIZES["nano"], "prune_layers": (1, 2), "keep_ratio": 0.7},
        "top_vim_tiny": {**SIZES["tiny"], "prune_layers": (10, 20), "keep_ratio": 0.75},
        "top_vim_small": {**SIZES["small"], "prune_layers": (5, 14, 23), "keep_ratio": 0.7},
    }

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 192,
        depth: int = 24,
        patch_size: int = 16,
        patch_stride: int | None = None,
        d_state: int = 16,
        expand: int = 2,
        drop_path: float = 0.0,
        symmetric_init: bool = False,
        prune_layers: Sequence[int] = (5, 10, 15),
        keep_ratio: float = 0.8,
        importance: Importance = "clip",
        score_from: ScoreFrom = "both",
        alignment: Alignment = "zero token",
        class_place: ClassAfter = "in order",
    ) -> None:
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            patch_size=patch_size,
            patch_stride=patch_stride,
            d_state=d_state,
            expand=expand,
            drop_path=drop_path,
            symmetric_init=symmetric_init,
        )
        for name, value, allowed in (
            ("importance", importance, get_args(Importance)),
            ("score_from", score_from, get_args(ScoreFrom)),
            ("alignment", alignment, get_args(Alignment)),
            ("class_place", class_place, get_args(ClassAfter)),
        ):
            if value not in allowed:
                raise unknown(f"{name} of {self.paper}", value, allowed)
        if any(not 1 <= layer <= depth for layer in prune_layers):
            raise InputError(f"prune_layers of {self.paper} must be from 1 to {depth}, not {list(prune_layers)}")
        if not 0 < keep_ratio <= 1:
            raise InputError(f"keep_ratio of {self.paper} must lie in (0, 1], not {keep_ratio}")
        if class_place == "middle" and alignment != "none":
            raise InputError(f"class_place='middle' of {self.paper} needs alignment='none', not {alignment!r}")
        self.prune_layers, self.keep_ratio = frozenset(prune_layers), keep_ratio
        self.importance, self.score_from, self.alignment = importance, score_from, alignment
        self.class_place = class_place

    def block(self, index: int, drop_path: float) -> VimBlock:
        return _GapBlock(self.width, self.mixer(), drop_path)

    def mixer(self) -> Mixer:
        return GapMamba(self.width, d_state=self.d_state, expand=self.expand, symmetric_init=self.symmetric_init)

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        x, grid, middle = self.embed(pixels)
        everyone, kept = x, Kept(x, middle, self.alignment)
        states = [kept.patches(x)] if hidden_states else []
        for number, block in enumerate(self.blocks, start=1):
            x, outputs, reads = block(x, grid, kept)
            if hidden_states:
                states.append(kept.patches(x))
            if number in self.prune_layers and self.keep_ratio < 1:
                everyone = kept.scattered(everyone, x)
                chosen = self.choose(self.score(outputs), kept.class_index)
                kept.drop(chosen, [read.step for read in reads])
                x = taken(x, chosen)
        return self.finish(kept.scattered(everyone, x), grid, middle, states)

    @torch.no_grad()
    def score(self, outputs: Sequence[Tensor]) -> Tensor:
        """Importance [B, L] from the gated output [B, L, E] of each direction."""
        forward, backward = outputs
        y = {"both": forward + backward, "forward": forward, "backward": backward}[self.score_from]
        if self.importance == "clip":
            return y.clamp_min(0).mean(-1)
        return {"mean": y, "l1": y.abs(), "l2": y.square()}[self.importance].mean(-1)

    def choose(self, scores: Tensor, class_index: Tensor) -> Tensor:
        """Indices [B, K] of the tokens that stay, from scores [B, L] and the place of the class token [B, 1]."""
        stay = kept_patches(scores.shape[1] - 1, self.keep_ratio)
        best = scores.scatter(1, class_index, -math.inf).topk(stay, dim=1).indices.sort(dim=1).values
        if self.class_place == "middle":
            return torch.cat([best[:, : stay // 2], class_index, best[:, stay // 2 :]], dim=1)
        return torch.cat([best, class_index], dim=1).sort(dim=1).values


class GapMamba(BidirectionalMamba):
    """The mixer of Vim over tokens with gaps between them, which also gives what its scans read and gave."""

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, ...], kept: Kept
    ) -> tuple[Tensor, list[Tensor], list[ScanInputs]]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        reads = self.read(u)
        gate = F.silu(z)
        ahead, back = (y * gate for y in self.scan(reads, kept.gaps((self.ahead, self.back), reads)))
        return self.out_proj((ahead + back) / 2), [ahead, back], reads

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = (), kept: Kept | None = None) -> int:
        return super().mixing_macs(x, grid)


class _GapBlock(VimBlock):
    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, ...], kept: Kept
    ) -> tuple[Tensor, list[Tensor], list[ScanInputs]]:
        mixed, outputs, reads = self.mixer(self.normed(x), grid, kept)
        return x + self.drop_path(mixed), outputs, reads


class Kept:
    """Which tokens are left, and how long the gaps between them are.

    Args:
        x: [B, L, D]: the tokens at the start.
        class_at: where the class token stands.
        alignment: see `TopVim`.
    """

    def __init__(self, x: Tensor, class_at: int, alignment: Alignment) -> None:
        batch, self.length, _ = x.shape
        self.class_at, self.alignment = class_at, alignment
        self.positions = torch.arange(self.length, device=x.device).expand(batch, -1)
        """[B, K]: where each token that is left stood at the start."""
        self.frozen: list[Tensor] | None = None
        """Time before each token that is left, of each direction in its order, [B, K, E]."""

    @property
    def class_index(self) -> Tensor:
        """[B, 1]: where the class token stands among those that are left."""
        return (self.positions == self.class_at).int().argmax(1, keepdim=True)

    def drop(self, chosen: Tensor, steps: Sequence[Tensor]) -> None:
        """Leaves the tokens at `chosen` [B, K]; steps [B, L, E] are what all had, of each direction in its order."""
        if self.alignment == "frozen":
            stay = torch.zeros_like(self.positions).scatter(1, chosen, 1)
            before = self.frozen or [torch.zeros_like(step) for step in steps]
            orders = ((stay, chosen), (stay.flip(1), stay.shape[1] - 1 - chosen.flip(1)))
            self.frozen = [_longer(gap, step, *order) for gap, step, order in zip(before, steps, orders, strict=True)]
        self.positions = self.positions.gather(1, chosen)

    def gaps(self, branches: Sequence[SelectiveBranch], reads: Sequence[ScanInputs]) -> Sequence[Tensor | None]:
        """Time of decay before each token, [B, K, E] of each direction in its order."""
        if self.alignment == "none" or self.positions.shape[1] == self.length:
            return (None, None)
        if self.frozen is not None:
            return self.frozen
        found = []
        for branch, read, positions in zip(branches, reads, (self.positions, self.positions.flip(1)), strict=True):
            # Before the first token there is no state that could decay.
            missing = F.pad(positions.diff(dim=1).abs() - 1, (1, 0))[..., None]
            if self.alignment == "zero token":
                found.append(missing * F.softplus(branch.dt_proj.bias))
            else:
                found.append(missing * F.pad(read.step[:, :-1], (0, 0, 1, 0)))
        return found

    def scattered(self, everyone: Tensor, x: Tensor) -> Tensor:
        """All tokens [B, L, D], those that are left as in x [B, K, D]."""
        return everyone.scatter(1, self.positions[..., None].expand_as(x), x)

    def patches(self, x: Tensor) -> Tensor:
        """Tokens [B, K, D] without the class token."""
        last = (self.positions == self.class_at).int().argsort(dim=1, stable=True)
        return taken(x, last[:, :-1])


def kept_patches(patches: int, keep_ratio: float) -> int:
    """How many of so many patches stay."""
    count = math.ceil(keep_ratio * patches)
    return count - 1 if count % 2 else count


def taken(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens [B, L, D] at indices [B, K]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def _longer(gap: Tensor, step: Tensor, stay: Tensor, index: Tensor) -> Tensor:
    """Gaps [B, K, E] before the tokens that stay, longer by the gaps and steps of those dropped before each."""
    # A token that goes belongs to the next that stays, whose number is how many stay before it.
    lost = torch.where(stay[..., None] == 1, 0.0, gap + step)
    sums = lost.new_zeros(len(lost), index.shape[1] + 1, lost.shape[2])
    sums = sums.scatter_add(1, stay.cumsum(1)[..., None].expand_as(lost), lost)
    return taken(gap, index) + sums[:, :-1]
