"""The base of methods that answer by several calls: the transcript, batching, and votes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from PIL import Image

from sightline.errors import InputError
from sightline.reasoning.strategy import Strategy, Transcript, vote

PICTURE = Image.new("RGB", (4, 4))


@dataclass(frozen=True)
class AskTwice(Strategy):
    """Asks a question in several wordings at once, and lets the answers vote; then asks whether it is sure."""

    wordings: int = 3

    def steps(self, picture: Image.Image, question: str, ask: Transcript) -> str:
        answers = ask([(picture, f"{question} ({number})") for number in range(self.wordings)])
        best = next(iter(vote(answers)))
        (sure,) = ask([(picture, f"Is it {best}?")])
        return best if sure == "yes" else "unsure"


def test_a_strategy_asks_in_batches_and_keeps_its_transcript() -> None:
    batches: list[int] = []

    def model(questions):  # type: ignore[no-untyped-def]
        batches.append(len(questions))
        return ["yes" if text.startswith("Is it") else "red" if "(1)" not in text else "blue" for _, text in questions]

    answer, transcript = AskTwice().answer(PICTURE, "Which colour?", model)
    assert answer == "red"
    assert batches == [3, 1]
    assert transcript.turns == [
        ("Which colour? (0)", "red"),
        ("Which colour? (1)", "blue"),
        ("Which colour? (2)", "red"),
        ("Is it red?", "yes"),
    ]


def test_a_model_that_loses_an_answer_is_noticed() -> None:
    with pytest.raises(InputError, match="gave 1 answers to 3 questions"):
        AskTwice().answer(PICTURE, "Which colour?", lambda questions: ["red"])


def test_votes_by_hand() -> None:
    assert vote(["a", "b", "a", "c"]) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert vote(["a", "b", "a"], [1, 3, 1]) == {"b": 0.6, "a": 0.4}
    assert sum(vote(["x", "y", "z"], [0.2, 0.7, 0.4]).values()) == pytest.approx(1)
    for answers, weights in (([], None), (["a"], [1, 2]), (["a"], [-1]), (["a", "b"], [0, 0])):
        with pytest.raises(InputError, match="a vote needs answers"):
            vote(answers, weights)
