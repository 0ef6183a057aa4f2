"""Writes what the docs derive from the code and from measured results; nothing in it is typed by hand.

- `docs/methods/<slug>.md`: the paper, the method's own documentation, its parameters, where it works (from
  `docs/capabilities.md`), and what was measured;
- `docs/grounding.md`: the ledger of the grounding methods, with several seeds of a smaller model;
- `docs/reduction.md`: fewer visual tokens against quality and time (see `reduction_docs.py`);
- `docs/encoders.md`: all encoders, what was seen with small ones, their speed (see `encoder_docs.py`);
- the table of methods and the built-in model's skills, between the markers in `README.md`.

Results are the JSON lines that `sightline bench ... --json` printed, in `docs/results/*.jsonl`: the four beds of
`scripts/measure_grounding.py`, `costs.jsonl` for the times, `skills.jsonl`. `--check` writes nothing and exits with 1
where a file is stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from encoder_docs import page as encoder_page
from reduction_docs import measured as measured_reduction
from reduction_docs import page as reduction_page

from sightline.methods import Method, methods
from sightline.papers import paper, peers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SKILL_TARGETS = "at least 95, 95, 85, 90, 98 % for existence_random, colour, count, relation, place"


def results(name: str) -> list[dict[str, Any]]:
    """The lines of one result file; none where it has not been measured."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def times(value: float | None) -> str:
    return "" if value is None else f"×{value:.2f}"


def tokens(count: float | None) -> str:
    return "" if count is None else f"{count:.0f}"


def with_interval(line: dict[str, Any]) -> str:
    low, high = line["interval"]
    value = line["scores"][line["headline"]]
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


BEDS = ("pope_random", "pope_adversarial", "chair_natural", "chair_against")
"""Yes/no questions and captions, each with scenes that agree with the prior and against it."""


def measured_times() -> dict[str, dict[str, Any]]:
    """Method -> its line in `costs.jsonl`."""
    return {line["method"]: line for line in results("costs")}


def shown(spec: str) -> str:
    """A short form without its prompts, which would fill a table."""
    name, _, arguments = spec.partition(":")
    kept = [argument for argument in arguments.split(",") if argument and " " not in argument.partition("=")[2]]
    kept = [argument for argument in kept if name != "mvp_reasoning"]
    return f"{name}:{','.join(kept)}" if kept else name


def name_of(line: dict[str, Any]) -> str:
    return line["method"].split(":")[0].split("+")[0]


def link(spec: str, folder: str = "docs/methods") -> str:
    slug = spec.split(":")[0]
    known = slug in methods() and "+" not in spec
    return f"[`{shown(spec)}`]({folder}/{slug}.md)" if known else f"`{shown(spec)}`"


def methods_table() -> str:
    pope = results("pope_adversarial")
    if not pope:
        return "Not measured yet.\n"
    captions = {line["method"]: line for line in results("chair_against")}
    costs = measured_times()
    rows = [
        "| method | yes/no against the prior, accuracy % | what changed | captions against it: CHAIR_i / recall % "
        "| what changed | visual tokens | first token | per token | answer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in pope:
        if line["method"] in chosen_only():
            continue
        caption = captions.get(line["method"])
        said, changed = ("", "") if caption is None else (caption_scores(caption), kind(caption))
        ratio = costs.get(line["method"], {}).get("ratio", {})
        whole = costs.get(line["method"], {}).get("costs", {}).get("ratio", {})
        rows.append(
            f"| {link(line['method'])}{peer(line['method'])} "
            f"| {with_interval(line)} | {kind(line)} | {said} | {changed} "
            f"| {tokens(line['visual_tokens'])} | {times(ratio.get('time_to_first_token'))} "
            f"| {times(ratio.get('time_per_token'))} | {times(whole.get('time_per_answer'))} |"
        )
    return "\n".join(rows) + "\n"


def peer(spec: str) -> str:
    name = spec.split(":")[0]
    return " (peer)" if name in {one.slug for one in peers()} else ""


def kind(line: dict[str, Any]) -> str:
    """What changed, in words."""
    return (line.get("change") or {}).get("kind", "")


def chosen() -> dict[str, dict[str, str]]:
    """Kind of question -> method -> the setting that did best on validation scenes."""
    file = RESULTS / "chosen.json"
    return json.loads(file.read_text()) if file.exists() else {"yes/no": {}, "captions": {}}


def chosen_only() -> set[str]:
    """Settings that are in the results because they were chosen there, and not because they are published."""
    return {spec for by_method in chosen().values() for method, spec in by_method.items() if spec != method}


def caption_scores(line: dict[str, Any]) -> str:
    scores = line["scores"]
    return f"{percent(scores['chair_i'])} / {percent(scores['recall'])}"


def skills_table() -> str:
    lines = results("skills")
    if not lines:
        return "Not measured yet.\n"
    scores = lines[0]["scores"]
    rows = ["| skill | % |", "| --- | --- |"]
    rows += [f"| {name} | {percent(value)} |" for name, value in scores.items()]
    return "\n".join(rows) + "\n"


def parameters(method: type[Method]) -> Iterator[str]:
    yield "| parameter | default |"
    yield "| --- | --- |"
    for field in dataclasses.fields(method):
        yield f"| `{field.name}` | `{field.default!r}` |"


def capabilities(slug: str) -> str:
    """Where the probed matrix of methods and families is, if it has the method."""
    file = ROOT / "docs" / "capabilities.md"
    if not file.exists():
        return ""
    lines = file.read_text().splitlines()
    return (
        "See the probed matrix in [capabilities.md](../capabilities.md).\n" if any(slug in one for one in lines) else ""
    )


def measured(slug: str) -> Iterator[str]:
    for name in BEDS:
        lines = results(name)
        for line in lines:
            if name_of(line) == slug and "+" not in line["method"]:
                yield from one_result(line, lines[0], name.replace("_", ", "))
    line = measured_times().get(slug)
    if line is not None:
        ratio, whole = line["ratio"], line["costs"]["ratio"]
        told = {
            "first token": ratio["time_to_first_token"],
            "each further token": ratio["time_per_token"],
            "whole answer": whole["time_per_answer"],
            "tokens read before the first": whole["prefill_tokens"],
            "peak memory": ratio["peak_memory"],
        }
        yield "**Price** (published setting, batch 1, one CPU thread, × the unmodified model): " + (
            ", ".join(f"{name} {times(value)}" for name, value in told.items() if value is not None) + ".\n"
        )


def one_result(line: dict[str, Any], none: dict[str, Any], bed: str) -> Iterator[str]:
    said = ", ".join(f"{name} {percent(value)}" for name, value in line["scores"].items() if value <= 1)
    yield f"**{bed}** (`{shown(line['method'])}`, {line['n']} items, {line['model']}): {said}."
    yield (
        f"On {line['headline']}: {with_interval(line)} against {with_interval(none)} of the unmodified model, "
        f"p = {line['p_value']:.3g}. What changed: {kind(line)}.\n"
    )


def sensitivity(slug: str) -> Iterator[str]:
    """The main strength at each value that was swept on validation scenes."""
    lines = [line for line in results("validation") if name_of(line) == slug]
    if not lines:
        return
    columns = (("pope_random", "accuracy"), ("pope_adversarial", "accuracy"), ("chair_natural", "f1"))
    columns += (("chair_against", "chair_i"), ("chair_against", "recall"))
    found = {(line["bed"], line["method"]): line["scores"] for line in lines}
    yield "## How much depends on the strength\n"
    yield "On validation scenes of picturebook-nano, which the settings were chosen on, %:\n"
    yield "| setting | yes/no with the prior | against | captions with: F1 | against: CHAIR_i | recall |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for spec in dict.fromkeys(line["method"] for line in lines):
        cells = [percent(found[bed, spec][score]) if (bed, spec) in found else "" for bed, score in columns]
        yield f"| `{spec}` | {' | '.join(cells)} |"
    yield ""


def usage(method: type[Method]) -> str:
    if method.attaches:
        return f"with sl.attach(model, sl.{method.__name__}()):\n    output = model.generate(**inputs)"
    return f"reply = sl.{method.__name__}().answer(model, processor, picture, question)"


def page(slug: str, method: type[Method]) -> str:
    entry = paper(slug)
    source = f" ([arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv}))" if entry.arxiv else ""
    module = inspect.getmodule(method)
    parts = [
        "# " + method.__name__ + "\n",
        f"*{entry.title}*, {entry.year}{source}. {entry.idea}\n",
        f"```python\nimport sightline as sl\n\n{usage(method)}\n```\n",
        f"On the command line: `{slug}`, with parameters `{slug}:name=value,name=value`.\n",
        "## What it does\n",
        "```text\n" + inspect.cleandoc(module.__doc__ if module and module.__doc__ else "") + "\n```\n",
        "## Parameters\n",
        inspect.cleandoc(method.__doc__ or "").partition("Args:")[0].strip() + "\n",
        "\n".join(parameters(method)) + "\n",
        "```text\n" + inspect.cleandoc("Args:" + (method.__doc__ or "").partition("Args:")[2]) + "\n```\n",
        "## Where it works\n",
        capabilities(slug),
        "## What was measured here\n",
        "\n".join([*measured(slug), *measured_reduction(RESULTS, slug)]) or "Nothing yet.\n",
        *(["\n".join(sensitivity(slug))] if results("validation") else []),
    ]
    return "\n".join(parts)


def ledger() -> str:
    """The page on the grounding methods: what each does to yes/no questions and captions, by seeds."""
    captions, seeds = [CAPTIONS_HEAD, *caption_rows(), ""], [SEEDS_HEAD, *seed_rows(), ""]
    return "\n".join([LEDGER_HEAD, *yes_no_rows(), "", *captions, *seeds, *pair_rows(), *text_rows()])


LEDGER_HEAD = """# Grounding methods, measured

Made by `scripts/write_docs.py` from `docs/results`, which `scripts/measure_grounding.py` wrote. The built-in model
learnt that some objects come with some places; scenes *with* the prior are as it learnt them, in scenes *against* it
the expected object is missing. Each method is run at its published setting and at the strength that did best on
validation scenes (yes/no: accuracy, mean of both kinds of scene; captions: F1, the same).

*What changed* is told from paired tests of every score against the unmodified model on the same items, adjusted for the
number of methods (Holm, 5 %). A **threshold shift** says yes more or less often on the same order of the items; only
**separation** (AUROC, calibrated accuracy: at the threshold where as many yes are said as are true) tells yes from no
better. Where a plausibility mask rules out yes or no (*masked*), margins tie, and a lower AUROC is not counted.

## Yes/no questions (POPE on the picture world)

(cal.: calibrated accuracy)

| method | with: accuracy | yes | AUROC | cal. | what changed | against: accuracy | yes | AUROC | cal. | what changed |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
CAPTIONS_HEAD = """## Captions (CHAIR on the picture world)

| method | with: CHAIR_i | CHAIR_s | recall | what changed | against: CHAIR_i | CHAIR_s | recall | what changed |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
SEEDS_HEAD = """## The same on three seeds of a smaller model

`sightline train nano --size pico --seed 1` to 3 (0.6 million parameters), each with a soft image of its own.
Differences to the unmodified model in points, picturebook-nano first and then the seeds: a sign that changes from seed
to seed is no effect of the method. In bold: shown by the paired test. A dot: not measured.

| method | yes/no with: accuracy | against: accuracy | AUROC | captions with: CHAIR_i | against: CHAIR_i | recall |
| --- | --- | --- | --- | --- | --- | --- |"""


def by_method(name: str) -> dict[str, dict[str, Any]]:
    return {line["method"]: line for line in results(name)}


def yes_no_rows() -> Iterator[str]:
    beds = [by_method(name) for name in BEDS[:2]]
    for spec in beds[1]:
        if all(spec in bed for bed in beds):
            cells = [yes_no_cells(bed[spec]) for bed in beds]
            yield f"| {link(spec, 'methods')}{peer(spec)} | {' | '.join(cells)} |"


def yes_no_cells(line: dict[str, Any]) -> str:
    names = ("accuracy", "yes_rate", "auroc", "calibrated_accuracy")
    values = [percent(line["scores"][name]) if name in line["scores"] else "" for name in names]
    return " | ".join([*values, kind(line)])


def caption_rows() -> Iterator[str]:
    beds = [by_method(name) for name in BEDS[2:]]
    for spec in beds[1]:
        if all(spec in bed for bed in beds):
            cells = []
            for bed in beds:
                values = [percent(bed[spec]["scores"][name]) for name in ("chair_i", "chair_s", "recall")]
                cells.append(" | ".join([*values, kind(bed[spec])]))
            yield f"| {link(spec, 'methods')}{peer(spec)} | {' | '.join(cells)} |"


def seed_rows() -> Iterator[str]:
    seeds = sorted({file.stem.split("_")[0] for file in (RESULTS / "seeds").glob("*.jsonl")})
    columns = (
        ("pope_random", "accuracy"),
        ("pope_adversarial", "accuracy"),
        ("pope_adversarial", "auroc"),
        ("chair_natural", "chair_i"),
        ("chair_against", "chair_i"),
        ("chair_against", "recall"),
    )
    beds = {bed: [by_method(bed), *(by_method(f"seeds/{seed}_{bed}") for seed in seeds)] for bed, _ in columns}
    specs = dict.fromkeys(spec for models in beds.values() for spec in models[0] if spec != "none" and "+" not in spec)
    for spec in specs:
        cells = [" ".join(difference(model, spec, score) for model in beds[bed]) for bed, score in columns]
        if any(spec in model for models in beds.values() for model in models[1:]):
            yield f"| {link(spec, 'methods')}{peer(spec)} | {' | '.join(cells)} |"


PAIRS_HEAD = """## Two at once

`sightline bench --benchmark pope --split adversarial --items 300 --cost-items 0 --threads 1 --json --pairs --methods
debiasing lacing vista ritual fastervlm:keep=0.25 pai dola > docs/results/pairs.jsonl`: accuracy of the pair, and by how
many points it differs from the better of its two methods; paired test, adjusted for the number of pairs. vista+dola is
refused: both change how late layers vote on the next token.

| pair | accuracy | better alone | beyond it | p |
| --- | --- | --- | --- | --- |"""


def pair_rows() -> Iterator[str]:
    lines = [line for line in results("pairs") if line["pair"]]
    if not lines:
        return
    yield PAIRS_HEAD
    for line in lines:
        pair, accuracy = line["pair"], percent(line["scores"]["accuracy"])
        gain = f"{100 * pair['difference']:+.1f}"
        yield f"| `{pair['pair']}` | {accuracy} | `{pair['better']}` | {gain} | {pair['p_value']:.3f} |"
    yield ""


TEXT_HEAD = """## A text against the picture

`sightline bench --benchmark words-or-vision --option "context={{text}}" --items 200 --batch-size 32 --cost-items 0
--json --methods none {methods} > docs/results/words_or_vision.jsonl`: accuracy without a text, and with one that says
the right answer (match), a wrong one (corruption), or something else (irrelevant); the text preference ratio (TPR), %.
*Heard* is how often the model, without the picture, answers what the text says: at 50 of 100 it does not take in what a
text beside the question says, and its low TPR is no virtue.

| method | base | match | corruption | irrelevant | TPR corruption | TPR irrelevant | heard | what changed |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
TEXT_SCORES = ("base", "match", "corruption", "irrelevant", "tpr_corruption", "tpr_irrelevant", "heard")


def text_rows() -> Iterator[str]:
    lines = results("words_or_vision")
    if not lines:
        return
    yield TEXT_HEAD.format(methods=" ".join(line["method"] for line in lines if line["method"] != "none"))
    for line in lines:
        cells = [percent(line["scores"][name]) if name in line["scores"] else "" for name in TEXT_SCORES]
        yield f"| {link(line['method'], 'methods')}{peer(line['method'])} | {' | '.join(cells)} | {kind(line)} |"
    yield ""


def difference(model: dict[str, dict[str, Any]], spec: str, score: str) -> str:
    """In points, against the unmodified model on the same bed; a dot where it was not measured."""
    if spec not in model or score not in model[spec]["scores"] or score not in model["none"]["scores"]:
        return "·"
    points = 100 * (model[spec]["scores"][score] - model["none"]["scores"][score])
    return f"**{points:+.1f}**" if model[spec]["p_values"].get(score, 1.0) < 0.05 else f"{points:+.1f}"


def between(text: str, marker: str, content: str) -> str:
    start, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->"
    if start not in text or end not in text:
        raise SystemExit(f"README.md lacks the markers {start.strip()} and {end}")
    head, rest = text.split(start, 1)
    return head + start + content + end + rest.split(end, 1)[1]


def files() -> dict[Path, str]:
    """Every derived file and what it should hold."""
    readme = ROOT / "README.md"
    text = between(readme.read_text(), "methods", methods_table())
    text = between(text, "skills", skills_table())
    pages = {ROOT / "docs" / "methods" / f"{slug}.md": page(slug, method) for slug, method in methods().items()}
    written = {
        readme: text,
        ROOT / "docs" / "grounding.md": ledger(),
        ROOT / "docs" / "encoders.md": encoder_page(RESULTS),
        ROOT / "docs" / "reduction.md": reduction_page(RESULTS),
    }
    return written | pages


def main() -> None:
    stale = [path for path, text in files().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        if stale:
            raise SystemExit(f"stale: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run scripts/write_docs.py")
        return
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
