"""V2PE: positions by the recursion of the paper, in exact fractions, and what the decoders make of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any, ClassVar

import families as tiny
import pytest
import torch
from families import FAMILIES, MROPE_FAMILIES
from specimens import EveryOther, Nothing, anatomy_of, forward_logits, generate, logits, model_of

import sightline as sl
from sightline.errors import InputError
from sightline.models.call import Call, Stream
from sightline.reduction.v2pe import STEPS, V2PE, scaled_positions

each_family = pytest.mark.parametrize("family", FAMILIES)


def by_recursion(images: Sequence[int], deltas: Sequence[Any], start: int = 0) -> list[Fraction]:
    """Positions of one row: `images` says of each token which image it belongs to, -1 for text."""
    last = Fraction(start - 1)
    positions: list[Fraction] = []
    place = 0
    while place < len(images):
        if images[place] < 0:
            last += 1
            positions.append(last)
            place += 1
            continue
        before, step, k = last, Fraction(deltas[images[place]]), 0
        image = images[place]
        while place < len(images) and images[place] == image:
            k += 1
            positions.append(before + k * step)
            place += 1
        last = Fraction(math.ceil(before + k * step))
    return positions


def scaled(images: Sequence[int], deltas: Sequence[float], start: int = 0) -> list[float]:
    positions = torch.arange(start, start + len(images))[None]
    return scaled_positions(positions, torch.tensor([images]), deltas)[0].tolist()


def at_the_boundary(model: Any, batch: dict[str, Any], *methods: Any) -> dict[str, Any]:
    """What the language model is called with."""
    seen: dict[str, Any] = {}
    with sl.attach(model, *methods), torch.no_grad():
        handle = model.model.get_submodule(anatomy_of(model.config.model_type).language_name)
        handle = handle.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
        model(**batch)
        handle.remove()
    return seen


@dataclass(frozen=True)
class Forced(V2PE):
    """V2PE that rewrites positions even where its step is one."""

    paper: ClassVar[str] = "forced_v2pe"

    @property
    def is_identity(self) -> bool:
        return False


# --- The numbers ---


def test_the_paper_s_example() -> None:
    """Text 0 1 2, <img> 3, 256 visual tokens, </img>."""
    images = [-1] * 4 + [0] * 256 + [-1]
    quarter = scaled(images, [64 / 256])
    assert quarter[:7] == [0, 1, 2, 3, 3.25, 3.5, 3.75]
    assert quarter[-2:] == [67, 68]
    smallest = scaled(images, [1 / 256])
    assert smallest[4] == 3 + 1 / 256
    assert smallest[-2:] == [4, 5]
    assert scaled(images, [1.0]) == list(range(261))
    assert scaled([-1] + [0] * 3 + [1] * 5 + [-1, -1], [0.5, 0.25]) == [0, 0.5, 1, 1.5, 2.25, 2.5, 2.75, 3, 3.25, 5, 6]


@pytest.mark.parametrize("seed", range(8))
def test_positions_are_those_of_the_recursion(seed: int) -> None:
    rng = Random(seed)
    images: list[int] = []
    count = 0
    while len(images) < 300:
        if rng.random() < 0.5:
            images += [-1] * rng.randint(1, 4)
        else:
            images += [count] * rng.randint(1, 40)
            count += 1
    deltas = [rng.choice(STEPS) for _ in range(count)]
    start = rng.randint(0, 3)
    assert scaled(images, deltas, start) == [float(one) for one in by_recursion(images, deltas, start)]
    tenths = [Fraction(rng.randint(1, 10), 10) for _ in range(count)]
    want = [float(one) for one in by_recursion(images, tenths, start)]
    got = scaled(images, [float(step) for step in tenths], start)
    assert got == pytest.approx(want, rel=1e-6)
    text = [place for place, image in enumerate(images) if image < 0]
    assert [got[place] for place in text] == [want[place] for place in text]


def test_rows_do_not_touch_each_other() -> None:
    images = torch.tensor([[-1, -1, -1, 0, 0, 0, -1], [1, 1, 2, 2, 2, -1, -1], [-1] * 7])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 2, 3]])
    got = scaled_positions(positions, images, [0.5, 0.25, 0.5])
    assert got.dtype == torch.float32
    assert got.tolist() == [[0, 0, 0, 0.5, 1, 1.5, 3], [0.25, 0.5, 1.5, 2, 2.5, 4, 5], [0, 0, 0, 0, 1, 2, 3]]


def test_every_axis_of_a_picture_is_scaled() -> None:
    """One text token, a picture of 2 rows and 4 columns, two text tokens; the first of four axes counts columns."""
    rows, columns = [1] * 4 + [2] * 4, [1, 2, 3, 4] * 2
    axes = torch.tensor([[0, *[1] * 8, 5, 6], [0, *rows, 5, 6], [0, *columns, 5, 6]])[:, None]
    images = torch.tensor([[-1, *[0] * 8, -1, -1]])
    got = scaled_positions(axes, images, [0.5])[:, 0].tolist()
    assert got[0] == [0, *[0.5] * 8, 3, 4]
    assert got[1] == [0, *[0.5] * 4, *[1] * 4, 3, 4]
    assert got[2] == [0, *[0.5, 1, 1.5, 2] * 2, 3, 4]
    counted = torch.cat([torch.arange(11)[None, None], axes])
    again = scaled_positions(counted, images, [0.5])
    assert again[0, 0].tolist() == list(range(11))
    assert again[1:, 0].tolist() == got


# --- In a model ---


@pytest.mark.parametrize("delta", [1 / 256, 1 / 16, 0.3])
def test_the_span_of_hundreds_of_pictures_is_exact(delta: float) -> None:
    model = model_of("llava")
    pictures, question = 200, [5, 6, 7]
    batch = tiny.inputs("llava", model, questions=[question], images_per_row=pictures)
    positions = at_the_boundary(model, batch, V2PE(delta=delta))["position_ids"][0]
    text = 1 + 2 * pictures + len(question)  # <s>, two tokens before each picture
    assert positions.shape == (text + 16 * pictures,)
    span = text + pictures * math.ceil(round(16 * delta, 9))
    assert positions[-1].item() == span - 1
    assert positions.max().item() == span - 1
    first = [0, 1, 2, *(2 + k * delta for k in range(1, 17)), 3 + math.ceil(round(16 * delta, 9))]
    assert positions[:20].tolist() == pytest.approx(first, rel=1e-6)


@each_family
def test_rotary_phases_are_those_of_the_fractions(family: str) -> None:
    """No decoder rounds them or looks them up."""
    rotary = anatomy_of(family).language_model.rotary_emb
    positions = torch.tensor([[0, 3.25, 3.5, 67.00390625, 1000.125]])
    options: dict[str, Any] = {}
    frequencies = {"inv_freq": None}
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        frequencies = {f"{kind}_inv_freq": kind for kind in set(anatomy_of(family).text_config.layer_types)}
    for name, kind in frequencies.items():
        if kind is not None:
            options["layer_type"] = kind
        axes = positions.expand(3, 1, -1) if family in MROPE_FAMILIES else positions
        cos, sin = rotary(torch.zeros(1, 5, 32), axes, **options)
        angles = positions[..., None] * getattr(rotary, name)
        angles = torch.cat([angles, angles], dim=-1)
        torch.testing.assert_close(cos.reshape(angles.shape), angles.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sin.reshape(angles.shape), angles.sin(), atol=1e-5, rtol=0)


@each_family
def test_only_differences_of_positions_count(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moving all by a fraction changes nothing; it would if any were rounded on the way."""
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=2)
    with sl.attach(model, V2PE(delta=0.3)):
        want = logits(generate(model, batch))
        monkeypatch.setattr(
            "sightline.reduction.v2pe.scaled_positions", lambda *args: scaled_positions(*args) + 0.609375
        )
        torch.testing.assert_close(logits(generate(model, batch)), want, atol=1e-4, rtol=0)


@each_family
def test_a_step_of_one_gives_the_stock_model_through_the_same_code(family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    want, plain = logits(generate(model, batch)), forward_logits(model, batch, use_cache=False)
    with sl.attach(model, Forced(delta=1.0)):
        torch.testing.assert_close(logits(generate(model, batch)), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(forward_logits(model, batch, use_cache=False), plain, atol=1e-5, rtol=0)


@each_family
def test_positions_of_a_padded_batch_with_several_pictures(family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    stock = at_the_boundary(model, batch, Nothing()).get("position_ids")
    got = at_the_boundary(model, batch, V2PE(delta=0.375))["position_ids"]
    assert got.dtype == torch.float32
    lengths = anatomy.tokens_per_image(batch)
    visual = anatomy.visual_positions(batch["input_ids"])
    numbers = iter([image for image, length in enumerate(lengths) for _ in range(length)])
    for row in range(3):
        begin = int((batch["attention_mask"][row] == 0).sum())
        images = [next(numbers) if seen else -1 for seen in visual[row].tolist()]
        if family not in MROPE_FAMILIES:
            start = begin if stock is None else int(stock[min(row, len(stock) - 1), begin])
            want = by_recursion(images[begin:], [0.375] * len(lengths), start)
            assert got[row, begin:].tolist() == [float(one) for one in want]
            continue
        place = begin
        last = -1.0
        assert stock is not None
        given = stock[-3:, row].tolist()
        while place < len(images):  # the same recursion, an axis at a time
            run = 1
            while images[place] >= 0 and place + run < len(images) and images[place + run] == images[place]:
                run += 1
            step, before = (0.375 if images[place] >= 0 else 1.0), last
            base = given[0][place] - 1
            for axis in range(3):
                for column in range(place, place + run):
                    want_one = before + step * (given[axis][column] - base)
                    assert got[-3 + axis, row, column].item() == want_one
                    last = max(last, want_one)
            last = math.ceil(last)
            place += run


def test_an_answer_is_that_of_the_stock_decoder_at_these_positions() -> None:
    """Greedy decoding by hand: everything is read anew, at positions from the recursion."""
    model = model_of("llava")
    for row in range(3):
        batch = tiny.single("llava", model, row, images_per_row=2)
        visual = anatomy_of("llava").visual_positions(batch["input_ids"])[0].tolist()
        images, seen = [], 0
        for column, flag in enumerate(visual):
            seen += flag and not (column and visual[column - 1])
            images.append(seen - 1 if flag else -1)
        with torch.no_grad():
            embeds = at_the_boundary(model, batch, V2PE(delta=1 / 8))["inputs_embeds"]
            want = []
            for _ in range(4):
                positions = torch.tensor([[float(one) for one in by_recursion(images, [0.125] * 2)]])
                hidden = model.model.language_model(
                    inputs_embeds=embeds,
                    position_ids=positions,
                    attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.long),
                    use_cache=False,
                ).last_hidden_state
                want.append(model.lm_head(hidden[0, -1]))
                token = want[-1].argmax()[None]
                embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None]], dim=1)
                images.append(-1)
        with sl.attach(model, V2PE(delta=1 / 8)):
            out = generate(model, batch)
        torch.testing.assert_close(torch.cat(out.logits), torch.stack(want), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llava", "paligemma", "idefics3", "qwen2_5_vl"])
@pytest.mark.parametrize("order", ["reducer first", "v2pe first"])
def test_with_dropped_tokens(family: str, order: str) -> None:
    """`kept`: survivors stand where they would stand in the whole prompt. `compact`: as if there had been no others."""
    model, anatomy = model_of(family), anatomy_of(family)
    method = V2PE(delta=0.375)

    def both(reducer: Any) -> list[Any]:
        return [reducer, method] if order == "reducer first" else [method, reducer]

    for row in range(3):
        batch = tiny.single(family, model, row, images_per_row=2)
        whole = at_the_boundary(model, batch, method)["position_ids"]
        reducer = EveryOther(keep=0.4, positions="kept")
        with sl.attach(model, *both(reducer)) as attachment:
            forward_logits(model, batch)
            columns = attachment.columns
        kept = at_the_boundary(model, batch, *both(reducer))["position_ids"]
        assert torch.equal(kept, whole[..., columns[0]])
        if family in MROPE_FAMILIES:
            continue
        compact = at_the_boundary(model, batch, *both(EveryOther(keep=0.4)))["position_ids"]
        lengths = anatomy.tokens_per_image(batch)
        visual = anatomy.visual_positions(batch["input_ids"])[0]
        owners = torch.full_like(visual, -1, dtype=torch.long)
        owners[visual] = torch.tensor([image for image, length in enumerate(lengths) for _ in range(length)])
        want = by_recursion(owners[columns[0]].tolist(), [0.375] * 2, 1 if family == "paligemma" else 0)
        assert compact[0].tolist() == [float(one) for one in want]


@dataclass(frozen=True)
class Blind(Nothing):
    """Adds rows without the picture whose text stays where it was."""

    paper: ClassVar[str] = "blind"
    keep_positions: bool = True

    def streams(self, call: Call) -> Sequence[Stream]:
        return (Stream("blind", without_picture=True, keep_positions=self.keep_positions),)


def test_the_text_of_a_branch_without_the_picture() -> None:
    model = model_of("llava")
    batch = tiny.single("llava", model, 0, images_per_row=2)
    visual = anatomy_of("llava").visual_positions(batch["input_ids"])[0]
    main, blind = at_the_boundary(model, batch, V2PE(), Blind())["position_ids"]
    assert torch.equal(blind[~visual], main[~visual])
    _, closed = at_the_boundary(model, batch, V2PE(), Blind(keep_positions=False))["position_ids"]
    assert closed[~visual].tolist() == list(range(int((~visual).sum())))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
def test_positions_stay_float32_in_a_model_of_lower_precision(family: str) -> None:
    model = tiny.tiny_model(family).bfloat16()
    batch = tiny.inputs(family, model)
    want = at_the_boundary(model_of(family), batch, V2PE(delta=1 / 256))["position_ids"]
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    got = at_the_boundary(model, batch, V2PE(delta=1 / 256))
    assert got["inputs_embeds"].dtype == torch.bfloat16
    assert got["position_ids"].dtype == torch.float32
    assert torch.equal(got["position_ids"], want)


# --- Training ---


def test_steps_are_drawn_for_each_picture_and_step() -> None:
    method = V2PE(random=True)
    assert tuple(s / 256 for s in (1, 2, 4, 8, 16, 32, 64, 128, 256)) == STEPS
    rng = Random(0)
    first, second = method.per_step(rng), method.per_step(rng)
    drawn = first.deltas(2000)
    assert set(drawn) == set(STEPS)
    assert min(drawn.count(step) for step in STEPS) > 150  # 222 are expected
    assert drawn == first.deltas(2000)
    assert drawn != second.deltas(2000)
    assert method.per_step(Random(0)) == first
    assert V2PE(delta=0.5).per_step(rng) == V2PE(delta=0.5)
    assert V2PE(delta=0.5).deltas(3) == [0.5] * 3
    assert not V2PE(delta=1.0, random=True).per_step(rng).is_identity
    assert V2PE(delta=1.0, random=True).is_identity


def test_pictures_of_a_training_step_have_steps_of_their_own() -> None:
    model = model_of("llava")
    batch = tiny.single("llava", model, 0, images_per_row=8)
    method = V2PE(random=True).per_step(Random(1))
    got = at_the_boundary(model, batch, method)["position_ids"][0]
    visual = anatomy_of("llava").visual_positions(batch["input_ids"])[0]
    steps = [run.diff().unique().tolist() for run in got[visual].split(16)]
    assert steps == [[step] for step in method.deltas(8)]
    assert len({step for (step,) in steps}) > 3


# --- Errors ---


@pytest.mark.parametrize("delta", [0.0, -0.5, 1.5, math.nan])
def test_a_step_outside_the_range_is_refused(delta: float) -> None:
    with pytest.raises(InputError, match=r"delta of v2pe must lie in \(0, 1\], not"):
        V2PE(delta=delta)


def test_flash_attention_is_refused() -> None:
    model = tiny.tiny_model("llava")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="'sdpa' or 'eager': flash attention takes positions"):
        sl.attach(model, V2PE())


def test_it_does_not_compose_with_itself() -> None:
    with pytest.raises(InputError, match="do not compose: both change the positions of visual tokens"):
        sl.attach(model_of("llava"), V2PE(), Forced())
