"""What methods cost: the arithmetic of rounds, and what is counted. No test looks at how long anything takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint

from sightline.benchmarks import costs
from sightline.benchmarks.costs import LiveTensors, measure
from sightline.benchmarks.item import get_benchmark
from sightline.methods import parse_methods
from sightline.models.loading import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


def test_live_tensors_counts_what_is_alive_at_once() -> None:
    weight = torch.randn(100, 100)
    with LiveTensors() as tensors:
        a = torch.zeros(1000)
        assert tensors.now == 4000
        b = a.view(10, 100)[2:]  # shares the storage
        c = weight.t()  # a weight's storage is not ours
        assert tensors.now == 4000
        del a
        assert tensors.now == 4000
        del b
        assert tensors.now == 0
        d = c @ weight
        d += 1
        e = [d * 2, d.bool()]
        assert tensors.now == 40_000 + 40_000 + 10_000
        e.clear()
        assert tensors.now == 40_000
    assert tensors.peak == 90_000


def test_costs_are_medians_over_rounds_and_medians_of_ratios() -> None:
    own = [(0.2, 0.03), (0.8, 0.05), (0.3, 0.01)]
    base = [(0.1, 0.01), (0.2, 0.05), (0.3, 0.04)]
    cost = costs._cost(own, 50, base, 200)
    assert cost.time_to_first_token == 0.3
    assert cost.time_per_token == 0.03
    assert cost.peak_memory == 50
    assert cost.ratio == {
        "time_to_first_token": pytest.approx(2.0),
        "time_per_token": pytest.approx(1.0),
        "peak_memory": 0.25,
    }


def test_measured_costs(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(checkpoint)
    # Every token but one would end the answer at once, so the fixed number of tokens has to be forced.
    model.generation_config.eos_token_id = [token for token in range(model.config.text_config.vocab_size) if token != 9]
    made: list[tuple[str, int]] = []
    real = model.generate

    def generate(**kwargs: Any) -> Any:
        output = real(**kwargs)
        made.append(("generate", output.shape[1] - kwargs["input_ids"].shape[1]))
        return output

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(costs, "LONGEST_EXTRA", 0.0)
    chosen = {"none": (), "fastervlm:keep=0.05": parse_methods("fastervlm:keep=0.05")}
    measured = measure(model, processor, chosen, get_benchmark("pope").items("random", 3), new_tokens=6)
    assert measured["rounds"] == 3
    assert made == [("generate", 6)] * (2 * (1 + 3) + 2), "a warm-up, three rounds and the memory pass"
    none, fewer = (measured["methods"][name] for name in chosen)
    assert none["ratio"] == {"time_to_first_token": 1.0, "time_per_token": 1.0, "peak_memory": 1.0}
    assert all(none[name] > 0 for name in ("time_to_first_token", "time_per_token", "peak_memory"))
    assert fewer["peak_memory"] < none["peak_memory"]
    assert fewer["ratio"]["peak_memory"] == fewer["peak_memory"] / none["peak_memory"]
