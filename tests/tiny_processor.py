"""A processor for the tiny models of `families`, whose words are their token ids: what runs on text and pictures can
then be tried on every family.

The text "t5 t17" is the tokens 5 and 17; any other word is the token that its letters add up to. A picture is a seed:
its first pixel's red, from which the row's pixels are drawn.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import families as tiny
import torch
from PIL import Image
from torch import Tensor


def picture(seed: int) -> Image.Image:
    """A picture that the processor tells apart by its seed, from 0 to 255."""
    return Image.new("RGB", (4, 4), (seed, 0, 0))


class TinyTokenizer:
    """Words to ids and back."""

    bos_token = "<bos>"
    pad_token_id = tiny.PAD
    all_special_ids = (tiny.PAD, tiny.BOS, *range(tiny.TEXT.stop, tiny.VOCABULARY))

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self.ids(text, add_special_tokens)}
        rows = [tiny.Row(self.ids(one, add_special_tokens)) for one in text]
        batch = tiny.collate("llava", None, rows, "left")
        if options.get("return_token_type_ids"):
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    def ids(self, text: str, start: bool) -> list[int]:
        known = {"<bos>": tiny.BOS, "\n": tiny.NEWLINE}
        words = re.findall(r"<bos>|\n|[^\s<]+", text)
        return [tiny.BOS] * start + [known[word] if word in known else self.id(word) for word in words]

    def id(self, word: str) -> int:
        number = int(word[1:]) if re.fullmatch(r"t\d+", word) else -1
        return number if number in tiny.TEXT else tiny.TEXT.start + zlib.crc32(word.encode()) % len(tiny.TEXT)


class TinyProcessor:
    """Puts at most one picture before a row's words, in the way of the family."""

    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, family: str, model: Any) -> None:
        self.family, self.model = family, model
        self.tokenizer = TinyTokenizer()
        self.chat_template = None if family == "paligemma" else "there is one"
        self.model_input_names = ["input_ids", "attention_mask"]
        if family in ("paligemma", "gemma3"):
            self.model_input_names.append("token_type_ids")

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        parts = messages[0]["content"]
        return " ".join("<image>" if part["type"] == "image" else part["text"] for part in parts)

    def __call__(self, images: Sequence[Sequence[Any]], text: Sequence[str], **options: Any) -> dict[str, Tensor]:
        rows = []
        for (image,), one in zip(images, text, strict=True):
            generator = torch.Generator().manual_seed(image.getpixel((0, 0))[0])
            question = self.tokenizer.ids(one.removeprefix("<image>"), False)
            rows.append(tiny._BUILDERS[self.family](self.model, question, range(1), generator))
        return tiny.collate(self.family, self.model, rows, "left")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(f"t{token}" for token in ids if token in tiny.TEXT)
