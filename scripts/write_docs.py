"""Writes what the docs derive from the code and from measured results; nothing in it is typed by hand.

- `docs/methods/<slug>.md`: the paper, the method's own documentation, its parameters, where it works (from
  `docs/capabilities.md`), and what was measured;
- the table of methods and the built-in model's skills, between the markers in `README.md`.

Results are the JSON lines that `sightline bench ... --json` printed, in `docs/results/*.jsonl`. `--check` writes
nothing and exits with 1 where a file is stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sightline.methods import Method, methods
from sightline.papers import paper

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


def verdict(line: dict[str, Any], none: dict[str, Any], higher_is_better: bool = True) -> str:
    """Better, worse, or no difference shown, by the paired test."""
    if line["p_value"] is None:
        return ""
    if line["p_value"] >= 0.05:
        return "no difference shown"
    better = (line["scores"][line["headline"]] > none["scores"][none["headline"]]) == higher_is_better
    return "better" if better else "worse"


def name_of(line: dict[str, Any]) -> str:
    return line["method"].split(":")[0].split("+")[0]


def link(spec: str) -> str:
    slug = spec.split(":")[0]
    return f"[`{spec}`](docs/methods/{slug}.md)" if slug in methods() and "+" not in spec else f"`{spec}`"


def methods_table() -> str:
    pope, chair = results("pope_adversarial"), results("chair_against")
    if not pope:
        return "Not measured yet.\n"
    captions = {line["method"]: line for line in chair}
    rows = [
        "| method | stretch | POPE adversarial, accuracy % | against none | captions: CHAIR_i / recall % "
        "| visual tokens | first token | per token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in pope:
        known = name_of(line) in methods()
        stretch = paper(name_of(line)).stretch if known else ""
        caption = captions.get(line["method"])
        said = "" if caption is None else caption_scores(caption)
        rows.append(
            f"| {link(line['method'])} | {stretch} | {with_interval(line)} | {verdict(line, pope[0])} | {said} "
            f"| {tokens(line['visual_tokens'])} | {times(line['ratio']['time_to_first_token'])} "
            f"| {times(line['ratio']['time_per_token'])} |"
        )
    return "\n".join(rows) + "\n"


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
    for file in sorted(RESULTS.glob("*.jsonl")):
        lines = results(file.stem)
        for line in lines:
            if name_of(line) == slug and "+" not in line["method"]:
                yield from one_result(line, lines[0])


def one_result(line: dict[str, Any], none: dict[str, Any]) -> Iterator[str]:
    higher = not line["headline"].startswith(("chair", "caption_chair"))
    said = ", ".join(f"{name} {percent(value)}" for name, value in line["scores"].items() if value <= 1)
    yield f"**{line['benchmark']}, {line['split']}** (`{line['method']}`, {line['n']} items, {line['model']}): {said}."
    compared = (
        f"On {line['headline']}: {with_interval(line)} against {with_interval(none)} of the unmodified model, "
        f"p = {line['p_value']:.3g}: {verdict(line, none, higher)}."
    )
    if line["time_per_token"] is not None:
        compared += (
            f" Time per token {times(line['ratio']['time_per_token'])}, "
            f"first token {times(line['ratio']['time_to_first_token'])}."
        )
    yield compared + "\n"


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
        "\n".join(measured(slug)) or "Nothing yet.\n",
    ]
    return "\n".join(parts)


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
    return {readme: text, **pages}


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
