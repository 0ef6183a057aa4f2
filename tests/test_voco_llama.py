"""VoCo-LLaMA: the mask by rules written out, two phases that equal one, and pictures as objects."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import families as tiny
import pytest
import torch
from families import FAMILIES, MROPE_FAMILIES
from specimens import anatomy_of, forward_logits, generate, has_picture, logits, model_of, tokens
from tiny_processor import TinyProcessor, picture
from torch import Tensor
from transformers import DynamicCache

import sightline as sl
from sightline.errors import InputError
from sightline.models.answering import prepare
from sightline.reduction.compressed_picture import CompressedPicture, answer, compress
from sightline.reduction.trained_reducer import hold
from sightline.reduction.voco_llama import PADDING, PREFIX, TEXT, VISION, VOCO, Layout, VoCo, visible

WORKING = [family for family in FAMILIES if family != "gemma3"]
works = pytest.mark.parametrize("family", WORKING)
METHOD = VoCo(tokens=3, weights="untrained")


def at_the_boundary(model: Any, batch: dict[str, Any], method: VoCo) -> dict[str, Any]:
    """What the language model is called with."""
    seen: dict[str, Any] = {}
    language_model = anatomy_of(model.config.model_type).language_model
    with sl.attach(model, method), torch.no_grad():
        handle = language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        model(**batch)
        handle.remove()
    return seen


# --- The mask ---


def allowed(kinds: list[int], groups: list[int], query: int, key: int, cross_group: bool) -> bool:
    """The rule, case by case."""
    if key > query:
        return False
    same = groups[query] == groups[key]
    if kinds[key] == VISION:
        return kinds[query] != TEXT and same
    if kinds[key] == VOCO:
        return kinds[query] == TEXT or same or cross_group
    if kinds[key] == PREFIX:
        return kinds[query] != TEXT
    return kinds[query] == TEXT


@pytest.mark.parametrize("cross_group", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_that_of_the_rule(seed: int, cross_group: bool) -> None:
    rng = Random(seed)
    kinds, groups = [PREFIX] * rng.randint(0, 3), [0] * 3
    groups = groups[: len(kinds)]
    for group in range(3):
        for kind, most in ((VISION, 4), (VOCO, 3), (TEXT, 3)):
            count = rng.randint(1, most)
            kinds += [kind] * count
            groups += [group] * count
    length = len(kinds)
    want = [[allowed(kinds, groups, q, k, cross_group) for k in range(length)] for q in range(length)]
    got = visible(torch.tensor([kinds]), torch.tensor([groups]), cross_group=cross_group)[0]
    assert (got & torch.ones(length, length).tril().bool()).tolist() == want


@pytest.mark.parametrize("cross_group", [False, True])
def test_with_one_image_it_is_the_rule_of_the_release(cross_group: bool) -> None:
    kinds = [PREFIX] * 2 + [VISION] * 5 + [VOCO] * 3 + [TEXT] * 4
    first, last = kinds.index(VOCO), kinds.index(TEXT) - 1
    want = [[k <= q and (k <= last if q <= last else k >= first) for k in range(14)] for q in range(14)]
    got = visible(torch.tensor([kinds]), torch.zeros(1, 14, dtype=torch.long), cross_group=cross_group)[0]
    assert (got & torch.ones(14, 14).tril().bool()).tolist() == want


def test_where_the_columns_go() -> None:
    """A padded row with an image in two runs and one in a single run, and a row without."""
    images = torch.tensor([[-1, -1, 0, -1, 0, -1, 1, 1, -1], [-1] * 9])
    layout = Layout.of(images, images >= 0, 2)
    assert layout.source[0].tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 7, 7, 8]
    v, c, t = VISION, VOCO, TEXT
    assert layout.kind[0].tolist() == [PREFIX, PREFIX, v, v, v, c, c, t, v, v, c, c, t]
    assert layout.group[0, 2:].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
    assert layout.kind[1].tolist() == [PADDING] * 4 + [TEXT] * 9
    assert layout.source[1, 4:].tolist() == list(range(9))
    positions = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7], list(range(9))])
    assert layout.positions(positions)[0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert layout.positions(positions)[1, 4:].tolist() == list(range(9))
    assert layout.positions(positions / 2)[0].tolist() == [0, 0, 0.5, 1, 1.5, 3, 4, 4, 4.5, 5, 6, 7, 7.5]
    axes = torch.tensor([[0, 1, 2, 2, 2, 5, 6, 6, 9], [0, 1, 3, 4, 4, 5, 6, 8, 9]])[:, None]
    one = Layout.of(images[:1], images[:1] >= 0, 2)
    assert one.positions(axes)[0, 0].tolist() == [0, 1, 2, 2, 2, 5, 6, 7, 8, 8, 11, 12, 13]
    assert one.positions(axes)[1, 0].tolist() == [0, 1, 3, 4, 4, 5, 6, 7, 8, 10, 11, 12, 13]
    hidden = Layout.of(images[:1], torch.tensor([[False] * 6 + [True] * 3]), 2)
    assert hidden.shown[0, [5, 6, 10, 11]].tolist() == [False, False, True, True]


@pytest.mark.parametrize("cross_group", [False, True])
def test_the_mask_of_a_padded_batch(cross_group: bool) -> None:
    """At the decoder, of two pictures, none, and one, against loops."""
    model = model_of("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    seen = at_the_boundary(model, batch, VoCo(tokens=2, cross_group=cross_group, weights="untrained"))
    mask, positions = seen["attention_mask"], seen["position_ids"]
    length = mask.shape[-1]
    visual = anatomy_of("llava").visual_positions(batch["input_ids"])
    for row in range(3):
        kinds: list[int] = []
        groups: list[int] = []
        begin = int((batch["attention_mask"][row] == 0).sum())
        flags = visual[row, begin:].tolist()
        group = 0
        for column, flag in enumerate(flags):
            text = PREFIX if not any(flags[: column + 1]) and any(flags) else TEXT
            kinds.append(VISION if flag else text)
            groups.append(group)
            if flag and not flags[column + 1]:
                kinds += [VOCO] * 2
                groups += [group] * 2
                group += 1
        padding = length - len(kinds)
        for q in range(len(kinds)):
            want = [False] * padding + [allowed(kinds, groups, q, k, cross_group) for k in range(len(kinds))]
            assert mask[row, 0, padding + q].tolist() == want
        assert positions[row, padding:].diff().tolist() == [1] * (len(kinds) - 1)
    assert mask.any(dim=-1).all()


# --- Two phases and one ---


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "paligemma"])
def test_two_phases_equal_one_and_the_picture_no_longer_counts(family: str) -> None:
    """Prefix and picture are read, their keys and values replaced by noise, then the text: nothing changes."""
    model, language_model = model_of(family), anatomy_of(family).language_model
    batch = tiny.single(family, model, 0)
    seen = at_the_boundary(model, batch, METHOD)
    embeds, positions, mask = seen["inputs_embeds"], seen["position_ids"], seen["attention_mask"]
    inserted = anatomy_of(family).visual_positions(batch["input_ids"])[0].nonzero()[-1].item() + 1
    cut = inserted + METHOD.tokens

    def read(begin: int, end: int, cache: Any) -> Tensor:
        with torch.no_grad():
            return language_model(
                inputs_embeds=embeds[:, begin:end],
                position_ids=positions[..., begin:end],
                attention_mask=mask[:, :, begin:end, :end],
                past_key_values=cache,
            ).last_hidden_state

    want = read(0, embeds.shape[1], None)[:, cut:]
    assert want.shape[1] > 2
    for noise in (0.0, 100.0):
        cache = DynamicCache()
        read(0, cut, cache)
        for layer in cache.layers:
            generator = torch.Generator().manual_seed(0)
            for states in (layer.keys, layer.values):
                spoilt = states[:, :, :inserted]
                states[:, :, :inserted] += noise * torch.randn(spoilt.shape, generator=generator)
        torch.testing.assert_close(read(cut, embeds.shape[1], cache), want, atol=1e-5, rtol=0)


def test_an_answer_is_that_of_the_masked_prompt() -> None:
    """Greedy decoding by hand: the stock decoder reads everything anew, under the rule."""
    model = model_of("llava")
    head, embed = model.lm_head, model.get_input_embeddings()
    for row in range(3):
        batch = tiny.single("llava", model, row)
        seen = at_the_boundary(model, batch, METHOD)
        embeds, first = seen["inputs_embeds"], batch["input_ids"][0].tolist().index(tiny.IMAGE)
        kinds = [PREFIX] * first + [VISION] * 16 + [VOCO] * 3
        kinds += [TEXT] * (embeds.shape[1] - len(kinds))
        want = []
        with torch.no_grad():
            for _ in range(4):
                length = len(kinds)
                rule = [[allowed(kinds, [0] * length, q, k, False) for k in range(length)] for q in range(length)]
                hidden = model.model.language_model(
                    inputs_embeds=embeds, attention_mask=torch.tensor(rule)[None, None], use_cache=False
                ).last_hidden_state
                want.append(head(hidden[0, -1]))
                embeds = torch.cat([embeds, embed(want[-1].argmax()[None])[None]], dim=1)
                kinds.append(TEXT)
        with sl.attach(model, METHOD):
            out = generate(model, batch)
        torch.testing.assert_close(torch.cat(out.logits), torch.stack(want), atol=1e-4, rtol=0)


@works
def test_the_cache_holds_the_compression_tokens_and_the_text(family: str) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    for images in (1, 2):
        batch = tiny.single(family, model, 0, images_per_row=images)
        visual = anatomy.visual_positions(batch["input_ids"])[0]
        starts = [image[0] for image in _columns_of_images(family, batch)]
        ends = [image[-1] for image in _columns_of_images(family, batch)]
        inside = sum(end - start + 1 for start, end in zip(starts, ends, strict=True))
        text = len(visual) - starts[0] - inside
        with sl.attach(model, METHOD):
            out = generate(model, batch, new=4)
        assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {3 * images + text + 3}
        assert len(out.past_key_values.layers) == len(anatomy.layers)


def _columns_of_images(family: str, batch: dict[str, Any]) -> list[list[int]]:
    anatomy = anatomy_of(family)
    columns = anatomy.visual_positions(batch["input_ids"])[0].nonzero()[:, 0]
    return [part.tolist() for part in columns.split(anatomy.tokens_per_image(batch))]


@works
def test_labels_follow_the_columns(family: str) -> None:
    model = model_of(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    with sl.attach(model, METHOD) as attachment:
        forward_logits(model, batch)
        columns = attachment.columns
    for row in range(3):
        real = columns[row][columns[row] >= 0].tolist()
        begin = int((batch["attention_mask"][row] == 0).sum())
        assert [column for column in real if column >= begin] == list(range(begin, batch["input_ids"].shape[1]))
    assert (columns < 0).sum(dim=1).tolist() == [6, 6, 6]  # put in, or padding of the rows that have fewer


# --- What the text can learn of a picture ---


@works
def test_the_picture_reaches_the_text_through_the_compression_tokens_alone(family: str) -> None:
    """The gradient of the text's logits with respect to the pixels is there, and is gone where the keys and values of
    the compression tokens are held fast."""
    model, anatomy = model_of(family), anatomy_of(family)
    batch = tiny.single(family, model, 0)
    end = _columns_of_images(family, batch)[0][-1] + 1
    pixels = batch["pixel_values"].clone().requires_grad_()

    def gradient() -> float:
        with sl.attach(model, METHOD):
            model(**{**batch, "pixel_values": pixels}, use_cache=False).logits[0, -1].square().sum().backward()
        found = 0.0 if pixels.grad is None else float(pixels.grad.abs().max())
        pixels.grad = None
        return found

    assert gradient() > 1e-4

    def hold_fast(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :end], output[:, end : end + 3].detach(), output[:, end + 3 :]], dim=1)

    projections = [getattr(layer.self_attn, name) for layer in anatomy.layers for name in ("k_proj", "v_proj")]
    handles = [projection.register_forward_hook(hold_fast) for projection in projections]
    try:
        assert gradient() == 0.0
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()


def test_the_embedding_is_learned() -> None:
    model = tiny.tiny_model("llava")
    anatomy = sl.Anatomy.of(model)
    module = METHOD.fresh(anatomy)
    assert [tuple(parameter.shape) for parameter in module.parameters()] == [(32,)]
    assert torch.equal(module.embedding, METHOD.fresh(anatomy).embedding)
    hold(model, METHOD, module)
    batch = tiny.inputs("llava", model)
    with sl.attach(model, METHOD):
        model(**batch).logits[:, -1].square().sum().backward()
    assert module.embedding.grad.abs().max() > 1e-4
    with sl.attach(model, METHOD):
        before = forward_logits(model, batch)
        with torch.no_grad():
            module.embedding += 1
        assert (forward_logits(model, batch) - before).abs().max() > 1e-2


@pytest.mark.parametrize("cross_group", [False, True])
def test_pictures_are_compressed_each_by_itself_or_one_after_the_other(cross_group: bool) -> None:
    model = model_of("llava")
    batch = tiny.single("llava", model, 0, images_per_row=2)
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][0] *= -1
    states = []
    with sl.attach(model, VoCo(tokens=2, cross_group=cross_group, weights="untrained")), torch.no_grad():
        for inputs in (batch, other):
            layers = model(**inputs, use_cache=True).past_key_values.layers
            states.append(torch.stack([layer.values[0] for layer in layers]))  # c c, two words, c c, question
    changed = (states[0] - states[1]).abs().amax(dim=(0, 1, 3)) > 1e-5
    assert changed[:4].all()
    assert changed[4:6].tolist() == [cross_group] * 2
    assert changed[6:].all()


def test_eager_attention_gives_the_same() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with sl.attach(model, METHOD):
        want = logits(generate(model, batch))
    model.set_attn_implementation("eager")
    with sl.attach(model, METHOD):
        torch.testing.assert_close(logits(generate(model, batch)), want, atol=1e-5, rtol=0)


def test_a_row_without_a_picture_is_read_as_ever() -> None:
    model = model_of("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    stock = logits(generate(model, batch))
    with sl.attach(model, METHOD):
        got = logits(generate(model, batch))
    torch.testing.assert_close(got[1], stock[1], atol=1e-5, rtol=0)
    assert (got[0] - stock[0]).abs().max() > 1e-2


# --- Pictures as objects ---


@pytest.mark.parametrize("family", [family for family in WORKING if family != "paligemma"])
def test_a_stored_picture_is_answered_about_like_the_live_one(family: str, tmp_path: Path) -> None:
    model, anatomy = model_of(family), anatomy_of(family)
    processor = TinyProcessor(family, model)
    small = compress(model, processor, picture(7), METHOD)
    shape = (len(anatomy.layers), anatomy.num_key_value_heads, 3, anatomy.head_dim)
    assert small.keys.shape == small.values.shape == shape
    assert small.tokens == 3
    assert small.nbytes == 2 * small.keys.numel() * 4
    file = tmp_path / "picture.safetensors"
    small.save(file)
    again = CompressedPicture.load(file)
    assert torch.equal(again.keys, small.keys)
    assert torch.equal(again.values, small.values)
    assert again.next_position == small.next_position
    if family in MROPE_FAMILIES:
        model.model.rope_deltas = torch.tensor([[1000]])  # what an earlier prompt leaves behind
    for question in ("t5 t17 t33", "what is it"):
        with sl.attach(model, METHOD):
            live = generate(model, prepare(model, processor, [picture(7)], [question]), new=5)
        inputs = again.inputs(model, processor, question)
        stored = generate(model, inputs, new=5)
        torch.testing.assert_close(logits(stored), logits(live), atol=1e-5, rtol=0)
        new = stored.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert new == live.sequences[0, -5:].tolist()
        assert answer(again, model, processor, question, max_new_tokens=5) == processor.decode(new)
    other = compress(model, processor, picture(8), METHOD)
    assert (other.values - small.values).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 1}])
def test_other_ways_of_generating(options: dict[str, Any]) -> None:
    model = model_of("llava")
    processor = TinyProcessor("llava", model)
    small = compress(model, processor, picture(7), METHOD)
    with sl.attach(model, METHOD):
        torch.manual_seed(1)
        live = tokens(model, prepare(model, processor, [picture(7)], ["t5 t6"]), **options)[0]
    torch.manual_seed(1)
    assert answer(small, model, processor, "t5 t6", max_new_tokens=4, **options) == processor.decode(live)


def test_nothing_stays_on_the_model() -> None:
    model = model_of("llava")
    processor = TinyProcessor("llava", model)
    inputs = prepare(model, processor, [picture(7)], ["t5"])
    stock = forward_logits(model, inputs)
    assert has_picture(inputs)
    compress(model, processor, picture(7), METHOD)
    assert torch.equal(forward_logits(model, inputs), stock)


# --- Errors ---


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_a_bad_number_of_tokens_is_refused(count: Any) -> None:
    with pytest.raises(InputError, match="tokens of voco_llama must"):
        VoCo(tokens=count)


def test_models_that_cannot_be_cut_are_refused() -> None:
    for model in (model_of("gemma3"), tiny.tiny_model("llava_next", text_config=dict(sliding_window=8))):
        with pytest.raises(InputError, match=r"cannot run on .* with sliding layers"):
            sl.attach(model, METHOD)
    model = tiny.tiny_model("llava")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="by a mask, which flash attention does not take"):
        sl.attach(model, METHOD)


def test_a_model_that_reads_in_both_directions_cannot_go_on_from_a_picture() -> None:
    model = model_of("paligemma")
    with pytest.raises(InputError, match="paligemma reads a prompt in both directions"):
        compress(model, TinyProcessor("paligemma", model), picture(7), METHOD)


def test_without_learned_weights_it_says_so() -> None:
    with pytest.raises(InputError, match="voco_llama needs weights that were learned for this model"):
        sl.attach(model_of("llava"), VoCo())
    with sl.attach(model_of("llava"), VoCo(tokens=0)):
        pass


def test_bad_files_and_other_models_are_refused(tmp_path: Path) -> None:
    model = model_of("llava")
    processor = TinyProcessor("llava", model)
    with pytest.raises(InputError, match="tokens of voco_llama must be 1 or more to compress a picture, not 0"):
        compress(model, processor, picture(7), VoCo(tokens=0))
    file = tmp_path / "nothing.safetensors"
    with pytest.raises(InputError, match="is no file of a compressed picture"):
        CompressedPicture.load(file)
    file.write_bytes(b"nothing at all")
    with pytest.raises(InputError, match="is no file of a compressed picture"):
        CompressedPicture.load(file)
    small = compress(model, processor, picture(7), METHOD)
    with pytest.raises(InputError, match="cannot write the compressed picture to"):
        small.save(tmp_path / "no folder" / "small.safetensors")
    deeper = tiny.tiny_model("llava", text_config=dict(num_hidden_layers=4))
    with pytest.raises(InputError, match="compressed by another model: its keys have the shape"):
        answer(small, deeper, TinyProcessor("llava", deeper), "t5")
