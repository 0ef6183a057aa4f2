"""The runner: what it asks, what it writes, what survives a kill, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from bench_runs import THREE, TOKENS, Tints, lines, small_run
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from torch import Tensor

from sightline import bench
from sightline.bench import fingerprint, run
from sightline.benchmarks import item, run_folder
from sightline.benchmarks.costs import Cost
from sightline.benchmarks.item import Answer, Item, Score, get_benchmark, register_benchmark
from sightline.benchmarks.run_folder import RunFolder
from sightline.benchmarks.statistics import holm, wilson
from sightline.benchmarks.summary import summarise
from sightline.errors import InputError
from sightline.files import write_json
from sightline.methods import _REGISTERED, Method, attach, parse_methods
from sightline.models.answering import reply
from sightline.models.loading import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


@pytest.fixture
def tints(monkeypatch: pytest.MonkeyPatch) -> type[Tints]:
    item.list_benchmarks()  # imports them, so that they are registered for good
    monkeypatch.setattr(item, "_registry", dict(item._registry))
    register_benchmark("tints")(Tints)
    monkeypatch.setattr(Tints, "broken", set())
    return Tints


# --- What is asked and written ---


def test_answers_are_those_of_plain_generate_one_by_one(checkpoint: str, tmp_path: Path) -> None:
    small_run(checkpoint, tmp_path / "run")
    model, processor = load(checkpoint)
    items = get_benchmark("pope").items("adversarial", 8)
    rows = lines(tmp_path / "run")
    assert [(row["method"], row["id"]) for row in rows] == [(m, i.id) for m in THREE for i in items]
    yes, no = (processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" yes", " no"))
    assert len(yes) == len(no) == 1
    for row in rows:
        asked = next(i for i in items if i.id == row["id"])
        inputs = processor(
            images=asked.picture(), text=f"USER: <image>\n{asked.question} ASSISTANT:", return_tensors="pt"
        )
        with attach(model, *parse_methods(row["method"]), processor=processor) as attached:
            output = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        end = new.index(2) if 2 in new else len(new)
        assert row["n_tokens"] == end
        assert row["cut_off"] == (2 not in new)
        assert row["text"] == processor.tokenizer.decode(new[:end]).strip()
        assert row["question"] == asked.question
        assert row["answer"] == asked.answer
        assert row["visual_tokens_given"] == 100
        kept = attached.kept
        if row["method"].startswith("fastervlm"):
            assert kept is not None
            assert row["kept"] == kept[0][0].tolist() == sorted(row["kept"])
            assert row["visual_tokens"] == len(row["kept"]) == 10
            assert (row["grid"], row["seen"]) == ([10, 10], [0, 0, 1, 1])
        else:
            assert "kept" not in row
            assert row["visual_tokens"] == 100
        scores = output.scores[0][0]
        margin = float(scores[yes[0]] - scores[no[0]])
        if math.isfinite(margin):
            assert row["yes_logit_margin"] == pytest.approx(margin, abs=2e-4)


def test_the_unmodified_model_is_first_and_methods_run_once_as_they_were_spelt(checkpoint: str, tmp_path: Path) -> None:
    summary = small_run(checkpoint, tmp_path, ["fastervlm:keep=0.10", "fastervlm:keep=0.1"], items=3)
    assert [method.method for method in summary.methods] == ["none", "fastervlm:keep=0.10"]


def test_items_fall_into_batches_of_one_limit_each() -> None:
    def made(name: str, limit: int) -> Item:
        return Item(name, "?", "a", lambda: Image.new("RGB", (1, 1)), name, "t", limit)

    items = [made("a", 8), made("b", 64), made("c", 8), made("d", 8), made("e", 64)]
    named = [[one.id for one in batch] for batch in bench._batches(items, 2)]
    assert named == [["a", "c"], ["d"], ["b", "e"]]


def test_fingerprint_tells_weights_apart(checkpoint: str) -> None:
    model, _ = load(checkpoint)
    before = fingerprint(model)
    assert before == fingerprint(load(checkpoint)[0])
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[3, 0] = torch.nextafter(weight[3, 0], torch.tensor(1e9))
    assert fingerprint(model) != before


# --- Going on where a run stopped ---


class Scripted(bench._Runner):
    """Answers from the item alone, without a model."""

    def _answer(self, name: str, own: Any, batch: Any) -> list[dict[str, Any]]:
        return [{"method": name, "id": one.id, "text": f"ä\n{name} {one.id}"} for one in batch]


def scripted_run(folder: RunFolder, methods: list[str], n: int = 3) -> None:
    items = [Item(f"i{k}", "?", "yes", lambda: Image.new("RGB", (1, 1)), "g", "t", 4) for k in range(n)]
    with folder.opened({"seed": 0}, {}, methods):
        runner = Scripted(None, None, get_benchmark("pope"), folder, bench._batches(items, 2))
        done = {(row["method"], row["id"]) for row in folder.rows()}
        for name in methods:
            runner.answer(name, (), done, lambda name, n: None)


def test_a_run_cut_at_any_byte_ends_with_the_same_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    scripted_run(folder, ["none", "vhr"])
    whole = folder.answers_file.read_bytes()
    assert len(whole.splitlines()) == 6
    for end in range(len(whole) + 1):
        folder.answers_file.write_bytes(whole[:end])
        scripted_run(folder, ["none", "vhr"])
        assert folder.answers_file.read_bytes() == whole, f"cut at byte {end}"


def test_a_real_run_cut_in_the_middle_ends_with_the_same_bytes(checkpoint: str, tmp_path: Path) -> None:
    """Also within a batch, with padding, and with a method that draws at random."""
    small_run(checkpoint, tmp_path)
    file = tmp_path / "answers.jsonl"
    whole = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    for end in (0, ends[0], ends[3] + 17, ends[11] - 1, ends[17], ends[20] + 1):
        file.write_bytes(whole[:end])
        small_run(checkpoint, tmp_path)
        assert file.read_bytes() == whole, f"cut at byte {end}"


def test_a_killed_process_loses_and_doubles_nothing(checkpoint: str, tmp_path: Path) -> None:
    arguments = ["bench", "--model", checkpoint, "--split", "adversarial", "--items", "60", "--batch-size", "2"]
    arguments += ["--max-new-tokens", str(TOKENS), "--cost-items", "0", "--methods", *THREE]
    code = "from sightline.cli import app; app()"
    source = str(Path(bench.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--out", str(tmp_path / "killed")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file = tmp_path / "killed" / "answers.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 20):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.read_bytes().count(b"\n") < 180
    options = dict(items=60, batch_size=2)
    small_run(checkpoint, tmp_path / "killed", **options)
    small_run(checkpoint, tmp_path / "whole", **options)
    assert file.read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


def test_methods_can_be_added_to_a_run(checkpoint: str, tmp_path: Path) -> None:
    small_run(checkpoint, tmp_path, ["none"], cost_items=1)
    before = (tmp_path / "answers.jsonl").read_bytes()
    measured = RunFolder(tmp_path).costs()
    assert measured is not None
    assert list(measured["methods"]) == ["none"]
    summary = small_run(checkpoint, tmp_path, ["fastervlm"], cost_items=1)
    after = (tmp_path / "answers.jsonl").read_bytes()
    assert after.startswith(before)
    assert [row["method"] for row in lines(tmp_path)] == ["none"] * 8 + ["fastervlm"] * 8
    assert [method.method for method in summary.methods] == ["none", "fastervlm"]
    assert all(method.cost is not None for method in summary.methods)
    stamp = (tmp_path / "costs.json").stat().st_mtime_ns
    small_run(checkpoint, tmp_path, ["fastervlm"], cost_items=1)
    assert (tmp_path / "costs.json").stat().st_mtime_ns == stamp, "finished work was done again"
    assert (tmp_path / "answers.jsonl").read_bytes() == after


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 1}, "seed: 0, now 1"),
        ({"split": "random"}, 'split: "adversarial", now "random"'),
        ({"batch_size": 4}, "batch_size: 3, now 4"),
        ({"options": {"matcher": "strict"}}, "options"),
        ({"items": 4}, "items: 3, now 4"),
        ({"max_new_tokens": 2}, "another item_set"),
        ({"dtype": "bfloat16"}, 'dtype: "float32", now "bfloat16"'),
    ],
)
def test_a_folder_with_other_settings_is_refused(
    checkpoint: str, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    small_run(checkpoint, tmp_path, ["none"], items=3)
    with (tmp_path / "answers.jsonl").open("ab") as file:
        file.write(b'{"half')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="other settings") as error:
        small_run(checkpoint, tmp_path, ["none"], **({"items": 3} | changed))
    assert told in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "a refused folder was touched"


def test_other_weights_are_other_settings(checkpoint: str, tmp_path: Path) -> None:
    small_run(checkpoint, tmp_path / "run", ["none"], items=3)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    info["settings"]["weights"] = "0" * 64
    write_json(tmp_path / "run" / "run.json", info)
    with pytest.raises(InputError, match="another weights"):
        small_run(checkpoint, tmp_path / "run", ["none"], items=3)


def test_two_runs_at_a_time_are_kept_apart(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with RunFolder(tmp_path).opened({}, {}, ["none"]):
        with pytest.raises(InputError, match="another run is writing"):
            with RunFolder(tmp_path).opened({}, {}, ["none"]):
                pass
    with RunFolder(tmp_path).opened({}, {}, ["none"]):
        pass


def test_damaged_folders_are_told_of(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(InputError, match=r"no run\.json"):
        folder.info()
    scripted_run(folder, ["none"])
    content = folder.answers_file.read_bytes().split(b"\n")
    folder.answers_file.write_bytes(b"\n".join([content[0], b"\0\0\0", content[2], b""]))
    with pytest.raises(InputError, match=r"line 2 of .* is damaged"):
        folder.rows()
    folder.answers_file.write_bytes(b"\n".join([content[0], b"\0\0\0", b""]))
    assert len(folder.rows()) == 1, "rubbish at the very end is what a power cut leaves"
    folder.run_file.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        folder.info()
    folder.run_file.write_text('{"format": 99}')
    with pytest.raises(InputError, match="format"):
        folder.info()
    folder.run_file.unlink()
    with pytest.raises(InputError, match=r"answers but no run\.json"):
        scripted_run(folder, ["none"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        scripted_run(RunFolder(tmp_path / "file"), ["none"])


# --- What goes wrong on the way ---


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RunFolder(tmp_path / "whole")
    scripted_run(whole, ["none", "vhr"])
    content = whole.answers_file.read_bytes()
    real = os.write
    for room in (0, 10, len(content) // 2, len(content) - 1):
        folder = RunFolder(tmp_path / str(room))
        left = [room]

        def write(descriptor: int, line: bytes, left: list[int] = left) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real(descriptor, line[: left[0]])
            left[0] -= written
            return written

        with monkeypatch.context() as patch:
            patch.setattr(run_folder.os, "write", write)
            with pytest.raises(InputError, match="the disk is full") as error:
                scripted_run(folder, ["none", "vhr"])
        assert "\n" not in str(error.value)
        kept = folder.answers_file.read_bytes()
        assert content.startswith(kept)
        assert len(kept) <= room
        assert kept == b"" or kept.endswith(b"\n")
        scripted_run(folder, ["none", "vhr"])
        assert folder.answers_file.read_bytes() == content


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    write_json(file, {"old": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="the disk is full"):
            write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file], "a partial file was left behind"
    with pytest.raises(InputError, match="cannot write"):
        write_json(file / "below", {})


def test_a_failed_item_is_recorded_and_the_run_goes_on(
    checkpoint: str, tmp_path: Path, tints: type[Tints], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = dict(batch_size=3, cost_items=1, quiet=True)
    run(checkpoint, "tints", ["vhr"], tmp_path / "well", **options)
    well = {(row["method"], row["id"]): row for row in lines(tmp_path / "well")}

    tints.broken.update({"tint-0", "tint-4"})
    real = reply

    def cursed(model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if any("number 5" in text for text in processor.tokenizer.batch_decode(inputs["input_ids"])):
            raise RuntimeError("number five is cursed")
        return real(model, processor, inputs, *args, **kwargs)

    monkeypatch.setattr(bench, "reply", cursed)
    summary = run(checkpoint, "tints", ["vhr"], tmp_path / "run", **options)
    for row in lines(tmp_path / "run"):
        if row["id"] in ("tint-0", "tint-4"):
            assert row["error"] == f"picture {row['id'][-1]} is gone"
        elif row["id"] == "tint-5":
            assert row["error"] == "RuntimeError: number five is cursed"
        else:
            good = well[row["method"], row["id"]]
            assert "error" not in row
            assert row["text"] == good["text"]
            assert row["question"] == good["question"]
    assert [(method.n, method.failed) for method in summary.methods] == [(4, 3), (4, 3)]

    monkeypatch.setattr(bench, "reply", real)
    tints.broken.clear()
    summary = run(checkpoint, "tints", ["vhr"], tmp_path / "run", **options)
    rows = lines(tmp_path / "run")
    assert [(method.n, method.failed) for method in summary.methods] == [(7, 0), (7, 0)]
    assert {(row["method"], row["id"]): row["text"] for row in rows} == {key: row["text"] for key, row in well.items()}
    assert len(rows) == 14


def test_a_run_in_which_everything_fails_says_so(checkpoint: str, tmp_path: Path, tints: type[Tints]) -> None:
    tints.broken.update(f"tint-{index}" for index in range(7))
    with pytest.raises(InputError, match="every item failed with none: picture 0 is gone"):
        run(checkpoint, "tints", ["none"], tmp_path, quiet=True)


@dataclass(frozen=True)
class Crooked(Method):
    """Changes the logits even at what it calls its identity setting."""

    paper: ClassVar[str] = "crooked"
    strength: float = 1.0

    def identity(self) -> Crooked:
        return replace(self, strength=0.0)

    def logits(self, call: Any, logits: Tensor) -> Tensor:
        changed = logits.clone()
        changed[:, 7] += 1e4
        return changed


def test_a_method_that_is_no_identity_at_its_identity_setting_is_refused(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_REGISTERED, "crooked", Crooked)
    with pytest.raises(InputError, match=r"crooked changes the answers .* identity setting"):
        small_run(checkpoint, tmp_path, ["none", "crooked"])
    assert lines(tmp_path) == [], "answers were taken before the check"
    with pytest.raises(InputError, match="crooked changes"):
        small_run(checkpoint, tmp_path, ["none", "vhr", "crooked"])
    assert RunFolder(tmp_path).info()["identity_checked"] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"methods": ["vhrr"]}, "did you mean 'vhr'"),
        ({"methods": ["fastervlm:keep=7"]}, "keep of fastervlm must lie in"),
        ({"methods": ["vhr+vhr"]}, "given twice"),
        ({"benchmark": "poep"}, "did you mean 'pope'"),
        ({"split": "adversary"}, "did you mean 'adversarial'"),
        ({"options": {"matchr": "pope"}}, "did you mean 'matcher'"),
        ({"items": 0}, "number of items"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"cost_items": -1}, "cost_items must be 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"max_seconds": 0}, "max_seconds must be a number above 0"),
        ({"max_seconds": math.nan}, "max_seconds must be a number above 0"),
        ({"model_name": "picturebook-nanu"}, "unknown model"),
        ({"dtype": "float31"}, "unknown dtype"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    checkpoint: str, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    wanted: dict[str, Any] = dict(model_name=checkpoint, benchmark="pope", methods=["none"], items=3, quiet=True)
    with pytest.raises(InputError) as error:
        run(out=tmp_path / "run", **(wanted | change))
    assert told in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_cannot_work_on_the_model_is_refused_before_anything_is_written(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Crooked, anatomy: Any) -> None:
        raise InputError("crooked needs a tower with a [CLS] token")

    monkeypatch.setitem(_REGISTERED, "crooked", Crooked)
    monkeypatch.setattr(Crooked, "check", refuse)
    with pytest.raises(InputError, match=r"\[CLS\]"):
        small_run(checkpoint, tmp_path / "run", ["none", "crooked"])
    assert not (tmp_path / "run").exists()


# --- The summary ---


def written(folder: Path, answers: dict[str, dict[str, bool | None]]) -> Path:
    """A run whose answers are right (True), wrong (False) or failed (None)."""
    settings = {"benchmark": "tints", "options": {}, "split": "test"}
    run = RunFolder(folder)
    with run.opened(settings, {}, list(answers)):
        for method, own in answers.items():
            for name, hit in own.items():
                facts = {"error": "gone"} if hit is None else {"hit": hit, "readable": name != "b", "cut_off": hit}
                tokens = {"visual_tokens": 100 if method == "none" else 10, "visual_tokens_given": 100}
                run.append([{"method": method, "id": name, "group": name, **facts, **tokens}])
    return folder


def test_summary_compares_on_shared_items_and_corrects_for_many(tmp_path: Path, tints: type[Tints]) -> None:
    names = [chr(97 + index) for index in range(20)]
    base = {name: index < 5 for index, name in enumerate(names)} | {"x": True}
    better = dict.fromkeys(names, True) | {"x": None}
    alike = {name: index < 6 for index, name in enumerate(names)} | {"x": True}
    summary = summarise(written(tmp_path, {"none": base, "better": better, "alike": alike}))
    none, first, second = summary.methods
    # McNemar by hand: 15 discordant pairs, all for `better`: 2 / 2^15; one for `alike`: 1. The item x failed.
    assert [method.p_value for method in (first, second)] == holm([2 / 2**15, 1.0])
    assert first.p_value == pytest.approx(2 * 2 / 2**15)
    assert (none.p_value, first.no_difference_shown, second.no_difference_shown) == (None, False, True)
    assert [(method.n, method.failed) for method in summary.methods] == [(21, 0), (20, 1), (21, 0)]
    assert none.headline == Score(6 / 21, *wilson(6, 21), 21)
    assert none.unparsed == pytest.approx(1 / 21)
    assert none.cut_off == pytest.approx(6 / 21)
    assert (none.visual_tokens, first.visual_tokens, first.visual_tokens_given) == (100, 10, 100)
    assert all(method.cost is None for method in summary.methods)


def test_summary_reads_costs(tmp_path: Path, tints: type[Tints]) -> None:
    folder = written(tmp_path, {"none": {"a": True}})
    cost = Cost(0.02, 0.003, 1000, {"time_to_first_token": 1.0, "time_per_token": 1.0, "peak_memory": 1.0})
    write_json(folder / "costs.json", {"methods": {"none": asdict(cost)}})
    assert summarise(folder).methods[0].cost == cost


def test_summary_of_nothing(tmp_path: Path, tints: type[Tints]) -> None:
    with pytest.raises(InputError, match="no answers yet"):
        summarise(written(tmp_path, {"none": {}}))


def test_answers_carry_the_row_of_the_benchmark() -> None:
    pope = get_benchmark("pope")
    one = pope.items("random", 1)[0]
    row = pope.row(Answer(one, "yes", 1, {"yes_logit_margin": 2.0}))
    assert row["p_yes"] == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert statistics.fmean([row["hit"]]) == (one.answer == "yes")
