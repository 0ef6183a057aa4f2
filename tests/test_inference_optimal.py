"""QueCC: the connector against loops, its exact properties, the question that it reads, and what the decoder gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import families as tiny
import pytest
import torch
from families import BOS, IMAGE
from specimens import generate, logits
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.models.boundary import Boundary
from sightline.models.stock_reading import read_alone
from sightline.reduction.inference_optimal import QueCC, QuestionConnector
from sightline.reduction.trained_reducer import hold, save

C, C_M, D = 8, 12, 6


def connector(stride: int) -> QuestionConnector:
    """A connector all of whose weights matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = QuestionConnector(C, C_M, D, stride, num_heads=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.double()


def given(grid: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """X, X_m and t of two pictures."""
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    shapes = ((2, n, C), (2, n, C_M), (2, D))
    one, two, three = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return one, two, three


# --- The module ---


def norm(layer: Any, vector: Tensor) -> Tensor:
    assert layer.eps == 1e-6
    spread = ((vector - vector.mean()) ** 2).mean()
    return (vector - vector.mean()) / (spread + 1e-6).sqrt() * layer.weight + layer.bias


def mlp(layers: Any, vector: Tensor) -> Tensor:
    hidden = layers[0].weight @ vector + layers[0].bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return norm(layers[3], layers[2].weight @ hidden + layers[2].bias)


def by_hand(module: Any, x: Tensor, multi: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
    """One picture, window by window, head by head, patch by patch."""
    s, attention = module.stride, module.attention
    w_q, w_k, w_v = attention.in_proj_weight.chunk(3)
    b_q, b_k, b_v = attention.in_proj_bias.chunk(3)
    words = norm(module.text[1], module.text[0].weight @ text + module.text[0].bias)
    tokens = []
    for top in range(0, grid[0], s):
        for left in range(0, grid[1], s):
            query = module.downsample.bias.clone()
            keys, values = [], []
            for down in range(s):
                for right in range(s):
                    place = (top + down) * grid[1] + left + right
                    query = query + module.downsample.weight[:, 0, down, right] * mlp(module.to_query, x[place] + words)
                    keys.append(w_k @ mlp(module.to_key, multi[place]) + b_k)
                    values.append(w_v @ mlp(module.to_value, multi[place]) + b_v)
            query, heads = w_q @ query + b_q, []
            for head in range(2):
                span = slice(head * C // 2, (head + 1) * C // 2)
                scores = torch.stack([query[span] @ key[span] / (C // 2) ** 0.5 for key in keys]).softmax(0)
                heads.append(sum(w * v[span] for w, v in zip(scores, values, strict=True)))
            out = attention.out_proj.weight @ torch.cat(heads) + attention.out_proj.bias
            hidden = module.projector[0].weight @ out + module.projector[0].bias
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            tokens.append(module.projector[2].weight @ hidden + module.projector[2].bias)
    return torch.stack(tokens)


@pytest.mark.parametrize(("stride", "grid"), [(1, (2, 3)), (2, (4, 6)), (3, (6, 3)), (4, (4, 4))])
def test_the_connector_is_the_equations(stride: int, grid: tuple[int, int]) -> None:
    module, (x, multi, text) = connector(stride), given(grid)
    found = module(x, multi, text, grid)
    assert found.shape == (2, grid[0] * grid[1] // stride**2, D)
    for index in range(2):
        expected = by_hand(module, x[index], multi[index], text[index], grid)
        torch.testing.assert_close(found[index], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("which", [0, 1], ids=["X", "X_m"])
def test_a_patch_changes_the_token_of_its_own_window_and_no_other(which: int) -> None:
    grid, stride = (4, 6), 2
    module, inputs = connector(stride), given(grid)
    before = module(*inputs, grid)
    for place in range(24):
        changed = [one.clone() for one in inputs]
        changed[which][:, place] += 3 * torch.arange(changed[which].shape[-1]).sin()
        moved = (module(*changed, grid) - before).abs().amax(dim=(0, 2)) > 1e-9
        window = (place // 6) // stride * 3 + (place % 6) // stride
        assert moved.nonzero()[:, 0].tolist() == [window]


def test_at_stride_one_a_token_is_its_patch_whatever_is_asked() -> None:
    module, (x, multi, text) = connector(1), given((3, 4))
    attention = module.attention
    value = module.to_value(multi) @ attention.in_proj_weight[-C:].T + attention.in_proj_bias[-C:]
    expected = attention.out_proj(value)
    torch.testing.assert_close(module.compressed(x, multi, text, (3, 4)), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(module.compressed(-x, multi, 5 * text, (3, 4)), expected, atol=1e-12, rtol=0)
    assert (connector(2)(*given((4, 4)), (4, 4)) - connector(2)(x[:, [0] * 16], *given((4, 4))[1:], (4, 4))).any()


def test_the_papers_connector_has_21_0_to_21_6_million_weights() -> None:
    counts = {}
    for stride in (1, 4, 6, 8, 12, 24):
        with torch.device("meta"):
            module = QuestionConnector(1024, 4 * 1024, 4096, stride)
        projector = sum(parameter.numel() for parameter in module.projector.parameters())
        counts[stride] = (sum(parameter.numel() for parameter in module.parameters()) - projector) / 1e6
    assert {stride: round(count, 2) for stride, count in counts.items()} == {
        1: 20.99,
        4: 21.01,
        6: 21.03,
        8: 21.06,
        12: 21.14,
        24: 21.58,
    }


# --- The question ---


def untrained(stride: int = 2, **options: Any) -> QueCC:
    return QueCC(stride=stride, num_heads=4, weights="untrained", **options)


def given_to_connector(model: Any, batch: dict[str, Any], *methods: Any, **options: Any) -> list[tuple[Tensor, ...]]:
    """What the connector is called with."""
    seen: list[tuple[Tensor, ...]] = []
    anatomy = Anatomy.of(model)
    own = next((method for method in methods if isinstance(method, QueCC)), untrained())
    module = own.module(anatomy)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        with sl.attach(model, own, *(method for method in methods if method is not own)), torch.no_grad():
            generate(model, batch, new=1, **options)
    finally:
        handle.remove()
    return seen


def alone(model: Any, ids: list[int]) -> Tensor:
    """The stock decoder's last hidden state of these tokens and nothing else."""
    with torch.no_grad():
        hidden: Tensor = model.model.language_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return hidden


QUESTIONS = [[7, 9, 30], [12, 44, 8, 21, 5, 60], [50]]


def test_the_question_is_read_alone_after_the_first_token() -> None:
    model = tiny.tiny_model("llava")
    expected = [alone(model, [BOS, *question]) for question in QUESTIONS]
    batch = tiny.inputs("llava", model, questions=QUESTIONS, images_per_row=[2, 1, 1])
    for options in ({}, {"num_beams": 2}):
        ((_, _, text, grid),) = given_to_connector(model, batch, **options)
        want = torch.stack([expected[0], expected[0], *expected[1:]])
        torch.testing.assert_close(text, want, atol=1e-5, rtol=0)
        assert grid == (4, 4)
    batch = tiny.inputs("llava", model, questions=QUESTIONS, images_per_row=[1, 0, 1])
    ((_, _, text, _),) = given_to_connector(model, batch)
    torch.testing.assert_close(text, torch.stack([expected[0], expected[2]]), atol=1e-5, rtol=0)


def test_other_methods_do_not_act_on_that_reading() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, questions=QUESTIONS)
    expected = torch.stack([alone(model, [BOS, *question]) for question in QUESTIONS])
    calls = given_to_connector(model, batch, untrained(), sl.Ritual(), sl.Vista(), sl.PAI(boost_prefill="always"))
    assert len(calls) == 2  # the picture, and that of the branch
    for _, _, text, _ in calls:
        torch.testing.assert_close(text, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_texts_of_different_lengths_are_read_as_if_each_were_alone(family: str) -> None:
    model = tiny.tiny_model(family)
    boundary = Boundary(Anatomy.of(model), [])
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(length, 32, generator=generator) for length in (3, 7, 1)]
    together = read_alone(boundary, texts)
    for text, found in zip(texts, together, strict=True):
        torch.testing.assert_close(read_alone(boundary, [text])[0], found, atol=1e-5, rtol=0)


def test_where_nothing_follows_the_picture_all_text_is_the_question() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0, questions=[[]])
    text = [token for token in batch["input_ids"][0].tolist() if token != IMAGE]
    assert text[0] == BOS
    ((_, _, found, _),) = given_to_connector(model, batch)
    torch.testing.assert_close(found[0], alone(model, text), atol=1e-5, rtol=0)


def test_a_prompt_without_text_is_refused() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    bare = dict(input_ids=torch.full((1, 16), IMAGE), pixel_values=batch["pixel_values"])
    with sl.attach(model, untrained()), torch.no_grad(), pytest.raises(InputError, match="a prompt has no text"):
        model(**bare)


def test_in_training_the_answer_is_no_part_of_the_question() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0, questions=[[7, 9, 30]])
    length = batch["input_ids"].shape[1]
    answered = {
        "input_ids": torch.cat([batch["input_ids"], torch.tensor([[40, 41]])], dim=1),
        "attention_mask": torch.ones(1, length + 2, dtype=torch.long),
        "pixel_values": batch["pixel_values"],
    }
    seen: list[Tensor] = []
    method = untrained()
    handle = method.module(Anatomy.of(model)).register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    with sl.attach(model, method) as attachment, torch.no_grad():
        attachment.answers_from(length)
        model(**answered, use_cache=False)
    handle.remove()
    torch.testing.assert_close(seen[0][0], alone(model, [BOS, 7, 9, 30]), atol=1e-5, rtol=0)


def test_another_question_makes_other_tokens_of_the_same_picture() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, questions=[[7, 9, 30], [12, 44, 8], [7, 9, 30]])
    batch["pixel_values"][:] = batch["pixel_values"][0].clone()
    tokens = at_the_boundary(model, batch, untrained())
    visual = torch.stack([row[-7:-3] for row in tokens])
    torch.testing.assert_close(visual[0], visual[2], atol=1e-5, rtol=0)
    assert (visual[0] - visual[1]).abs().max() > 1e-3


# --- What goes in, and what the decoder gets ---


def at_the_boundary(model: Any, batch: dict[str, Any], *methods: Any) -> Tensor:
    """What the language model reads last, [B, T, D]."""
    seen: list[Tensor] = []
    with sl.attach(model, *methods), torch.no_grad():
        handle = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**batch)
        handle.remove()
    return seen[-1]


@pytest.mark.parametrize(
    ("shares", "layers"), [((0.5, 0.667, 0.917, 0.958), [2]), ((0.3, 0.6), [1, 2]), ((0.001,), [0])]
)
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_keys_and_values_are_made_of_the_layers_of_the_tower(
    family: str, shares: tuple[float, ...], layers: list[int]
) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model)
    with torch.no_grad():
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    first = 1 if family == "llava" else 0  # [CLS]
    ((patches, multi, _, _),) = given_to_connector(model, batch, untrained(multi_layers=shares))
    expected = torch.cat([states[layer][:, first:] for layer in layers], dim=-1)
    torch.testing.assert_close(multi, expected, atol=1e-5, rtol=0)
    if family == "llava":
        torch.testing.assert_close(patches, states[-2][:, 1:], atol=1e-5, rtol=0)


def test_the_papers_layers_of_a_tower_of_24() -> None:
    model = tiny.tiny_model("llava", vision_config=dict(num_hidden_layers=24))
    names = set(QueCC().readings(Anatomy.of(model)))
    assert names == {"tower", "tower layer 12", "tower layer 16", "tower layer 22", "tower layer 23"}


@pytest.mark.parametrize(("stride", "tokens"), [(1, 16), (2, 4), (4, 1)])
def test_the_decoder_gets_the_tokens_in_the_first_places(stride: int, tokens: int) -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0, images_per_row=2)
    visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    kept = visual[:tokens] + visual[16 : 16 + tokens]
    whole = at_the_boundary(model, batch)[0]
    columns = [column for column in range(len(whole)) if column not in visual or column in kept]
    method = untrained(stride)
    ((patches, multi, text, grid),) = given_to_connector(model, batch, method)
    with torch.no_grad():
        made = method.module(Anatomy.of(model))(patches, multi, text, grid)
    expected = whole.clone()
    expected[kept] = made.flatten(0, 1)
    seen = at_the_boundary(model, batch, method)[0]
    torch.testing.assert_close(seen, expected[columns], atol=1e-5, rtol=0)
    with sl.attach(model, method) as attachment:
        out = generate(model, batch)
    assert attachment.visual_tokens == [2 * tokens]
    assert out.past_key_values.get_seq_length() == len(columns) + 3  # the question's own reading leaves nothing there


def test_the_question_is_read_once_a_prompt_also_without_a_cache() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    readings: list[int] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: readings.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with sl.attach(model, untrained()):
        cached, anew = generate(model, batch), generate(model, batch, use_cache=False)
    handle.remove()
    torch.testing.assert_close(logits(cached), logits(anew), atol=1e-4, rtol=0)
    assert len(readings) == 2 * (1 + 4)


def test_an_answers_loss_reaches_the_weights(tmp_path: Path) -> None:
    model = tiny.tiny_model("llava")
    anatomy, method = Anatomy.of(model), untrained()
    module = method.fresh(anatomy, seed=3)
    hold(model, method, module)
    try:
        with sl.attach(model, method):
            model(**tiny.inputs("llava", model)).logits.square().mean().backward()
    finally:
        hold(model, method, None)
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in module.parameters())
    save(method, module, tmp_path)
    back: Any = dataclasses.replace(method, weights=str(tmp_path)).module(anatomy)
    assert torch.equal(back.downsample.weight, module.downsample.weight)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="were learned with stride=2, not 4"):
        QueCC(stride=4, num_heads=4, weights=str(tmp_path)).module(anatomy)


# --- Errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": -1}, "stride of inference_optimal must lie in"),
        ({"stride": 1.5}, "stride of inference_optimal must be a whole number"),
        ({"num_heads": 0}, "num_heads of inference_optimal must lie in"),
        ({"multi_layers": ()}, "multi_layers of inference_optimal must be shares"),
        ({"multi_layers": (0.5, 1.0)}, "multi_layers of inference_optimal must be shares"),
        ({"multi_layers": (12, 16)}, "multi_layers of inference_optimal must be shares"),
        ({"weights": ""}, "weights of inference_optimal must be"),
    ],
)
def test_settings_outside_the_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QueCC(**settings)


def test_a_stride_that_does_not_divide_the_grid_is_refused_and_those_that_do_are_named() -> None:
    model = tiny.tiny_model("llava")
    with pytest.raises(InputError, match=r"stride .* must divide the 4 x 4 .*: 1, 2, 4, not 3"):
        sl.attach(model, untrained(3))
    with pytest.raises(InputError, match=r"num_heads .* must divide the width of the tower, 32, and 5"):
        sl.attach(model, QueCC(stride=2, num_heads=5, weights="untrained"))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "internvl"])
def test_models_without_a_connector_of_patches_are_refused(family: str) -> None:
    with pytest.raises(InputError, match="inference_optimal takes the place of a connector that maps each patch"):
        sl.attach(tiny.tiny_model(family), untrained())


@pytest.mark.parametrize(("side", "stride"), [(24, 4), (10, 2), (9, 3), (7, 1)])
def test_the_stride_is_the_papers_or_the_largest_below_that_divides_the_grid(side: int, stride: int) -> None:
    model = tiny.tiny_model("llava", vision_config=dict(image_size=4 * side, patch_size=4))
    assert QueCC().settled(Anatomy.of(model)) == QueCC(stride=stride)
    assert QueCC(stride=1).settled(Anatomy.of(model)) == QueCC(stride=1)


def test_the_identity_is_no_stride() -> None:
    assert QueCC().identity() == QueCC(stride=0)
    assert QueCC(stride=0).is_identity
    assert QueCC().one_question
