"""Methods that reduce visual tokens with weights of their own, and where those weights lie.

`sightline train reduce` trains them and leaves a checkpoint of the whole model with `reducer.safetensors` beside it;
`weights = "auto"` finds that file in the folder that the model was loaded from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import weakref
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.anatomy import Anatomy, TowerReading
from sightline.models.call import Reduced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sightline.models.call import Call, Encoded

FILE = "reducer.safetensors"
AUTO, UNTRAINED = "auto", "untrained"
TOWER = "tower"
"""The name of the reading of what the connector reads."""


class ConnectorInput(TowerReading):
    """What the connector is given: the tower's features, [pictures, patches, C]."""

    def row(self, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
        return hidden_states

    def read(self, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        return args[0] if args else next(iter(kwargs.values()))


def connector_input(name: str, anatomy: Anatomy) -> ConnectorInput:
    """The reading of what the connector reads.

    Raises:
        InputError: where the connector does not give one visual token for each patch of a picture it reads.
    """
    connector = anatomy.connector
    if connector is None or not anatomy.plain_connector:
        raise InputError(
            f"{name} takes the place of a connector that maps each patch of a picture to one visual token, which "
            f"{anatomy.family} does not have; it works on models of the llava family"
        )
    return ConnectorInput(connector)


def first_places(features: Tensor, encoded: Encoded) -> Reduced:
    """New visual tokens [pictures, m, D] at the first m places that each picture had in the prompt."""
    pictures, tokens, width = features.shape
    keep = torch.zeros(pictures, len(encoded.features) // pictures, dtype=torch.bool, device=features.device)
    keep[:, :tokens] = True
    return Reduced(keep.flatten(), features.reshape(-1, width).to(encoded.features.dtype))


@dataclass(frozen=True)
class TrainedReducer(Method):
    """A method with weights that are learned, beside or together with the decoder's.

    The paper's file writes `build`, and uses `module(anatomy)`.

    Args:
        weights: `auto` takes the file beside the model's own weights; `untrained` draws them, always the same, for
            measuring what a method costs; else a file, or a folder with one, that `sightline train reduce` has written.
    """

    structure: ClassVar[tuple[str, ...]] = ()
    """The fields that fix the shapes of the weights: they are read back with them."""
    frames: ClassVar[bool] = False
    """Whether it reduces across the pictures of a row, and so is trained on films."""

    weights: str = dataclasses.field(default=AUTO, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.weights, str) and self.weights):
            raise InputError(
                f"weights of {self.paper} must be '{AUTO}', '{UNTRAINED}' or the path of a file, not {self.weights!r}"
            )

    @property
    def one_question(self) -> bool:
        """Whether the reduction depends on the question, so that a row of training holds only one."""
        return False

    @abstractmethod
    def build(self, anatomy: Anatomy) -> nn.Module:
        """The module with fresh weights, for this model; asked of what is `settled`."""

    def settled(self, anatomy: Anatomy) -> Self:
        """The same with what it leaves to the model filled in."""
        return self

    def per_step(self, rng: random.Random) -> Self:
        """The settings of one training step."""
        return self

    def training_loss(self, call: Call) -> Tensor | None:
        """What a training step adds to the loss of the answers."""
        return None

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.is_identity:
            return
        # Since it was loaded the file may have been replaced, or the model moved to another device.
        held, key = _HELD.get(anatomy.model, {}), self.settled(anatomy)._key(self.weights)
        if key in held and held[key][1] != self._stamp(anatomy):
            del held[key]
        self.module(anatomy).to(anatomy.model.device)

    def module(self, anatomy: Anatomy) -> nn.Module:
        """The module in use on this model: the one that `hold` was given, or that of `weights`.

        Raises:
            InputError: if there is none, or one for other settings or for another model.
        """
        held = _HELD.setdefault(anatomy.model, {})
        own = self.settled(anatomy)
        for key in (own._key(None), own._key(self.weights)):
            if key in held:
                return held[key][0]
        stamp = self._stamp(anatomy)  # before the file is read: one that is replaced meanwhile is then read again
        module = own.fresh(anatomy)
        if self.weights != UNTRAINED:
            own._load(module, self._file(anatomy))
        module.requires_grad_(False).eval()
        held[key] = module.to(anatomy.model.device), stamp
        return module

    def _key(self, weights: str | None) -> tuple[Any, ...]:
        return self.paper, weights, *(getattr(self, name) for name in self.structure)

    def fresh(self, anatomy: Anatomy, *, seed: int = 0) -> nn.Module:
        """`build` with a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.settled(anatomy).build(anatomy)

    def _stamp(self, anatomy: Anatomy) -> tuple[Any, ...]:
        """What changes when the file of the weights does."""
        if self.weights == UNTRAINED:
            return ()
        file = self._file(anatomy)
        about = file.stat()
        return file, about.st_mtime_ns, about.st_size

    def _file(self, anatomy: Anatomy) -> Path:
        given = str(anatomy.model.name_or_path) if self.weights == AUTO else self.weights
        path = Path(given).expanduser()
        file = path / FILE if path.is_dir() else path
        if given and file.is_file():
            return file
        if self.weights == AUTO:
            raise InputError(
                f"{self.paper} needs weights that were learned for this model, and no {FILE} lies beside its own: make "
                f"them with `sightline train reduce --method {self.paper}`, or give their file as weights "
                f"('{UNTRAINED}' draws random ones)"
            )
        raise InputError(
            f"weights of {self.paper} must be '{AUTO}', '{UNTRAINED}' or the path of a file that `sightline train "
            f"reduce` has written; there is no file {self.weights!r}"
        )

    def _load(self, module: nn.Module, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {}).get("method", "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"cannot read the weights {file}: {error}") from error
        if about.get("paper") != self.paper:
            raise InputError(f"the weights in {file} belong to {about.get('paper', 'nothing known')}, not {self.paper}")
        for name in self.structure:
            learned = about["settings"].get(name)
            if learned != _plain(getattr(self, name)):
                raise InputError(
                    f"the weights in {file} were learned with {name}={learned}, not {getattr(self, name)!r}: give "
                    f"{self.paper} that value"
                )
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the weights in {file} were learned for another model: {reason}") from error


_HELD: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[nn.Module, tuple[Any, ...]]]] = (
    weakref.WeakKeyDictionary()
)
"""Of each model the modules in use on it, and of which state of their file they are."""


def hold(model: PreTrainedModel, method: TrainedReducer, module: nn.Module | None) -> None:
    """Makes a module the one that this method uses on a model, whatever its `weights` say; None lets go of it."""
    held, key = _HELD.setdefault(model, {}), method.settled(Anatomy.of(model))._key(None)
    if module is None:
        held.pop(key, None)
    else:
        held[key] = module, ()


def save(method: TrainedReducer, module: nn.Module, folder: Path) -> Path:
    """Writes the weights into a folder, in place of those that were there."""
    settings = {name: _plain(getattr(method, name)) for name in method.structure}
    about = json.dumps({"paper": method.paper, "settings": settings})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    file = folder / FILE
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"method": about})
    os.replace(partial, file)
    return file


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
