"""The command line: its surface, its exit codes, and what each command does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import call, refused
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint

from sightline import cli
from sightline.cli import app
from sightline.errors import InputError
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import Scene, sample_scene

COMMON_MODEL_OPTIONS = [
    "--attention",
    "--device",
    "--dtype",
    "--model",
    "--revision",
    "--threads",
    "--trust-remote-code",
]
SURFACE = {
    "bench": [
        *COMMON_MODEL_OPTIONS,
        "--annotations",
        "--batch-size",
        "--benchmark",
        "--cost-items",
        "--images",
        "--items",
        "--json",
        "--max-new-tokens",
        "--max-seconds",
        "--methods",
        "--option",
        "--out",
        "--pairs",
        "--questions",
        "--seed",
        "--source",
        "--split",
        "--sweep",
        "--synonyms",
    ],
    "report": ["run"],
    "ask": [
        *COMMON_MODEL_OPTIONS,
        "--frames",
        "--max-new-tokens",
        "--max-seconds",
        "--methods",
        "pictures",
        "question",
    ],
    "attack": [
        *COMMON_MODEL_OPTIONS,
        "--epsilon",
        "--guard-tokens",
        "--items",
        "--iterations",
        "--json",
        "--max-new-tokens",
        "--methods",
        "--out",
        "--question",
        "--sample-every",
        "--seed",
    ],
    "scaling": [
        "--batch",
        "--device",
        "--fit-only",
        "--jobs",
        "--json",
        "--model",
        "--out",
        "--published",
        "--scenes",
        "--seeds",
        "--shapes",
        "--steps",
        "--threads",
        "--tokens",
    ],
    "papers": ["--json", "--stretch"],
    "methods": ["--json"],
    "encoders": ["--json", "--measure", "pattern"],
    "picturebook draw": ["--against", "--seed", "--size", "--split", "-n", "out"],
    "train nano": [
        "--batch",
        "--compile",
        "--device",
        "--no-compile",
        "--out",
        "--seed",
        "--size",
        "--steps",
        "--threads",
        "--warm-up-steps",
        "--workers",
    ],
    "train soft-image": ["--batch", "--device", "--model", "--out", "--seed", "--steps", "--threads"],
    "train reduce": [
        "--batch",
        "--decoder",
        "--device",
        "--frames",
        "--learning-rate",
        "--method",
        "--model",
        "--module-learning-rate",
        "--no-decoder",
        "--out",
        "--seed",
        "--steps",
        "--threads",
        "--workers",
    ],
    "train encoder": [
        "--batch",
        "--device",
        "--encoder",
        "--examples",
        "--image-size",
        "--json",
        "--learning-rate",
        "--out",
        "--seed",
        "--set",
        "--steps",
        "--task",
        "--threads",
    ],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


def surface(command: Any, name: str = "") -> dict[str, list[str]]:
    """Command -> its options and arguments."""
    if hasattr(command, "commands"):
        found: dict[str, list[str]] = {}
        for part, child in command.commands.items():
            found |= surface(child, f"{name} {part}".strip())
        return found
    names = [opt for parameter in command.params for opt in (*parameter.opts, *parameter.secondary_opts)]
    return {name: sorted(opt for opt in names if opt != "--help")}


def test_the_surface_is_frozen() -> None:
    """People and scripts type these; adding is free, renaming and removing is not."""
    assert surface(typer.main.get_command(app)) == {name: sorted(names) for name, names in SURFACE.items()}


def test_every_command_has_help_with_an_example() -> None:
    for name in SURFACE:
        result = call(*name.split(), "--help")
        assert result.exit_code == 0
        assert f"Example: sightline {name}" in " ".join(result.stdout.split())


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, sightline.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    source = str(Path(cli.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "[]\n"


def test_several_methods_after_one_option(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, Any]] = []

    def run(model: str, benchmark: str, methods: list[str], out: Path | None, **options: Any) -> Any:
        taken.append({"model": model, "benchmark": benchmark, "methods": methods, "out": out, **options})
        raise InputError("seen enough")

    monkeypatch.setattr("sightline.bench.run", run)
    for arguments in (
        ["--methods", "none", "fastervlm:keep=0.25", "vhr+vista", "--items", "5"],
        ["--items", "5", "--methods", "none", "fastervlm:keep=0.25", "vhr+vista"],
        ["--methods", "none", "--methods", "fastervlm:keep=0.25", "--items", "5", "--methods", "vhr+vista"],
        ["--methods=none", "fastervlm:keep=0.25", "--items=5", "--methods", "vhr+vista"],
    ):
        assert "seen enough" in refused("bench", *arguments)
        assert taken[-1]["methods"] == ["none", "fastervlm:keep=0.25", "vhr+vista"]
        assert taken[-1]["items"] == 5
    assert taken[-1]["model"] == "picturebook-nano"
    assert taken[-1]["out"] is None
    refused("bench")
    assert taken[-1]["methods"] == ["none"]


def test_pairs_and_sweeps_become_entries_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[list[str], bool]] = []

    def run(model: str, benchmark: str, methods: list[str], out: Path | None, **options: Any) -> Any:
        taken.append((methods, options["skip_refused"]))
        raise InputError("seen enough")

    monkeypatch.setattr("sightline.bench.run", run)
    refused("bench", "--pairs", "--methods", "vista", "fastervlm:keep=0.25", "ritual")
    singles = ["vista", "fastervlm:keep=0.25", "ritual"]
    pairs = ["vista+fastervlm:keep=0.25", "vista+ritual", "fastervlm:keep=0.25+ritual"]
    assert taken[-1] == (["none", *singles, *pairs], True)
    sweep = [
        "vista:strength=0.1",
        "vista:strength=0.2",
        "fastervlm:keep=0.5",
        "fastervlm:keep=0.75",
        "fastervlm:keep=1",
    ]
    for arguments in (
        ["--sweep", "vista:strength=0.1;0.2", "fastervlm:keep=0.5..1..3"],
        ["--sweep=vista:strength=0.1;0.2", "--sweep", "fastervlm:keep=0.5..1..3"],
    ):
        refused("bench", *arguments)
        assert taken[-1] == (["none", *sweep], False)
    refused("bench", "--methods", "ritual", "--sweep", "vista:strength=0.1;0.2", "--items", "3")
    assert taken[-1][0] == ["ritual", *sweep[:2]]
    count = len(taken)
    assert "two methods or more" in refused("bench", "--pairs", "--methods", "vista")
    assert "which values of gamma" in refused("bench", "--sweep", "vista:gamma")
    assert len(taken) == count


def test_options_of_the_benchmark_come_in_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def run(*arguments: Any, **options: Any) -> Any:
        taken.append(options["options"])
        raise InputError("seen enough")

    monkeypatch.setattr("sightline.bench.run", run)
    refused("bench", "--benchmark", "chair", "--option", "against=true", "--option", "max_new_tokens=7")
    assert taken[-1] == {"against": True, "max_new_tokens": 7}
    refused(
        "bench", "--source", "files", "--images", "a", "--questions", "b/{split}.json", "--option", "suffix= Please?"
    )
    assert taken[-1] == {"source": "files", "images": "a", "questions": "b/{split}.json", "suffix": " Please?"}
    assert "against must be true or false" in refused("bench", "--benchmark", "chair", "--option", "against=maybe")
    assert "max_new_tokens must be a whole number" in refused("bench", "--option", "max_new_tokens=many")
    assert "NAME=VALUE" in refused("bench", "--option", "against")


# --- bench and report ---


def test_bench_then_report(checkpoint: str, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    arguments = ["bench", "--model", checkpoint, "--items", "4", "--batch-size", "4", "--max-new-tokens", "3"]
    arguments += ["--cost-items", "1", "--methods", "fastervlm:keep=0.5", "--out", out]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert "first token" in result.stdout
    assert "50 (×0.50)" in result.stdout
    assert f"sightline report {out}" in " ".join(result.stdout.split())
    again = call(*arguments, "--json")
    records = [json.loads(line) for line in again.stdout.splitlines()]
    assert [record["method"] for record in records] == ["none", "fastervlm:keep=0.5"]
    assert records[1]["ratio"]["visual_tokens"] == 0.5
    result = call("report", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
    assert "other settings (seed: 0, now 1, another item_set)" in refused(*arguments, "--seed", "1")


def test_bench_in_pairs_tells_what_was_refused(checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [
        "bench",
        "--model",
        checkpoint,
        "--items",
        "6",
        "--max-new-tokens",
        "2",
        "--cost-items",
        "0",
        "--pairs",
    ]
    methods = ["--methods", "vista", "fastervlm:keep=0.5", "fastervlm:keep=0.25", "--out", str(out)]
    result = call(*arguments, *methods)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "Refused: fastervlm:keep=0.5+fastervlm:keep=0.25: fastervlm is given twice" in told
    records = [json.loads(line) for line in call(*arguments, *methods, "--json").stdout.splitlines()]
    pairs = {record["method"]: record["pair"] for record in records if record["pair"]}
    assert list(pairs) == ["vista+fastervlm:keep=0.5", "vista+fastervlm:keep=0.25"]
    assert pairs["vista+fastervlm:keep=0.5"]["first"] == "vista"
    assert call("report", str(out)).exit_code == 0
    assert "Methods in pairs" in (out / "report.html").read_text()


def test_a_run_without_a_folder_gets_one_named_by_its_settings(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "--model", checkpoint, "--items", "2", "--max-new-tokens", "2", "--cost-items", "0"]
    for seed in ("0", "0", "1"):
        result = call(*arguments, "--seed", seed)
        assert result.exit_code == 0, result.output
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("pico-pope-random-") for name in folders)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--benchmark", "poep"], "did you mean 'pope'"),
        (["--methods", "none", "fastervlmm"], "did you mean 'fastervlm'"),
        (["--methods", "fastervlm:kept=0.5"], "did you mean 'keep'"),
        (["--methods", "fastervlm:keep=2"], "keep"),
        (["--split", "advers"], "did you mean 'adversarial'"),
        (["--model", "picturebook-nono"], "unknown model 'picturebook-nono'"),
        (["--model", "./nowhere"], "no folder"),
        (["--source", "files"], "needs questions= "),
        (["--items", "-3"], "number of items"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_bench_refuses_bad_input(tmp_path: Path, arguments: list[str], told: str) -> None:
    assert told in refused("bench", "--out", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_report_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert "holds no run" in refused("report", str(tmp_path))
    assert "holds no run" in refused("report", str(tmp_path / "nowhere"))


def test_a_benchmark_of_words_beside_pictures(checkpoint: str, tmp_path: Path) -> None:
    arguments = ["bench", "--benchmark", "words-or-vision", "--option", "context={text}", "--model", checkpoint]
    arguments += ["--items", "2", "--max-new-tokens", "2", "--cost-items", "0", "--methods", "vista"]
    result = call(*arguments, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "macro" in result.stdout
    result = call("report", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "words-or-vision" in (tmp_path / "report.html").read_text()


# --- ask ---


def test_ask_answers_about_any_picture(checkpoint: str, tmp_path: Path) -> None:
    from sightline.models.loading import load

    file = tmp_path / "photo.webp"
    Image.new("RGBA", (90, 40), (200, 40, 40, 128)).save(file)
    arguments = ["ask", str(file), "What is there?", "--model", checkpoint, "--max-new-tokens", "4"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    model, processor = load(checkpoint)
    from sightline.models.images import open_picture

    inputs = processor(images=open_picture(file), text="USER: <image>\nWhat is there? ASSISTANT:", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip() + " [cut off: 4 tokens]"
    assert result.stdout == expected + "\n"
    several = call(*arguments, "--methods", "none", "fastervlm:keep=0.5+vista")
    shown = several.stdout.split("\n")
    assert shown[0] == f"none: {expected}".split("\n")[0]
    assert "fastervlm:keep=0.5+vista: " in several.stdout


def test_ask_with_a_strategy_and_a_limit_on_time(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sightline.models import answering
    from sightline.models.loading import load
    from sightline.reasoning.mvp_reasoning import MvpReasoning

    file = tmp_path / "photo.png"
    picture = draw(sample_scene("test", 3))
    picture.save(file)
    arguments = ["ask", str(file), "Is there a cat?", "--model", checkpoint, "--max-new-tokens", "3"]
    short = "mvp_reasoning:k=1,caption_tokens=4,path_tokens=3"
    result = call(*arguments, "--methods", "none", short, f"vista+{short}")
    assert result.exit_code == 0, result.output
    model, processor = load(checkpoint)
    strategy = MvpReasoning(k=1, caption_tokens=4, path_tokens=3)
    by_hand = strategy.answer(model, processor, picture, "Is there a cat?", 3)
    assert f"\n{short}: {by_hand.text}{answering.cut_off_mark(by_hand)}\n" in result.stdout
    assert f"\nvista+{short}: " in result.stdout
    seconds = iter(range(0, 1000, 5))
    monkeypatch.setattr(answering, "clock", lambda: next(seconds))
    assert call(*arguments, "--max-seconds", "7.5").stdout.endswith(" [cut off: 7.5 s]\n")


def test_ask_refuses_bad_input(checkpoint: str, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (20, 20)).save(good)
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    draw(sample_scene("test", 0)).save(cut)
    cut.write_bytes(cut.read_bytes()[:-2000])
    model = ["--model", checkpoint]
    assert "question is empty" in refused("ask", str(good), "  ", *model)
    assert "not a picture" in refused("ask", str(text), "What?", *model)
    assert "cut off" in refused("ask", str(cut), "What?", *model)
    assert "does not exist" in refused("ask", str(tmp_path / "none.png"), "What?", *model)
    assert "is a folder" in refused("ask", str(tmp_path), "What?", *model)
    assert "unknown method" in refused("ask", str(good), "What?", *model, "--methods", "vhs")
    assert "given twice" in refused("ask", str(good), "What?", "--model", "nowhere", "--methods", "vista+vista")
    assert "seconds of a budget" in refused("ask", str(good), "What?", *model, "--max-seconds", "0")


# --- papers, methods, picturebook, train ---


def test_papers_lists_the_catalogue() -> None:
    from sightline.papers import as_dict, papers, peers

    records = [json.loads(line) for line in call("papers", "--json").stdout.splitlines()]
    assert records == [as_dict(entry) for entry in papers()]
    assert list(records[0]) == ["slug", "title", "stretch", "status", "object"]
    assert not {entry.slug for entry in peers()} & {record["slug"] for record in records}
    shown = call("papers", "--stretch", "grounding").stdout
    assert "vista" in shown
    assert "fastervlm" not in shown
    assert any(line.startswith("vcd ") and "peer" in line for line in shown.splitlines())
    assert f"of {sum(entry.stretch == 'grounding' for entry in peers())} peers implemented" in shown
    assert "peer" not in call("papers", "--stretch", "encoders").stdout
    assert "did you mean 'grounding'" in refused("papers", "--stretch", "groundin")


def test_methods_lists_parameters_and_defaults() -> None:
    from sightline.methods import methods
    from sightline.papers import peers

    records = {record["method"]: record for record in map(json.loads, call("methods", "--json").stdout.splitlines())}
    assert list(records) == list(methods())
    assert {name for name, record in records.items() if record["peer"]} == {entry.slug for entry in peers()}
    assert records["fastervlm"]["parameters"]["keep"] == methods()["fastervlm"]().keep  # type: ignore[attr-defined]
    shown = call("methods").stdout
    assert all(name in shown for name in records)


def test_picturebook_draw(tmp_path: Path) -> None:
    result = call("picturebook", "draw", "--seed", "7", "-n", "5", "--size", "64", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "sheet.png")
    records = [json.loads(line) for line in (tmp_path / "scenes.jsonl").read_text().splitlines()]
    assert len(records) == 5
    for number, record in enumerate(records):
        scene = sample_scene("train", 7_000_000 + number)
        assert Scene.from_json(json.dumps(record["scene"])) == scene
        assert Image.open(tmp_path / record["file"]).tobytes() == draw(scene, 64).tobytes()
    sheet = Image.open(tmp_path / "sheet.png")
    # Three columns and two rows of 64 pixels, 12 pixels of paper round each.
    assert sheet.size == (3 * 76 + 12, 2 * 76 + 12)
    third = draw(sample_scene("train", 7_000_002), 64)
    assert sheet.crop((12 + 2 * 76, 12, 12 + 2 * 76 + 64, 12 + 64)).tobytes() == third.tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        "scenes.jsonl",
        "sheet.png",
        *(record["file"] for record in records),
    }


def test_picturebook_draw_refuses_bad_input(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert "did you mean 'test'" in refused("picturebook", "draw", "--split", "tests", out)
    assert "number of scenes" in refused("picturebook", "draw", "-n", "0", out)
    assert "picture's size" in refused("picturebook", "draw", "--size", "9", out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("picturebook", "draw", str(tmp_path / "file"))


def test_train_nano_passes_its_recipe_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sightline.training.nano import Recipe

    taken: list[Any] = []

    def train(recipe: Recipe, out: Path, threads: int, device: str, workers: int) -> Path:
        taken.append((recipe, out, threads, device, workers))
        return out / "checkpoint"

    monkeypatch.setattr("sightline.training.nano.train", train)
    arguments = ["--size", "pico", "--seed", "3", "--steps", "5", "--no-compile", "--out", str(tmp_path)]
    result = call("train", "nano", *arguments)
    assert result.exit_code == 0, result.output
    assert taken == [(Recipe.of("pico", seed=3, steps=5, compile=False), tmp_path, 1, "cpu", 1)]
    assert result.stdout.strip() == str(tmp_path / "checkpoint")
    assert "did you mean 'nano'" in refused("train", "nano", "--size", "nanoo")
    assert "steps must be 1 or more" in refused("train", "nano", "--steps", "0")


# --- How commands end ---


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(stretch: str | None) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("sightline.papers.papers", interrupted)
    result = call("papers")
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_a_full_disk_ends_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(stretch: str | None) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sightline.papers.papers", full)
    assert "the disk is full" in refused("papers")


def test_a_message_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(stretch: str | None) -> Any:
        raise InputError("one thing\n  and another")

    monkeypatch.setattr("sightline.papers.papers", torn)
    assert refused("papers") == "sightline: one thing and another\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(stretch: str | None) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("sightline.papers.papers", broken)
    assert isinstance(call("papers").exception, ZeroDivisionError)
