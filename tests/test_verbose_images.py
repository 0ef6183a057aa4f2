"""Verbose Images: the losses and the schedule by hand, one step against a stock model differentiated by its pixels, the
ball, and the measurement of answers' lengths with its guard."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import families as tiny
import numpy as np
import pytest
import torch
from tiny_checkpoint import save_tiny_checkpoint
from tiny_processor import TinyProcessor, picture
from torch import Tensor
from typer.testing import CliRunner

from sightline.cli import app
from sightline.errors import InputError
from sightline.models.answering import Budget, prepare
from sightline.models.images import open_picture
from sightline.models.loading import load
from sightline.probes.answer_lengths import UNROUNDED, VERSIONS, first_scenes, measure, summarise
from sightline.probes.verbose_images import (
    Pixels,
    Step,
    VerboseImages,
    diversity_loss,
    eos_loss,
    uncertainty_loss,
)

ENDS = [5, 9, 17, 30, 41]
QUESTION = "t11 t23 t7"
SHORT = VerboseImages(iterations=2, repeats=2, max_new_tokens=6, epsilon=8 / 255, step_size=4 / 255)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny.tiny_model("llava")
    made.generation_config.eos_token_id = ENDS
    return made


@pytest.fixture(scope="module")
def processor(model: Any) -> TinyProcessor:
    return TinyProcessor("llava", model)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    folder = str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))
    return *load(folder), folder


# --- The losses and the schedule, by hand ---


def test_the_loss_of_the_end_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log() + torch.tensor([[3.0], [-2.0]])
    assert eos_loss(logits, [2]).item() == pytest.approx((0.25 + 0.7) / 2)
    assert eos_loss(logits, [1, 2]).item() == pytest.approx((0.5 + 0.9) / 2)


def test_the_loss_of_uncertainty_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log() + 4
    one = (math.log(1 / 3 / 0.5) + 2 * math.log(1 / 3 / 0.25)) / 3
    two = sum(math.log(1 / 3 / p) for p in (0.1, 0.2, 0.7)) / 3
    assert uncertainty_loss(logits).item() == pytest.approx(one + two, abs=1e-6)
    assert uncertainty_loss(torch.full((4, 7), 2.5)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_of_diversity_by_hand() -> None:
    # Two layers, one position each, as the rows of one matrix. Its singular values: 3 and 4.
    assert diversity_loss(torch.tensor([[[3.0, 0.0]], [[0.0, -4.0]]])).item() == pytest.approx(-7)
    # |H| is all ones: rank one, singular value 2. Without |.| the rows are orthogonal: sqrt 2 twice.
    signed = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    assert diversity_loss(signed).item() == pytest.approx(-2)
    assert diversity_loss(signed, absolute=False).item() == pytest.approx(-2 * math.sqrt(2))
    rank_one = torch.tensor([[1.0], [2.0], [5.0]]) * torch.tensor([2.0, 0.5, 1.0, 3.0])
    assert diversity_loss(rank_one[None]).item() == pytest.approx(-rank_one.norm().item(), rel=1e-5)


def test_the_weights_by_hand() -> None:
    attack = VerboseImages()
    end, diversity = attack.eos_schedule, attack.diversity_schedule
    assert attack.weight(end, 0, 40.0, None) == pytest.approx(2.0)  # T = -20
    assert attack.weight(diversity, 0, -40.0, None) == pytest.approx(40.0)  # T = 1
    second = 0.9 * 2.0 + 0.1 * 40 / (20 - 10 * math.log(2))
    assert attack.weight(end, 1, 40.0, 2.0) == pytest.approx(second)
    assert attack.weight(end, 6, 1.0, None) == pytest.approx(1 / 0.54090, rel=1e-4)  # T = -0.54
    assert attack.weight(end, 7, 1.0, None) == pytest.approx(1 / 0.79442, rel=1e-4)  # T = 0.79
    assert attack.weight(diversity, 99, 3.0, None) == pytest.approx(3 / (0.5 * math.log(100) + 1))
    assert attack.weight((0.0, 0.1), 3, 5.0, None) == pytest.approx(10.0)  # |T| is held above 0.5


# --- One step, against the stock model without a cache ---


def slow_losses(logits: Tensor, hidden: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    eos, uncertain = torch.zeros(()), torch.zeros(())
    for row in logits:
        shares = row.exp() / row.exp().sum()
        eos = eos + sum(shares[end] for end in ENDS) / len(logits)
        for share in shares:
            uncertain = uncertain + (math.log(1 / len(row)) - share.log()) / len(row)
    matrix = torch.cat(hidden).abs()
    return eos, uncertain, -torch.linalg.matrix_norm(matrix, ord="nuc")


def drawn(model: Any, inputs: dict[str, Any], attack: VerboseImages, draw: int) -> list[list[int]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(attack.seed + draw)
        sampling = dict(do_sample=True, top_p=attack.top_p, top_k=0, num_return_sequences=attack.repeats)
        rows = model.generate(**inputs, max_new_tokens=attack.max_new_tokens, **sampling)
    answers = rows[:, inputs["input_ids"].shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ENDS, answer)) for answer in answers]


@pytest.mark.parametrize("positions", ["answer", "all"])
@pytest.mark.parametrize("official_space", [False, True])
def test_one_step_is_that_of_a_stock_forward(
    model: Any, processor: TinyProcessor, positions: str, official_space: bool
) -> None:
    attack = dataclasses.replace(SHORT, iterations=1, positions=positions, official_space=official_space)
    made = attack.attack(model, processor, picture(3), QUESTION, quiet=True)

    inputs = prepare(model, processor, [picture(3)], [QUESTION])
    answer = max(drawn(model, inputs, attack, 0), key=len)
    assert answer, "the case says nothing without an answer"
    scale = 0.5 if official_space else 1.0  # the tiny processor's standard deviation
    clean = (inputs["pixel_values"][0] * 0.5 + 0.5).clamp(0, 1)
    noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(attack.seed))
    start = (clean + (2 * noise - 1) * attack.epsilon * scale).clamp(0, 1) - clean
    leaf = start.clone().requires_grad_()
    ids = [*inputs["input_ids"][0].tolist(), *answer] + [ENDS[0]] * (positions == "all")
    out = model(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=(inputs["pixel_values"][0] + leaf / 0.5)[None],
        output_hidden_states=True,
        use_cache=False,
    )
    first = 0 if positions == "all" else inputs["input_ids"].shape[1] - 1
    losses = slow_losses(out.logits[0, first:], [layer[0, first:] for layer in out.hidden_states])
    values = [loss.item() for loss in losses]
    lambda_eos = abs(values[1] / values[0] / -20)
    lambda_diversity = abs(values[1] / values[2] / 1)
    total = losses[1] + lambda_eos * losses[0] + lambda_diversity * losses[2]
    (gradient,) = torch.autograd.grad(total, leaf)
    moved = start - attack.step_size * scale * gradient.sign()
    radius = attack.epsilon * scale
    expected = (clean + moved.clamp(-radius, radius)).clamp(0, 1) - clean

    step = made.history[0]
    assert [step.eos, step.uncertainty, step.diversity] == pytest.approx(values, rel=1e-4)
    assert [step.lambda_eos, step.lambda_diversity] == pytest.approx([lambda_eos, lambda_diversity], rel=1e-4)
    told = (made.pixel_values[0] - inputs["pixel_values"][0]) * 0.5
    sure = gradient.abs() > 1e-4 * gradient.abs().max()  # rounding decides the sign of the rest
    assert sure.float().mean() > 0.9
    torch.testing.assert_close(told[sure], expected[sure], atol=1e-5, rtol=0)
    after = {**inputs, "pixel_values": made.pixel_values}
    lengths = [len(answer) for answer in drawn(model, after, attack, 1)]
    assert step.length == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("family", [one for one in tiny.FAMILIES if one != "paligemma"])
def test_reading_behind_the_prompt_is_one_forward(family: str) -> None:
    # (PaliGemma's prompt ends in a newline, so that an answer is not the end of a longer question.)
    model = tiny.tiny_model(family)
    question, answer = [12, 30, 9], [40, 22, 61, 13]
    inputs = tiny.single(family, model, 0, [question])
    whole = tiny.single(family, model, 0, [question + answer])
    with torch.no_grad():
        logits, hidden = VerboseImages().read(model, inputs, torch.tensor(answer))
        out = model(**whole, output_hidden_states=True)
    torch.testing.assert_close(logits, out.logits[0, -5:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, torch.stack(out.hidden_states)[:, 0, -5:], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        logits, hidden = VerboseImages().read(model, inputs, torch.tensor([], dtype=torch.long))
    torch.testing.assert_close(logits, out.logits[0, -5:-4], atol=1e-4, rtol=1e-4)
    assert hidden.shape[1] == 1


# --- The ball, the seed, the effect ---


@pytest.mark.parametrize("official_space", [False, True])
def test_no_step_leaves_the_ball_or_the_range(
    model: Any, processor: TinyProcessor, official_space: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = dataclasses.replace(SHORT, iterations=5, official_space=official_space)
    projected: list[list[Tensor]] = []
    real = Pixels.project

    def noted(self: Pixels, delta: Any, radius: Any) -> list[Tensor]:
        projected.append(real(self, delta, radius))
        return projected[-1]

    monkeypatch.setattr(Pixels, "project", noted)
    attack.attack(model, processor, picture(4), QUESTION, quiet=True)
    clean = Pixels(model, processor, picture(4), QUESTION).clean[0]
    assert len(projected) == 6  # the start, and each step
    radius = attack.epsilon * (0.5 if official_space else 1)
    for (delta,) in projected:
        assert delta.abs().max() <= radius + 1e-6
        assert (clean + delta).min() >= 0
        assert (clean + delta).max() <= 1
    assert (projected[-1][0].abs() > 0.99 * radius).any()
    assert ((clean + projected[-1][0]) == 0).any(), "the case has to meet the end of the range"


@pytest.mark.parametrize("change", [{"iterations": 0}, {"epsilon": 0.0}])
def test_without_an_attack_the_picture_is_clean(model: Any, processor: TinyProcessor, change: dict[str, Any]) -> None:
    attack = dataclasses.replace(SHORT, **change)
    made = attack.attack(model, processor, picture(5), QUESTION, quiet=True)
    assert made.pixel_values.equal(prepare(model, processor, [picture(5)], [QUESTION])["pixel_values"])
    assert (made.history, made.best) == ((), None)


def test_the_seed_decides(model: Any, processor: TinyProcessor) -> None:
    state = torch.get_rng_state()
    told: list[Step] = []
    first = SHORT.attack(model, processor, picture(6), QUESTION, told=told.append)
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(99)
    again = SHORT.attack(model, processor, picture(6), QUESTION, quiet=True)
    other = dataclasses.replace(SHORT, seed=1).attack(model, processor, picture(6), QUESTION, quiet=True)
    assert first.history == again.history == tuple(told)
    assert first.pixel_values.equal(again.pixel_values)
    assert not first.pixel_values.equal(other.pixel_values)


def test_the_end_becomes_less_likely(model: Any, processor: TinyProcessor) -> None:
    # One answer all along, so that the losses of the iterations can be compared.
    attack = dataclasses.replace(SHORT, iterations=15, sample_every=100, losses=("eos",), epsilon=0.1, step_size=0.02)
    history = attack.attack(model, processor, picture(7), QUESTION, quiet=True).history
    assert history[-1].eos < 0.8 * history[0].eos
    assert [step.length is None for step in history] == [True] * 14 + [False]


def test_the_longest_answers_choose_the_picture(
    model: Any, processor: TinyProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = iter([9.0, 2.0, 5.0, 3.0])  # of the clean picture, then after each step
    seen: list[Tensor] = []

    def sampled(self: VerboseImages, model: Any, inputs: Any, draw: int) -> tuple[Tensor, float]:
        seen.append(inputs["pixel_values"])
        return torch.tensor([40, 50]), next(lengths)

    monkeypatch.setattr(VerboseImages, "sampled", sampled)
    made = dataclasses.replace(SHORT, iterations=3).attack(model, processor, picture(8), QUESTION, quiet=True)
    assert (made.best, made.clean_length) == (1, 9.0)
    assert made.pixel_values.equal(seen[2])
    assert not made.pixel_values.equal(seen[3])


# --- The measurement ---


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_measurement_goes_through_8_bits_and_the_guard(pico: tuple[Any, Any, str], tmp_path: Path) -> None:
    model, processor, _ = pico
    pictures = first_scenes(2)
    options: dict[str, Any] = dict(attack=SHORT, max_new_tokens=8, guard=Budget(tokens=3), quiet=True)
    lines = measure(model, processor, pictures, ["vhr"], tmp_path, **options)
    assert lines == lines_of(tmp_path)
    keys = [(line["id"], line["method"], line["picture"], line["guard"]) for line in lines]
    wanted = itertools.product(pictures, ("none", "vhr"), VERSIONS, (False, True))
    assert sorted(keys) == sorted([*wanted, *((name, "none", UNROUNDED, False) for name in pictures)])

    for name, clean in pictures.items():
        attacked = open_picture(tmp_path / "pictures" / f"{name}.png")
        levels = np.asarray(attacked, dtype=int)
        assert 0 < np.abs(levels - np.asarray(clean, dtype=int)).max() <= 8  # epsilon is 8/255
        seen = prepare(model, processor, [attacked], ["What?"])["pixel_values"][0]
        mean, std = (
            torch.tensor(v)[:, None, None]
            for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
        )
        torch.testing.assert_close(seen, (torch.tensor(levels).permute(2, 0, 1) / 255 - mean) / std, atol=1e-5, rtol=0)
        beside = open_picture(tmp_path / "pictures" / f"{name}.beside.png")
        assert beside.size == (2 * 3 * clean.width + 4, 3 * clean.height)

    # An untrained model goes on and on: every answer is longer than the guard lets it be.
    assert {line["tokens"] for line in lines if not line["guard"]} == {8}
    for line in (line for line in lines if line["guard"]):
        assert (line["tokens"], line["stopped"], line["cut_off"]) == (3, "tokens", True)
        assert line["text"].endswith("[cut off: 3 tokens]")
    assert all(line["text"].endswith("[cut off: 8 tokens]") for line in lines if not line["guard"])

    # A run that was killed in the middle of a line ends as if it had not been.
    whole = (tmp_path / "answers.jsonl").read_bytes()
    rows = whole.splitlines(keepends=True)
    for kept in (0, 2, 12, len(rows) - 1):
        (tmp_path / "answers.jsonl").write_bytes(b"".join(rows[:kept]) + rows[kept][:10])
        assert measure(model, processor, pictures, ["vhr"], tmp_path, **options) == lines
        assert (tmp_path / "answers.jsonl").read_bytes() == whole
    with pytest.raises(InputError, match=r"another run|other settings \(question"):
        measure(model, processor, pictures, ["vhr"], tmp_path, question="Why?", **options)


def test_no_iterations_measure_the_clean_picture(pico: tuple[Any, Any, str], tmp_path: Path) -> None:
    model, processor, _ = pico
    attack = dataclasses.replace(SHORT, iterations=0)
    lines = measure(model, processor, first_scenes(1), [], tmp_path, attack=attack, max_new_tokens=8, quiet=True)
    texts = {line["picture"]: line["text"] for line in lines}
    assert texts["clean"] == texts["attacked"] == texts[UNROUNDED]
    assert lines[0]["attack"]["best"] is None


def test_the_summary_by_hand() -> None:
    def line(name: str, version: str, tokens: int, cut: bool = False, **more: Any) -> dict[str, Any]:
        return {
            "id": name,
            "method": "none",
            "guard": False,
            "picture": version,
            "tokens": tokens,
            "cut_off": cut,
        } | more

    rows = [
        line("a", "clean", 10, sampled_tokens=11.0),
        line("a", "noise", 12, sampled_tokens=12.0),
        line("a", "attacked", 64, True, sampled_tokens=60.0),
        line("a", UNROUNDED, 60),
        line("b", "clean", 30, sampled_tokens=29.0),
        line("b", "noise", 28, sampled_tokens=28.0),
        line("b", "attacked", 16, sampled_tokens=20.0),
        line("b", UNROUNDED, 20),
        line("c", "clean", 500),  # not measured to its end
    ]
    (summary,) = summarise(rows)
    assert summary["pictures"] == 2
    assert summary["tokens"] == {"clean": 20.0, "noise": 20.0, "attacked": 40.0, UNROUNDED: 40.0}
    assert summary["sampled_tokens"] == {"clean": 20.0, "noise": 20.0, "attacked": 40.0}
    assert summary["cut_off"] == {"clean": 0.0, "noise": 0.0, "attacked": 0.5}
    assert summary["growth"]["noise"]["times"] == 1.0
    growth = summary["growth"]["attacked"]
    assert growth["times"] == 2.0
    assert growth["low"] == pytest.approx(16 / 30)  # of two pictures, draws that have b or a alone
    assert growth["high"] == pytest.approx(6.4)
    assert summarise([]) == []


def test_the_command(pico: tuple[Any, Any, str], tmp_path: Path) -> None:
    arguments = ["attack", "--model", pico[2], "--items", "1", "--out", str(tmp_path), "--iterations", "1"]
    arguments += ["--max-new-tokens", "6", "--guard-tokens", "2", "--methods", "none", "vhr"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "vhr + guard" in result.stdout
    again = CliRunner().invoke(app, [*arguments, "--json"])
    printed = [json.loads(line) for line in again.stdout.splitlines()]
    wanted = [("none", False), ("none", True), ("vhr", False), ("vhr", True)]
    assert [(line["method"], line["guard"]) for line in printed] == wanted
    refused = CliRunner().invoke(app, [*arguments, "--epsilon", "2"])
    assert refused.exit_code == 2
    assert refused.stderr == "sightline: epsilon of verbose_images must lie in [0, 1], not 2.0\n"


# --- Bad input ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 1.5}, r"epsilon of verbose_images must lie in \[0, 1\], not 1.5"),
        ({"epsilon": "8"}, "epsilon of verbose_images must be a number, not '8'"),
        ({"epsilon": math.nan}, r"must lie in \[0, 1\], not nan"),
        ({"step_size": 0}, r"step_size of verbose_images must lie in \(0, 1\], not 0"),
        ({"top_p": 0.0}, r"top_p .* \(0, 1\]"),
        ({"momentum": -0.1}, r"momentum .* \[0, 1\]"),
        ({"iterations": 1.5}, "iterations of verbose_images must be a whole number, not 1.5"),
        ({"iterations": True}, "iterations of verbose_images must be a whole number"),
        ({"iterations": -1}, r"iterations of verbose_images must lie in \[0, 1000000\], not -1"),
        ({"repeats": 0}, "repeats"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"sample_every": 0}, "sample_every"),
        ({"seed": -1}, "seed"),
        ({"eos_schedule": (1.0,)}, "eos_schedule of verbose_images must be two numbers a, b"),
        ({"diversity_schedule": (1.0, math.inf)}, "diversity_schedule of verbose_images must be two numbers"),
        ({"losses": ("eos", "diversty")}, "unknown loss of verbose_images.*did you mean 'diversity'"),
        ({"losses": ()}, "losses of verbose_images must name at least one of eos, uncertainty, diversity"),
        ({"positions": "prompt"}, "unknown positions of verbose_images"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VerboseImages(**given)


def test_a_model_without_an_end_token_is_refused() -> None:
    model = tiny.tiny_model("llava")
    with pytest.raises(InputError, match="verbose_images puts off a model's end token, but this model has none"):
        SHORT.attack(model, TinyProcessor("llava", model), picture(1), QUESTION, quiet=True)


def test_tiles_are_attacked_but_make_no_picture(tmp_path: Path) -> None:
    model = tiny.tiny_model("llava_next")
    model.generation_config.eos_token_id = ENDS
    processor = TinyProcessor("llava_next", model)
    made = SHORT.attack(model, processor, picture(2), QUESTION, quiet=True)
    clean = prepare(model, processor, [picture(2)], [QUESTION])["pixel_values"]
    assert made.picture is None
    moved = (made.pixel_values - clean).abs().flatten(start_dim=-3).amax(dim=-1).flatten()
    assert len(moved) > 1
    assert (moved > 0).all()
    with pytest.raises(InputError, match="cuts a picture into tiles"):
        measure(model, processor, {"one": picture(2)}, [], tmp_path, attack=SHORT, question=QUESTION, quiet=True)


def test_an_empty_question_is_refused(model: Any, processor: TinyProcessor) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        SHORT.attack(model, processor, picture(1), " ", quiet=True)
