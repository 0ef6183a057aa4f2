"""What `write_docs.py` writes about encoders: `docs/encoders.md`, from the code and from `docs/results`.

`encoders.jsonl` is what `scripts/measure_encoders.py` wrote; `encoder_speed.jsonl` and `mixer_speed.jsonl` are what
`benchmarks/encoders.py --json` and `benchmarks/mixers.py --json` printed.
"""

from __future__ import annotations

import inspect
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sightline.encoders.catalogue import record
from sightline.encoders.encoder import Encoder, MacCounter, count_parameters, create_encoder, encoders
from sightline.papers import paper

HEAD = """# Encoders

Made by `scripts/write_docs.py` from the code and from `docs/results`.

```python
import sightline as sl

encoder = sl.create_encoder("vig_tiny", image_size=1024)
features = encoder(pixels)  # tokens, grid, pooled, maps, hidden_states
sl.list_encoders("vi*")
```

Under a stock Llava: `sl.EncoderVisionConfig("vig_tiny", image_size=512)` is a `vision_config` of `LlavaConfig`.
Official checkpoints, saved as safetensors, load with `encoder.load_official(path)`; which of their keys become which of
ours is told at the end of this page.

## All configurations

Parameters and multiply-adds of one input are those of the classifier for 1000 classes (segmentation, frames and
features: of the network as it is), counted from the code by `count_parameters` and `MacCounter`.

| name | paper | input | parameters (M) | multiply-adds (G) | tokens |
| --- | --- | --- | --- | --- | --- |"""


def page(results: Path) -> str:
    """The whole page."""
    return "\n".join([HEAD, *configurations(), "", *claims(results), *speed(results), *keys()])


def configurations() -> Iterator[str]:
    """One row a configuration."""
    for name in encoders():
        try:
            with torch.device("meta"):
                encoder = create_encoder(name, num_classes=1000).eval()
        except ValueError:  # one that has no classes, or whose classes are pixels'
            with torch.device("meta"):
                encoder = create_encoder(name).eval()
        title = title_of(name)
        macs, tokens, taken = work(encoder)
        yield f"| `{name}` | {title} | {taken} | {count_parameters(encoder) / 1e6:.2f} | {macs} | {tokens} |"


def title_of(name: str) -> str:
    """The paper's title up to its colon, after which most only explain themselves."""
    slug = record(name)["paper"]
    if slug is None:
        return OTHERS[encoders()[name].__module__.rpartition(".")[2]]
    return paper(slug).title.partition(":")[0].partition(" can be")[0]


OTHERS = {"vit": "the plain ViT", "vil": "Vision-LSTM, the blocks of xLSTM-UNet"}
"""Modules of encoders that stand beside the papers'."""


def work(encoder: Encoder) -> tuple[str, str, str]:
    """Multiply-adds, tokens and the input, in words."""
    shape = encoder.example_shape()
    *before, height, width = shape[1:]
    taken = f"{height}²" if height == width else f"{height} x {width}"
    if encoder.inputs == "clips":
        taken = f"{before[0]} frames of {taken}"
    elif encoder.inputs == "volumes":
        taken = f"{before[-1]} x {taken}"
    elif encoder.inputs == "frame features":
        taken = f"features of {height} frames"
    with MacCounter(encoder) as counter, torch.no_grad():
        features = encoder(torch.empty(shape, device="meta"))
    return f"{counter.macs / 1e9:.3g}", " x ".join(map(str, features.grid)), taken


CLAIMS_HEAD = """## What was seen small

`python scripts/measure_encoders.py`: encoders of a few hundred thousand parameters, trained from nothing for minutes on
one CPU core, the arms of a comparison with the same examples, steps, batch and learning rate. Scores on test examples
for each seed that was run, and their mean. A difference that is not the same in all seeds is not told from chance, and
one of a single seed shows nothing yet; where all arms are near chance (4 % for the kinds of picturebook, 10 % for
digits, 12.5 % for actions) they have not learnt the task in so few steps.
"""


def claims(results: Path) -> Iterator[str]:
    """A table a comparison."""
    file = results / "encoders.jsonl"
    if not file.exists():
        return
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    yield CLAIMS_HEAD
    for comparison in dict.fromkeys(line["comparison"] for line in lines):
        own = sorted((line for line in lines if line["comparison"] == comparison), key=lambda line: line["seed"])
        first = own[0]
        recipe = first["recipe"]
        yield f"### {comparison[0].upper()}{comparison[1:]}\n"
        yield (
            f"Task `{recipe['task']}`, {recipe['examples']} examples, {recipe['steps']} steps of {recipe['batch']}, "
            f"seeds {', '.join(str(seed) for seed in sorted({line['seed'] for line in own}))}.\n"
        )
        yield from comparison_table(own)
        yield ""


def comparison_table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Arms by scores; each cell has the seeds' values and their mean."""
    scores = list(lines[0]["scores"])
    yield f"| arm | parameters | {' | '.join(scores)} | seconds |"
    yield f"| --- | --- |{' --- |' * (len(scores) + 1)}"
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        cells = []
        for score in scores:
            values = [line["scores"][score] for line in own if score in line["scores"]]
            cells.append(f"**{shown(score, statistics.fmean(values))}** ({', '.join(shown(score, v) for v in values)})")
        seconds = statistics.median(line["seconds"] for line in own)
        yield f"| {arm} | {own[0]['parameters']:,} | {' | '.join(cells)} | {seconds:.0f} |"


def shown(score: str, value: float) -> str:
    """Shares in %, errors and ratios as they are."""
    if score.startswith(("accuracy", "dice")):
        return f"{100 * value:.1f}"
    return f"{value:.4f}" if "mse" in score else f"{value:.2f}"


def speed(results: Path) -> Iterator[str]:
    """The tables of the benchmarks, as they were printed."""
    for name, command in (("mixer_speed", "benchmarks/mixers.py"), ("encoder_speed", "benchmarks/encoders.py")):
        file = results / f"{name}.jsonl"
        if not file.exists():
            continue
        tables = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        yield f"## Speed: `python {command} --json`\n"
        about = tables[0]["machine"]
        yield ", ".join(f"{key} {value}" for key, value in about.items()) + ".\n"
        for table in tables:
            yield f"**{table['benchmark']}.** {table['note']}\n"
            columns = list(dict.fromkeys(key for row in table["rows"] for key in row))
            yield f"| {' | '.join('' if column == 'name' else column for column in columns)} |"
            yield f"|{' --- |' * len(columns)}"
            for row in table["rows"]:
                yield f"| {' | '.join(cell(row.get(column)) for column in columns)} |"
            yield ""


def cell(value: Any) -> str:
    """A number with four digits, yes or no, or nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


KEYS_HEAD = """## Keys of official checkpoints

Regular expressions and what they become, tried in order; a key that none matches keeps its name.
"""


def keys() -> Iterator[str]:
    """The tables of `Encoder.official_keys`."""
    yield KEYS_HEAD
    seen: set[str] = set()
    for made in encoders().values():
        if not made.official_keys or made.__qualname__ in seen:
            continue
        seen.add(made.__qualname__)
        yield f"**{made.__name__}** (`{inspect.getmodule(made).__name__}`)\n"  # type: ignore[union-attr]
        yield "```text"
        width = max(len(pattern) for pattern, _ in made.official_keys)
        yield from (f"{pattern:<{width}}  ->  {replacement}" for pattern, replacement in made.official_keys)
        yield "```\n"
