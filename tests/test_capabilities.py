"""The matrix in docs/capabilities.md lists what is there, and says what a probe finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from families import FAMILIES
from specimens import NAMES, ORDERED_PAIRS

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docs" / "capabilities.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("capabilities", ROOT / "scripts" / "capabilities.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables() -> dict[str, list[list[str]]]:
    """Rows of cells under each heading of the file, the reasons' numbers left out, the head first."""
    found: dict[str, list[list[str]]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found.setdefault(line[3:], [])
        elif found and line.startswith("| ") and not line.startswith("| ---"):
            rows.append([cell.split(" (")[0] for cell in line.strip("| ").split(" | ")])
    return found


def test_the_file_lists_exactly_the_methods_and_families_that_there_are(script: ModuleType) -> None:
    found = tables()
    assert list(found) == [*NAMES, "Two methods at once"]
    for name in NAMES:
        assert found[name][0] == ["family", *script.BEHAVIOURS]
        assert [row[0] for row in found[name][1:]] == list(FAMILIES)
    pairs = found["Two methods at once"]
    assert pairs[0] == ["methods", *FAMILIES]
    assert [row[0] for row in pairs[1:]] == [f"{first}+{second}" for first, second in ORDERED_PAIRS]


def test_every_cell_says_yes_or_refused() -> None:
    cells = [cell for rows in tables().values() for row in rows[1:] for cell in row[1:]]
    assert set(cells) <= {"yes", "refused"}
    assert cells.count("yes") > len(cells) / 3  # half of the pairs are of two reducers, which exclude each other


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_what_a_probe_finds(name: str, script: ModuleType) -> None:
    trials = {family: script.Trial(family) for family in ("llava", "qwen3_vl")}
    for row in script.method_rows(name, trials):
        found = next(line for line in tables()[name] if line[0] == row[0])
        assert found == [cell.partition(": ")[0] for cell in row]


def test_what_goes_wrong_is_written_down(script: ModuleType) -> None:
    trial = script.Trial("llava")
    assert script.tried(trial, [], script.greedy) == "yes"
    assert script.tried(trial, [], lambda trial: False) == "FAILS: another answer than it has to be"
    assert script.tried(trial, [], lambda trial: [][0]) == "FAILS: IndexError: list index out of range"
    lines = list(script.table(["a", "b", "c"], [["x", "yes", "refused: why"], ["y", "refused: why", "FAILS: how"]]))
    assert lines == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| x | yes | refused (1) |",
        "| y | refused (1) | FAILS (2) |",
        "",
        "1. refused: why",
        "2. FAILS: how",
        "",
    ]


def test_check_ends_with_one_where_the_file_is_stale(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "FILE", tmp_path / "docs" / "capabilities.md")
    monkeypatch.setattr(script, "capabilities", lambda: "all is well\n")
    assert script.main(["--check"]) == 1
    assert not script.FILE.exists()
    assert script.main([]) == 0
    assert script.FILE.read_text() == "all is well\n"
    assert script.main(["--check"]) == 0
    monkeypatch.setattr(script, "capabilities", lambda: "| FAILS (1) |\n")
    assert script.main(["--check"]) == 1
    assert "stale: capabilities.md" in capsys.readouterr().err
    assert script.main([]) == 1
