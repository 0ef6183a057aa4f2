"""Example pictures of a run: what each method answered, and which patches it kept."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from sightline.benchmarks.item import Benchmark, Item
from sightline.picturebook.scene import PLURALS

if TYPE_CHECKING:
    from sightline.models.answering import Shown

MOST = 8
MOST_NAMED = 3
"""So many methods are named under a picture of which they kept the same patches."""
LARGEST_SIDE = 448
SMALL_SIDE = 160
"""Pictures up to this size are shown pixel by pixel, as the model sees them."""

MOST_FRAMES = 16
"""Of a question on more pictures, so many are shown, evenly spaced."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """An item, and the line of each method that answered it."""

    item: Item
    rows: dict[str, Row]

    @property
    def differ(self) -> bool:
        """Whether some methods were right and some were wrong."""
        return len({is_right(row) for row in self.rows.values()}) > 1


def is_right(row: Row) -> bool:
    """Whether an answer is right; a caption is right when it names nothing that is not there."""
    return bool(row["hit"]) if "hit" in row else not row.get("hallucinated")


def choose(benchmark: Benchmark, settings: Mapping[str, Any], rows: Sequence[Row], most: int = MOST) -> list[Example]:
    """Up to `most` items that all methods answered, each on another picture: first those on which methods differ, the
    tasks in turn.

    Raises:
        InputError: if the items cannot be had any more.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    of_item: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "error" not in row:
            of_item.setdefault(row["id"], {})[row["method"]] = row
    items = benchmark.items(settings["split"], settings["items"], settings["seed"])
    examples = [Example(item, of_item[item.id]) for item in items if len(of_item.get(item.id, {})) == len(methods) > 0]
    chosen: list[Example] = []
    shown: set[str] = set()
    for differ in (True, False):
        queues: dict[str, list[Example]] = {}
        for example in _answers_in_turn([example for example in examples if example.differ == differ]):
            queues.setdefault(example.item.task, []).append(example)
        while any(queues.values()) and len(chosen) < most:
            for queue in queues.values():
                found = next((example for example in queue if example.item.group not in shown), None)
                queue[:] = queue[queue.index(found) + 1 :] if found else []
                if found and len(chosen) < most:
                    chosen.append(found)
                    shown.add(found.item.group)
    return chosen


def _answers_in_turn(examples: Sequence[Example]) -> list[Example]:
    """Of each task first one of each right answer, then a second of each, and so on."""
    count: Counter[tuple[str, str]] = Counter()
    turns = []
    for example in examples:
        key = (example.item.task, example.item.answer)
        turns.append(count[key])
        count[key] += 1
    return [examples[place] for place in sorted(range(len(examples)), key=lambda place: turns[place])]


def card(example: Example, series: Mapping[str, int]) -> str:
    """The HTML of one example; a picture that cannot be opened any more is told of in its place."""
    item = example.item
    try:
        picture = None if item.picture is None else item.picture()
    except Exception as error:
        shown = f'<p class="missing">The picture cannot be opened: {escape(str(error))}</p>'
    else:
        asked_blind = '<p class="missing">Asked without a picture.</p>'
        shown = asked_blind if picture is None else _pictures(sheet(picture), example, series)
    by_text: dict[str, list[str]] = {}
    for method, row in example.rows.items():
        by_text.setdefault(str(row["text"]), []).append(method)
    answers = "".join(_answer(example.rows[methods[0]], methods, series) for methods in by_text.values())
    truth = "in the picture" if "objects" in next(iter(example.rows.values())) else "right answer"
    answer = ", ".join(item.meta["objects"]) if truth == "in the picture" and "objects" in item.meta else item.answer
    return (
        f'<article class="card"><div class="pictures">{shown}</div><div class="words">'
        f'<p class="task">{escape(item.task.replace("_", " "))}</p><h3>{escape(item.question)}</h3>'
        f'<p class="truth"><span>{truth}</span> {escape(answer)}</p><ul class="answers">{answers}</ul></div></article>'
    )


def sheet(shown: Shown) -> Image.Image:
    """One picture as it is; of several, up to `MOST_FRAMES` side by side, row by row."""
    if isinstance(shown, Image.Image):
        return shown
    count = min(len(shown), MOST_FRAMES)
    frames = [shown[(2 * place + 1) * len(shown) // (2 * count)] for place in range(count)]
    width, height = (max(frame.size[side] for frame in frames) for side in (0, 1))
    columns = math.ceil(math.sqrt(count))
    whole = Image.new("RGB", (columns * width, math.ceil(count / columns) * height), "white")
    for place, frame in enumerate(frames):
        row, column = divmod(place, columns)
        whole.paste(frame, (column * width, row * height))
    return whole


def _pictures(picture: Image.Image, example: Example, series: Mapping[str, int]) -> str:
    """The picture, and once more for each way in which methods dropped some of its tokens."""
    whole = data_uri(picture)
    pixels = " pixels" if max(picture.size) <= SMALL_SIDE else ""
    width, height = picture.size
    figures = [
        f'<figure class="main"><svg class="picture{pixels}" viewBox="0 0 {width} {height}">'
        f'<image id="{_name(example)}" href="{whole}" width="{width}" height="{height}" '
        'preserveAspectRatio="none"/></svg></figure>'
    ]
    alike: dict[str, list[str]] = {}
    for method, row in example.rows.items():
        if "kept" in row and row.get("grid"):
            alike.setdefault(dropped(row, width, height), []).append(method)
    for overlay, methods in alike.items():
        first = example.rows[methods[0]]
        rows, columns = first["grid"]
        names = escape(", ".join(methods[:MOST_NAMED])) + (
            f" and {len(methods) - MOST_NAMED} more" if len(methods) > MOST_NAMED else ""
        )
        figures.append(
            f'<figure class="s{series[methods[0]]}"><svg class="picture{pixels}" viewBox="0 0 {width} {height}">'
            f'<use href="#{_name(example)}"/>{overlay}</svg>'
            f'<figcaption><i class="key"></i><span>{names}'
            f"<small>{len(first['kept'])} of {rows * columns} patches</small></span></figcaption></figure>"
        )
    return "".join(figures)


def dropped(row: Row, width: int, height: int) -> str:
    """SVG on a picture of `width` x `height` that dims the patches that a method dropped and outlines those that it
    kept; what the model never saw is dimmed too."""
    rows, columns = row["grid"]
    sides = (width, height, width, height)
    left, top, right, bottom = (e * side for e, side in zip(row.get("seen", (0, 0, 1, 1)), sides, strict=True))
    w, h = (right - left) / columns, (bottom - top) / rows
    kept = {divmod(index, columns) for index in row["kept"]}
    dim, outline = [], []
    if (left, top, right, bottom) != (0, 0, width, height):
        dim.append(f"M0 0H{width}V{height}H0ZM{left:g} {top:g}V{bottom:g}H{right:g}V{top:g}Z")
    for y in range(rows):
        for x in range(columns):
            at = f"M{left + x * w:.4g} {top + y * h:.4g}"
            if (y, x) not in kept:
                dim.append(f"{at}h{w:.4g}v{h:.4g}h{-w:.4g}z")
            # The outline runs where a kept patch meets one that is not, or the edge.
            if ((y, x) in kept) != ((y - 1, x) in kept):
                outline.append(f"{at}h{w:.4g}")
            if ((y, x) in kept) != ((y, x - 1) in kept):
                outline.append(f"{at}v{h:.4g}")
        if (y, columns - 1) in kept:
            outline.append(f"M{right:.4g} {top + y * h:.4g}v{h:.4g}")
    outline += [f"M{left + x * w:.4g} {bottom:.4g}h{w:.4g}" for x in range(columns) if (rows - 1, x) in kept]
    return (
        f'<path class="dropped" fill-rule="evenodd" d="{"".join(dim)}"/>'
        f'<path class="kept" stroke-width="{max(width, height) / 90:.3g}" d="{"".join(outline)}"/>'
    )


def _answer(row: Row, methods: Sequence[str], series: Mapping[str, int]) -> str:
    """An answer, and the methods that gave it."""
    right = is_right(row)
    mark = '<b class="right" title="right">✓</b>' if right else '<b class="wrong" title="wrong">✗</b>'
    text = _marked(str(row["text"]), row.get("hallucinated", ())) or "<em>nothing</em>"
    who = "".join(f'<span class="s{series[name]}"><i class="key"></i>{escape(name)}</span>' for name in methods)
    return f'<li>{mark}<div><p>{text}</p><p class="who">{who}</p></div></li>'


def _marked(text: str, hallucinated: Sequence[str]) -> str:
    """Escaped text in which the names of hallucinated objects stand out."""
    if not hallucinated:
        return escape(text)
    words = sorted({form for name in hallucinated for form in (name, PLURALS.get(name, f"{name}s"))}, key=len)
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, reversed(words)))})\b", re.IGNORECASE)
    parts = pattern.split(text)
    return "".join(f"<mark>{escape(p)}</mark>" if place % 2 else escape(p) for place, p in enumerate(parts))


def data_uri(picture: Image.Image) -> str:
    """The picture as a PNG in a data URI, made smaller where it is large."""
    shown = picture.convert("RGB")
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    shown.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _name(example: Example) -> str:
    return "picture-" + re.sub(r"[^A-Za-z0-9_-]", "-", example.item.id)
