"""The kinds of methods that steer the decoder's attention: the outputs of its heads, or the logits of visual keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError, unknown
from sightline.grounding.contrastive_decoding import ContrastiveDecoding, contrasted
from sightline.grounding.one_token_loops import boosted
from sightline.machine_code import in_loops
from sightline.methods import Method, in_range
from sightline.models.call import NO_PICTURE, Stream

if TYPE_CHECKING:
    from sightline.models.anatomy import Anatomy
    from sightline.models.attending import Attended, Attending
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call


@dataclass(frozen=True)
class AttentionSteering(Method):
    """Multiplies each head's output, before the output projection, by a factor chosen while the prompt is read; the
    paper's file writes `layers_of` and `head_factors`.

    The prompt is read twice in one forward, with the picture and without it, layer by layer: what a head gives in both
    is what its factor is chosen by, and both are scaled before the layer goes on. From then on the factors are fixed
    for the row, and a step costs one multiplication.
    """

    needs_picture: ClassVar[bool] = True
    changes: ClassVar[frozenset[str]] = frozenset({"the attention heads' outputs"})

    @abstractmethod
    def layers_of(self, depth: int) -> Sequence[int]:
        """The layers that are steered, of a decoder of `depth` layers (0-based)."""

    @abstractmethod
    def head_factors(self, full: Tensor, text: Tensor) -> Tensor:
        """Factors for one layer.

        Args:
            full: head outputs at the prompt's last position, [B, heads, head_dim].
            text: the same without the picture.

        Returns:
            [B, heads].
        """

    def stream(self) -> Stream:
        """The rows without a picture, which are steered too and so are no other method's."""
        return Stream((self, "no picture"), without_picture=True, transient=True)

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        check_layers(self, self.layers_of(len(anatomy.layers)), anatomy)

    def install(self, boundary: Boundary) -> None:
        for index in self.layers_of(len(boundary.anatomy.layers)):
            projection = boundary.anatomy.attention_heads_input(boundary.anatomy.layers[index])
            boundary.before(projection, self._scale(index, boundary.anatomy.num_heads))

    def streams(self, call: Call) -> Sequence[Stream]:
        return () if self in call.memory else (self.stream(),)

    def _scale(self, layer: int, num_heads: int) -> Callable[[Call, Tensor], Tensor]:
        def scale(call: Call, x: Tensor) -> Tensor:
            factors: dict[int, Tensor] = call.memory.setdefault(self, {})
            if layer not in factors:
                factors[layer] = self._factors(call, x[:, -1].unflatten(-1, (num_heads, -1))).to(x.dtype)
            if len(x) == call.rows:
                return x * factors[layer]
            scaled = x.clone()
            scaled[: call.rows] *= factors[layer]
            rows = call.stream_rows(self.stream().name)
            if rows is not None:
                scaled[rows] *= factors[layer]
            return scaled

        return scale

    def _factors(self, call: Call, heads: Tensor) -> Tensor:
        """[B, 1, heads * head_dim], from the outputs [R, heads, head_dim] at the prompt's last position."""
        rows = call.stream_rows(self.stream().name)
        assert rows is not None
        factors = self.head_factors(heads[: call.rows], heads[rows])
        # Without a picture both outputs are the same but for rounding, which must not choose heads.
        if call.bare is not None:
            factors = factors.masked_fill(call.bare[:, None], 1.0)
        return factors.repeat_interleave(heads.shape[-1], dim=-1)[:, None]


@dataclass(frozen=True)
class LogitBoost(Method):
    """Raises the attention logits of visual keys at the position whose next token is asked for, z := z + f |z|; the
    paper's file writes `layers_of` and `boosts`.

    Only the last query's row changes, so what the cache holds of earlier positions stays the stock model's. All heads
    are boosted alike unless `head_weights` says otherwise. Rows of other branches are left alone, and a key that is
    hidden stays hidden.
    """

    needs_picture: ClassVar[bool] = True
    changes: ClassVar[frozenset[str]] = frozenset({"the attention logits"})

    @abstractmethod
    def layers_of(self, depth: int) -> Sequence[int]:
        """The layers that are steered, of a decoder of `depth` layers (0-based)."""

    @abstractmethod
    def boosts(self, call: Call) -> Tensor:
        """The factor f of each visual token of the encoded batch, float32 [N]."""

    def weighs_heads(self) -> bool:
        """Whether `head_weights` is asked."""
        return False

    def head_weights(self, attention: Tensor) -> Tensor:
        """What f is multiplied by in each head of a layer, [B, heads].

        Args:
            attention: the attention that each head pays to all visual tokens together at the prompt's last position,
                with this layer's logits as they are, float32 [B, heads].
        """
        return torch.ones_like(attention)

    def boosts_prompt(self) -> bool:
        """Whether the prompt's own last position is boosted, or only those of generated tokens."""
        return True

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        check_layers(self, self.layers_of(len(anatomy.layers)), anatomy)

    def install(self, boundary: Boundary) -> None:
        for index in self.layers_of(len(boundary.anatomy.layers)):
            boundary.attend(boundary.anatomy.layers[index], self._boost(index))

    def before_prompt(self, call: Call) -> None:
        heads: dict[int, Tensor] = call.memory.setdefault((self, "head weights"), {})
        call.memory[self, "boost"] = _Boost(call.on_columns(self.boosts(call)), heads)

    def _boost(self, layer: int) -> Callable[[Call, Attending], Attended]:
        def change(call: Call, attending: Attending) -> Attended:
            boost: _Boost = call.memory[self, "boost"]
            queries = call.new_queries
            if call.reading_prompt:
                if self.weighs_heads() and layer not in boost.heads:
                    boost.heads[layer] = self._weigh(call, attending)
                if not self.boosts_prompt():
                    queries -= 1
                    if queries == 0:
                        return attending.stock()
            if queries == 1 and not boost.heads and _one_token(attending):
                query, key, value = attending.query, attending.key, attending.value
                factors = boost.factors(call.key_columns(key.shape[2], 1), query)
                return boosted(query, key, value, factors, attending.scaling), None
            logits = attending.unmasked(queries)
            factors = boost.factors(call.key_columns(logits.shape[-1], attending.query.shape[2]), logits)
            size = logits.abs()
            if layer in boost.heads:
                size *= _more_rows(boost.heads[layer], len(logits))
            return attending.with_last(attending.masked(logits.addcmul(size, factors)))

        return change

    def _weigh(self, call: Call, attending: Attending) -> Tensor:
        """`head_weights` of a layer, [B, heads, 1, 1], from the prompt's last position."""
        assert call.prompt is not None
        logits = attending.logits(call.new_queries)[: call.rows, :, 0]
        attention = logits.softmax(dim=-1, dtype=torch.float32)
        weights = self.head_weights((attention * call.prompt[0].visual[:, None]).sum(dim=-1))
        return weights.to(logits.dtype)[..., None, None]


def _one_token(attending: Attending) -> bool:
    """Whether compiled loops may compute it: one query of one row, that sees all keys, and few enough of these for one
    thread."""
    rows, _, queries, _ = attending.query.shape
    return (
        rows == queries == 1
        and attending.mask is None
        and not attending.shows_weights
        and attending.options.get("softcap") is None
        and attending.key.numel() <= LARGEST_CACHE
        and attending.value.shape == attending.key.shape
        and in_loops(attending.query, attending.key, attending.value)
    )


class _Boost:
    """The factors of one prompt, laid out for the keys of the step that is computed: layers of a step share them."""

    def __init__(self, columns: Tensor, heads: dict[int, Tensor]) -> None:
        self.heads = heads
        """What the factors are multiplied by in the heads of each layer, [B, heads, 1, 1]; none: one."""
        self._all = columns[:, None, None]  # [B or R, 1, 1, columns and some room]
        self._shown: tuple[int, int, int] | None = None
        self._now = columns

    def factors(self, columns: slice, like: Tensor) -> Tensor:
        """[R, 1, 1, k] for the keys at `columns`, in the dtype and for the rows of `like` [R, ...]: 0 for generated
        keys and in the rows of branches."""
        wanted = (len(like), columns.start, columns.stop)
        if wanted != self._shown:
            rows, length = len(self._all), self._all.shape[-1]
            if rows < len(like) or length < columns.stop or self._all.dtype != like.dtype:
                self._all = F.pad(self._all, (0, max(0, columns.stop + ROOM - length))).to(like.dtype)
                self._all = _more_rows(self._all, max(rows, len(like)))
            self._now, self._shown = self._all[: len(like), ..., columns], wanted
        return self._now


LARGEST_CACHE = 1 << 17
"""Numbers in the keys of a layer beyond which several threads are faster than one loop."""

ROOM = 64
"""Generated keys for which there is room before the factors are laid out anew."""


def _more_rows(values: Tensor, rows: int) -> Tensor:
    """[B, ...] -> [rows, ...], with zeros below."""
    return (
        values if len(values) == rows else torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])
    )


@dataclass(frozen=True)
class GuidedBoost(LogitBoost, ContrastiveDecoding):
    """A boost of visual keys with guidance away from the answer without the picture; the paper's file writes `boosts`.

    With c the log-probabilities of the boosted model and u those without the picture (unboosted),

        out = gamma c + (1 - gamma) u  where  c >= log(0.1) + max c,   -inf elsewhere.

    c and u are logits but for a constant of the row, so this is own + (gamma - 1) (own - branch) on logits, and what is
    added is added to what other methods have made of the logits.

    Args:
        alpha: strength of the boost, in [0, 10]; from 1 on, negative logits change their sign.
        layers: the layers to steer (0-based); None for the published ones: from the third of 32 on, other depths
            leaving out the same share.
        gamma: strength of the guidance, in [1, 10]; 1 is none, and all tokens stay possible.
        boost_prefill: whether the answer's first token is boosted too. `auto`: as released, when there is no guidance
            (there, a flag that spares the guiding branch is still set while the prompt is read).
    """

    alpha: float = 0.5
    layers: tuple[int, ...] | None = None
    gamma: float = 1.1
    boost_prefill: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range(self, "alpha", 0, 10)
        in_range(self, "gamma", 1, 10)
        if self.boost_prefill not in ("auto", "always", "never"):
            raise unknown(f"boost_prefill of {self.paper}", str(self.boost_prefill), ("auto", "always", "never"))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # a list cannot be hashed
            for layer in self.layers:
                if not isinstance(layer, Integral) or isinstance(layer, bool):
                    raise InputError(f"layers of {self.paper} must be whole numbers, not {layer!r}")

    @property
    def boosted(self) -> bool:
        """Whether any logit is raised."""
        return self.alpha > 0 and self.layers != ()

    def claims(self) -> frozenset[str]:
        return self.changes if self.boosted else frozenset()

    @property
    def is_identity(self) -> bool:
        return not self.boosted and self.gamma == 1

    def layers_of(self, depth: int) -> Sequence[int]:
        return range(round(depth * 2 / 32), depth) if self.layers is None else sorted(set(self.layers))

    def boosts_prompt(self) -> bool:
        return self.boost_prefill == "always" or (self.boost_prefill == "auto" and self.gamma == 1)

    def install(self, boundary: Boundary) -> None:
        if self.boosted:
            super().install(boundary)

    def before_prompt(self, call: Call) -> None:
        if self.boosted:
            super().before_prompt(call)

    def branches(self, call: Call) -> Sequence[Stream]:
        return () if self.gamma == 1 else (NO_PICTURE,)

    @property
    def changes_logits(self) -> bool:
        return self.gamma > 1

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return contrasted(logits, own, branches[0], self.gamma - 1, PLAUSIBLE)


PLAUSIBLE = 0.1
"""Share of the likeliest token's probability that a token needs under guidance."""


def check_layers(method: Method, layers: Sequence[int], anatomy: Anatomy) -> None:
    """Raises `InputError` when the decoder lacks a layer."""
    depth = len(anatomy.layers)
    for layer in layers:
        if not 0 <= layer < depth:
            raise InputError(
                f"{method.paper} is asked to steer layer {layer}, but the decoder has layers 0 to {depth - 1}"
            )


def last_layers(depth: int, share: float) -> range:
    """The last `share` of `depth` layers, at least one."""
    return range(depth - max(1, round(share * depth)), depth)


def median(values: Tensor) -> Tensor:
    """The lower median over the last dimension, kept as a dimension of size one."""
    return torch.median(values, dim=-1, keepdim=True).values
