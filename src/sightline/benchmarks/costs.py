"""What methods cost on this machine: time to the first token, time for each further one, and memory.

Methods are compared in rounds: in each round every method generates once from the same prompt, one right after the
other, and the ratio to the unmodified model is taken within the round, so that a machine that is busy for a while
disturbs both sides alike. Reported are medians over rounds. Memory is measured in a pass of its own, because counting
tensors takes time.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StoppingCriteria, StoppingCriteriaList

from sightline.methods import attach
from sightline.models.answering import prepare

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
            the methods do before, and reading the prompt are all in it.
        time_per_token: seconds for each further token.
        peak_memory: bytes of all tensors that are alive at once during `generate`, weights and inputs not counted.
        ratio: the same three, divided by those of the unmodified model (the median of the rounds' ratios).
    """

    time_to_first_token: float
    time_per_token: float
    peak_memory: int
    ratio: dict[str, float]


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
    batches = [prepare(model, processor, [item.picture()], [item.question]) for item in items]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    names = list(chosen)
    _round(model, processor, chosen, names, batches[0], new_tokens)
    start = time.perf_counter()
    rounds = 0
    while rounds < len(batches) or (rounds < 5 * len(batches) and time.perf_counter() - start < LONGEST_EXTRA):
        # Each round begins with another method, so that none always comes after the same one.
        order = names[rounds % len(names) :] + names[: rounds % len(names)]
        taken = _round(model, processor, chosen, order, batches[rounds % len(batches)], new_tokens)
        for name in names:
            times[name].append(taken[name])
        rounds += 1
    memory = {name: _memory(model, processor, chosen[name], batches[0], new_tokens) for name in names}
    costs = {name: _cost(times[name], memory[name], times[BASELINE], memory[BASELINE]) for name in names}
    return {
        "methods": {name: asdict(cost) for name, cost in costs.items()},
        "rounds": rounds,
        "new_tokens": new_tokens,
    }


def _cost(
    own: Sequence[tuple[float, float]], memory: int, base: Sequence[tuple[float, float]], base_memory: int
) -> Cost:
    def median(values: Sequence[float]) -> float:
        return float(statistics.median(values))

    ratios = [(first / b_first, later / b_later) for (first, later), (b_first, b_later) in zip(own, base, strict=True)]
    return Cost(
        median([first for first, _ in own]),
        median([later for _, later in own]),
        memory,
        {
            "time_to_first_token": median([first for first, _ in ratios]),
            "time_per_token": median([later for _, later in ratios]),
            "peak_memory": memory / base_memory,
        },
    )


def _round(
    model: Any,
    processor: Any,
    chosen: Mapping[str, tuple[Method, ...]],
    order: Sequence[str],
    inputs: Mapping[str, Any],
    new_tokens: int,
) -> dict[str, tuple[float, float]]:
    """Method -> seconds to the first token, and for each further one."""
    taken = {}
    gc.collect()
    gc.disable()  # a collection in the middle of one method's turn would be charged to it
    try:
        for name in order:
            with attach(model, *chosen[name], processor=processor):
                stamps = _Stamps()
                _wait(model.device)
                start = time.perf_counter()
                _generate(model, inputs, new_tokens, stopping_criteria=StoppingCriteriaList([stamps]))
            first, last = stamps.times[0], stamps.times[-1]
            taken[name] = (first - start, (last - first) / (len(stamps.times) - 1))
    finally:
        gc.enable()
    return taken


def _memory(model: Any, processor: Any, methods: tuple[Method, ...], inputs: Mapping[str, Any], new_tokens: int) -> int:
    with attach(model, *methods, processor=processor):
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
            _generate(model, inputs, new_tokens)
            return torch.cuda.max_memory_allocated(model.device) - before
        gc.collect()
        with LiveTensors() as tensors:
            _generate(model, inputs, new_tokens)
        return tensors.peak


def _generate(model: Any, inputs: Mapping[str, Any], new_tokens: int, **more: Any) -> None:
    """Exactly `new_tokens` tokens: until then the end token is ruled out."""
    model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, **more)


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock read now tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
