"""Loading a model and its processor: built in, from a folder, or from the Hugging Face hub."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sightline.errors import InputError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""The built-in models: each folder in it that holds a config.json, named by the folder."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def built_in_models() -> tuple[str, ...]:
    """Names of the models that come with the package, sorted."""
    return tuple(sorted(config.parent.name for config in CHECKPOINTS.glob("*/config.json")))


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model in eval mode, and its processor, which pads on the left.

    Args:
        name_or_path: a built-in model ("picturebook-nano"), a folder that `save_pretrained` made, or a hub id
            ("owner/name").
        dtype: one of `DTYPES` or a torch dtype; by default what the checkpoint was saved in.
        device: where to put the model; by default it stays on the CPU.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...; by default what transformers chooses.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint. Weights are read from safetensors files only, with
            or without it, because the older format can run code too.
        local_files_only: use only what is in the hub's local cache.

    Raises:
        InputError: when there is no such model, its weights are not safetensors, it is not a vision-language model, or
            dtype, device or attention implementation cannot be had.
    """
    place = _device(device)
    where = _located(os.fspath(name_or_path))
    options: dict[str, Any] = dict(
        trust_remote_code=trust_remote_code, local_files_only=local_files_only or isinstance(where, Path)
    )
    if revision is not None:
        options["revision"] = revision
    chosen: dict[str, Any] = {}
    if dtype is not None:
        chosen["dtype"] = _dtype(dtype)
    if attn_implementation is not None:
        chosen["attn_implementation"] = attn_implementation

    from transformers import AutoModelForImageTextToText, AutoProcessor  # imported late: it takes seconds

    import_module("sightline.encoders.vision_model")  # so that transformers knows towers made of our encoders
    try:
        processor: Any = AutoProcessor.from_pretrained(where, **options)
        model: Any = AutoModelForImageTextToText.from_pretrained(where, use_safetensors=True, **chosen, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load model {os.fspath(name_or_path)!r}: {reason}") from error
    _prepare_tokenizer(processor)
    return model.to(place).eval(), processor


def _located(name: str) -> Path | str:
    """The folder of a built-in or local model, or the hub id itself."""
    if name in built_in_models():
        return _checked(CHECKPOINTS / name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.exists():
        raise InputError(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name!r}")
    if "/" not in name:
        raise InputError(
            f"{unknown('model', name, built_in_models())}; a model can also be a folder, or a hub id such as "
            "'llava-hf/llava-1.5-7b-hf'"
        )
    return name


def _checked(folder: Path) -> Path:
    """`folder`, if a model can be loaded from it without running code that pickled weights may hold."""
    if not (folder / "config.json").is_file():
        raise InputError(f"folder {str(folder)!r} holds no model: there is no config.json in it")
    if any(folder.glob("*.safetensors")):
        return folder
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"folder {str(folder)!r} has its weights only in {pickled[0]!r}, a format that can run code when it is "
            "read; convert them to safetensors first"
        )
    raise InputError(f"folder {str(folder)!r} holds no weights: there is no .safetensors file in it")


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return dtype


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: use 'cpu', 'cuda', 'cuda:1', 'mps', ...") from error
    if place.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (place.index or 0) >= found:
            raise InputError(f"device {str(place)!r} is not there: {found} CUDA devices were found")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not there")
    return place


def _prepare_tokenizer(processor: Any) -> None:
    """Batched generation continues each row from its right end, so padding goes to the left."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if getattr(tokenizer, "pad_token", None) is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
