"""Pictures as objects: what VoCo-LLaMA has written of a picture, stored and asked about later.

In: a picture. Out: for each layer of the decoder the keys and values of n tokens, [heads, n, d]; a question is read
after them as if the picture had just been read (see `sightline.reduction.voco_llama`). The picture has to come first in
the prompt: what precedes it is compressed with it, and is the same for all questions.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from sightline.errors import InputError
from sightline.methods import attach
from sightline.models.anatomy import Anatomy
from sightline.models.answering import prepare
from sightline.reduction.voco_llama import VoCo

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


@dataclass(frozen=True, eq=False)
class CompressedPicture:
    """What a model's decoder has written of a picture: all that it needs to answer questions about it."""

    keys: Tensor
    """[layers, key/value heads, n, d], turned to their positions."""
    values: Tensor
    """[layers, key/value heads, n, d]"""
    next_position: int
    """The position of the first token that follows."""

    @property
    def tokens(self) -> int:
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values."""
        return int(self.keys.nbytes + self.values.nbytes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it into one safetensors file.

        Raises:
            InputError: if there is no such folder, or it cannot be written to.
        """
        tensors = {"keys": self.keys.cpu().contiguous(), "values": self.values.cpu().contiguous()}
        about = json.dumps({"paper": VoCo.paper, "next_position": self.next_position})
        try:
            save_file(tensors, path, metadata={"compressed_picture": about})
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write the compressed picture to {os.fspath(path)!r}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressedPicture:
        """Reads what `save` has written.

        Raises:
            InputError: if there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, "pt") as opened:
                about = json.loads((opened.metadata() or {})["compressed_picture"])
                return cls(opened.get_tensor("keys"), opened.get_tensor("values"), int(about["next_position"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{os.fspath(path)!r} is no file of a compressed picture: {error}") from error

    def inputs(self, model: Any, processor: Any, question: str) -> dict[str, Any]:
        """What `model(**inputs)` and `model.generate(**inputs)` need to read a question after the picture: ids [1, Q]
        of what follows the picture in the prompt, their positions, and a cache that holds n entries a layer.

        Raises:
            InputError: if the picture was compressed by a model of another shape.
        """
        anatomy = Anatomy.of(model, processor)
        expected = (len(anatomy.layers), anatomy.num_key_value_heads, self.tokens, anatomy.head_dim)
        if tuple(self.keys.shape) != expected:
            raise InputError(
                f"the picture was compressed by another model: its keys have the shape {tuple(self.keys.shape)}, this "
                f"model's would have {expected}"
            )
        prompt, end = _prompt(anatomy, processor, None, question)
        ids = prompt["input_ids"][:, end:]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(*(one[None].to(model.device, model.dtype) for one in (keys, values)), layer)
        positions = torch.arange(self.next_position, self.next_position + ids.shape[1], device=ids.device)[None]
        if anatomy.mrope:
            positions = positions.expand(4, 1, -1)
        ones = ids.new_ones(1, self.tokens + ids.shape[1])
        return {"input_ids": ids, "attention_mask": ones, "position_ids": positions, "past_key_values": cache}


def compress(model: Any, processor: Any, picture: PillowImage, method: VoCo | None = None) -> CompressedPicture:
    """Reads a picture once, and keeps n entries a layer of it.

    Args:
        model: a model of a supported family, with no methods attached.
        processor: its processor, whose prompts must show the picture before they ask.
        picture: RGB.
        method: by default `VoCo()`, with the weights beside the model's own.

    Raises:
        InputError: if the method cannot work on the model, or the model cannot go on from what was read before.
    """
    method = VoCo() if method is None else method
    if method.is_identity:
        raise InputError(f"tokens of {method.paper} must be 1 or more to compress a picture, not {method.tokens}")
    seen: dict[str, Any] = {}
    anatomy = Anatomy.of(model, processor)
    with attach(model, method, processor=processor), torch.no_grad():
        prompt, end = _prompt(anatomy, processor, picture, "?")
        length = prompt["input_ids"].shape[1]
        cut = {
            name: value[:, :end] if value.shape[:2] == (1, length) and not value.is_floating_point() else value
            for name, value in prompt.items()
        }
        handle = anatomy.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        try:
            cache = model(**cut, use_cache=True).past_key_values
        finally:
            handle.remove()
    mask: Tensor = seen["attention_mask"]
    if bool((mask if mask.dtype == torch.bool else mask == 0).triu(1).any()):
        raise InputError(
            f"{anatomy.family} reads a prompt in both directions, and only from the prompt's start: it cannot "
            "be asked about a picture that was read before"
        )
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    return CompressedPicture(keys, values, int(seen["position_ids"][..., -1].max()) + 1)


def answer(compressed: CompressedPicture, model: Any, processor: Any, question: str, **options: Any) -> str:
    """The answer to a question about a compressed picture, as if the model, with the method attached, had just read it.

    Args:
        compressed: what `compress` gave for this model.
        model: the same model, with no methods attached.
        processor: its processor.
        question: the question.
        options: of `model.generate`, for one answer; greedy unless told otherwise.
    """
    inputs = compressed.inputs(model, processor, question)
    own = model.generation_config
    rows = max(options.get(name, getattr(own, name, None)) or 1 for name in ("num_beams", "num_return_sequences"))
    if rows > 1:  # `generate` repeats the rows of everything but the cache
        inputs["past_key_values"].batch_repeat_interleave(rows)
    output = model.generate(**inputs, **{"do_sample": False, **options})
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = processor.decode(new.tolist(), skip_special_tokens=True)
    return text.strip()


def _prompt(anatomy: Anatomy, processor: Any, picture: PillowImage | None, question: str) -> tuple[dict[str, Any], int]:
    """A prompt's inputs, and the column where its picture has ended. What follows a picture does not depend on it, so
    that a blank one serves where only that is read."""
    if picture is None:
        picture = Image.new("RGB", (64, 64))
    inputs = prepare(anatomy.model, processor, [picture], [question])
    return inputs, int(anatomy.visual_positions(inputs["input_ids"])[0].nonzero()[-1]) + 1
