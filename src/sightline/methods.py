"""What a method is, and how methods attach to a stock model and leave it again.

A `Method` is a frozen dataclass of its paper's hyper-parameters. `attach(model, *methods)` puts methods on one model
*instance*: through PyTorch hooks and one wrapped bound method (`get_image_features`, where `generate` encodes
pictures), never by touching a class. Detaching, in whatever way the context ends, takes all of it away. Inside the
context everything is plain `transformers`: `model.generate(**inputs)`, `model(**inputs)`.

What happens at the boundary of the language model is in `sightline.models.boundary`; the kinds of methods
(`TokenReducer`, `AttentionSteering`, `HiddenSteering`, `ContrastiveDecoding`) are the base classes in the folders of
their papers. A `Strategy` (`sightline.models.conversation`) is found and parsed like them, but does not attach: it asks
a model several times.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar, get_args, get_type_hints

from sightline.errors import InputError, unknown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sightline.models.anatomy import Anatomy, TowerReading
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call, Encoded, Reduced, Stream
    from sightline.models.rows import AttentionMask, View

STRETCHES_WITH_METHODS = ("reduction", "grounding", "reasoning")


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen record of hyper-parameters that knows how to act at the boundary.

    A paper's class sets `paper` (its slug), overrides what it needs of the rest, and validates its fields in
    `__post_init__` with the helpers `InputError` and `in_range`.
    """

    paper: ClassVar[str] = ""
    """Slug of the paper; the method's name on the command line."""
    attaches: ClassVar[bool] = True
    """Whether it acts on a model, and not by asking one several times (a `Strategy`)."""
    needs_cls: ClassVar[bool] = False
    """Whether it reads the attention of the vision tower's [CLS] token."""
    needs_picture: ClassVar[bool] = False
    """Whether a batch in which no prompt has a picture is refused. (Of a batch that mixes, the rows without a picture
    are answered as by the stock model.)"""
    main_strength: ClassVar[tuple[str, tuple[float, ...]]]
    """The field that says how strongly the method acts, and the values of it that a sweep tries."""
    changes: ClassVar[frozenset[str]] = frozenset()
    """What only one method at a time may change; two methods that share an entry do not compose."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise InputError(f"{field.name} of {self.paper} must be true or false, not {value!r}")

    def claims(self) -> frozenset[str]:
        """Of `changes`, those that hold at these settings."""
        return self.changes

    @property
    def is_identity(self) -> bool:
        """Whether these settings leave the model as it is; such a method is not installed at all."""
        return False

    @abstractmethod
    def identity(self) -> Self:
        """A copy at its identity setting."""

    def check(self, anatomy: Anatomy) -> None:
        """Raises `InputError` when the method cannot work on this model."""
        if self.needs_cls and anatomy.cls is None:
            raise InputError(
                f"{self.paper} needs a vision tower with a [CLS] token, which {anatomy.family} lacks; it works on "
                "models with a CLIP tower (llava, llava_next) or an InternVL tower"
            )

    def readings(self, anatomy: Anatomy) -> dict[str, TowerReading]:
        """What is read off the vision tower into `Encoded.readings`; a name stands for the same in all methods."""
        return {"cls": anatomy.cls} if self.needs_cls and anatomy.cls is not None else {}

    def install(self, boundary: Boundary) -> None:  # noqa: B027  (most need none)
        """Registers the hooks that the method needs inside the decoder (`boundary.before`, `boundary.after`)."""

    def reduced(self, call: Call, encoded: Encoded) -> Reduced | None:
        """Which visual tokens of an encoded batch reach the decoder, and as what; None: all as they are."""
        return None

    def streams(self, call: Call) -> Sequence[Stream]:
        """Extra rows for the forward that is about to read the prompt."""
        return ()

    @property
    def rewrites(self) -> bool:
        """Whether `rewrite` is asked at these settings."""
        return type(self).rewrite is not Method.rewrite

    def rewrite(self, call: Call, view: View, mask: AttentionMask) -> tuple[View, AttentionMask]:
        """The last word on a view of the prompt, the main one first: other positions (they may be fractions), more
        columns. All views get the mask that the main one was given, and as many columns."""
        return view, mask

    def after_prompt(self, call: Call, cache: Any) -> None:  # noqa: B027  (most need none)
        """Called with the cache that a rewritten prompt has filled; see `Call.cut_cache`."""

    def before_prompt(self, call: Call) -> None:  # noqa: B027  (most need none)
        """Called once the prompt's rows are fixed, before the decoder reads them."""

    @property
    def changes_logits(self) -> bool:
        """Whether `logits` is asked at these settings."""
        return type(self).logits is not Method.logits

    def logits(self, call: Call, logits: Tensor) -> Tensor:
        """The next-token logits [B, vocabulary], changed."""
        return logits


class OfPaper(Protocol):
    """A record of a paper's hyper-parameters: a `Method`, or an attack."""

    paper: ClassVar[str]


def in_range(
    method: OfPaper, name: str, low: float, high: float, *, low_open: bool = False, whole: bool = False
) -> None:
    """Raises `InputError` unless field `name` of the method is a number (`whole`: a whole one) between the bounds,
    `low` itself left out if `low_open`."""
    value: Any = getattr(method, name)
    is_number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not is_number:
        raise InputError(f"{name} of {method.paper} must be a {'whole ' if whole else ''}number, not {value!r}")
    if not (low < value if low_open else low <= value) or not value <= high:
        least, most = (f"{bound:.0f}" if float(bound).is_integer() else f"{bound:g}" for bound in (low, high))
        bounds = f"{'(' if low_open else '['}{least}, {most}]"
        raise InputError(f"{name} of {method.paper} must lie in {bounds}, not {value!r}")


_REGISTERED: dict[str, type[Method]] = {}
_MethodClass = TypeVar("_MethodClass", bound=type[Method])


def register(method: _MethodClass) -> _MethodClass:
    """Class decorator that makes a method known by the slug of its paper."""
    _REGISTERED[method.paper] = method
    return method


def methods() -> dict[str, type[Method]]:
    """All methods by name: every module of the folders that hold methods is imported, and registers its own."""
    for stretch in STRETCHES_WITH_METHODS:
        package = importlib.import_module(f"sightline.{stretch}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"sightline.{stretch}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def parse_methods(text: str) -> tuple[Method, ...]:
    """Methods from their short form: `"none"`, `"vhr"`, `"fastervlm:keep=0.25+vista:strength=0.1,gamma=0.2"`.

    Raises:
        InputError: for an unknown method or parameter (with the nearest name), or a value of the wrong type or range.
    """
    if text.strip() == "none":
        return ()
    return tuple(_parse_one(part.strip()) for part in text.split("+"))


def _parse_one(text: str) -> Method:
    name, _, arguments = text.partition(":")
    known = methods()
    if name not in known:
        raise unknown("method", name, ["none", *known])
    method = known[name]
    kinds = get_type_hints(method)
    names = [field.name for field in dataclasses.fields(method)]
    values: dict[str, Any] = {}
    for argument in filter(None, arguments.split(",")):
        key, equals, value = argument.partition("=")
        if key not in names:
            raise unknown(f"parameter of {name}", key, names)
        if not equals:
            raise InputError(f"parameter {key} of {name} needs a value: {name}:{key}=...")
        values[key] = _parse_value(name, key, value, kinds[key])
    return method(**values)


def _parse_value(name: str, key: str, value: str, kind: Any) -> Any:
    if value.lower() == "none" and type(None) in get_args(kind):
        return None
    kind = next((one for one in (int, float) if kind == one | None), kind)
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if kind in (int, float):
            return kind(value)
        if "tuple" in str(kind):  # layers=1;18;19 (a comma would start the next parameter)
            part_kind = next((one for one in (str, float) if one.__name__ in str(kind)), int)
            return tuple(part_kind(part) for part in value.split(";") if part)
    except (KeyError, ValueError):
        what = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "numbers with ; between")
        raise InputError(f"parameter {key} of {name} must be {what}, not {value!r}") from None
    return value


def describe(chosen: Sequence[Method]) -> str:
    """The short form of methods, with the parameters that differ from their defaults; `parse_methods` reads it back."""
    return "+".join(_describe_one(method) for method in chosen) or "none"


def _describe_one(method: Method) -> str:
    changed = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if value != field.default:
            text = ";".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
            changed.append(f"{field.name}={text.lower() if isinstance(value, bool) else text}")
    return method.paper + (":" + ",".join(changed) if changed else "")


class Attachment:
    """Methods on a model, until `detach()` or the end of the `with` block. Made by `attach`."""

    def __init__(self, model: PreTrainedModel, chosen: tuple[Method, ...], processor: Any) -> None:
        self.model, self.methods, self.processor = model, chosen, processor
        self._boundary: Boundary | None = None
        self._final_call: Call | None = None

    @property
    def kept(self) -> list[list[Tensor]] | None:
        """After a forward or a `generate`: for each row, for each of its images, the indices of the visual tokens that
        reached the decoder, in the order of the prompt; None when every token did."""
        call = self.call
        return call.kept if call is not None else None

    @property
    def columns(self) -> Tensor | None:
        """After a forward: int [B, T], for each column of the prompt that the decoder read, which of the given ones it
        was (-1: a method put it in), so that labels follow; None when no prompt with a picture was read."""
        call = self.call
        return call.columns if call is not None else None

    @property
    def visual_tokens(self) -> list[int]:
        """For each row, the visual tokens that reached the decoder."""
        call = self.call
        return call.visual_tokens if call is not None else []

    @property
    def visual_tokens_given(self) -> list[int]:
        """For each row, the visual tokens of its prompt."""
        call = self.call
        return call.visual.sum(dim=1).tolist() if call is not None else []

    @property
    def call(self) -> Call | None:
        """After a forward or a `generate`: what is known of its prompt; None when no prompt with a picture was read."""
        stack = _ATTACHED.get(self.model, [])
        boundary = stack[-1]._boundary if self in stack else None
        return self._final_call if boundary is None or boundary.last_call is None else boundary.last_call

    def answers_from(self, column: int) -> None:
        """Says, for training, that in the rows given from here on answers begin at this column: what methods do then
        depends on the prompt before it alone, as when an answer is generated."""
        boundary = _ATTACHED[self.model][-1]._boundary
        assert boundary is not None
        boundary.prompt_length = column

    def detach(self) -> None:
        """Takes the methods off the model; does nothing when they are off already."""
        stack = _ATTACHED.get(self.model, [])
        if self in stack:
            _rebuild(self.model, [other for other in stack if other is not self])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


_ATTACHED: weakref.WeakKeyDictionary[Any, list[Attachment]] = weakref.WeakKeyDictionary()


def attach(model: PreTrainedModel, *chosen: Method, processor: Any = None) -> Attachment:
    """Puts methods on a model; use it as a context.

        with sl.attach(model, sl.FasterVLM(keep=0.25), sl.Vista()):
            output = model.generate(**inputs)

    Contexts nest: the methods of the outer one stay on, as if all had been given together, outer ones first.

    Args:
        model: a model of a supported family (see `Anatomy`).
        chosen: the methods, in the order in which they act.
        processor: the model's processor, whose pixel mean and deviation replace the family's usual ones.

    Raises:
        InputError: for a model of an unknown family, a method that cannot work on it, or methods that do not compose.
    """
    stack = list(_ATTACHED.get(model, []))
    attachment = Attachment(model, chosen, processor)
    _rebuild(model, [*stack, attachment])
    return attachment


def _rebuild(model: PreTrainedModel, stack: list[Attachment]) -> None:
    """Makes the model carry exactly the methods of `stack`; if they do not fit, it is left as it was."""
    from sightline.models.anatomy import Anatomy
    from sightline.models.boundary import Boundary

    wanted = [method for attachment in stack for method in attachment.methods]
    check_composition(wanted)
    active = [method for method in wanted if not method.is_identity]
    boundary = None
    if wanted:
        processor = next((a.processor for a in reversed(stack) if a.processor is not None), None)
        anatomy = Anatomy.of(model, processor)
        for method in wanted:
            method.check(anatomy)
        boundary = Boundary(anatomy, active)
    before = _ATTACHED.get(model, [])
    for attachment in before:
        attachment._final_call = attachment.call
    previous = before[-1]._boundary if before else None
    if previous is not None:
        previous.remove()
    try:
        if boundary is not None:
            boundary.install()
    except BaseException:
        assert boundary is not None
        boundary.remove()
        if previous is not None:
            previous.install()
        raise
    if before:
        before[-1]._boundary = None
    if stack:
        _ATTACHED[model] = stack
        stack[-1]._boundary = boundary
    else:
        _ATTACHED.pop(model, None)


def check_composition(chosen: Sequence[Method]) -> None:
    """Raises `InputError` when two of the methods cannot be on a model together, and says why."""
    for position, second in enumerate(chosen):
        for first in chosen[:position]:
            if type(first) is type(second):
                raise InputError(f"{first.paper} is given twice; give it once, with the settings you want")
            shared = first.claims() & second.claims()
            if shared:
                raise InputError(
                    f"{first.paper} and {second.paper} do not compose: both change {' and '.join(sorted(shared))}"
                )
