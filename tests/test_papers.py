"""The catalogue: 94 papers, and a status that follows from the code alone."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import sightline.papers
from sightline.errors import InputError
from sightline.papers import STRETCHES, _assigned, as_dict, paper, papers, peers, read_catalogue

PACKAGE = Path(sightline.papers.__file__).parent
ENTRY = """
[looker]
title = "Looking Twice"
stretch = "grounding"
year = 2024
arxiv = "2401.00001"
idea = "Look again before answering."
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "grounding").mkdir()
    (tmp_path / "papers.toml").write_text(ENTRY, encoding="utf-8")
    return tmp_path


def write_paper(package: Path, source: str) -> None:
    (package / "grounding" / "looker.py").write_text(source, encoding="utf-8")


def test_there_are_94_papers_in_the_order_of_the_road() -> None:
    assert len(papers()) == len({entry.slug for entry in papers()}) == 94
    assert list(dict.fromkeys(entry.stretch for entry in papers())) == list(STRETCHES)
    assert Counter(entry.stretch for entry in papers()) == {
        "encoders": 21,
        "connectors": 14,
        "reduction": 12,
        "grounding": 9,
        "objectives": 13,
        "reasoning": 10,
        "benchmarks": 10,
        "probes": 4,
        "models": 1,
    }


def test_every_entry_is_printable_and_plausible() -> None:
    for entry in papers():
        assert 2010 <= entry.year <= 2026, entry
        assert entry.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv), entry
        assert entry.idea.endswith((".", "?")), entry
        for text in (entry.title, entry.idea):
            assert text == " ".join(text.split()), entry
            assert "\\" not in text, entry


def test_no_two_papers_share_a_title_an_idea_or_an_arxiv_number() -> None:
    for values in zip(*[(entry.title, entry.idea) for entry in papers()], strict=True):
        assert len(set(values)) == 94
    numbers = [entry.arxiv for entry in papers() if entry.arxiv]
    assert len(set(numbers)) == len(numbers)


def test_the_fields_of_the_json_output_are_frozen() -> None:
    entry = as_dict(paper("fastervlm"))
    assert list(entry) == ["slug", "title", "stretch", "status", "object"]
    assert json.loads(json.dumps(entry)) == entry
    assert entry["stretch"] == "reduction"


def test_a_stretch_can_be_asked_for() -> None:
    assert [entry.slug for entry in papers("models")] == ["nanovlms"]
    assert sum(len(papers(stretch)) for stretch in STRETCHES) == 94
    with pytest.raises(InputError, match=r"unknown stretch 'encoder'.*did you mean 'encoders'"):
        papers("encoder")


def test_an_unknown_paper_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown paper 'fastvm'.*did you mean 'fastvlm'"):
        paper("fastvm")


def test_a_file_makes_a_paper_implemented(package: Path) -> None:
    (planned,) = read_catalogue(package, "tiny")
    assert (planned.status, planned.object) == ("planned", None)
    # Heavy or missing dependencies do not matter: the file is never imported.
    write_paper(
        package,
        "import a_module_that_does_not_exist\n"
        "class Base:\n    paper: ClassVar[str]\n"
        "class Looker(Base):\n    strength: float = 1.0\n    paper: ClassVar[str] = 'looker'\n",
    )
    (implemented,) = read_catalogue(package, "tiny")
    assert (implemented.status, implemented.object) == ("implemented", "tiny.grounding.looker.Looker")


def test_an_entry_more_and_a_file_more_are_one_paper_more(package: Path) -> None:
    with (package / "papers.toml").open("a", encoding="utf-8") as file:
        file.write(ENTRY.replace("looker", "blinker").replace("grounding", "probes"))
    (package / "probes").mkdir()
    (package / "probes" / "blinker.py").write_text("class Blinker:\n    paper = 'blinker'\n", encoding="utf-8")
    assert [(entry.slug, entry.object) for entry in read_catalogue(package, "tiny")] == [
        ("looker", None),
        ("blinker", "tiny.probes.blinker.Blinker"),
    ]


def test_a_file_in_another_stretch_does_not_count(package: Path) -> None:
    (package / "probes").mkdir()
    (package / "probes" / "looker.py").write_text("class Looker:\n    paper = 'looker'\n", encoding="utf-8")
    assert read_catalogue(package)[0].status == "planned"


@pytest.mark.parametrize("source", ["", "class Looker:\n    paper = ''\n", "class Looker:\n    def paper(self): ...\n"])
def test_a_file_that_claims_nothing_implements_nothing(package: Path, source: str) -> None:
    write_paper(package, source)
    assert read_catalogue(package)[0].status == "planned"


@pytest.mark.parametrize(
    "source",
    [
        "PAPER = 'looker'\nOBJECT = 'look'\ndef look(): ...\n",
        "PAPER: Final = 'looker'\nOBJECT: Final = 'look'\nlook = partial(print, 1)\n",
        "PAPER = 'looker'\nOBJECT = 'look'\nclass look:\n    paper = 'looker'\nclass Other:\n    paper = 'looker'\n",
    ],
)
def test_constants_name_a_function_or_choose_among_classes(package: Path, source: str) -> None:
    write_paper(package, source)
    assert read_catalogue(package)[0].object == "sightline.grounding.looker.look"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Other:\n    paper = 'luker'\n", r"looker.py: holds another paper's Other \(of 'luker'\)"),
        ("class A:\n    paper = 'looker'\nclass B:\n    paper = 'looker'\n", "A, B all claim the paper"),
        ("PAPER = 'looker'\ndef look(): ...\n", "OBJECT the name of something .* not 'looker' and None"),
        ("PAPER = 'looker'\nOBJECT = 'loook'\ndef look(): ...\n", "not 'looker' and 'loook'"),
        ("PAPER = 'looker'\nOBJECT = 'look'\nlook: Callable[[], None]\n", "not 'looker' and 'look'"),
        ("PAPER = 'luker'\nOBJECT = 'look'\ndef look(): ...\n", "PAPER must be 'looker'"),
        ("OBJECT = 'look'\ndef look(): ...\n", "PAPER must be 'looker'"),
    ],
)
def test_a_file_that_contradicts_the_catalogue_is_refused(package: Path, source: str, message: str) -> None:
    write_paper(package, source)
    with pytest.raises(InputError, match=message):
        read_catalogue(package)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"grounding"', '"ground"', "unknown stretch of papers.toml.*did you mean 'grounding'"),
        ("idea =", "ideas =", "unknown field of .*looker.* 'ideas'.*did you mean 'idea'"),
        ("year = 2024\n", "", "the field 'year' is missing"),
        ("2024\n", '"2024"\n', "'year' must be a whole number"),
        ("2024\n", "true\n", "'year' must be a whole number"),
        ('"Looking Twice"', '""', "'title' must be a text that is not empty"),
        ("Look again before", "Look again " * 10, "the idea has 1.. characters, at most 100"),
        ("year = ", 'status = "implemented"\nyear = ', "'status' is read from the code"),
        ("year = ", 'object = "Looker"\nyear = ', "'object' is read from the code"),
        ("[looker]", "[look-er]", "name can name a Python file"),
        ("[looker]", "[looker]\n[looker]", "papers.toml cannot be read"),
        ("[looker]", "looker = 3\n[x]", "a paper is a table"),
    ],
)
def test_a_damaged_catalogue_is_refused(package: Path, old: str, new: str, message: str) -> None:
    assert old in ENTRY
    (package / "papers.toml").write_text(ENTRY.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_catalogue(package)


def test_the_arxiv_number_may_be_missing(package: Path) -> None:
    (package / "papers.toml").write_text(ENTRY.replace('arxiv = "2401.00001"\n', ""), encoding="utf-8")
    assert read_catalogue(package)[0].arxiv is None


def test_every_implemented_object_exists_and_says_which_paper_it_is() -> None:
    for entry in (*papers(), *peers()):
        if entry.object is not None:
            module, _, name = entry.object.rpartition(".")
            found = getattr(importlib.import_module(module), name)
            assert getattr(found, "paper", entry.slug) == entry.slug


def test_every_file_that_is_named_by_a_paper_implements_it_and_has_a_test() -> None:
    tests = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    for entry in (*papers(), *peers()):
        if (PACKAGE / entry.stretch / f"{entry.slug}.py").exists():
            assert entry.status == "implemented", f"{entry.slug}.py does not say that it is the paper"
            assert f"test_{entry.slug}.py" in tests, f"{entry.slug} has no test of its own"


def test_a_paper_is_claimed_nowhere_but_in_its_file() -> None:
    own = {PACKAGE / entry.stretch / f"{entry.slug}.py" for entry in (*papers(), *peers())}
    for path in set(PACKAGE.rglob("*.py")) - own:
        module = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"PAPER", "OBJECT"} & _assigned(module.body).keys(), path
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                assert not _assigned(node.body).get("paper"), f"{path}: {node.name}"
