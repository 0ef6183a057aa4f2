"""VideoLLM-MoD: routing by hand, gathered layers against whole ones, a film frame by frame against one reading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import families as tiny
import pytest
import torch
from families import IMAGE
from slow_narrowing import cached, hiding, visual
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.methods import attach
from sightline.models.anatomy import Anatomy
from sightline.reduction.trained_reducer import hold
from sightline.reduction.videollm_mod import FrameStream, VideoLLMMoD, drawn, ranked

DEEP: dict[str, Any] = dict(text_config=dict(num_hidden_layers=6))


@pytest.fixture
def model() -> Any:
    return tiny.tiny_model("llava", **DEEP)


@pytest.fixture
def strong(model: Any) -> Iterator[tuple[Any, nn.Module]]:
    """Routers whose gates differ much from 1."""
    method = VideoLLMMoD(weights="untrained")
    module = method.fresh(Anatomy.of(model))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(10)
    hold(model, method, module.requires_grad_(False))
    yield model, module
    hold(model, method, None)


# --- By hand ---


def test_ranks_are_counted_within_a_frame() -> None:
    frames = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1], [0, 0, 1, -1, -1, 2, 2, 2]])
    scores = torch.tensor([[9.0, 1, 3, 2, 7, 0, 5, 8], [1.0, 1, 0, 2, 2, 4, 4, 5]])
    rank, size = ranked(frames, scores)
    for row in range(2):
        for column in range(8):
            same = [other for other in range(8) if frames[row, other] == frames[row, column]]
            better = [other for other in same if (-scores[row, other], other) < (-scores[row, column], column)]
            assert rank[row, column] == len(better)
            assert size[row, column] == len(same)


@pytest.mark.parametrize("selector", ["learned", "uniform", "random"])
def test_every_frame_has_its_own_share_and_the_planted_tokens_are_in_it(model: Any, selector: Any) -> None:
    anatomy = Anatomy.of(model)
    method = VideoLLMMoD(r=0.35, selector=selector, weights="untrained")
    frames = torch.tensor([[-1] * 3 + [0] * 10 + [-1] + [1] * 5 + [2] + [-1] * 2])
    hidden = torch.randn(1, 22, 32, generator=torch.Generator().manual_seed(0))
    if selector == "learned":
        routers: Any = method.module(anatomy)
        for column in (4, 9, 12, 15):
            hidden[0, column] += 100 * routers[1].score.weight[0] / routers[1].score.weight.norm()
    chosen = method.route(anatomy, 3, hidden, frames).stays[0]
    counts = [int(chosen[frames[0] == frame].sum()) for frame in range(3)]
    assert counts == [4, 2, 1]  # 3.5 rounds to the even 4, 1.75 to 2, and at least one
    assert not chosen[frames[0] == -1].any()
    if selector == "learned":
        assert chosen[[4, 9, 12, 15]].all()
    if selector == "uniform":
        assert chosen.nonzero()[:, 0].tolist() == [5, 7, 10, 12, 16, 18, 19]
    if selector == "random":
        numbers = drawn(3, frames, ranked(frames, torch.zeros(frames.shape))[0])
        assert chosen[3:13].nonzero()[:, 0].tolist() == sorted(numbers[0, 3:13].topk(4).indices.tolist())
        assert not torch.equal(chosen, method.route(anatomy, 5, hidden, frames).stays[0])
        alone = torch.tensor([[0] * 10])
        assert torch.equal(method.route(anatomy, 3, hidden[:, :10], alone).stays[0], chosen[3:13])


def test_strategies_name_their_layers() -> None:
    layers = {
        name: list(VideoLLMMoD(strategy=name).layers(8))
        for name in ("interleaved", "all", "interleaved_deep", "all_deep")
    }
    assert layers == {
        "interleaved": [1, 3, 5, 7],
        "all": [1, 2, 3, 4, 5, 6, 7],
        "interleaved_deep": [3, 5, 7],
        "all_deep": [2, 3, 4, 5, 6, 7],
    }


# --- Gathered layers against whole ones ---


@torch.no_grad()
def whole(model: Any, batch: dict[str, Any], method: VideoLLMMoD, routers: Any) -> tuple[Tensor, dict[int, Tensor]]:
    """Last logits where every MoD layer runs on everything, with the keys that are passed by hidden and their outputs
    thrown away; and bool [B, S], what each layer passes by."""
    anatomy = Anatomy.of(model)
    lengths = iter(anatomy.tokens_per_image(batch))
    frames: list[list[list[int]]] = []  # of each row the columns of each frame
    for row in visual(batch):
        columns = row.nonzero()[:, 0].tolist()
        frames.append([])
        while columns:
            length = next(lengths)
            frames[-1].append(columns[:length])
            columns = columns[length:]
    skipped = {layer: torch.zeros_like(visual(batch)) for layer in method.layers(len(anatomy.layers))}
    handles = []

    def hooks_of(number: int, layer: int) -> Any:
        gates = torch.ones(skipped[layer].shape)
        came: list[Tensor] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            came[:] = [args[0]]
            for row, columns in enumerate(frames):
                for frame in columns:
                    scores = [float(routers[number].score.weight[0] @ args[0][row, column]) for column in frame]
                    order = torch.tensor(scores).argsort(descending=True, stable=True).tolist()
                    count = max(1, round(method.r * len(frame)))
                    for rank, place in enumerate(order):
                        skipped[layer][row, frame[place]] = rank >= count
                        score = scores[place]
                        gates[row, frame[place]] = {"tanh": 1 + math.tanh(score), "raw": score, "none": 1}[method.gate]

        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            changed = came[0] + gates[..., None] * (output - came[0])
            return torch.where(skipped[layer][..., None], came[0], changed)

        module = anatomy.layers[layer]
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for number, layer in enumerate(skipped):
        hooks_of(number, layer)
    try:
        with hiding(model, skipped):  # after `before` has said what is skipped
            logits: Tensor = model(**batch, use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, skipped


@pytest.mark.parametrize("gate", ["tanh", "raw", "none"])
def test_gathered_layers_equal_whole_ones_with_the_skipped_keys_hidden(strong: Any, gate: Any) -> None:
    model, routers = strong
    method = VideoLLMMoD(r=0.3, gate=gate, weights="untrained")
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    want, skipped = whole(model, batch, method, routers)
    with torch.no_grad(), attach(model, method):
        out = model(**batch, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], want, atol=1e-5, rtol=1e-4)
    length, real = batch["input_ids"].shape[1], batch["attention_mask"].sum(dim=1)
    left = int((real - skipped[1].sum(dim=1)).max())
    assert skipped[1].sum(dim=1).tolist() == [22, 0, 11]  # of 16 a frame 5 stay
    assert cached(out.past_key_values) == [length, left] * 3


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next", "smolvlm"])
@pytest.mark.parametrize("strategy", ["all", "interleaved_deep"])
def test_other_families_and_strategies(family: str, strategy: Any) -> None:
    model = tiny.tiny_model(family, **DEEP)
    method = VideoLLMMoD(r=0.3, strategy=strategy, weights="untrained")
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    want, _ = whole(model, batch, method, method.module(Anatomy.of(model)))
    with torch.no_grad(), attach(model, method):
        got = model(**batch).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_is_skipped_passes_bit_for_bit_and_text_is_whole(strong: Any) -> None:
    model, routers = strong
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    method = VideoLLMMoD(weights="untrained")
    _, skipped = whole(model, batch, method, routers)
    for layer in (1, 3, 5):
        seen: list[Tensor] = []
        module = model.model.language_model.layers[layer]
        handles = [module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))]
        with torch.no_grad(), attach(model, method):
            handles.append(module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output)))
            model(**batch)
        for handle in handles:
            handle.remove()
        came, went = seen
        same = (came == went).all(dim=-1)
        real = batch["attention_mask"].bool()
        assert torch.equal(same & real, skipped[layer])


def test_closed_gates_and_open_ones(model: Any) -> None:
    """With gates of 0 a MoD layer does nothing to vision; with gates of 1 and all tokens it is the stock layer."""
    method = VideoLLMMoD(r=1.0, weights="untrained")
    module = method.fresh(Anatomy.of(model))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
        stock = model(**batch).logits[:, -1]
        hold(model, method, module)
        with attach(model, method):
            torch.testing.assert_close(model(**batch).logits[:, -1], stock, atol=1e-5, rtol=1e-4)
        closed = VideoLLMMoD(r=1.0, gate="raw", weights="untrained")
        hold(model, closed, module)
        seen: list[Tensor] = []
        layer = model.model.language_model.layers[1]
        handles = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
        with attach(model, closed):
            handles.append(layer.register_forward_hook(lambda module, args, output: seen.append(output)))
            model(**batch)
        for handle in handles:
            handle.remove()
        hold(model, method, None)
    assert torch.equal(seen[0][visual(batch)], seen[1][visual(batch)])
    text = batch["attention_mask"].bool() & ~visual(batch)
    assert (seen[0][text] != seen[1][text]).any(dim=-1).all()


def test_routers_learn_through_their_gates(model: Any) -> None:
    method = VideoLLMMoD(weights="untrained")
    module = method.fresh(Anatomy.of(model)).train()
    hold(model, method, module)
    with attach(model, method):
        model(**tiny.inputs("llava", model)).logits[:, -1].square().mean().backward()
    hold(model, method, None)
    first, second, last = (float(parameter.grad.abs().sum()) for parameter in module.parameters())  # type: ignore[union-attr]
    assert first > 0
    assert second > 0
    assert last == 0  # behind the last layer nobody reads a visual token


def test_only_learned_routing_needs_weights(model: Any) -> None:
    with pytest.raises(InputError, match="videollm_mod needs weights that were learned for this model"):
        attach(model, VideoLLMMoD())
    batch = tiny.inputs("llava", model)
    with torch.no_grad(), attach(model, VideoLLMMoD(selector="uniform")):
        uniform = model(**batch).logits[:, -1]
    with torch.no_grad(), attach(model, VideoLLMMoD(selector="random")):
        assert (model(**batch).logits[:, -1] - uniform).abs().max() > 1e-3
    assert VideoLLMMoD(r=1.0, selector="uniform").is_identity
    assert VideoLLMMoD(r=1.0, gate="none").is_identity
    assert not VideoLLMMoD(r=1.0).is_identity


# --- A film, frame by frame ---


def streamed(model: Any, method: VideoLLMMoD, batch: dict[str, Any], frames: slice = slice(None)) -> tuple[Any, Tensor]:
    """Reads a prompt of one row piece by piece: runs of text as one, pictures one by one."""
    stream = FrameStream(model, method)
    ids = batch["input_ids"][0].tolist()
    pictures = iter(batch["pixel_values"])
    at = 0
    while at < len(ids):
        end = at
        if ids[at] == IMAGE:
            end = at + 16
            logits = stream.frames(pixel_values=next(pictures)[None])
        else:
            while end < len(ids) and ids[end] != IMAGE:
                end += 1
            logits = stream.text(torch.tensor([ids[at:end]]))
        at = end
    assert stream.length == len(ids)
    return stream.cache, logits


@pytest.mark.parametrize("selector", ["learned", "uniform", "random"])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_frame_by_frame_equals_one_reading(family: str, selector: Any) -> None:
    model = tiny.tiny_model(family, **DEEP)
    method = VideoLLMMoD(selector=selector, strategy="all", weights="untrained")
    batch = tiny.single(family, model, 0, images_per_row=1 if family == "internvl" else 3)
    with torch.no_grad(), attach(model, method):
        out = model(**batch, use_cache=True)
    cache, logits = streamed(model, method, batch)
    torch.testing.assert_close(logits, out.logits[:, -1], atol=1e-5, rtol=1e-4)
    assert cached(cache) == cached(out.past_key_values)
    for one, other in zip(cache.layers, out.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-4)


def test_an_answer_to_a_film_goes_on_from_the_cache(model: Any) -> None:
    method = VideoLLMMoD(weights="untrained")
    batch = tiny.single("llava", model, 1, images_per_row=3)
    with attach(model, method):
        want = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    stream = FrameStream(model, method)
    ids = batch["input_ids"][0]
    first, last = (int(place) for place in (ids == IMAGE).nonzero()[[0, -1], 0])
    pieces = [ids[:first], *ids[first : last + 1].split(18)]  # a frame and the two words behind it
    stream.text(pieces[0][None])
    for picture, piece in zip(batch["pixel_values"], pieces[1:], strict=True):
        stream.frames(pixel_values=picture[None])
        if len(piece) > 16:
            stream.text(piece[None, 16:])
    logits = stream.text(ids[None, last + 1 :])
    got = []
    for _ in range(4):
        got.append(int(logits.argmax()))
        logits = stream.text(torch.tensor([got[-1:]]))
    assert got == want


def test_a_film_at_the_identity_is_the_stock_models(model: Any) -> None:
    batch = tiny.single("llava", model, 0, images_per_row=2)
    with torch.no_grad():
        stock = model(**batch).logits[:, -1]
    _, logits = streamed(model, VideoLLMMoD(weights="untrained").identity(), batch)
    torch.testing.assert_close(logits, stock, atol=1e-5, rtol=1e-4)


def test_later_frames_change_nothing_that_was_read(model: Any) -> None:
    method = VideoLLMMoD(weights="untrained")
    batch = tiny.single("llava", model, 0, images_per_row=3)
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][2] += 1
    with torch.no_grad(), attach(model, method):
        one, two = (model(**given, use_cache=True).past_key_values.layers[3].keys for given in (batch, other))
    spoken = 1 + 3 * 2 + 2 * 3  # the first token, two words in front of each frame, and 3 tokens of two frames
    assert torch.equal(one[:, :, :spoken], two[:, :, :spoken])
    assert not torch.equal(one, two)


@torch.no_grad()
def test_a_forward_that_broke_off_leaves_nothing_behind(model: Any) -> None:
    """In the middle of a layer, as when the memory is full: other prompts and older caches go on as if it had not."""
    batch = tiny.inputs("llava", model)
    text = tiny.inputs("llava", model, images_per_row=0)
    stock = model(**text).logits
    new = torch.full((len(batch["input_ids"]), 1), 5)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], dim=1)

    def break_off(module: Any, args: Any) -> None:
        raise MemoryError

    with attach(model, VideoLLMMoD(r=0.3, weights="untrained")):
        caches = [model(**batch, use_cache=True).past_key_values for _ in range(2)]
        expected = model(input_ids=new, attention_mask=mask, past_key_values=caches[0]).logits
        layer: Any = Anatomy.of(model).layers[1]
        handle = layer.mlp.register_forward_pre_hook(break_off)
        with pytest.raises(MemoryError):
            model(**batch)
        handle.remove()
        assert torch.equal(model(**text).logits, stock)
        handle = layer.mlp.register_forward_pre_hook(break_off)
        with pytest.raises(MemoryError):
            model(**batch)
        handle.remove()
        went_on = model(input_ids=new, attention_mask=mask, past_key_values=caches[1]).logits
    assert torch.equal(went_on, expected)


# --- Errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(r=0), r"r of videollm_mod must lie in \(0, 1\], not 0"),
        (dict(strategy="deep"), "unknown strategy of videollm_mod 'deep'"),
        (dict(selector="best"), "unknown selector of videollm_mod 'best'"),
        (dict(gate="relu"), "unknown gate of videollm_mod 'relu'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VideoLLMMoD(**settings)


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="strategy 'interleaved_deep' of videollm_mod finds no layer to act at among"):
        attach(tiny.tiny_model("llava"), VideoLLMMoD(strategy="interleaved_deep", weights="untrained"))
    with pytest.raises(InputError, match="sliding layers"):
        attach(tiny.tiny_model("gemma3"), VideoLLMMoD(weights="untrained"))
    for family in ("qwen2_vl", "paligemma"):
        with pytest.raises(InputError, match=f"a film cannot be read frame by frame with {family}"):
            FrameStream(tiny.tiny_model(family), VideoLLMMoD(weights="untrained"))
    stream = FrameStream(tiny.tiny_model("llava"), VideoLLMMoD(weights="untrained"))
    with pytest.raises(InputError, match="no frames to read"):
        stream.frames(pixel_values=torch.zeros(0, 3, 16, 16))
    with pytest.raises(InputError, match="no tokens to read"):
        stream.text(torch.zeros(1, 0, dtype=torch.long))
