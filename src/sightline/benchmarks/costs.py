"""What methods cost on this machine: time to the first token, for each further one and for a whole answer; memory; and
how much prompt the language model reads.

Methods are compared in rounds: in each round every method generates from the same prompt, one right after the other,
and the ratio to the unmodified model is taken within the round, so that a machine that is busy for a while disturbs
both sides alike. Reported are medians over rounds. Memory and the prompt's tokens are measured in passes of their own,
because counting takes time.

The times of the tokens are those of a fixed number of tokens, whatever the answer. A strategy, which asks the model
several times, has none; what compares it is the time of a whole answer, which ends where it ends.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteria, StoppingCriteriaList

from sightline.errors import InputError
from sightline.methods import attach
from sightline.models.anatomy import Anatomy
from sightline.models.answering import Reply, prepare
from sightline.models.conversation import answer, strategy_of

if TYPE_CHECKING:
    from sightline.benchmarks.item import Item
    from sightline.methods import Method

BASELINE = "none"
NEW_TOKENS = 16
LONGEST_EXTRA = 8.0
"""Seconds after which no more rounds are added to the ones that were asked for."""


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds, at batch size 1.

    Attributes:
        time_to_first_token: seconds from the call of `generate` to its first token; encoding the picture, whatever
            the methods do before, and reading the prompt are all in it. None for a strategy.
        time_per_token: seconds for each further token. None for a strategy.
        peak_memory: bytes of all tensors that are alive at once, weights and inputs not counted: during `generate`, or
            for a strategy during a whole answer.
        ratio: these three, time_per_answer and prefill_tokens, divided by those of the unmodified model (for times the
            median of the rounds' ratios); None or absent where there is nothing to divide.
        time_per_answer: seconds for a whole answer, from the question as text to the answer as text, within the item's
            own limit on tokens.
        calls: how many requests were put to the model for an answer, the mean over the items. (Of requests that a
            strategy makes at the same time, equal ones are read once.)
        prefill_tokens: what the language model reads in forwards of more than one token, for one whole answer: the sum
            of rows times columns. The rows that methods add are in it, and the forwards that they make beside the
            generation; not what encoding pictures takes.
    """

    time_to_first_token: float | None
    time_per_token: float | None
    peak_memory: int
    ratio: dict[str, float | None]
    time_per_answer: float | None = None
    calls: float = 1.0
    prefill_tokens: int | None = None


@dataclass(frozen=True)
class _Times:
    """One round of one method, in seconds."""

    first: float | None
    later: float | None
    answer: float
    calls: int


class _Stamps(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        _wait(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class LiveTensors(TorchDispatchMode):
    """While it is on, counts the bytes of the storages that operations make, until the last tensor on each is gone.

    What an operation allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # A view has the storage of its input: nothing new, and not ours if the input is a weight.
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self._live:
                    self._live[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return output

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def measure(
    model: Any,
    processor: Any,
    chosen: Mapping[str, tuple[Method, ...]],
    items: Sequence[Item],
    *,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Measures every entry of `chosen`, which must hold the unmodified model as "none".

    Each item gives a round; after one round that is thrown away, all items have their turn, and again while that takes
    less than a few seconds in all, because the rounds of a small model are short and noisy.

    Returns:
        What costs.json holds: methods (name -> `Cost` as a dict), rounds, new_tokens.
    """
    turns = [_Turn(model, processor, item, new_tokens) for item in items]
    times: dict[str, list[_Times]] = {name: [] for name in chosen}
    names = list(chosen)
    turns[0].round(chosen, names)
    start = time.perf_counter()
    rounds = 0
    while rounds < len(turns) or (rounds < 5 * len(turns) and time.perf_counter() - start < LONGEST_EXTRA):
        # Each round begins with another method, so that none always comes after the same one.
        order = names[rounds % len(names) :] + names[: rounds % len(names)]
        taken = turns[rounds % len(turns)].round(chosen, order)
        for name in names:
            times[name].append(taken[name])
        rounds += 1
    memory = {name: turns[0].memory(chosen[name]) for name in names}
    prefill = {name: turns[0].prefill_tokens(chosen[name]) for name in names}
    costs = {
        name: _cost(times[name], times[BASELINE], (memory[name], memory[BASELINE]), (prefill[name], prefill[BASELINE]))
        for name in names
    }
    return {
        "methods": {name: asdict(cost) for name, cost in costs.items()},
        "rounds": rounds,
        "new_tokens": new_tokens,
    }


def _cost(
    own: Sequence[_Times], base: Sequence[_Times], memory: tuple[int, int], prefill: tuple[int | None, int | None]
) -> Cost:
    """Of the rounds of a method and of the unmodified model, and of what each of them needs and reads."""
    first, first_ratio = _medians([one.first for one in own], [one.first for one in base])
    later, later_ratio = _medians([one.later for one in own], [one.later for one in base])
    whole, whole_ratio = _medians([one.answer for one in own], [one.answer for one in base])
    read, base_read = prefill
    return Cost(
        first,
        later,
        memory[0],
        {
            "time_to_first_token": first_ratio,
            "time_per_token": later_ratio,
            "peak_memory": memory[0] / memory[1],
            "time_per_answer": whole_ratio,
            "prefill_tokens": read / base_read if read is not None and base_read else None,
        },
        whole,
        statistics.fmean(one.calls for one in own),
        read,
    )


def _medians(own: Sequence[float | None], base: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The median, and that of the ratios; None where it was not measured."""
    pairs = [(mine, other) for mine, other in zip(own, base, strict=True) if mine is not None and other is not None]
    if not pairs:
        return None, None
    return statistics.median(mine for mine, _ in pairs), statistics.median(mine / other for mine, other in pairs)


class _Turn:
    """One item, for one method after the other."""

    def __init__(self, model: Any, processor: Any, item: Item, new_tokens: int) -> None:
        self.model, self.processor, self.new_tokens = model, processor, new_tokens
        self.picture = None if item.picture is None else item.picture()
        self.question, self.limit = item.question, item.max_new_tokens
        self.inputs = prepare(model, processor, [self.picture], [self.question])

    def round(self, chosen: Mapping[str, tuple[Method, ...]], order: Sequence[str]) -> dict[str, _Times]:
        """Method -> its times."""
        taken = {}
        gc.collect()
        gc.disable()  # a collection in the middle of one method's turn would be charged to it
        try:
            for name in order:
                first, later = self._tokens(chosen[name])
                _wait(self.model.device)
                start = time.perf_counter()
                calls = self._answer(chosen[name]).calls
                _wait(self.model.device)
                taken[name] = _Times(first, later, time.perf_counter() - start, calls)
        finally:
            gc.enable()
        return taken

    def memory(self, own: tuple[Method, ...]) -> int:
        """The most bytes at once."""
        strategy, methods = strategy_of(own)
        if strategy is not None:
            return self._peak(lambda: self._answer(own))
        with attach(self.model, *methods, processor=self.processor):
            return self._peak(self._generate)

    def prefill_tokens(self, own: tuple[Method, ...]) -> int | None:
        """Rows times columns of what the language model reads in pieces; None where it is not known."""
        try:
            language_model = Anatomy.of(self.model, self.processor).language_model
        except InputError:
            return None
        read = 0

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal read
            # After the forward: a hook before it would not see the rows that methods add.
            rows, columns = kwargs["inputs_embeds"].shape[:2]
            read += rows * columns if columns > 1 else 0

        handle = language_model.register_forward_hook(count, with_kwargs=True)
        try:
            self._answer(own)
        finally:
            handle.remove()
        return read

    def _tokens(self, own: tuple[Method, ...]) -> tuple[float | None, float | None]:
        """Seconds to the first token, and for each further one; a strategy has none."""
        strategy, methods = strategy_of(own)
        if strategy is not None:
            return None, None
        with attach(self.model, *methods, processor=self.processor):
            stamps = _Stamps()
            _wait(self.model.device)
            start = time.perf_counter()
            self._generate(stopping_criteria=StoppingCriteriaList([stamps]))
        first, last = stamps.times[0], stamps.times[-1]
        return first - start, (last - first) / (len(stamps.times) - 1)

    def _answer(self, own: tuple[Method, ...]) -> Reply:
        return answer(self.model, self.processor, self.picture, self.question, own, self.limit)

    def _generate(self, **more: Any) -> None:
        """Exactly `new_tokens` tokens: until then the end token is ruled out."""
        exactly = {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}
        self.model.generate(**self.inputs, **exactly, do_sample=False, num_beams=1, **more)

    def _peak(self, work: Callable[[], object]) -> int:
        device = self.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            work()
            return torch.cuda.max_memory_allocated(device) - before
        gc.collect()
        with LiveTensors() as tensors:
            work()
        return tensors.peak


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock read now tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
