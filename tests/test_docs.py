"""The docs say what the code and the result files say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sightline.methods import methods

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def write_docs() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))  # as Python has it for a script
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_page_and_none_is_stale(write_docs: ModuleType) -> None:
    wanted = write_docs.files()
    assert {path.stem for path in wanted if path.parent.name == "methods"} == set(methods())
    assert {path.name for path in (ROOT / "docs" / "methods").iterdir()} == {f"{name}.md" for name in methods()}
    stale = [path.name for path, text in wanted.items() if path.read_text() != text]
    assert not stale, f"run scripts/write_docs.py: {stale}"


def test_a_result_becomes_a_row(write_docs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_docs, "RESULTS", tmp_path)
    assert write_docs.methods_table() == "Not measured yet.\n"

    def line(method: str, accuracy: float, change: str, tokens: float) -> str:
        return json.dumps(
            {
                "method": method,
                "headline": "accuracy",
                "scores": {"accuracy": accuracy},
                "interval": [accuracy - 0.02, accuracy + 0.02],
                "change": {"kind": change} if change else None,
                "visual_tokens": tokens,
                "ratio": {"time_to_first_token": 0.5, "time_per_token": 1.25},
                "costs": {"ratio": {"time_per_answer": 0.75}},
            }
        )

    lines = [
        line("none", 0.8, "", 100),
        line("fastervlm:keep=0.25", 0.75, "separation worse", 25),
        line("pai", 0.81, "no difference shown", 100),
        line("pai:alpha=0.1", 0.81, "no difference shown", 100),
    ]
    (tmp_path / "pope_adversarial.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "costs.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "chosen.json").write_text(json.dumps({"yes/no": {"pai": "pai:alpha=0.1"}, "captions": {}}))
    _, _, none, faster, pai = write_docs.methods_table().splitlines()
    assert none.startswith("| `none` | 80.0 [78.0, 82.0] |  |")
    assert "| [`fastervlm:keep=0.25`](docs/methods/fastervlm.md) | 75.0 [73.0, 77.0] | separation worse |" in faster
    assert faster.endswith("| 25 | ×0.50 | ×1.25 | ×0.75 |")
    assert "(peer) | 81.0 [79.0, 83.0] | no difference shown |" in pai
