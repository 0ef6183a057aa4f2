"""VISTA: visual information steering (Li et al., ICML 2025, arXiv:2502.03628).

Two parts, both without training. In: the prompt, with the picture and without. Out: next-token logits.

*Visual steering vector.* v^l = h^l(picture, text) - h^l(text), the difference of layer l's output at the prompt's last
position, measured on the unsteered model. It tilts the output m of every layer's feed-forward part, at every position,
in direction only:

    kappa = 1 + max(0, cos(m, -v))
    m := ||m|| * unit( unit(m) + strength * kappa * unit(v) )         (scale="unit", site="mlp": the official code)
    h := ||h|| * unit( h + strength * v )                             (scale="raw", site="residual": the paper)

*Self-logits augmentation.* The head reads a window W of late layers too: o := (1 - gamma) o + gamma * mean over W of
head(h^l). The official code reads the layers' outputs without the final norm (`lens_norm=False`).

The numbers of the paper come from the code, so its form is the default. Left out: the code passes the one difference
through a principal component analysis, which only adds 1 to the very first coordinate of the first layer. The code's
window 25..30 of 32 layers becomes, for other depths, the `window` layers before the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.grounding.hidden_steering import HiddenSteering
from sightline.grounding.one_token_loops import tilted
from sightline.machine_code import in_loops
from sightline.methods import in_range, register

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


@register
@dataclass(frozen=True)
class Vista(HiddenSteering):
    """Steers the decoder towards what the picture added, and lets late layers vote on the next token.

    Args:
        strength: lambda of the paper, in [0, 10]; 0 with gamma = 0 is the stock model. The paper uses 0.17 for captions
            by LLaVA-1.5, 0.01 for yes/no questions.
        gamma: weight of the late layers' logits, in [0, 1].
        window: how many layers before the last are read.
        site: `mlp` steers the output of the feed-forward part, `residual` the layer's output.
        scale: `unit` adds unit vectors, `raw` the measured difference.
        apply_to: `all` positions, or the `new` ones only.
        lens_norm: apply the final norm to the late layers before the head.
    """

    paper: ClassVar[str] = "vista"
    changes: ClassVar[frozenset[str]] = frozenset({"how late layers vote on the next token"})
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("strength", (0.01, 0.03, 0.05, 0.1, 0.17, 0.3))

    strength: float = 0.17
    gamma: float = 0.3
    window: int = 5
    site: Literal["mlp", "residual"] = "mlp"
    scale: Literal["unit", "raw"] = "unit"
    apply_to: Literal["all", "new"] = "all"
    lens_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "strength", 0, 10)
        in_range(self, "gamma", 0, 1)
        in_range(self, "window", 1, 1000, whole=True)
        for name, allowed in (("site", ("mlp", "residual")), ("scale", ("unit", "raw")), ("apply_to", ("all", "new"))):
            if getattr(self, name) not in allowed:
                raise unknown(f"{name} of {self.paper}", str(getattr(self, name)), allowed)

    def claims(self) -> frozenset[str]:
        return self.changes if self.gamma > 0 else frozenset()

    @property
    def is_identity(self) -> bool:
        return self.strength == 0 and self.gamma == 0

    def identity(self) -> Self:
        return replace(self, strength=0.0, gamma=0.0)

    def window_of(self, depth: int) -> range:
        """The layers whose outputs the head reads (0-based): those before the last, as many as there are."""
        return range(max(0, depth - 1 - self.window), depth - 1)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.gamma > 0 and len(anatomy.layers) < 2:
            raise InputError("vista's logit augmentation needs a decoder of two layers or more; set gamma=0")

    def install(self, boundary: Boundary) -> None:
        if self.strength > 0:
            super().install(boundary)
        if self.gamma > 0:
            for layer in self.window_of(len(boundary.anatomy.layers)):
                boundary.after(boundary.anatomy.layers[layer], self._read(layer))

    def before_prompt(self, call: Call) -> None:
        if self.strength > 0:
            super().before_prompt(call)

    def steered_module(self, boundary: Boundary, layer: int) -> nn.Module:
        return super().steered_module(boundary, layer) if self.site == "mlp" else boundary.anatomy.layers[layer]

    def steers_prompt(self) -> bool:
        return self.apply_to == "all"

    def direction(self, full: Tensor, text: Tensor) -> Tensor:
        difference = full.float() - text.float()
        return F.normalize(difference, dim=-1) if self.scale == "unit" else difference

    def steer(self, hidden: Tensor, direction: Tensor) -> Tensor:
        if hidden.shape[:2] == (1, 1) and in_loops(hidden, direction):
            return tilted(hidden, direction, self.strength, self.scale == "unit")
        wide = hidden.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        if self.scale == "unit":
            # ||m|| times the tilted vector, ||m|| kappa being max(||m||, ||m|| - m.v): fewer steps a layer and token.
            kappa = torch.maximum(length, torch.baddbmm(length, wide, direction.mT, alpha=-1))
            moved = torch.addcmul(wide, kappa, direction, value=self.strength)
        else:
            moved = torch.add(wide, direction, alpha=self.strength)
        shrink = length / torch.linalg.vector_norm(moved, dim=-1, keepdim=True).clamp_min(1e-12)
        return (moved * shrink).to(hidden.dtype)

    def _read(self, layer: int) -> Callable[[Call, Tensor], None]:
        def read(call: Call, hidden: Tensor) -> None:
            call.memory.setdefault((self, "late layers"), {})[layer] = hidden[: call.rows, -1]

        return read

    @property
    def changes_logits(self) -> bool:
        return self.gamma > 0

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        anatomy = call.boundary.anatomy
        late = torch.stack(list(call.memory[self, "late layers"].values()))  # [window, B, D]
        if self.lens_norm:
            late = anatomy.final_norm(late)
        # The head is linear, so the mean may be taken first: its many weights are read for one row instead of several.
        augmented = anatomy.head_logits(late.mean(dim=0)).to(logits.dtype)
        if self.gamma == 1:
            return augmented.masked_fill(logits == -math.inf, -math.inf)  # what another method has ruled out stays out
        return torch.add(logits * (1 - self.gamma), augmented, alpha=self.gamma)
