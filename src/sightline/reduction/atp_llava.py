"""ATP-LLaVA: adaptive token pruning between decoder layers (Ye et al., CVPR 2025, arXiv:2412.00447).

In: the attention A of a decoder layer over the prompt, mean over heads, [K, K] for K columns, and the raster of each
picture. Out: two thresholds for this very prompt, and with them the visual tokens that later layers read. Each prompt
keeps a number of its own, which may shrink at each of the modules (in front of layers 4, 14 and 24 of 32).

    S_self_j  = mean over visual queries i that can see j of A_ij
    S_cross_j = mean over text queries i behind j of A_ij
    S_red     = (S_self + S_cross) / 2,     stretched to [0, 1] over the visual tokens that are left
    S_spa_j   = max over sampling rates R whose grid holds j of 1 - lambda_sample R;      0 off every grid
    theta_r, theta_s = sigmoid(two linear heads of z),      z = relu(linear(statistics of S_self and S_cross))

    answering:  j stays where S_red_j > theta_r or S_spa_j > theta_s, and only what stayed before can stay
    training:   m_j = max(sigmoid(T (S_red_j - theta_r)), sigmoid(T (S_spa_j - theta_s)))
                M_j = product of m_j over the modules so far
                nothing is dropped; later layers add log(M_j + eps) to the logits of visual key j, but for its own query
    loss:       lambda_atp sum_l l n_l / N + lambda_target |mean_l n_l - N_target| / N,     n_l = sum of M at module l

A grid has a stride of sqrt(1 / R) along rows and columns; the grids are nested, so a low theta_s admits a dense one and
a high theta_s only the coarsest. A picture whose tokens are no raster (tiles, newlines) has every (1 / R)-th token.

No official code was released. What the paper leaves open is settled so: S_red is stretched for each prompt, as a
threshold between 0 and 1 means nothing for weights of some thousandths; thresholds are read off statistics of the
scores (which do not depend on the number of tokens) rather than off the scores; several sampling rates at once are the
reading under which a threshold on S_spa selects a rate; both losses are counted in shares of N. Rotary phases stay
those of the original positions. In training S_self and the stretching look at the tokens with M > 1/2, those that would
be left.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.methods import in_range, register
from sightline.models.narrowing import Chosen, Columns, LayerInput
from sightline.reduction.layer_reducer import LayerReducer
from sightline.reduction.trained_reducer import TrainedReducer

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.attending import Attended, Attending
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call

PAPER_LAYERS, PAPER_DEPTH = (4, 14, 24), 32
EPSILON = 1e-6
STATISTICS = 6
WIDTH = 64
START = (-2.0, 0.0)
"""What the two heads give at first: theta_r near 0.12, where most tokens pass, and theta_s = 0.5."""


@register
@dataclass(frozen=True)
class ATPLlava(TrainedReducer, LayerReducer):
    """Drops visual tokens between decoder layers by thresholds that trained modules set for each prompt.

    Args:
        module_layers: the layers (counted from 0) that a module sits in front of; None for the paper's, 4, 14 and 24 of
            32, scaled to the depth. None at all, `()`, is the stock model.
        rates: the sampling rates R of the grids, each in (0, 1], densest first. The paper names 1/4.
        lambda_sample: how much lower a dense grid scores, in [0, 10]; 3 in the paper.
        T: temperature of the soft masks, in (0, 1000000], the larger the sharper. The paper's is not known; published
            reconstructions have 10 and 100. At 10 training sees other shares than answering does.
        lambda_atp: weight of the tokens that are left, deep layers more, in [0, 10]; 0.05 in the paper.
        lambda_target: weight of the distance from the target, in [0, 10]; 0.2 in the paper.
        target: share of the visual tokens to be left on average, in (0, 1]; the paper's 144 of 576 are 0.25. It acts in
            training alone.
        strictness: added to both thresholds before the sigmoid, in [-10, 10]. Not the paper's: it moves a trained
            module along its trade-off. 0 is as trained.
        weights: where the modules' weights are (see `TrainedReducer`).
    """

    paper: ClassVar[str] = "atp_llava"
    structure: ClassVar[tuple[str, ...]] = ("module_layers", "rates", "lambda_sample")
    main_strength: ClassVar[tuple[str, tuple[float, ...]]] = ("strictness", (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0))

    module_layers: tuple[int, ...] | None = None
    rates: tuple[float, ...] = (0.25, 0.0625, 0.015625)
    lambda_sample: float = 3.0
    T: float = 100.0
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    target: float = 0.25
    strictness: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("lambda_sample", 0, 10), ("lambda_atp", 0, 10), ("lambda_target", 0, 10)):
            in_range(self, name, low, high)
        in_range(self, "T", 0, 1e6, low_open=True)
        in_range(self, "target", 0, 1, low_open=True)
        in_range(self, "strictness", -10, 10)
        rates, places = self.rates, self.module_layers
        numbers = isinstance(rates, tuple) and all(isinstance(rate, (int, float)) for rate in rates)
        if not numbers or not all(0 < rate <= 1 for rate in rates) or list(rates) != sorted(rates, reverse=True):
            raise InputError(f"rates of {self.paper} must lie in (0, 1], the largest first, not {rates!r}")
        numbers = isinstance(places, tuple) and all(isinstance(place, int) for place in places)
        if places is not None and not (numbers and list(places) == sorted(set(places))):
            raise InputError(f"module_layers of {self.paper} must be different layers in order, not {places!r}")

    @property
    def one_question(self) -> bool:
        return True

    @property
    def is_identity(self) -> bool:
        return self.module_layers == ()

    def identity(self) -> Self:
        return replace(self, module_layers=())

    def layers(self, depth: int) -> Sequence[int]:
        if self.module_layers is not None:
            return self.module_layers
        scaled = {min(max(1, round(layer * depth / PAPER_DEPTH)), depth - 1) for layer in PAPER_LAYERS}
        return tuple(sorted(scaled))

    def build(self, anatomy: Anatomy) -> nn.Module:
        return nn.ModuleList(Thresholds() for _ in self.layers(len(anatomy.layers)))

    def install(self, boundary: Boundary) -> None:
        super().install(boundary)
        depth = len(boundary.anatomy.layers)
        modules = self.layers(depth)
        for layer in range(modules[0] - 1, depth):
            module = layer + 1 if layer + 1 in modules else None
            boundary.attend(boundary.anatomy.layers[layer], functools.partial(self._attend, module))

    def before_prompt(self, call: Call) -> None:
        anatomy = call.boundary.anatomy
        scores = [
            spatial_scores(grid or (last - first,), self.rates, self.lambda_sample)
            for grid, (first, last) in zip(
                anatomy.grids(call.inputs), (image for row in call.images for image in row), strict=True
            )
        ]
        features = call.encoded.features
        call.memory[self, "spatial"] = call.on_columns(
            torch.cat(scores).to(features.device) if scores else features.new_zeros(0, dtype=torch.float32)
        )
        call.memory[self, "left"] = {}

    # --- At a module ---

    def choose(self, call: Call, here: LayerInput) -> Chosen:
        anatomy = call.boundary.anatomy
        module: Any = self.module(anatomy)
        thresholds = module[list(self.layers(len(anatomy.layers))).index(here.layer)]
        columns = here.columns
        weights, seen = call.memory.pop((self, "attention"))
        call.memory[self, here.layer] = len(weights)
        spatial = call.memory[self, "spatial"]
        spatial = spatial.repeat(len(here.hidden) // len(spatial), 1).gather(1, columns.index)
        mask = self._mask(call)
        live = columns.visual if mask is None else columns.visual & (mask > 0.5)
        own, cross = scores_of(weights, seen, columns, live, here.hidden.shape[1] - call.new_queries + 1)
        redundancy = stretched((own + cross) / 2, live)
        logits = thresholds(statistics(own, live), statistics(cross, live)) + self.strictness
        theta_r, theta_s = logits.sigmoid()[..., None].unbind(dim=1)
        if not self._trains(call):
            return Chosen((redundancy > theta_r) | (spatial > theta_s))
        soft = torch.maximum(((redundancy - theta_r) * self.T).sigmoid(), ((spatial - theta_s) * self.T).sigmoid())
        mask = torch.where(columns.visual, soft if mask is None else soft * mask, 1.0)
        call.memory[self, "mask"] = mask
        call.memory[self, "left"][here.layer] = (mask * columns.visual)[: call.rows].sum(dim=1)
        return Chosen(torch.ones_like(columns.visual))

    def _attend(self, module: int | None, call: Call, attending: Attending) -> Attended:
        """The attention of a layer behind the first module, or right in front of one."""
        if not call.reading_prompt:
            return attending.stock()
        mask = self._mask(call)
        open_ones = attending
        if mask is not None:
            attending = replace(attending, mask=attending.masked(soft_bias(mask).to(attending.query.dtype)))
        rows, _, length, _ = attending.query.shape
        if module is not None and call.memory.get((self, module)) != rows:  # else it has chosen: see `narrow`
            nothing = attending.query.new_zeros(rows, 1, length, length)
            seen = open_ones.masked(nothing)[:, 0] == 0
            call.memory[self, "attention"] = (attending.weights().mean(dim=1), seen)
        return attending.stock()

    def _trains(self, call: Call) -> bool:
        return torch.is_grad_enabled() and self.module(call.boundary.anatomy).training

    def _mask(self, call: Call) -> Tensor | None:
        """The soft mask so far, [R, K], 1 for text; None in front of the first module, and outside training."""
        mask: Tensor | None = call.memory.get((self, "mask"))
        return mask

    def training_loss(self, call: Call) -> Tensor | None:
        left: dict[int, Tensor] = call.memory.get((self, "left"), {})
        given = call.shown[0].sum(dim=1)
        pictured = given > 0
        if not left or not bool(pictured.any()):
            return None
        shares = torch.stack([(tokens[pictured] / given[pictured]).mean() for tokens in left.values()])
        depths = shares.new_tensor(list(left))
        return self.lambda_atp * (shares * depths).sum() + self.lambda_target * (shares.mean() - self.target).abs()


class Thresholds(nn.Module):
    """Statistics of the two scores [R, 2 * STATISTICS] -> logits of theta_r and theta_s, [R, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * STATISTICS, WIDTH)
        self.heads = nn.Linear(WIDTH, 2)
        nn.init.normal_(self.heads.weight, std=0.02)
        with torch.no_grad():
            self.heads.bias.copy_(torch.tensor(START))

    def forward(self, own: Tensor, cross: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.inner(torch.cat([own, cross], dim=1)).relu())
        return logits


def scores_of(weights: Tensor, seen: Tensor, columns: Columns, live: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """S_self and S_cross, [R, K].

    Args:
        weights: float32 [R, K, K], the mean over heads.
        seen: bool [R, K, K], which query may see which key.
        columns: the K columns.
        live: bool [R, K], the visual tokens that are left.
        prompt: how many of the columns are the prompt's; what was generated behind it has no say.
    """
    places = torch.arange(weights.shape[1], device=weights.device)
    text = columns.real & ~columns.visual & (places < prompt)
    behind = places[:, None] > places
    return received(weights, seen, live), received(weights, seen & behind, text)


def received(weights: Tensor, seen: Tensor, queries: Tensor) -> Tensor:
    """[R, K]: the mean attention that each key gets from those `queries` (bool [R, K]) that see it; 0 if none does."""
    counted = seen & queries[:, :, None]
    return (weights * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def stretched(scores: Tensor, live: Tensor) -> Tensor:
    """[R, K], so that the live ones fill [0, 1]; 1 where they are all the same."""
    low = scores.masked_fill(~live, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~live, -torch.inf).amax(dim=1, keepdim=True)
    flat = ~(high > low)
    unit = (scores - low.masked_fill(flat, 0)) / (high - low).masked_fill(flat, 1)
    return unit.masked_fill(flat, 1)


def statistics(scores: Tensor, live: Tensor) -> Tensor:
    """float32 [R, STATISTICS] of the live scores of each row, whatever their number and scale: the logarithm of their
    sum, then spread, maximum and quartiles in units of the mean. Zeros for a row without any."""
    rows = []
    for row, alive in zip(scores.float(), live, strict=True):
        values = row[alive]
        if not len(values):
            rows.append(row.new_zeros(STATISTICS))
            continue
        mean = values.mean().clamp(min=1e-12)
        relative = values / mean
        quartiles = relative.quantile(values.new_tensor([0.25, 0.5, 0.75]))
        spread = (relative.var(correction=0) + 1e-6).sqrt()  # the root of 0 has no gradient
        rest = torch.stack([(mean * len(values)).log(), spread, relative.max().log1p()])
        rows.append(torch.cat([rest, quartiles]))
    return torch.stack(rows)


def spatial_scores(shape: tuple[int, ...], rates: Sequence[float], lambda_sample: float) -> Tensor:
    """S_spa of the tokens of a picture, float32 [n], read row by row.

    Args:
        shape: rows and columns of the raster; or the number of tokens alone, where they are none.
        rates: the sampling rates.
        lambda_sample: how much lower a dense grid scores.
    """
    scores = torch.zeros(shape)
    steps = [max(1, round((1 / rate) ** (1 / len(shape)))) for rate in rates]
    for rate, step in zip(rates, steps, strict=True):
        # All grids share the point from which they start, about the middle of the coarsest cell: so they are nested.
        on = [(torch.arange(side) - min(max(steps), side) // 2) % step == 0 for side in shape]
        grid = functools.reduce(lambda one, other: one[..., None] & other, on)
        scores = torch.where(grid, scores.clamp(min=1 - lambda_sample * rate), scores)
    return scores.flatten()


def soft_bias(mask: Tensor) -> Tensor:
    """What is added to the attention logits, [R, 1, K, K]: log(M + eps) of the key, and 0 for a token's own query."""
    own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (mask + EPSILON).log()[:, None, None, :].masked_fill(own, 0)
