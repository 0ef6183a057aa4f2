"""Sightline: methods for vision-language models, on stock `transformers` models, composable and measured.

    import sightline as sl

    model, processor = sl.load("picturebook-nano")
    with sl.attach(model, sl.FasterVLM(keep=0.25)):
        output = model.generate(**inputs)

Every method is importable from here by the name of its class; `sl.methods()` lists them. Encoders are made by name:

    encoder = sl.create_encoder("vig_tiny", image_size=1024)
    features = encoder(pixels)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("sightline")

_EXPORTS = {
    "Anatomy": "sightline.models.anatomy",
    "EncoderVisionConfig": "sightline.encoders.vision_model",
    "EncoderVisionModel": "sightline.encoders.vision_model",
    "InputError": "sightline.errors",
    "attach": "sightline.methods",
    "create_encoder": "sightline.encoders.encoder",
    "describe": "sightline.methods",
    "list_encoders": "sightline.encoders.encoder",
    "load": "sightline.models.loading",
    "methods": "sightline.methods",
    "open_picture": "sightline.models.images",
    "papers": "sightline.papers",
    "parse_methods": "sightline.methods",
    "read_video": "sightline.models.videos",
    "stream_video": "sightline.models.videos",
}


def __getattr__(name: str) -> Any:
    # Late, so that `sightline --help` and `sightline papers` start without torch; methods are found, not listed.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if not name.startswith("_"):
        from sightline.methods import methods

        for method in methods().values():
            if method.__name__ == name:
                return method
    raise AttributeError(f"module 'sightline' has no attribute {name!r}")


def __dir__() -> list[str]:
    from sightline.methods import methods

    return sorted([*_EXPORTS, "__version__", *(method.__name__ for method in methods().values())])
