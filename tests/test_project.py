"""What holds for the repository as a whole: its commands, its licence, its dependencies, and what it promises."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sightline

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted((ROOT / "src").rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
RECIPES = {
    "install": ["pip install"],
    "demo": ["pip install", "sightline bench --model picturebook-nano", "sightline report runs/demo"],
    "test": ["[dev]", "OMP_NUM_THREADS=1", "-m pytest"],
    "check": ["[dev]", "-m ruff check .", "-m ruff format --check .", "-m mypy"],
    "bench": ["pip install", "benchmarks/*.py"],
    "train": ["pip install", "sightline train nano"],
}


def text(*parts: str) -> str:
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def test_the_version_is_said_once() -> None:
    assert sightline.__version__ == version("sightline") == PROJECT["project"]["version"]


def test_the_licence_is_apache() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    licence = text("LICENSE")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.parametrize("name", ["papers.toml", "py.typed"])
def test_what_the_package_reads_lies_in_it(name: str) -> None:
    assert files("sightline").joinpath(name).is_file()


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make in a folder that holds what it reads and nothing else, so that every step is still to be done."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    # When the tests were started by make, its settings must not reach this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", RECIPES)
def test_each_target_makes_the_environment_that_it_needs(target: str, tmp_path: Path) -> None:
    made = make(tmp_path, "-n", target)
    assert made.returncode == 0
    places = [made.stdout.index(step) for step in ("-m venv", "--constraint constraints.txt", *RECIPES[target][1:])]
    assert places == sorted(places)
    assert RECIPES[target][0] in made.stdout


def test_make_says_clearly_that_no_python_is_new_enough(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    made = make(tmp_path, "install", f"PYTHON={old}")
    assert made.returncode != 0
    assert "No Python 3.11 or newer" in made.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_gate_runs_the_checks_and_the_tests() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in text(".ci", "run")
    assert re.findall(r"^make (\w+)$", text(".ci", "run"), re.MULTILINE) == ["check", "test"]


def test_every_dependency_is_pinned_at_a_version_that_is_allowed() -> None:
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    pins = {name.lower().replace("_", "-"): pin for name, pin in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    optional = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in optional.values() for line in extra)]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line


def test_transformers_has_no_upper_cap() -> None:
    (transformers,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("transformers"))
    assert [specifier.operator for specifier in Requirement(transformers).specifier] == [">="]


def imported_at_import_time(path: Path) -> Iterator[str]:
    """Top-level names of the packages that a module imports when it is imported, those for annotations left out."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def test_importing_the_package_needs_no_more_than_its_core_dependencies() -> None:
    core = {Requirement(line).name for line in PROJECT["project"]["dependencies"]} - {"pillow"} | {"PIL", "sightline"}
    for path in SOURCES:
        others = set(imported_at_import_time(path)) - core - sys.stdlib_module_names
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"


@pytest.mark.parametrize("stretch", ["reduction", "grounding"])
def test_methods_know_no_model_class(stretch: str) -> None:
    for path in (ROOT / "src" / "sightline" / stretch).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert not (node.module or "").startswith("transformers.models"), path
                assert not [alias.name for alias in node.names if re.search(r"For[A-Z]\w+$|Config$", alias.name)], path


@pytest.mark.parametrize(
    ("pattern", "promise"),
    [
        (r"trust_remote_code\s*=\s*True", "remote code runs only where the user asked for it"),
        (r"torch\.load\(|import pickle|pickle\.load", "nothing is unpickled"),
        (r"MAX_IMAGE_PIXELS\s*=|LOAD_TRUNCATED_IMAGES\s*=", "Pillow's global settings are left alone"),
    ],
)
def test_the_source_keeps_what_is_promised(pattern: str, promise: str) -> None:
    assert SOURCES
    broken = [str(path.relative_to(ROOT)) for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert not broken, promise


def test_no_file_has_more_than_600_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in CODE
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long


def test_no_file_is_a_drawer_of_leftovers() -> None:
    assert not [
        path for path in CODE if path.stem.strip("_") in {"utils", "util", "helpers", "helper", "manager", "misc"}
    ]


def test_hooks_download_nothing() -> None:
    assert set(re.findall(r"repo: (\S+)", text(".pre-commit-config.yaml"))) == {"local"}
    assert set(re.findall(r"language: (\S+)", text(".pre-commit-config.yaml"))) <= {"system", "fail"}
