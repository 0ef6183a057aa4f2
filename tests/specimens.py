"""What the tests of attached methods share: the catalogue's methods at settings that do something, models that are made
once, and methods that exist only to be tested.

A method that joins the catalogue joins these tests with its default settings; where those do not suit a model of three
layers, four heads and sixteen visual tokens, `SETTINGS` has others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import families as tiny
import torch
from families import FAMILIES
from torch import Tensor, nn

from sightline.grounding.attention_steering import AttentionSteering
from sightline.grounding.contrastive_decoding import PictureView
from sightline.grounding.hidden_steering import HiddenSteering
from sightline.methods import Method, methods
from sightline.models.anatomy import Anatomy
from sightline.models.narrowing import slides
from sightline.reduction.layer_reducer import LayerReducer
from sightline.reduction.token_reducer import ImageTokens, TokenReducer

SETTINGS: dict[str, dict[str, Any]] = {
    "atp_llava": {"weights": "untrained", "strictness": 1.5},
    "b_vllm": {"selected": 4, "queries": 4, "width": 16, "heads": 2, "weights": "untrained"},
    "damro": {"k": 4},
    "fastervlm": {"keep": 0.4},
    "imbalanced_attention": {"spatial_ratio": 0.1, "head_modulation": "proportional", "boost_prefill": "always"},
    "inference_optimal": {"stride": 2, "weights": "untrained"},
    "lacing": {"cfg_scale": 2.0, "soft_image": "untrained"},
    "mqt": {"tokens": 5, "max_tokens": 16, "weights": "untrained"},
    "pai": {"boost_prefill": "always"},
    "red_villm": {"parts": "temporal", "weights": "untrained"},
    "simvlg": {"layers": 3},
    "storm": {"temporal_pool": 2, "spatial_pool": 2, "weights": "untrained"},
    "tome": {"keep": 0.4},
    "videollm_mod": {"weights": "untrained"},
    "visionzip": {"contextual": 0.5},
    "voco_llama": {"tokens": 2, "weights": "untrained"},
}
NAMES: tuple[str, ...] = tuple(name for name, kind in methods().items() if kind.attaches)
"""The methods that attach to a model. (Strategies, which ask it several times, have tests of their own.)"""
ORDERED_PAIRS = [(first, second) for first in NAMES for second in NAMES if first != second]
NEW_TOKENS = 4


def specimen(name: str) -> Method:
    """The method of the catalogue, at settings that change the answer."""
    return methods()[name](**SETTINGS.get(name, {}))


@functools.cache
def model_of(family: str) -> Any:
    """The family's tiny model, the same object for all tests: leave it as it was."""
    return tiny.tiny_model(family)


@functools.cache
def anatomy_of(family: str) -> Anatomy:
    return Anatomy.of(model_of(family))


@functools.cache
def refusal(name: str, family: str) -> str | None:
    """What the error says when the method cannot work on the family; None where it works."""
    return refusal_on(name, anatomy_of(family))


def refusal_on(name: str, anatomy: Anatomy) -> str | None:
    """The same, of any model."""
    if methods()[name].needs_cls and anatomy.cls is None:
        return r"needs a vision tower with a \[CLS\] token"
    if name in ("mqt", "inference_optimal", "storm", "red_villm", "b_vllm") and not anatomy.plain_connector:
        return "takes the place of a connector that maps each patch"
    if name == "voco_llama" and slides(anatomy):
        return "with sliding layers: their windows count what is in the cache"
    if issubclass(methods()[name], LayerReducer):
        if slides(anatomy):
            return "the windows of its sliding layers count what is in the cache"
        if name == "atp_llava" and anatomy.family == "qwen3_vl":
            return "must act at a layer from 2 on"
    if name in ("fopru", "visionzip") and anatomy.connected_layer is None:
        return "it is not known which of them make which visual token"
    if name == "tome" and not anatomy.patches_are_tokens:
        return "each of whose patches is a visual token of its own"
    return "visual tokens are no raster" if name == "agla" and not anatomy.rasters else None


WORKING = [(name, family) for name in NAMES for family in FAMILIES if refusal(name, family) is None]
REFUSED = [(name, family) for name in NAMES for family in FAMILIES if refusal(name, family) is not None]


def composing(names: Sequence[str]) -> list[Method]:
    """Many of the catalogue's methods that can be on a model together, in the order of their names; those that exclude
    fewest others are taken first. (Of the reducers there is one.)"""
    claims = {name: specimen(name).claims() for name in names}
    excluded = {name: sum(bool(claims[name] & claims[other]) for other in names) for name in names}
    chosen: list[str] = []
    for name in sorted(names, key=lambda name: (excluded[name], name)):
        if not any(claims[name] & claims[other] for other in chosen):
            chosen.append(name)
    assert len(chosen) > len(names) / 4
    return [specimen(name) for name in sorted(chosen)]


def has_picture(batch: dict[str, Any]) -> bool:
    """Whether any prompt of the batch shows a picture."""
    return batch.get("pixel_values") is not None


def generate(model: Any, batch: dict[str, Any], new: int = NEW_TOKENS, **options: Any) -> Any:
    """`model.generate`, greedy unless told otherwise, with everything that it can return."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(**batch, max_new_tokens=new, **options)


def tokens(model: Any, batch: dict[str, Any], new: int = NEW_TOKENS, **options: Any) -> list[list[int]]:
    """The new tokens of each row."""
    out = generate(model, batch, new, output_logits=False, **options)
    return out.sequences[:, batch["input_ids"].shape[1] :].tolist()


def logits(out: Any) -> Tensor:
    """[rows, steps, vocabulary] of what `generate` returned, ruled-out tokens at -99."""
    return torch.stack(out.logits, dim=1).clamp(min=-99.0)


def forward_logits(model: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """Next-token logits [rows, vocabulary] of a plain forward, ruled-out tokens at -99."""
    with torch.no_grad():
        return model(**batch, **options).logits[:, -1].clamp(min=-99.0)


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that could be left behind: attributes, hooks and their order, what bound methods are found."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = (
            type(module),
            sorted(vars(module)),
            *(list(hooks.values()) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")),
            module.forward,
            getattr(module, "get_image_features", None),
        )
    return found


@contextmanager
def row_counts(model: Any) -> Iterator[list[int]]:
    """How many rows the language model is given at each step."""
    counts: list[int] = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        yield counts
    finally:
        hook.remove()


# --- Methods that exist only here ---


@dataclass(frozen=True)
class EveryOther(TokenReducer):
    """Drops every second visual token, whatever it shows; works with any tower."""

    paper: ClassVar[str] = "every_other"
    keep: float = 0.5

    def scores(self, image: ImageTokens) -> Tensor:
        places = torch.arange(len(image.features), device=image.features.device)
        return (places % 2).float() + places / 1000  # the odd ones, and the last of the even ones


@dataclass(frozen=True)
class Nothing(Method):
    """Puts all of the engine's hooks on and changes nothing."""

    paper: ClassVar[str] = "nothing"

    def identity(self) -> Self:
        return self


@dataclass(frozen=True)
class Mirror(PictureView):
    """Answers by the mirrored picture alone: the main rows are read and not listened to."""

    paper: ClassVar[str] = "mirror"

    def identity(self) -> Self:
        return self

    def view(self, pictures: list[Tensor], generator: torch.Generator) -> list[Tensor]:
        return [picture.flip(-1) for picture in pictures]

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return branches[0]


@dataclass(frozen=True)
class Watching(HiddenSteering):
    """Notes what the layers gave with the picture and without it; steers nothing."""

    paper: ClassVar[str] = "watching"
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, hash=False, compare=False)

    def identity(self) -> Self:
        return self

    def direction(self, full: Tensor, text: Tensor) -> Tensor:
        self.seen.append((full.clone(), text.clone()))
        return full - text

    def steer(self, hidden: Tensor, direction: Tensor) -> Tensor:
        return hidden


@dataclass(frozen=True)
class Listening(AttentionSteering):
    """Notes what the heads gave with the picture and without it; scales nothing."""

    paper: ClassVar[str] = "listening"
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, hash=False, compare=False)

    def identity(self) -> Self:
        return self

    def layers_of(self, depth: int) -> range:
        return range(depth)

    def head_factors(self, full: Tensor, text: Tensor) -> Tensor:
        self.seen.append((full.clone(), text.clone()))
        return torch.ones(full.shape[:2])
