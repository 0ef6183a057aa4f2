"""MQT: the resampler against loops, its exact properties, and what the decoder gets."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import families as tiny
import pytest
import torch
from families import IMAGE
from torch import Tensor, nn

import sightline as sl
from sightline.errors import InputError
from sightline.methods import parse_methods
from sightline.models.anatomy import Anatomy
from sightline.reduction.mqt import MQT, Resampler, position_table
from sightline.reduction.trained_reducer import FILE, hold, save

MODES = ("position", "content+position")
each_mode = pytest.mark.parametrize("mode", MODES)
GRIDS = [(4, 4), (3, 5), (6, 2)]


def resampler(mode: str, channels: int = 8, width: int = 8, tokens: int = 9, heads: int = 2) -> Resampler:
    """A resampler all of whose weights matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Resampler(channels, width, 6, tokens, heads, key_mode=mode)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


def patches(grid: tuple[int, int], channels: int = 8, pictures: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pictures, grid[0] * grid[1], channels, generator=generator, dtype=torch.float64)


# --- The module ---


def test_the_table_is_sines_and_cosines_of_column_and_then_of_row() -> None:
    width, rows, columns = 12, 3, 5
    table = position_table(rows, columns, width)
    assert table.shape == (15, 12)
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (column, row):
                angles = [place * 10_000 ** (-i / (width / 4)) for i in range(width // 4)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            assert table[row * columns + column].tolist() == pytest.approx(expected, abs=1e-6)


def norm(layer: nn.LayerNorm, vector: Tensor) -> Tensor:
    assert layer.eps == 1e-6
    spread = ((vector - vector.mean()) ** 2).mean()
    return (vector - vector.mean()) / (spread + 1e-6).sqrt() * layer.weight + layer.bias


def by_hand(module: Resampler, picture: Tensor, tokens: int, grid: tuple[int, int]) -> Tensor:
    """One picture [n, C], query by query, head by head, key by key."""
    attention, width, side = module.attention, module.query.shape[1], module.side
    heads, part = attention.num_heads, module.query.shape[1] // module.attention.num_heads
    table = position_table(side, side, width).double()
    raster = table.T.reshape(1, width, side, side)
    resized = nn.functional.interpolate(raster, size=grid, mode="bicubic", align_corners=False)[0]
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    keys, values = [], []
    for place, patch in enumerate(picture):
        value = norm(module.ln_v, module.widen(patch))
        where = resized[:, place // grid[1], place % grid[1]]
        key = norm(module.ln_k, where if module.key_mode == "position" else value + where)
        keys.append(w_k @ key + b_k)
        values.append(w_v @ value + b_v)
    outputs = []
    for index in range(tokens):
        query = w_q @ norm(module.ln_q, module.query[index] + table[index]) + b_q
        found = []
        for head in range(heads):
            span = slice(head * part, (head + 1) * part)
            scores = torch.stack([query[span] @ key[span] / part**0.5 for key in keys])
            found.append(sum(w * v[span] for w, v in zip(scores.softmax(0), values, strict=True)))
        mixed = attention.out_proj.weight @ torch.cat(found) + attention.out_proj.bias
        outputs.append(mixed @ module.projection)
    return torch.stack(outputs)


@each_mode
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [8, 12])
def test_the_resampler_is_the_equations(mode: str, grid: tuple[int, int], width: int) -> None:
    module = resampler(mode, width=width)
    assert isinstance(module.widen, nn.Identity) == (width == 8)
    pictures = patches(grid)
    found = module(pictures, 5, grid)
    assert found.shape == (2, 5, 6)
    for picture, tokens in zip(pictures, found, strict=True):
        torch.testing.assert_close(tokens, by_hand(module, picture, 5, grid), atol=1e-9, rtol=0)


@each_mode
def test_fewer_tokens_are_the_first_of_more(mode: str) -> None:
    module, pictures = resampler(mode, tokens=16), patches((5, 3))
    whole = module(pictures, 16, (5, 3))
    for tokens in range(1, 17):
        torch.testing.assert_close(module(pictures, tokens, (5, 3)), whole[:, :tokens], atol=1e-12, rtol=0)


def test_keys_of_position_attend_alike_to_all_pictures_and_keys_of_content_do_not() -> None:
    one, other = patches((4, 4), seed=1), patches((4, 4), seed=2)
    pooling, looking = (resampler(mode) for mode in MODES)
    assert torch.equal(pooling.weights(one, 9, (4, 4)), pooling.weights(other, 9, (4, 4)))
    assert (looking.weights(one, 9, (4, 4)) - looking.weights(other, 9, (4, 4))).abs().max() > 0.1
    assert pooling.weights(one, 9, (4, 4)).shape == (2, 2, 9, 16)
    torch.testing.assert_close(pooling.weights(one, 9, (4, 4)).sum(-1), torch.ones(2, 2, 9).double())


@each_mode
def test_with_keys_of_position_it_is_linear_in_what_it_is_shown(mode: str) -> None:
    module = resampler(mode)
    module.ln_v = nn.Identity()  # type: ignore[assignment]
    one, other = patches((4, 4), seed=1), patches((4, 4), seed=2)

    def moved(pictures: Tensor) -> Tensor:
        """The output, less the constant that the biases make."""
        return module(pictures, 9, (4, 4)) - module(torch.zeros_like(pictures), 9, (4, 4))

    distance = (moved(3 * one - 2 * other) - 3 * moved(one) + 2 * moved(other)).abs().max()
    assert distance < 1e-9 if mode == "position" else distance > 0.1


def test_the_papers_module_has_8_66_million_weights() -> None:
    with torch.device("meta"):
        module = Resampler(1024, 1024, 4096, 256, 16)
    assert sum(parameter.numel() for parameter in module.parameters()) == 8_660_992
    assert "positions" not in module.state_dict()


def test_the_last_map_starts_as_normal_numbers_over_the_root_of_the_width() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Resampler(16, 64, 256, 16, 2)
    assert float(module.projection.detach().std()) == pytest.approx(1 / 16, rel=0.05)
    assert float(module.query.detach().std()) == pytest.approx(0.02, rel=0.1)


def errors_after_training(nested: bool) -> dict[int, float]:
    """How well 2 and all 16 tokens tell a picture's four numbers after 200 steps of training, each number planted in
    four patches; a reader of its own for each token adds up what they tell. (A number's size is lost in LN(X).)"""
    method = MQT(tokens=8, max_tokens=16, num_heads=2, nested=nested)
    torch.manual_seed(0)
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    module, readers = Resampler(8, 8, 8, 16, 2, key_mode="content+position"), nn.Parameter(torch.randn(16, 8, 8) / 8)
    optimizer = torch.optim.Adam([*module.parameters(), readers], lr=1e-2)

    def error(first: int, batch: int) -> Tensor:
        numbers = torch.randn(batch, 4, generator=generator).repeat(1, 2)
        shown = torch.eye(8) * numbers[:, None]  # patch i of eight has the number of channel i there
        told = torch.einsum("bmd,mde->be", module(torch.cat([shown, shown], 1), first, (4, 4)), readers[:first])
        return ((told - numbers) ** 2).mean()

    for _ in range(200):
        loss = error(method.per_step(rng).tokens, 32)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return {tokens: float(error(tokens, 512)) for tokens in (2, 16)}


def test_only_what_was_trained_nested_can_be_cut() -> None:
    with torch.random.fork_rng(devices=[]):
        nested, fixed = errors_after_training(True), errors_after_training(False)
    assert nested[2] < 0.75 * fixed[2]
    assert nested[16] < 1.25 * fixed[16]


# --- The method ---


def test_the_defaults_and_what_fixes_the_weights() -> None:
    assert dataclasses.asdict(MQT()) == dict(
        tokens=16, max_tokens=None, num_heads=16, width=0, key_mode="content+position", nested=True, weights="auto"
    )
    assert MQT(tokens=0).is_identity
    assert MQT().identity() == MQT(tokens=0)
    assert not MQT(tokens=1).is_identity


def test_a_training_step_draws_an_even_number_of_tokens() -> None:
    rng, method = random.Random(0), MQT(tokens=3, max_tokens=16)
    drawn = [method.per_step(rng) for _ in range(400)]
    assert {one.tokens for one in drawn} == {2, 4, 6, 8, 10, 12, 14, 16}
    assert {dataclasses.replace(one, tokens=3) for one in drawn} == {method}
    assert {MQT(max_tokens=16, nested=False).per_step(rng).tokens for _ in range(20)} == {16}


def untrained(tokens: int, **options: Any) -> MQT:
    return MQT(tokens=tokens, max_tokens=16, num_heads=4, weights="untrained", **options)


def read(model: Any, batch: dict[str, Any], *methods: Any) -> tuple[dict[str, Any], Tensor]:
    """What the language model and the connector are given."""
    seen: dict[str, Any] = {}
    tower: list[Tensor] = []
    anatomy = Anatomy.of(model)
    assert anatomy.connector is not None
    with sl.attach(model, *methods), torch.no_grad():
        handles = [
            anatomy.language_model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
            ),
            anatomy.connector.register_forward_pre_hook(lambda module, args: tower.append(args[0])),
        ]
        model(**batch)
        for handle in handles:
            handle.remove()
    return seen, torch.cat(tower)


@each_mode
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_the_decoder_gets_the_first_tokens_in_the_first_places(family: str, mode: str) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.single(family, model, 0, images_per_row=2)
    whole, tower = read(model, batch)
    visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    module: Any = untrained(16, key_mode=mode).module(Anatomy.of(model))
    with torch.no_grad():
        expected = module(tower, 16, (4, 4))
    every, _ = read(model, batch, untrained(16, key_mode=mode))
    torch.testing.assert_close(every["inputs_embeds"][0, visual], expected.flatten(0, 1), atol=1e-5, rtol=0)
    for tokens in (1, 2, 5, 16):
        method = untrained(tokens, key_mode=mode)
        seen, _ = read(model, batch, method)
        kept = visual[:tokens] + visual[16 : 16 + tokens]
        columns = [column for column in range(len(whole["inputs_embeds"][0])) if column not in visual or column in kept]
        torch.testing.assert_close(seen["inputs_embeds"][0], every["inputs_embeds"][0, columns], atol=1e-5, rtol=0)
        text = [column for column in columns if column not in visual]
        assert torch.equal(seen["inputs_embeds"][0, [columns.index(c) for c in text]], whole["inputs_embeds"][0, text])
        first = int(seen["position_ids"][0, 0])
        assert seen["position_ids"].tolist() == [list(range(first, first + len(columns)))]


def test_what_attach_says_was_kept() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with sl.attach(model, untrained(3)) as attachment, torch.no_grad():
        model(**batch)
    assert attachment.kept is not None
    assert [[image.tolist() for image in row] for row in attachment.kept] == [[[0, 1, 2]] * 2, [], [[0, 1, 2]]]
    assert attachment.visual_tokens == [6, 0, 3]
    assert attachment.visual_tokens_given == [32, 0, 16]


def test_an_answers_loss_reaches_the_weights() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    method = untrained(4)
    module = method.fresh(Anatomy.of(model), seed=3)
    hold(model, method, module)
    try:
        with sl.attach(model, method):
            model(**batch).logits.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    finally:
        hold(model, method, None)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    query = gradients["query"]
    assert query is not None
    assert query[4:].abs().sum() == 0  # the later queries were not asked


def test_saved_weights_are_read_back_and_only_by_the_settings_that_made_them(tmp_path: Path) -> None:
    model = tiny.tiny_model("llava")
    anatomy = Anatomy.of(model)
    method = untrained(4)
    module = method.fresh(anatomy, seed=3)
    assert save(method, module, tmp_path) == tmp_path / FILE
    back: Any = dataclasses.replace(method, weights=str(tmp_path)).module(anatomy)
    assert torch.equal(back.query, module.query)  # type: ignore[arg-type]
    for changed, name in (({"key_mode": "position"}, "key_mode"), ({"max_tokens": 9}, "max_tokens")):
        with pytest.raises(InputError, match=f"were learned with {name}="):
            dataclasses.replace(method, weights=str(tmp_path), **changed).module(anatomy)
    with pytest.raises(InputError, match="mqt needs weights that were learned for this model"):
        sl.attach(model, MQT(tokens=4, max_tokens=16, num_heads=4))


def test_as_many_queries_as_a_picture_has_room_for_unless_told() -> None:
    model = tiny.tiny_model("llava")  # 16 visual tokens a picture
    assert MQT().settled(Anatomy.of(model)) == MQT(max_tokens=16)
    assert MQT(tokens=4, max_tokens=9).settled(Anatomy.of(model)) == MQT(tokens=4, max_tokens=9)
    wide = tiny.tiny_model("llava", vision_config=dict(image_size=168, patch_size=7))  # 576, as LLaVA-1.5
    assert MQT().settled(Anatomy.of(wide)) == MQT(max_tokens=256)
    assert parse_methods("mqt:max_tokens=none") == (MQT(),)
    assert parse_methods("mqt:max_tokens=16") == (MQT(max_tokens=16),)
    with sl.attach(model, MQT(tokens=5, weights="untrained")) as attachment:
        model(**tiny.inputs("llava", model))
    assert set(attachment.visual_tokens) == {5}
    with pytest.raises(InputError, match=r"tokens of mqt must lie in \[0, 16\], not 20"):
        sl.attach(model, MQT(tokens=20, weights="untrained"))


def test_weights_that_were_replaced_are_read_anew(tmp_path: Path) -> None:
    model = tiny.tiny_model("llava")
    anatomy, batch = Anatomy.of(model), tiny.inputs("llava", model)
    method = dataclasses.replace(untrained(4), weights=str(tmp_path))

    def answered(seed: int) -> Tensor:
        save(method, method.fresh(anatomy, seed=seed), tmp_path)
        with sl.attach(model, method), torch.no_grad():
            logits: Tensor = model(**batch).logits[:, -1]
        return logits

    one, other = answered(1), answered(2)
    assert (one - other).abs().max() > 0.01
    assert torch.equal(answered(1), one)


# --- Errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, r"tokens of mqt must lie in \[0, 256\], not -1"),
        ({"tokens": 17, "max_tokens": 16}, r"tokens of mqt must lie in \[0, 16\], not 17"),
        ({"tokens": 2.5}, "tokens of mqt must be a whole number"),
        ({"max_tokens": 20}, "max_tokens of mqt must be a square number .* not 20"),
        ({"max_tokens": 1, "tokens": 1}, "max_tokens of mqt must lie in"),
        ({"num_heads": 0}, "num_heads of mqt must lie in"),
        ({"width": -4}, "width of mqt must lie in"),
        ({"key_mode": "content"}, "unknown key_mode of mqt 'content'"),
        ({"nested": 1}, "nested of mqt must be true or false, not 1"),
        ({"weights": ""}, "weights of mqt must be"),
    ],
)
def test_settings_outside_the_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MQT(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 25}, "max_tokens of mqt must be at most the visual tokens of a picture, here 16, not 25"),
        ({"max_tokens": 16, "num_heads": 5}, r"multiple of four and of num_heads \(5\), and 32 is not"),
        ({"max_tokens": 16, "num_heads": 2, "width": 30}, r"multiple of four and of num_heads \(2\), and 30 is not"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sl.attach(tiny.tiny_model("llava"), MQT(tokens=4, weights="untrained", **settings))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "gemma3"])
def test_models_without_a_connector_of_patches_are_refused(family: str) -> None:
    with pytest.raises(InputError, match="mqt takes the place of a connector that maps each patch"):
        sl.attach(tiny.tiny_model(family), untrained(4))
