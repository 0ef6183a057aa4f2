"""ATP-LLaVA: scores by hand, the hard form against hidden keys, the soft form against its formula and its limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import families as tiny
import pytest
import torch
from slow_narrowing import answer, attentions, cached, hiding, visual
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.methods import attach
from sightline.models.anatomy import Anatomy
from sightline.models.narrowing import Columns
from sightline.reduction.atp_llava import (
    EPSILON,
    ATPLlava,
    Thresholds,
    scores_of,
    soft_bias,
    spatial_scores,
    statistics,
    stretched,
)
from sightline.reduction.trained_reducer import hold

DEEP: dict[str, Any] = dict(text_config=dict(num_hidden_layers=6))
METHOD = ATPLlava(weights="untrained", module_layers=(1, 3, 4), strictness=1.0)


@pytest.fixture
def model() -> Any:
    return tiny.tiny_model("llava", **DEEP)


# --- By hand ---


def slow_scores(weights: Tensor, row: Tensor, live: Tensor, real: Tensor, ahead: bool = False) -> tuple[Tensor, Tensor]:
    """S_self and S_cross of one row: weights [S, S], bool [S] what is visual, left, and no padding."""
    length = len(row)
    own, cross = torch.zeros(length), torch.zeros(length)
    for key in range(length):
        eyes = [i for i in range(length) if live[i] and (ahead or i >= key)]
        own[key] = sum(float(weights[i, key]) for i in eyes) / max(1, len(eyes))
        words = [i for i in range(key + 1, length) if real[i] and not row[i]]
        cross[key] = sum(float(weights[i, key]) for i in words) / max(1, len(words))
    return own, cross


def test_a_key_is_scored_by_those_queries_that_can_see_it() -> None:
    # pad, text, two visual, text, one visual, text, and one column that was generated
    shown = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    seen = torch.ones(1, 8, 8).tril().bool() & (real[:, None] | torch.eye(8).bool())
    weights = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1)) * seen
    weights /= weights.sum(dim=-1, keepdim=True)
    columns = Columns(torch.arange(8)[None], real, shown, padded=True)
    own, cross = scores_of(weights, seen, columns, shown, 7)
    w = weights[0]
    assert own[0, 2] == pytest.approx(float(w[2, 2] + w[3, 2] + w[5, 2]) / 3)
    assert own[0, 3] == pytest.approx(float(w[3, 3] + w[5, 3]) / 2)
    assert own[0, 5] == pytest.approx(float(w[5, 5]))
    assert cross[0, 2] == pytest.approx(float(w[4, 2] + w[6, 2]) / 2)
    assert cross[0, 5] == pytest.approx(float(w[6, 5]))
    live = shown & (torch.arange(8) != 3)
    assert scores_of(weights, seen, columns, live, 7)[0][0, 2] == pytest.approx(float(w[2, 2] + w[5, 2]) / 2)
    # Words in front of a token have no say, not even where a prompt's columns all see one another.
    every = torch.ones_like(seen)
    looking = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2))
    _, cross = scores_of(looking, every, columns, shown, 7)
    assert cross[0, 2] == pytest.approx(float(looking[0, 4, 2] + looking[0, 6, 2]) / 2)
    # Even attention (1 / i for query i) gives no early token an advantage over what the queries behind it pay.
    even = torch.ones(1, 8, 8).tril()
    own, _ = scores_of(even, seen, columns, shown, 7)
    assert own[0, shown[0]].tolist() == [1.0, 1.0, 1.0]


def test_scores_are_stretched_over_what_is_left() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.4, 0.3, 0.1], [0.3, 0.3, 0.5, 0.3, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]])
    live = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    unit = stretched(scores, live)
    torch.testing.assert_close(unit[0, 1:4], torch.tensor([0.0, 1.0, 0.5]))
    assert unit[1, live[1]].tolist() == [1.0, 1.0, 1.0]
    assert unit.isfinite().all()


def test_statistics_know_no_scale_and_no_number() -> None:
    values = torch.tensor([0.1, 0.4, 0.2, 0.3])
    got = statistics(values[None], torch.ones(1, 4).bool())[0]
    spread = math.sqrt(0.0125) / 0.25
    want = [0.0, math.sqrt(spread**2 + 1e-6), math.log1p(0.4 / 0.25), 0.7, 1.0, 1.3]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=0)
    wide = torch.cat([torch.tensor([9.0]), values.repeat(3) / 3])[None]
    live = torch.tensor([[0] + [1] * 12]).bool()
    torch.testing.assert_close(statistics(wide, live)[0, :3], got[:3], atol=1e-5, rtol=0)
    assert statistics(wide, torch.zeros(1, 13).bool()).tolist() == [[0.0] * 6]
    same = torch.full((1, 3), 0.2, requires_grad=True)
    statistics(same, torch.ones(1, 3).bool()).sum().backward()
    assert same.grad is not None
    assert same.grad.isfinite().all()


def test_grids_are_nested_and_the_coarsest_scores_highest() -> None:
    assert spatial_scores((4, 4), (0.25,), 3.0).view(4, 4).tolist() == [
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.25, 0.0, 0.25],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.25, 0.0, 0.25],
    ]
    for shape in ((9, 11), (24, 24), (5, 3)):
        scores = spatial_scores(shape, (1 / 4, 1 / 16, 1 / 64), 3.0).view(shape)
        for row in range(shape[0]):
            for column in range(shape[1]):
                want = 0.0
                for step in (2, 4, 8):
                    if (row - min(8, shape[0]) // 2) % step == 0 and (column - min(8, shape[1]) // 2) % step == 0:
                        want = 1 - 3 / step**2
                assert scores[row, column] == want
    scores = spatial_scores((24, 24), (1 / 4, 1 / 16, 1 / 64), 3.0)
    assert [int((scores >= level).sum()) for level in (0.25, 0.8125, 0.953125)] == [144, 36, 9]
    row = spatial_scores((32,), (1 / 4, 1 / 16), 3.0)  # no raster: every fourth token, every sixteenth
    assert [int((row >= level).sum()) for level in (0.25, 0.8125)] == [8, 2]


def test_the_soft_mask_weighs_keys_as_in_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 5, 5, generator=generator)
    mask = torch.tensor([[1.0, 0.3, 0.0, 0.9, 1.0]])
    weighed = torch.zeros(5, 5)
    for i in range(5):
        for j in range(5):
            weighed[i, j] = logits[0, 0, i, j].exp() * (1.0 if i == j else mask[0, j] + EPSILON)
    want = weighed / weighed.sum(dim=1, keepdim=True)
    torch.testing.assert_close((logits + soft_bias(mask)).softmax(dim=-1)[0, 0], want)


# --- Answering: hidden keys ---


@torch.no_grad()
def dropped_by_hand(model: Any, batch: dict[str, Any], method: ATPLlava) -> dict[int, Tensor]:
    """For every layer bool [B, S], the visual tokens that the method leaves out, module after module."""
    anatomy = Anatomy.of(model)
    thresholds: Any = method.module(anatomy)
    shown, real = visual(batch), batch["attention_mask"].bool()
    places = method.layers(len(anatomy.layers))
    grids = [
        spatial_scores(grid or (count,), method.rates, method.lambda_sample)
        for grid, count in zip(anatomy.grids(batch), anatomy.tokens_per_image(batch), strict=True)
    ]
    spatial = torch.zeros(shown.shape)
    spatial[shown] = torch.cat(grids)
    hidden: dict[int, Tensor] = {}
    gone = torch.zeros_like(shown)
    for number, layer in enumerate(places):
        weights = attentions(model, batch, hidden)[layer - 1]
        gone = gone.clone()
        for row in range(len(shown)):
            live = shown[row] & ~gone[row]
            if not live.any():
                continue
            ahead = anatomy.family == "paligemma"
            own, cross = slow_scores(weights[row], shown[row], live, real[row], ahead)
            both = (own + cross) / 2
            low, high = both[live].min(), both[live].max()
            logits = thresholds[number](statistics(own[None], live[None]), statistics(cross[None], live[None]))[0]
            theta_r, theta_s = (logits + method.strictness).sigmoid()
            for column in live.nonzero()[:, 0].tolist():
                stays = (both[column] - low) / (high - low) > theta_r or spatial[row, column] > theta_s
                gone[row, column] = not stays
        for later in range(layer, len(anatomy.layers)):
            hidden[later] = gone
    return hidden


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_onevision", "paligemma"])
def test_it_equals_hiding_the_dropped_keys(family: str) -> None:
    model = tiny.tiny_model(family, **DEEP)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    hidden = dropped_by_hand(model, batch, METHOD)
    with torch.no_grad(), hiding(model, hidden):
        want = model(**batch, use_cache=False).logits[:, -1]
    with torch.no_grad(), attach(model, METHOD):
        out = model(**batch, use_cache=True)
    torch.testing.assert_close(out.logits[:, -1], want, atol=1e-5, rtol=1e-4)
    real = batch["attention_mask"].sum(dim=1)
    lengths = [
        batch["input_ids"].shape[1],
        *(int((real - hidden[layer].sum(dim=1)).max()) for layer in range(1, 6)),
    ]
    assert cached(out.past_key_values) == lengths
    counts = [int(hidden[layer].sum()) for layer in (1, 3, 4)]
    assert 0 < counts[0] < counts[1] < counts[2]  # what is gone stays gone, and each module drops something
    given = visual(batch).sum(dim=1)
    left = (given - hidden[4].sum(dim=1))[[0, 2]]
    assert (left > 0).all()
    assert left[0] / given[0] != left[1] / given[2]  # each prompt its own share


def test_an_answer_goes_on_at_the_right_positions_from_shorter_caches(model: Any) -> None:
    for row in range(3):
        batch = tiny.single("llava", model, row)
        hidden = dropped_by_hand(model, batch, METHOD)
        tokens, scores = answer(model, batch, hidden, 4)
        with attach(model, METHOD):
            out = model.generate(
                **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        length = batch["input_ids"].shape[1]
        assert out.sequences[0, length:].tolist() == tokens
        torch.testing.assert_close(torch.cat(out.logits), scores, atol=1e-4, rtol=0)


def test_the_question_decides_how_much_is_left(model: Any) -> None:
    batch = tiny.inputs("llava", model, questions=[[3, 8, 9], [70, 4, 33], [8, 8, 41]])
    batch["pixel_values"][:] = batch["pixel_values"][1].clone()
    last = dropped_by_hand(model, batch, METHOD)[5]
    assert len({str(row.nonzero().tolist()) for row in last}) > 1


def test_stricter_thresholds_leave_less(model: Any) -> None:
    batch = tiny.single("llava", model, 1)
    counts = []
    for strictness in (-10.0, -1.0, 0.5, 2.0, 4.0):
        method = ATPLlava(weights="untrained", module_layers=(2,), strictness=strictness)
        with torch.no_grad(), attach(model, method):
            counts.append(cached(model(**batch, use_cache=True).past_key_values)[-1])
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= batch["input_ids"].shape[1] - 1  # the lowest score is 0, and below any threshold
    assert counts[-1] < batch["input_ids"].shape[1] - 8


def test_the_papers_layers_are_scaled_to_the_depth() -> None:
    assert ATPLlava().layers(32) == (4, 14, 24)
    assert ATPLlava().layers(28) == (4, 12, 21)
    assert ATPLlava().layers(6) == (1, 3, 4)
    assert ATPLlava().layers(2) == (1,)
    assert ATPLlava(module_layers=(2, 5)).layers(32) == (2, 5)


# --- Training ---


@pytest.fixture
def trained(model: Any) -> Iterator[tuple[Any, ATPLlava, nn.Module]]:
    method = METHOD
    module = method.fresh(Anatomy.of(model)).train()
    hold(model, method, module)
    yield model, method, module
    hold(model, method, None)


def test_a_training_step_drops_nothing_and_reaches_the_thresholds(trained: Any) -> None:
    model, method, module = trained
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with attach(model, method) as attachment:
        out = model(**batch, use_cache=True)
        call = attachment.call
        assert call is not None
        loss = method.training_loss(call)
    assert cached(out.past_key_values) == [batch["input_ids"].shape[1]] * 6
    assert loss is not None
    (out.logits[:, -1].square().mean() + loss).backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert all(float(one.inner.weight.grad.abs().sum()) > 0 for one in module)


def test_the_loss_counts_deep_tokens_more_and_pulls_to_the_target(trained: Any) -> None:
    model, method, _ = trained
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with attach(model, method) as attachment:
        model(**batch, use_cache=False)
        call = attachment.call
        assert call is not None
        loss = method.training_loss(call)
    mask = call.memory[method, "mask"].detach()
    left = {layer: tokens.detach() for layer, tokens in call.memory[method, "left"].items()}
    assert list(left) == [1, 3, 4]
    shares = [float((left[layer][0] / 32 + left[layer][2] / 16) / 2) for layer in left]
    assert 1 > shares[0] > shares[1] > shares[2] > 0
    torch.testing.assert_close(left[4][0], mask[0][visual(batch)[0]].sum())
    assert (mask[~visual(batch)] == 1).all()
    want = 0.05 * (1 * shares[0] + 3 * shares[1] + 4 * shares[2]) + 0.2 * abs(sum(shares) / 3 - 0.25)
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)


def test_with_sharp_masks_training_is_what_answering_does(trained: Any) -> None:
    model, _, module = trained
    sharp = ATPLlava(weights="untrained", module_layers=(1, 3, 4), strictness=1.0, T=1e6)
    hold(model, sharp, module)
    batch = tiny.single("llava", model, 0)
    with attach(model, sharp):
        soft = model(**batch, use_cache=False).logits[0, -1]
        with torch.no_grad():
            hard = model(**batch, use_cache=False).logits[0, -1]
    with torch.no_grad():
        stock = model(**batch, use_cache=False).logits[0, -1]
    hold(model, sharp, None)
    assert (hard - stock).abs().max() > 0.1
    torch.testing.assert_close(soft.detach(), hard, atol=1e-4, rtol=0)


def test_training_teaches_a_module_to_keep_the_target(trained: Any) -> None:
    """The budget alone, without an answer to be right about."""
    model, _, module = trained
    method = ATPLlava(
        weights="untrained", module_layers=(1, 3, 4), strictness=1.0, lambda_atp=0.0, lambda_target=1.0, target=0.5
    )
    batch = tiny.inputs("llava", model)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    model.requires_grad_(False)
    with attach(model, method) as attachment:
        for _ in range(25):
            model(**batch, use_cache=False)
            call = attachment.call
            assert call is not None
            loss = method.training_loss(call)
            assert loss is not None
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[0] > 0.1
    assert min(losses[-5:]) < 0.03


def test_fresh_thresholds_let_most_tokens_pass() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Thresholds()
    logits = module(torch.randn(4, 6, generator=torch.Generator().manual_seed(2)), torch.zeros(4, 6))
    assert logits.shape == (4, 2)
    assert ((logits - torch.tensor([-2.0, 0.0])).abs() < 0.5).all()


# --- Errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(T=0), r"T of atp_llava must lie in \(0, 1000000\], not 0"),
        (dict(target=0), r"target of atp_llava must lie in \(0, 1\], not 0"),
        (dict(strictness=30), r"strictness of atp_llava must lie in \[-10, 10\], not 30"),
        (dict(rates=(0.1, 0.5)), r"rates of atp_llava must lie in \(0, 1\], the largest first"),
        (dict(rates=(2.0,)), r"rates of atp_llava must lie in \(0, 1\], the largest first"),
        (dict(rates=0.25), r"rates of atp_llava must lie in \(0, 1\], the largest first, not 0.25"),
        (dict(rates=("a",)), r"rates of atp_llava must lie in \(0, 1\], the largest first"),
        (dict(module_layers=2), "module_layers of atp_llava must be different layers in order, not 2"),
        (dict(module_layers=("a",)), "module_layers of atp_llava must be different layers in order"),
        (dict(module_layers=(3, 3)), "module_layers of atp_llava must be different layers in order"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ATPLlava(**settings)


def test_models_and_layers_that_do_not_fit_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="atp_llava must act at a layer from 1 to 5, not 6"):
        attach(model, ATPLlava(weights="untrained", module_layers=(6,)))
    with pytest.raises(InputError, match="atp_llava needs weights that were learned for this model"):
        attach(model, ATPLlava())
