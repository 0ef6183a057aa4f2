"""The runner: methods in turn on the same items of a benchmark, on one model, on one machine.

A run is a folder (`benchmarks.run_folder`) to which one line an answer is appended. Killed at any moment and started
again, it asks what is missing and ends with the same lines. Two things make this exact: the items always fall into the
same batches, so that a row's padding and its rounding do not depend on where a run was interrupted; and methods are
attached anew for each batch, so that what they draw at random does not depend on the batches before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sightline.benchmarks.costs import BASELINE, measure
from sightline.benchmarks.flops import DecoderShape, costs_of, stock_cost
from sightline.benchmarks.item import Answer, Benchmark, Item, get_benchmark
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.summary import Summary, summarise
from sightline.errors import InputError
from sightline.files import write_json
from sightline.methods import Method, attach, parse_methods
from sightline.models.anatomy import Anatomy
from sightline.models.answering import UNLIMITED, Budget, Reply, end_tokens, pictures_of, prepare, reply, seen
from sightline.models.conversation import converse, strategy_of
from sightline.models.loading import load

CHECKED_TOKENS = 32
"""How far the identity check follows an answer."""

Chosen = Mapping[str, tuple[Method, ...]]
"""The short form of methods -> the methods."""


def run(
    model_name: str,
    benchmark: str,
    methods: Sequence[str],
    out: Path | None = None,
    *,
    split: str | None = None,
    items: int | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    max_new_tokens: int | None = None,
    max_seconds: float | None = None,
    cost_items: int = 8,
    skip_refused: bool = False,
    quiet: bool = False,
    **model_options: Any,
) -> Summary:
    """Runs methods on a benchmark, or what is left of it, and says what came out.

    Args:
        model_name: a built-in model, a folder or a hub id, as in `load`.
        benchmark: its name.
        methods: short forms such as "fastervlm:keep=0.25+vista". The unmodified model, "none", is what all are
            compared with, and is run first if it is not among them.
        out: the folder of the run; one that holds a run with the same settings is gone on with. By default a folder
            under `runs` that is named by the settings.
        split: one of the benchmark's splits, its first by default.
        items: how many items, the benchmark's usual number by default.
        options: the benchmark's options.
        batch_size: items a batch.
        seed: which items are drawn.
        max_new_tokens: the longest answer, instead of the benchmark's own limit.
        max_seconds: the longest time of generating one answer; whatever is there by then counts. The answers of a batch
            are generated together, so each of them has had the time of its batch.
        cost_items: on how many items times are measured; 0 leaves them out.
        skip_refused: go on without what cannot work on the model or does not compose, and note in run.json why.
        quiet: show no progress.
        model_options: what else `load` takes: dtype, device, attn_implementation, revision, trust_remote_code.

    Raises:
        InputError: for anything in the arguments that cannot be used, a folder with another run, a method that does
            not work on the model or changes its answers at its identity setting, and a full disk.
    """
    chosen = _chosen(methods)
    for name, value, least in (("batch_size", batch_size, 1), ("cost_items", cost_items, 0)):
        if value < least:
            raise InputError(f"{name} must be {least} or more, not {value}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    if max_seconds is not None and not 0 < max_seconds < math.inf:
        raise InputError(f"max_seconds must be a number above 0, not {max_seconds}")
    bench = get_benchmark(benchmark, **(options or {}))
    split = bench.splits[0] if split is None else split
    asked = bench.items(split, items, seed)
    if max_new_tokens is not None:
        asked = [dataclasses.replace(item, max_new_tokens=max_new_tokens) for item in asked]

    model, processor = load(model_name, **model_options)
    refused: dict[str, str] = {}
    for name, own in list(chosen.items()):
        try:
            attach(model, *strategy_of(own)[1], processor=processor).detach()  # before anything is written
        except InputError as error:
            if not skip_refused:
                raise
            refused[name] = str(error)
            del chosen[name]
    settings = {
        "model": model_name,
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "benchmark": bench.name,
        "options": _options(bench),
        "split": split,
        "items": items,
        "item_count": len(asked),
        "seed": seed,
        "batch_size": batch_size,
        "max_seconds": max_seconds,
        "item_set": _digest([(item.id, item.question, item.answer, item.max_new_tokens) for item in asked]),
        "versions": _versions(),
    }
    if out is None:
        out = Path("runs") / f"{Path(model_name).name}-{bench.name}-{split}-{_digest(settings)[:8]}"
    folder = RunFolder(out)
    with folder.opened(settings, _machine(), list(chosen)) as info:
        if refused:
            info["refused"] = info.get("refused", {}) | refused
            folder.update(info)
        budget = Budget(seconds=max_seconds)
        runner = _Runner(model, processor, bench, folder, _batches(asked, batch_size), budget)
        unchecked = {name: own for name, own in chosen.items() if name not in info["identity_checked"]}
        if unchecked:
            runner.check_identity(unchecked)
            info["identity_checked"] += list(unchecked)
            folder.update(info)
        done = {(row["method"], row["id"]) for row in folder.rows()}
        with _progress(len(asked) * len(chosen), quiet) as report:
            for name, own in chosen.items():
                runner.answer(name, own, done, report)
        if cost_items:
            _measure_costs(runner, info, cost_items, quiet)
    return summarise(out)


def fingerprint(model: Any) -> str:
    """The SHA-256 of a model's weights: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Runner:
    """Puts batches of items to a model, and their answers into a folder."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        benchmark: Benchmark,
        folder: RunFolder,
        batches: Sequence[Sequence[Item]],
        budget: Budget = UNLIMITED,
    ) -> None:
        self.model, self.processor, self.budget = model, processor, budget
        self.benchmark, self.folder, self.batches = benchmark, folder, batches
        self.batch_size = max((len(batch) for batch in batches), default=1)
        try:
            self.anatomy: Anatomy | None = Anatomy.of(model, processor)
        except InputError:  # a family that no method knows can still be measured as it is
            self.anatomy = None

    def check_identity(self, chosen: Chosen) -> None:
        """Compares tokens on the first batch that has pictures: stock model, methods at their identity setting, and
        the stock model again once they are detached. A strategy's are those of its answer.

        Raises:
            InputError: if any of them differs.
        """
        for batch in self.batches:
            good, pictures, _ = _open(batch)
            if good and pictures[0] is not None:
                break
        else:
            return  # not one picture can be opened (each item's line will say why), or there are none to act on
        inputs = prepare(self.model, self.processor, pictures, [item.question for item in good])
        limit = min(CHECKED_TOKENS, good[0].max_new_tokens)

        def tokens() -> list[tuple[int, ...]]:
            output = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)
            ends = end_tokens(self.model)
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            return [tuple(itertools.takewhile(lambda token: token not in ends, row)) for row in new]

        stock = tokens()
        for name, own in chosen.items():
            strategy, methods = strategy_of([method.identity() for method in own])
            if strategy is None:
                with attach(self.model, *methods, processor=self.processor):
                    neutral = tokens()
            else:
                questions = [(picture, item.question) for item, picture in zip(good, pictures, strict=True)]
                replies = converse(strategy, self.model, self.processor, questions, limit, methods)
                neutral = [answer.tokens for answer in replies]
            for other, when in ((neutral, "at its identity setting"), (tokens(), "after it is detached")):
                if stock != other:
                    raise InputError(
                        f"{name} changes the answers of this model even {when}, so no comparison with it can be "
                        "trusted; the run is refused"
                    )

    def answer(
        self, name: str, own: tuple[Method, ...], done: set[tuple[str, str]], report: Callable[[str, int], None]
    ) -> None:
        """Answers all items that are not done with one entry's methods."""
        for batch in self.batches:
            missing = [item for item in batch if (name, item.id) not in done]
            if missing:
                # The whole batch again: its padding, and with it the last bits of each number, stay the same.
                rows = self._answer(name, own, batch)
                self.folder.append(row for row in rows if (name, row["id"]) not in done)
            report(name, len(batch))

    def _answer(self, name: str, own: tuple[Method, ...], batch: Sequence[Item]) -> list[dict[str, Any]]:
        good, pictures, failures = _open(batch)
        rows: dict[str, dict[str, Any]] = {}
        try:
            rows |= self._generate(own, good, pictures) if good else {}
        except Exception as error:
            if len(good) == 1:
                failures[good[0].id] = _told(error)
            else:  # find out which of them it was, and keep the others
                for item, picture in zip(good, pictures, strict=True):
                    try:
                        rows |= self._generate(own, [item], [picture])
                    except Exception as its_error:
                        failures[item.id] = _told(its_error)
        return [
            {"method": name, **(rows[item.id] if item.id in rows else _failed(item, failures[item.id]))}
            for item in batch
        ]

    def _generate(self, own: tuple[Method, ...], batch: Sequence[Item], pictures: Sequence[Any]) -> dict[str, Any]:
        """Item id -> the line of its answer."""
        text_only = pictures[0] is None
        # Without a picture there is nothing that the methods could act on, and most refuse a batch that has none.
        strategy, methods = strategy_of(() if text_only else own)
        margin = any(_yes_or_no(item) for item in batch)
        if strategy is not None:
            questions = [(picture, item.question) for item, picture in zip(batch, pictures, strict=True)]
            replies = converse(
                strategy,
                self.model,
                self.processor,
                questions,
                batch[0].max_new_tokens,
                methods,
                batch_size=self.batch_size,
                margin=margin,
                budget=self.budget,
            )
            facts = [{"calls": answer.calls, "generated": answer.generated} for answer in replies]
        else:
            replies, facts = self._one_call(methods, batch, pictures, margin)
        rows = {}
        for item, answer, own_facts in zip(batch, replies, facts, strict=True):
            told: dict[str, Any] = {"question": item.question, "cut_off": answer.cut_off}
            if answer.stopped == "seconds":
                told["stopped"] = answer.stopped
            if text_only:
                told["text_only"] = True
            told |= own_facts
            if _yes_or_no(item) and answer.yes_logit_margin is not None:
                told["yes_logit_margin"] = round(answer.yes_logit_margin, 5)
            rows[item.id] = self.benchmark.row(Answer(item, answer.text, answer.n_tokens, told))
        return rows

    def _one_call(
        self, methods: tuple[Method, ...], batch: Sequence[Item], pictures: Sequence[Any], margin: bool
    ) -> tuple[list[Reply], list[dict[str, Any]]]:
        """The replies of the model with methods on it, and what became of the visual tokens."""
        inputs = prepare(self.model, self.processor, pictures, [item.question for item in batch])
        limit = batch[0].max_new_tokens
        with attach(self.model, *methods, processor=self.processor) as attached:
            replies = reply(self.model, self.processor, inputs, limit, margin=margin, budget=self.budget)
            left, kept, call = attached.visual_tokens, attached.kept, attached.call
        facts: list[dict[str, Any]] = [{} for _ in batch]
        if self.anatomy is None or pictures[0] is None:
            return replies, facts
        given = self.anatomy.visual_positions(inputs["input_ids"]).sum(dim=1).tolist()
        grids = list(self.anatomy.grids(inputs)) if kept is not None else []
        shape, width = DecoderShape.of(self.anatomy.text_config), self.model.dtype.itemsize
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        stock = [stock_cost(shape, *of_row, width) for of_row in zip(lengths, given, strict=True)]
        costs = stock if call is None else costs_of(call, shape, width)
        first = 0  # the row's first picture among all
        for place, told in enumerate(facts):
            told["visual_tokens"] = (left or given)[place]
            told["visual_tokens_given"] = given[place]
            told["layer_visual_tokens"] = round(costs[place].visual_tokens, 3)
            told["prefill_flops"], told["prefill_flops_given"] = costs[place].flops, stock[place].flops
            told["cache_bytes"], told["cache_bytes_given"] = costs[place].cache_bytes, stock[place].cache_bytes
            shown = pictures_of(pictures[place])
            if kept is not None and len(shown) == 1:
                told["kept"] = [int(index) for image in kept[place] for index in image.tolist()]
                if grids[first] is not None:
                    told["grid"] = grids[first]
                    told["seen"] = seen(self.processor, shown[0])
            first += len(shown)
        return replies, facts


def _measure_costs(runner: _Runner, info: Mapping[str, Any], n: int, quiet: bool) -> None:
    """Writes costs.json, unless it has every method of the run: they are only comparable within one measurement."""
    have = (runner.folder.costs() or {"methods": {}})["methods"]
    names = list(info["methods"])
    if all(name in have for name in names):
        return
    good: list[Item] = []
    for batch in runner.batches:
        if batch[0].picture is not None:
            good += _open(batch[: n - len(good)])[0]
        if len(good) >= n:
            break
    if not good:
        return
    # A line and no spinner: one that turns would take time from what is measured.
    Console(stderr=True, quiet=quiet).print("measuring times and memory")
    costs = measure(runner.model, runner.processor, {name: parse_methods(name) for name in names}, good)
    attention = str(getattr(runner.model.config, "_attn_implementation", None))
    write_json(runner.folder.costs_file, costs | {"attention": attention, "machine": _machine()})


def _chosen(specs: Sequence[str]) -> dict[str, tuple[Method, ...]]:
    """Methods by the short form as it was given, those that are the same methods once, the unmodified model first."""
    chosen: dict[str, tuple[Method, ...]] = {BASELINE: ()}
    for spec in specs:
        own = parse_methods(spec)
        if own not in chosen.values():
            chosen["+".join(part.strip() for part in spec.split("+"))] = own
    return chosen


def _batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Items in fixed batches of one limit on tokens each, those without a picture apart."""
    alike: dict[tuple[int, bool], list[Item]] = {}
    for item in items:
        alike.setdefault((item.max_new_tokens, item.picture is None), []).append(item)
    return [own[start : start + size] for own in alike.values() for start in range(0, len(own), size)]


def _open(batch: Sequence[Item]) -> tuple[list[Item], list[Any], dict[str, str]]:
    """The items whose picture can be had, their pictures, and for the other items why not."""
    good, pictures, failures = [], [], {}
    for item in batch:
        try:
            pictures.append(None if item.picture is None else item.picture())
            good.append(item)
        except Exception as error:
            failures[item.id] = _told(error)
    return good, pictures, failures


def _failed(item: Item, message: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "group": item.group,
        "task": item.task,
        "question": item.question,
        "answer": item.answer,
        "error": message,
    }


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _yes_or_no(item: Item) -> bool:
    return item.answer in ("yes", "no")


def _options(benchmark: Benchmark) -> dict[str, Any]:
    """The benchmark's options as JSON can hold them."""
    fields = dataclasses.fields(benchmark)  # type: ignore[arg-type]  # subclasses are dataclasses
    values = {field.name: getattr(benchmark, field.name) for field in fields if field.init}
    loaded: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return loaded


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("sightline")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = "unknown"
    return {"sightline": own, "torch": torch.__version__, "transformers": transformers.__version__}


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, which Python only knows on some systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A function to which the method and the number of items just done are told; it draws on stderr."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda name, n: bar.update(task, advance=n, description=name)
