"""Path Ensemble: a ViT as a sum of paths, each of which can be scaled or left out (Chang et al., ICCV 2023,
arXiv:2308.06548).

In: pictures [B, C, H, W]. Out: tokens [B, N, D] and pooled feature [B, D], of the ensemble. Layer l = 1..L adds the
outputs of its attention and of its MLP to what it gets,

    a_l = MSA_l(LN x_{l-1}),   f_l = MLP_l(LN(x_{l-1} + a_l)),   x_l = x_{l-1} + a_l + f_l,

so that x_L is the sum of 2L + 1 paths p_0 = x_0, p_{2l-1} = a_l, p_{2l} = f_l. The trunk x stays as it is; beside it

    z = sum_i w_i * p_i,    logits = Head(LN(z)),        w_i = 1, a vector of numbers that are learned, or 0 (pruned).

All w_i = 1 is the plain ViT. A pruned path still feeds the trunk: no work is saved. Self-distillation trains partial
sums z_m = sum_{i <= 2m} w_i * p_i, the short paths, towards the whole, through the same norm and head:

    loss = CE(g_L, y) + lambda mean_m T^2 KL(softmax(g_L / T) || softmax(g_m / T)),    g_L without gradient in the KL.

No official code is known. EnsembleScale starts at 1; the layers m (a third and two thirds of L), lambda = 0.5 and T = 1
are choices made here, and so is what to prune, which `harmless_paths` finds on pictures with known classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Features, register_encoder
from sightline.encoders.layers import to_map
from sightline.encoders.vit import SIZES, Block, VisionTransformer
from sightline.errors import InputError


@register_encoder
class PathEnsemble(VisionTransformer):
    """A pre-norm ViT whose classifier reads a weighted sum of its paths.

    Args:
        width: D.
        depth: blocks, L.
        num_heads: heads of each block.
        patch_size: pixels a side of a patch.
        mlp_ratio: hidden width of the MLP over D.
        class_token: put a class token first, and pool by it.
        drop_path: rate of the last block; those before rise to it linearly. A path that is dropped is dropped from the
            trunk and from the ensemble alike.
        layer_scale: start of LayerScale, None for none; it is part of a path.
        ensemble_scale: whether each path has a learned scale a channel, [2L + 1, D]; keep it out of weight decay
            (`no_weight_decay`).
        pruned: numbers of the paths that are left out of the ensemble.
    """

    paper: ClassVar[str] = "path_ensemble"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"path_ensemble_{size}": dict(values, ensemble_scale=True) for size, values in SIZES.items()
    }

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        ensemble_scale: bool = True,
        pruned: Sequence[int] = (),
    ) -> None:
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        self.ensemble_scale = nn.Parameter(torch.ones(self.path_count, width)) if ensemble_scale else None
        self.pruned = pruned

    @property
    def path_count(self) -> int:
        """2L + 1."""
        return 2 * self.depth + 1

    @property
    def pruned(self) -> tuple[int, ...]:
        """The paths that are left out of the ensemble; can be set at any time."""
        return self._pruned

    @pruned.setter
    def pruned(self, paths: Sequence[int]) -> None:
        found = set(paths)
        if any(not 0 <= path < self.path_count for path in found) or len(found) == self.path_count:
            raise InputError(
                f"pruned must be paths from 0 to {self.path_count - 1}, and not all of them, not {list(paths)}"
            )
        self._pruned = tuple(sorted(found))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would pull away from where they start."""
        return {"ensemble_scale", "pos_embed", "cls_token"}

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        """`hidden_states` are the trunk's."""
        x, grid = self.embed(pixels)
        states = [x[:, self.extra :]] if hidden_states else []
        ensemble = self._weighted(0, x)
        for path, value, trunk in self._steps(x, grid):
            ensemble = self._added(ensemble, path, value)
            if hidden_states and path % 2 == 0:
                states.append(trunk[:, self.extra :])
        assert ensemble is not None, "some path is always kept"
        return self.finish(ensemble, grid, states)

    def _steps(self, x: Tensor, grid: tuple[int, ...]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number and value of each path after the first, and the trunk that has it."""
        for layer, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            attended = block.mix(x, grid)
            x = x + attended
            yield 2 * layer - 1, attended, x
            fed = block.feed(x)
            x = x + fed
            yield 2 * layer, fed, x

    def _weighted(self, path: int, value: Tensor) -> Tensor | None:
        """w_i * p_i, None for a pruned path."""
        if path in self._pruned:
            return None
        return value if self.ensemble_scale is None else value * self.ensemble_scale[path]

    def _added(self, ensemble: Tensor | None, path: int, value: Tensor) -> Tensor | None:
        weighted = self._weighted(path, value)
        if ensemble is None or weighted is None:
            return weighted if ensemble is None else ensemble
        return ensemble + weighted

    def paths(self, pixels: Tensor) -> Tensor:
        """All weighted paths w_i * p_i of the tokens, class token first: [2L + 1, B, T, D]; pruned ones are 0.

        Takes 2L + 1 times the memory of the tokens; meant for analysis.
        """
        self.check(pixels)
        x, grid = self.embed(pixels)
        values = [x, *(value for _, value, _ in self._steps(x, grid))]
        weighted = [self._weighted(path, value) for path, value in enumerate(values)]
        return torch.stack([torch.zeros_like(x) if value is None else value for value in weighted])

    def _read(self, ensemble: Tensor) -> Tensor:
        """Logits [..., classes] of sums of paths [..., T, D]."""
        self._check_head()
        normed = self.norm(ensemble)
        return self.head(normed[..., 0, :] if self.extra else normed.mean(dim=-2))

    def _check_head(self) -> None:
        if self.num_classes == 0:
            raise InputError(f"{self.called} has no head; create it with num_classes")

    def ablated_logits(self, pixels: Tensor) -> Tensor:
        """Logits with one path left out of the ensemble and nothing else changed: [2L + 1, B, classes]."""
        paths = self.paths(pixels)
        whole = paths.sum(dim=0)
        return torch.stack([self._read(whole - path) for path in paths])

    def partial_logits(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Logits [B, classes] of the sums of the paths up to these layers (1 to L), and last those of all paths."""
        if list(layers) != sorted(set(layers)) or any(not 1 <= layer < self.depth for layer in layers):
            raise InputError(f"layers must be rising from 1 to {self.depth - 1}, not {list(layers)}")
        self.check(pixels)
        x, grid = self.embed(pixels)
        ensemble, logits = self._weighted(0, x), []
        for path, value, _ in self._steps(x, grid):
            ensemble = self._added(ensemble, path, value)
            if path == 2 * self.depth or (path % 2 == 0 and path // 2 in layers):
                logits.append(self._read(torch.zeros_like(value) if ensemble is None else ensemble))
        return logits

    def attributions(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What each path gives to each logit, with the statistics of the final norm frozen at those of the whole sum.

        Returns:
            [2L + 1, B, classes], and the constant [classes] that the norm's and the head's biases give; the sum over
            paths plus the constant is the logits, exactly.
        """
        self._check_head()
        paths = self.paths(pixels)
        if self.extra:
            paths = paths[:, :, :1]
        deviation = (paths.sum(dim=0).var(dim=-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
        parts = (paths - paths.mean(dim=-1, keepdim=True)) / deviation * self.norm.weight
        assert isinstance(self.head, nn.Linear)
        return parts.mean(dim=2) @ self.head.weight.T, self.head(self.norm.bias)


def self_distillation_loss(
    logits: Sequence[Tensor], target: Tensor, *, weight: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Cross entropy of the whole ensemble, and the divergence of the partial ones from it.

    Args:
        logits: [B, classes] of the partial sums, and last of all paths: `PathEnsemble.partial_logits`.
        target: [B] classes.
        weight: lambda.
        temperature: T.
    """
    *partial, whole = logits
    loss = F.cross_entropy(whole, target)
    teacher = (whole.detach() / temperature).log_softmax(dim=-1)
    divergences = [
        F.kl_div((short / temperature).log_softmax(dim=-1), teacher, reduction="batchmean", log_target=True)
        for short in partial
    ]
    if not divergences:
        return loss
    return loss + weight * temperature**2 * torch.stack(divergences).mean()


@torch.no_grad()
def harmless_paths(encoder: PathEnsemble, pixels: Tensor, target: Tensor) -> tuple[int, ...]:
    """The paths whose removal does not lower the accuracy on these pictures, one at a time: candidates for `pruned`."""
    right = (encoder.logits(pixels).argmax(dim=-1) == target).sum()
    without = (encoder.ablated_logits(pixels).argmax(dim=-1) == target).sum(dim=-1)
    return tuple(path for path in range(encoder.path_count) if without[path] >= right and path not in encoder.pruned)


def high_frequency_gap(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """How much of the tokens varies from patch to patch: log amplitude at the highest frequency minus that at zero.

    Args:
        tokens: [B, N, D].
        grid: (rows, columns).

    Returns:
        [B]: the difference of the mean log amplitudes over the channels; it rises where a high-pass filter was at work.
    """
    spectrum = torch.fft.fft2(to_map(tokens, grid).double()).abs().clamp_min(1e-12).log().mean(dim=1)
    return spectrum[:, grid[0] // 2, grid[1] // 2] - spectrum[:, 0, 0]
