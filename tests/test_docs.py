"""The docs say what the code and the result files say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from sightline.methods import methods

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def write_docs() -> ModuleType:
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

    def line(method: str, accuracy: float, p: float | None, tokens: float) -> str:
        return json.dumps(
            {
                "method": method,
                "headline": "accuracy",
                "scores": {"accuracy": accuracy},
                "interval": [accuracy - 0.02, accuracy + 0.02],
                "p_value": p,
                "visual_tokens": tokens,
                "ratio": {"time_to_first_token": 0.5, "time_per_token": 1.25},
            }
        )

    lines = [line("none", 0.8, None, 100), line("fastervlm:keep=0.25", 0.75, 0.01, 25), line("vhr", 0.81, 0.4, 100)]
    (tmp_path / "pope_adversarial.jsonl").write_text("\n".join(lines) + "\n")
    _, _, none, faster, vhr = write_docs.methods_table().splitlines()
    assert none.startswith("| `none` |  | 80.0 [78.0, 82.0] |  |")
    assert "| [`fastervlm:keep=0.25`](docs/methods/fastervlm.md) | reduction | 75.0 [73.0, 77.0] | worse |" in faster
    assert "| 25 | ×0.50 | ×1.25 |" in faster
    assert "| no difference shown |" in vhr
