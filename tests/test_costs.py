"""What methods cost: the arithmetic of rounds, and what is counted. No test looks at how long anything takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint

from sightline.benchmarks import costs
from sightline.benchmarks.costs import Cost, LiveTensors, _Times, _Turn, measure
from sightline.benchmarks.item import get_benchmark
from sightline.methods import parse_methods
from sightline.models.conversation import Request, Steps, Strategy, Talk
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
    own = [_Times(0.2, 0.03, 1.0, 1), _Times(0.8, 0.05, 4.0, 1), _Times(0.3, 0.01, 2.0, 1)]
    base = [_Times(0.1, 0.01, 1.0, 1), _Times(0.2, 0.05, 1.0, 1), _Times(0.3, 0.04, 4.0, 1)]
    cost = costs._cost(own, base, (50, 200), (300, 100))
    assert cost.time_to_first_token == 0.3
    assert cost.time_per_token == 0.03
    assert (cost.time_per_answer, cost.calls, cost.prefill_tokens) == (2.0, 1.0, 300)
    assert cost.peak_memory == 50
    assert cost.ratio == {
        "time_to_first_token": pytest.approx(2.0),
        "time_per_token": pytest.approx(1.0),
        "peak_memory": 0.25,
        "time_per_answer": pytest.approx(1.0),
        "prefill_tokens": 3.0,
    }


def test_a_strategy_has_no_times_of_tokens() -> None:
    own = [_Times(None, None, 3.0, 6), _Times(None, None, 5.0, 9)]
    base = [_Times(0.1, 0.01, 1.0, 1), _Times(0.1, 0.01, 1.0, 1)]
    cost = costs._cost(own, base, (50, 50), (None, None))
    assert (cost.time_to_first_token, cost.time_per_token, cost.prefill_tokens) == (None, None, None)
    assert (cost.time_per_answer, cost.calls) == (4.0, 7.5)
    assert cost.ratio == {
        "time_to_first_token": None,
        "time_per_token": None,
        "peak_memory": 1.0,
        "time_per_answer": 4.0,
        "prefill_tokens": None,
    }


def test_what_was_written_before_still_loads() -> None:
    ratio = {"time_to_first_token": 1.5, "time_per_token": 1.2, "peak_memory": 1.0}
    cost = Cost(**{"time_to_first_token": 0.1, "time_per_token": 0.01, "peak_memory": 7, "ratio": ratio})
    assert (cost.time_per_answer, cost.calls, cost.prefill_tokens) == (None, 1.0, None)


def test_measured_costs(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(checkpoint)
    # Every token but one would end the answer at once, so the fixed number of tokens has to be forced.
    model.generation_config.eos_token_id = [token for token in range(model.config.text_config.vocab_size) if token != 9]
    made: list[int] = []
    real = model.generate

    def generate(**kwargs: Any) -> Any:
        output = real(**kwargs)
        made.append(getattr(output, "sequences", output).shape[1] - kwargs["input_ids"].shape[1])
        return output

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(costs, "LONGEST_EXTRA", 0.0)
    chosen = {"none": (), "fastervlm:keep=0.05": parse_methods("fastervlm:keep=0.05")}
    measured = measure(model, processor, chosen, get_benchmark("pope").items("random", 3), new_tokens=6)
    assert measured["rounds"] == 3
    rounds, memory, prompts = [6, 1] * (2 * (1 + 3)), [6] * 2, [1] * 2
    assert made == [*rounds, *memory, *prompts], "a warm-up and three rounds of tokens and an answer, two passes"
    none, fewer = (measured["methods"][name] for name in chosen)
    assert none["ratio"] == dict.fromkeys(none["ratio"], 1.0)
    timed = ("time_to_first_token", "time_per_token", "peak_memory", "time_per_answer")
    assert all(none[name] > 0 for name in timed)
    assert set(none["ratio"]) == {*timed, "prefill_tokens"}
    assert fewer["peak_memory"] < none["peak_memory"]
    assert fewer["ratio"]["peak_memory"] == fewer["peak_memory"] / none["peak_memory"]


def test_prompt_tokens_are_rows_times_columns(checkpoint: str) -> None:
    model, processor = load(checkpoint)
    item = get_benchmark("pope").items("random", 1)[0]
    turn = _Turn(model, processor, item, 3)
    length = turn.inputs["input_ids"].shape[1]
    assert length > 100

    def read(spec: str) -> int:
        count = turn.prefill_tokens(parse_methods(spec))
        assert count is not None
        return count

    assert read("none") == length
    assert read("fastervlm:keep=0.1") == length - 90
    assert read("ritual") == 2 * length, "the transformed picture rides as a row of its own"
    # VISTA reads the prompt in two rows before it reads it once more.
    assert read("vista") == 3 * length
    assert read("fastervlm:keep=0.1+ritual") == 2 * (length - 90)


@dataclass(frozen=True)
class Twice(Strategy):
    """Asks the same again."""

    paper: ClassVar[str] = "twice"

    def identity(self) -> Self:
        return self

    def steps(self, picture: Any, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        yield [Request(picture, question, 5)]
        (last,) = yield [Request(picture, question, 2)]
        return last


def test_a_strategys_costs(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(checkpoint)
    monkeypatch.setattr(costs, "LONGEST_EXTRA", 0.0)
    items = get_benchmark("pope").items("random", 2)
    ritual = parse_methods("ritual")
    measured = measure(model, processor, {"none": (), "twice": (Twice(),), "both": (Twice(), *ritual)}, items)
    none, twice, both = measured["methods"].values()
    assert (none["calls"], twice["calls"], both["calls"]) == (1, 2, 2)
    assert twice["time_to_first_token"] is None
    assert twice["time_per_token"] is None
    assert twice["time_per_answer"] > 0
    assert twice["peak_memory"] > 0
    assert twice["ratio"]["prefill_tokens"] == 2
    assert both["ratio"]["prefill_tokens"] == 4
