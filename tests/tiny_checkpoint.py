"""A checkpoint of the built-in model's form, small and untrained, for tests of what runs a model from a folder."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from sightline.models.picturebook_vlm import build_model, build_processor, build_tokenizer
from sightline.training.nano import text_corpus


def save_tiny_checkpoint(folder: Path) -> Path:
    """Saves a pico model with random weights and its processor; deterministic."""
    tokenizer = build_tokenizer(islice(text_corpus(60), 600), 400)
    build_model("pico", tokenizer).save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return folder
