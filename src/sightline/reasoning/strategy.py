"""The kind of method that answers a question by several calls of a model rather than by changing one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from sightline.errors import InputError

Ask = Callable[[Sequence[tuple[Image.Image, str]]], list[str]]
"""Answers of a model to a batch of (picture, question)."""


@dataclass
class Transcript:
    """What a strategy asked, and what it was answered, call by call."""

    ask: Ask
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(question, answer) in the order of asking."""

    def __call__(self, questions: Sequence[tuple[Image.Image, str]]) -> list[str]:
        """Asks a batch and writes it down."""
        answers = self.ask(questions)
        if len(answers) != len(questions):
            raise InputError(f"the model gave {len(answers)} answers to {len(questions)} questions")
        self.turns += [(question, answer) for (_, question), answer in zip(questions, answers, strict=True)]
        return answers


@dataclass(frozen=True)
class Strategy(ABC):
    """A way to reach one answer through several; a paper's file writes `steps`.

    It works on top of whatever methods are attached to the model, and its own hyper-parameters are its fields.
    """

    @abstractmethod
    def steps(self, picture: Image.Image, question: str, ask: Transcript) -> str:
        """Asks what it needs through `ask`, which takes batches, and returns the final answer."""

    def answer(self, picture: Image.Image, question: str, ask: Ask) -> tuple[str, Transcript]:
        """The final answer, and the transcript of how it came about."""
        transcript = Transcript(ask)
        return self.steps(picture, question, transcript), transcript


def vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> dict[str, float]:
    """The share of the weight that each answer got; shares sum to one, the first given answer leads among equals.

    Raises:
        InputError: when there are no answers, or the weights do not fit.
    """
    weights = [1.0] * len(answers) if weights is None else weights
    if not answers or len(weights) != len(answers) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError("a vote needs answers, and one weight that is not negative for each, not all zero")
    tally: Counter[str] = Counter()
    for answer, weight in zip(answers, weights, strict=True):
        tally[answer] += weight  # type: ignore[assignment]
    return {answer: weight / sum(weights) for answer, weight in tally.most_common()}
