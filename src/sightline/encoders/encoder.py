"""What an encoder is, and how one is made by name: pictures in, features out, the same shape of answer for all papers.

    encoder = sl.create_encoder("vig_tiny", image_size=1024)
    features = encoder(pixels)              # [B, 3, 1024, 1024]
    features.tokens                         # [B, 4096, 192]

An encoder's file registers a class with the published configurations under their published names; `create_encoder` and
`list_encoders` find them. Shapes: B pictures, C channels, H x W pixels, N = product of `grid` patch tokens of width D.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import math
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sightline.encoders.layers import to_map
from sightline.errors import InputError, unknown

Inputs = Literal["pictures", "clips", "volumes", "frame features"]

LARGEST_SIDE = 16_384
"""Pixels of a side beyond which a picture is refused: a typing error rather than a picture."""


@dataclass
class Features:
    """What every encoder gives."""

    tokens: Tensor
    """[B, N, D]: the patch tokens in raster order, after the final norm; class and other extra tokens are left out."""
    grid: tuple[int, ...]
    """(rows, columns), or (frames, rows, columns) or (depth, rows, columns): N is their product."""
    pooled: Tensor | None = None
    """[B, F]: the class or pooled feature that a classifier reads."""
    maps: tuple[Tensor, ...] = ()
    """[B, C_i, H_i, W_i], finest first: one a stage, or the tokens as one map."""
    hidden_states: tuple[Tensor, ...] = ()
    """Where asked for: the tokens that enter the first block and those that leave each block, [B, N_i, D_i]."""


class Encoder(nn.Module, ABC):
    """Base of all encoders; a paper's file writes `__init__`, `encode` and the class attributes.

    Args:
        image_size: side of the square input, or (height, width), for which tables such as position embeddings are
            made; other sizes that the architecture allows are taken too, and the tables resized.
        in_chans: channels of the input.
        num_classes: classes of the linear head, 0 for none.
    """

    paper: ClassVar[str]
    """The slug of its paper."""
    configs: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Published name -> arguments of `__init__`."""
    inputs: ClassVar[Inputs] = "pictures"
    """What goes in: pictures [B, C, H, W], clips [B, T, C, H, W], volumes [B, C, D, H, W], features [B, T, D]."""
    official_keys: ClassVar[Sequence[tuple[str, str]]] = ()
    """How keys of official checkpoints become ours: regular expressions and replacements, tried in order, the first
    that matches the whole key is taken; a key that none matches stays. Empty where no official code is public."""

    name: str = ""
    """The name that it was created by."""
    settings: Mapping[str, Any]
    """The arguments that it was created with: enough to make it again."""

    def __init__(self, *, image_size: int | tuple[int, int], in_chans: int, num_classes: int, width: int) -> None:
        super().__init__()
        if in_chans < 1 or num_classes < 0:
            raise InputError(f"in_chans must be 1 or more and num_classes 0 or more, not {in_chans} and {num_classes}")
        self.image_size = as_pair(image_size)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.width = width
        """D of `Features.tokens`."""

    @property
    def called(self) -> str:
        """What messages call it."""
        return self.name or getattr(self, "paper", type(self).__name__)

    @property
    def stride(self) -> int:
        """Pixels a side of what one token stands for; sides have to be multiples of it."""
        return 1

    @property
    def frames(self) -> int | None:
        """How many frames a clip has to have, None for any number."""
        return None

    def example_shape(self, batch: int = 1) -> tuple[int, ...]:
        """The shape of inputs of the size that it was made for; of clips, eight frames where any number will do."""
        if self.inputs == "clips":
            return (batch, self.frames or 8, self.in_chans, *self.image_size)
        return (batch, self.in_chans, *self.image_size)

    @abstractmethod
    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        """The features of checked pixels."""

    @abstractmethod
    def classify(self, features: Features) -> Tensor:
        """Logits [B, num_classes] from the features; only asked where there is a head."""

    def forward(self, pixels: Tensor, *, hidden_states: bool = False) -> Features:
        """Encodes pixels.

        Args:
            pixels: see `inputs`; normalised as the checkpoint wants it.
            hidden_states: whether to give `Features.hidden_states` too.

        Raises:
            InputError: a wrong number of dimensions or channels, a size that the design cannot take, NaN or infinity.
        """
        self.check(pixels)
        return self.encode(pixels, hidden_states)

    def logits(self, pixels: Tensor) -> Tensor:
        """Class logits [B, num_classes].

        Raises:
            InputError: without a head (num_classes = 0), and as `forward`.
        """
        if self.num_classes == 0:
            raise InputError(f"{self.called} has no head; create it with num_classes")
        return self.classify(self(pixels))

    def training_loss(self, pixels: Tensor, targets: Tensor, step: int, steps: int) -> Tensor:
        """The loss of one training step; an encoder whose paper has another one overrides it.

        Args:
            pixels: see `inputs`.
            targets: class numbers [B]; for segmentation class numbers of every pixel; for prediction not used.
            step: which step it is, counted from 0, of `steps`: papers train in phases.
        """
        return nn.functional.cross_entropy(self.logits(pixels), targets, label_smoothing=0.1)

    def check(self, pixels: Tensor) -> None:
        """Raises `InputError` when `pixels` are not what the encoder takes."""
        wanted = {"pictures": "[B, C, H, W]", "clips": "[B, T, C, H, W]", "volumes": "[B, C, D, H, W]"}
        shape = wanted.get(self.inputs, "[B, T, D]")
        if pixels.ndim != shape.count(",") + 1:
            raise InputError(f"{self.called} takes {self.inputs} {shape}, not a tensor of shape {list(pixels.shape)}")
        if self.inputs != "frame features":
            channels = pixels.shape[2 if self.inputs == "clips" else 1]
            if channels != self.in_chans:
                raise InputError(f"{self.called} was made for in_chans={self.in_chans}, but the pixels have {channels}")
            self.check_size(*pixels.shape[-2:])
        if not pixels.is_meta and not bool(pixels.isfinite().all()):
            raise InputError(f"the pixels given to {self.called} hold NaN or infinity")

    def check_size(self, height: int, width: int) -> None:
        """Raises `InputError` for a size that the design cannot take."""
        check_multiple(self.called, (height, width), self.stride)

    def load_official(self, path: str | Path) -> None:
        """Loads a checkpoint of the paper's official code, its keys renamed by `official_keys`.

        Position tables of another grid are resized (`adapt_official`); an encoder without a head takes no head.

        Args:
            path: a `.safetensors` file.

        Raises:
            InputError: an unreadable file, one of another format, or keys that are missing, left over or of another
                shape; all of them are named.
        """
        if not self.official_keys:
            raise InputError(f"there is no public official code for {self.called} whose keys are known")
        given = self.adapt_official(read_safetensors(Path(path)))
        state = {self.our_key(key): value for key, value in given.items()}
        if self.num_classes == 0:  # the checkpoint's classifier is not asked for
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
        load_exactly(self, state, str(path))

    def our_key(self, key: str) -> str:
        """The name here of a key of the official checkpoint."""
        for pattern, replacement in self.official_keys:
            match = re.fullmatch(pattern, key)
            if match:
                return match.expand(replacement)
        return key

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official state dict, with what `official_keys` cannot say: buffers left out, tables resized."""
        return state


def features_of_stages(
    x: Tensor,
    grid: tuple[int, int],
    stages: Sequence[nn.Module] | nn.ModuleList,
    shrinks: Sequence[nn.Module] | nn.ModuleList,
    norm: nn.Module,
    hidden_states: bool,
) -> Features:
    """The features of a pyramid on tokens, pooled by their mean.

    Args:
        x: tokens [B, N, D] that enter the first stage.
        grid: their rows and columns.
        stages: each holds its blocks, called with tokens and grid.
        shrinks: between two stages, tokens and grid -> fewer tokens and their grid.
        norm: the final norm.
        hidden_states: whether to keep them.
    """
    states, maps = [x], []
    for number, blocks in enumerate(stages):
        for block in blocks.children():
            x = block(x, grid)
            states.append(x)
        if number < len(shrinks):
            maps.append(to_map(x, grid))
            x, grid = shrinks[number](x, grid)
    tokens = norm(x)
    maps.append(to_map(tokens, grid))
    return Features(tokens, grid, tokens.mean(dim=1), tuple(maps), tuple(states) if hidden_states else ())


Made = TypeVar("Made", bound=type[Encoder])
_CLASSES: dict[str, type[Encoder]] = {}


def register_encoder(made: Made) -> Made:
    """Class decorator: makes an encoder's configurations known by their names."""
    for name in made.configs:
        assert name not in _CLASSES, f"two encoders are called {name!r}"
        _CLASSES[name] = made
    return made


def encoders() -> dict[str, type[Encoder]]:
    """Name of each configuration -> the class that it is one of; all modules of the folder are imported."""
    package = importlib.import_module("sightline.encoders")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"sightline.encoders.{module.name}")
    return dict(sorted(_CLASSES.items()))


def list_encoders(pattern: str = "*") -> list[str]:
    """The names of encoders that match a shell pattern such as `vi*`."""
    return [name for name in encoders() if fnmatch.fnmatchcase(name, pattern)]


def create_encoder(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    num_classes: int = 0,
    **overrides: Any,
) -> Encoder:
    """Makes an encoder with random weights.

    Args:
        name: one of `list_encoders()`.
        image_size: side of the square input or (height, width) in pixels; None for the published one.
        in_chans: channels of the input.
        num_classes: classes of the linear head, 0 for none. Published parameter counts are those with 1000.
        **overrides: other arguments of the encoder's class, such as `depth=6`.

    Raises:
        InputError: an unknown name or argument (with the nearest), or values that the design cannot take.
    """
    known = encoders()
    if name not in known:
        raise unknown("encoder", name, known)
    made = known[name]
    parameters = {key for key in inspect.signature(made.__init__).parameters if key not in ("self", "num_classes")}
    for key in overrides:
        if key not in parameters:
            raise unknown(f"argument of {name}", key, parameters - {"image_size", "in_chans"})
    settings = dict(made.configs[name]) | overrides | {"in_chans": in_chans, "num_classes": num_classes}
    if image_size is not None:
        settings["image_size"] = image_size
    encoder = made(**settings)
    encoder.name, encoder.settings = name, settings
    return encoder


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or a pair.

    Raises:
        InputError: anything else than whole numbers from 1 to 16384.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or not 1 <= side <= LARGEST_SIDE for side in pair):
        raise InputError(f"image_size must be a side or (height, width) in pixels from 1 to {LARGEST_SIDE}, not {size}")
    return pair


def check_multiple(name: str, size: tuple[int, int], stride: int) -> None:
    """Raises `InputError` unless both sides are multiples of the stride; the nearest size that is one is named."""
    if any(side % stride or side == 0 for side in size):
        near = " x ".join(str(max(1, round(side / stride)) * stride) for side in size)
        raise InputError(
            f"{name} takes pictures whose sides are multiples of {stride} pixels, not {size[0]} x {size[1]}; the "
            f"nearest size is {near}"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file.

    Raises:
        InputError: another format, or a file that cannot be read.
    """
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is not a .safetensors file; weights in other formats can run code when they are loaded: where you "
            "trust them, save their state dict once with safetensors.torch.save_file"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Loads a state dict that must fit in every key and shape.

    Raises:
        InputError: one sentence that lists what is missing, left over or of another shape; nothing is loaded then.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(state[key].shape)} and should be {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong = [
        f"{what}: {', '.join(found)}"
        for what, found in (("missing", missing), ("not expected", extra), ("of another shape", shapes))
        if found
    ]
    if wrong:
        raise InputError(f"{where} does not fit the encoder; {'; '.join(wrong)}")
    module.load_state_dict(dict(state), strict=False)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in module.parameters())


class MacCounter:
    """Counts the multiply-adds of forwards while it is entered.

    Linear layers and convolutions are counted from their shapes; a module that does other work (a mixer: the products
    of queries and keys, a scan) says how much in `mixing_macs(*the forward's arguments)`, for the whole batch.
    Norms, activations and additions are left out, as in most published counts.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.macs = module, 0
        self._handles: list[Any] = []

    def __enter__(self) -> MacCounter:
        for part in self.module.modules():
            if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or hasattr(part, "mixing_macs"):
                self._handles.append(part.register_forward_hook(self._count, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _count(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        work = getattr(part, "mixing_macs", None)
        if callable(work):
            self.macs += int(work(*args, **kwargs))
        if isinstance(part, nn.Linear):
            self.macs += output.numel() * part.in_features
        elif isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            self.macs += output.numel() * part.in_channels // part.groups * math.prod(part.kernel_size)


def count_macs(name: str, *, image_size: int | tuple[int, int] | None = None, **overrides: Any) -> int:
    """Multiply-adds of one picture through an encoder and its head for 1000 classes, without computing anything.

    Raises:
        InputError: as `create_encoder`; and for encoders of other inputs than pictures.
    """
    with torch.device("meta"):
        encoder = create_encoder(name, image_size=image_size, **{"num_classes": 1000, **overrides}).eval()
    if encoder.inputs != "pictures":
        raise InputError(f"{name} takes {encoder.inputs}, not pictures")
    with MacCounter(encoder) as counter, torch.no_grad():
        encoder.logits(torch.empty(encoder.example_shape(), device="meta"))
    return counter.macs
