"""PAINT: which tokens are chosen, by hand and from the tower's own attention maps, and what is done to their logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import families as tiny
import numpy as np
import pytest
import torch
from slow_boost import SlowBoost, slow_answer
from specimens import generate, logits
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.imbalanced_attention import Paint, largest, outliers
from sightline.grounding.pai import PAI
from sightline.methods import parse_methods


def test_the_defaults() -> None:
    method = Paint()
    assert (method.alpha, method.beta, method.local_ratio, method.spatial_ratio) == (0.7, 0.4, 0.25, 0.0)
    assert (method.gamma, method.layers, method.head_modulation, method.boost_prefill) == (1.1, None, "none", "auto")
    assert list(method.layers_of(32)) == list(range(2, 32))
    assert parse_methods("imbalanced_attention:head_modulation=topk") == (Paint(head_modulation="topk"),)


def test_what_leaves_the_model_as_it_is() -> None:
    assert Paint(alpha=0.0, beta=0.0, gamma=1.0).is_identity
    assert Paint().identity().is_identity
    for changed in (Paint(alpha=0.0, beta=0.0), Paint(alpha=0.0, gamma=1.0), Paint(beta=0.0, gamma=1.0)):
        assert not changed.is_identity
    assert not Paint(alpha=0.0, beta=0.0).claims()
    assert Paint(alpha=0.0).claims()


# --- Which tokens ---


def test_the_largest_are_counted_downwards_and_ties_go_to_the_first() -> None:
    scores = torch.tensor([3.0, 9.0, -math.inf, 5.0, 7.0, 5.0, 1.0])
    places = [largest(scores, share).nonzero()[:, 0].tolist() for share in (0.0, 0.16, 0.17, 0.34, 0.5, 1.0)]
    assert places == [[], [], [1], [1, 4], [1, 3, 4], [0, 1, 3, 4, 5, 6]]
    assert int(largest(torch.rand(100), 0.29).sum()) == 29  # 0.29 * 100 < 29 in floating point


def test_outliers_by_hand() -> None:
    # Of 0..8 and 15 the quartiles are 2.25 and 6.75; 6.75 + 1.5 * 4.5 = 13.5.
    scores = torch.tensor([4.0, 1.0, 15.0, 3.0, 0.0, 2.0, -math.inf, 5.0, 8.0, 7.0, 6.0])
    assert outliers(scores).nonzero()[:, 0].tolist() == [2]
    assert not outliers(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 13.5])).any()
    assert not outliers(torch.full((5,), 0.2)).any()


def test_the_factors_of_a_picture_by_hand() -> None:
    first = torch.tensor([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0])  # a quarter: tokens 0 and 2
    received = torch.tensor([0.0, 0.1, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0])
    late = torch.tensor([50.0, 1.0, 1.1, 1.2, 1.3, 40.0, 1.0, 1.1])  # quartiles 1.075 and 10.975: 0 and 5 stand out
    method = Paint(alpha=0.7, beta=0.4)
    assert method.factors(first, received, late).tolist() == pytest.approx([0.4, 0, 0.7, 0, 0, 0.4, 0, 0])
    spatial = Paint(alpha=0.7, beta=0.4, spatial_ratio=0.2)  # one of eight: token 3
    assert spatial.factors(first, received, late).tolist() == pytest.approx([0.4, 0, 0.7, 0.7, 0, 0.4, 0, 0])


def chosen_by_numpy(first: np.ndarray, late: np.ndarray, method: Paint) -> np.ndarray:
    """The factors of a picture, from the maps [heads, 1 + patches, 1 + patches] of two layers of the tower."""
    local = first[:, 0, 1:].sum(axis=0)
    patches = len(local)
    received = first.mean(axis=0)[1:, 1:].sum(axis=0)
    summary = late[:, 0, 1:].sum(axis=0)
    quarter, three_quarters = np.percentile(summary, [25, 75])
    outlying = {j for j in range(patches) if summary[j] > three_quarters + 1.5 * (three_quarters - quarter)}
    strong = set(np.argsort(-local)[: int(patches * method.local_ratio)].tolist())
    strong |= set(np.argsort(-received)[: int(patches * method.spatial_ratio)].tolist())
    factors = np.zeros(patches, dtype=np.float32)
    for j in strong - outlying:
        factors[j] = method.alpha
    for j in outlying:
        factors[j] = method.beta
    return factors


@torch.no_grad()
def columns_of(model: Any, batch: dict[str, Any], method: Paint) -> Tensor:
    """The factors of the prompts' columns, from the attention maps that the tower gives in eager mode."""
    model.set_attn_implementation("eager")
    maps = model.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    first, late = maps[0].numpy(), maps[-2].numpy()  # the connector of a tiny Llava reads the last layer but one
    factors = [chosen_by_numpy(first[picture], late[picture], method) for picture in range(len(first))]
    columns = torch.zeros(batch["input_ids"].shape)
    columns[batch["input_ids"] == tiny.IMAGE] = torch.from_numpy(np.concatenate(factors))
    return columns


# --- What is done to them ---

SEED = 1  # of a model whose pictures have summary tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        Paint(gamma=1.0),
        Paint(alpha=1.2, beta=0.9, spatial_ratio=0.2, layers=(0, 2), gamma=1.0, boost_prefill="never"),
        Paint(gamma=1.5),
        Paint(gamma=1.0, head_modulation="proportional"),
        Paint(gamma=1.0, head_modulation="proportional", boost_prefill="never"),
        Paint(gamma=1.0, head_modulation="topk", heads_ratio=0.8),
    ],
)
def test_answers_are_those_of_a_stock_model_with_slow_attention(method: Paint) -> None:
    model = tiny.tiny_model("llava", seed=SEED)
    batch = tiny.inputs("llava", model, images_per_row=[1, 2, 1])
    columns = columns_of(model, batch, method)
    # Both kinds of tokens are there, and others.
    assert {round(f, 4) for f in columns.unique().tolist()} == {0.0, method.alpha, method.beta}
    weigh = {
        "none": None,
        "proportional": lambda shares: shares / shares.max(),
        "topk": lambda shares: (shares >= shares.sort(descending=True).values[2]).float(),  # 3 of 4
    }[method.head_modulation]
    steps, boost_prompt = 3, method.boost_prefill == "auto" and method.gamma == 1
    visual = batch["input_ids"] == tiny.IMAGE
    for use_cache in (True, False):
        boost = SlowBoost(columns, method.layers_of(3), weigh=weigh, visual=visual)
        tokens, expected = slow_answer(
            model, batch, boost, method.gamma, steps, boost_prompt=boost_prompt, use_cache=use_cache
        )
        with sl.attach(model, method):
            out = generate(model, batch, steps, use_cache=use_cache)
        assert out.sequences[:, -steps:].tolist() == tokens
        got = torch.stack(out.logits).log_softmax(dim=-1)
        torch.testing.assert_close(got, torch.stack(expected).log_softmax(dim=-1), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_with_all_tokens_local_it_is_pai() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, images_per_row=[2, 1, 1])
    answers = []
    for method in (Paint(alpha=0.7, beta=0.7, local_ratio=1.0, boost_prefill="always"), PAI(0.7, None, 1.1, "always")):
        with sl.attach(model, method):
            answers.append(logits(generate(model, batch)))
    assert torch.equal(*answers)


@torch.no_grad()
def test_without_summary_tokens_beta_does_nothing() -> None:
    model = tiny.tiny_model("llava", seed=SEED)
    plain = Paint(alpha=0.0, beta=0.4)
    batch = next(
        one
        for one in (tiny.single("llava", model, 0, seed=seed) for seed in range(20))
        if not columns_of(model, one, plain).any()
    )
    answers = []
    for method in (Paint(alpha=0.7, beta=9.0, local_ratio=1.0), PAI(alpha=0.7)):
        with sl.attach(model, method):
            answers.append(logits(generate(model, batch)))
    assert torch.equal(*answers)


@torch.no_grad()
def test_attention_goes_to_the_chosen_tokens_and_leaves_the_others_in_proportion() -> None:
    model = tiny.tiny_model("llava", seed=SEED)
    batch = tiny.single("llava", model, 1)
    chosen = columns_of(model, batch, Paint(spatial_ratio=0.1))[0] > 0
    model.set_attn_implementation("eager")
    shares, odds = [], []
    for alpha in (0.0, 0.2, 0.7, 1.5):
        with sl.attach(model, Paint(alpha=alpha, beta=alpha / 2, spatial_ratio=0.1, gamma=1.0)):
            attention = model(**batch, output_attentions=True).attentions[0][0, :, -1]
        shares.append(attention[:, chosen].sum(dim=-1))
        odds.append(attention[:, ~chosen] / attention[:, ~chosen].sum(dim=-1, keepdim=True))
        torch.testing.assert_close(odds[-1], odds[0])
    for less, more in itertools.pairwise(shares):
        assert (more >= less).all()
    assert (shares[-1] > shares[0]).all()


@torch.no_grad()
def test_factors_stay_with_their_tokens_when_others_are_dropped() -> None:
    model = tiny.tiny_model("llava", seed=SEED)
    batch = tiny.single("llava", model, 1)
    method, reducer = Paint(gamma=1.0), sl.FasterVLM(keep=0.6)
    factors = columns_of(model, batch, method)[0]
    model.set_attn_implementation("eager")
    with sl.attach(model, reducer) as attachment:
        before = model(**batch, output_attentions=True).attentions[0][0, :, -1]
        assert attachment.kept is not None
        kept = attachment.kept[0][0]
    with sl.attach(model, method, reducer):
        after = model(**batch, output_attentions=True).attentions[0][0, :, -1]
    stays = batch["input_ids"][0] != tiny.IMAGE
    stays[stays.logical_not().nonzero()[kept, 0]] = True
    chosen = factors[stays] > 0
    assert chosen.any()
    assert chosen.sum() < (factors > 0).sum()  # some of the chosen are gone
    # The weights of all others shrink alike; those of the chosen shrink less, or grow.
    change = after / before
    torch.testing.assert_close(change[:, ~chosen], change[:, :1].expand(-1, int((~chosen).sum())))
    assert (change[:, chosen] > change[:, :1] * (1 + 1e-4)).all()


def test_what_a_head_is_multiplied_by() -> None:
    attention = torch.tensor([[0.2, 0.8, 0.4], [0.0, 0.0, 0.0]])
    proportional = Paint(head_modulation="proportional").head_weights(attention)
    torch.testing.assert_close(proportional, torch.tensor([[0.25, 1.0, 0.5], [0.0, 0.0, 0.0]]))
    half = Paint(head_modulation="topk").head_weights(attention)  # of three heads one
    assert half[0].tolist() == [0, 1, 0]
    two = Paint(head_modulation="topk", heads_ratio=0.7).head_weights(attention)
    assert two[0].tolist() == [0, 1, 1]
    assert Paint(head_modulation="topk", heads_ratio=0.01).head_weights(attention)[0].tolist() == [0, 1, 0]


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=11), r"alpha of imbalanced_attention must lie in \[0, 10\], not 11"),
        (dict(beta=-1.0), r"beta of imbalanced_attention must lie in \[0, 10\], not -1.0"),
        (dict(local_ratio=1.5), r"local_ratio of imbalanced_attention must lie in \[0, 1\], not 1.5"),
        (dict(spatial_ratio=-0.1), r"spatial_ratio of imbalanced_attention must lie in \[0, 1\]"),
        (dict(heads_ratio=0.0), r"heads_ratio of imbalanced_attention must lie in \(0, 1\], not 0.0"),
        (dict(head_modulation="top"), "unknown head_modulation of imbalanced_attention .*did you mean 'topk'"),
        (dict(gamma=0.9), r"gamma of imbalanced_attention must lie in \[1, 10\], not 0.9"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Paint(**options)


@pytest.mark.parametrize("family", ["paligemma", "qwen2_5_vl"])
def test_a_tower_without_a_cls_token_is_refused(family: str) -> None:
    with pytest.raises(InputError, match=r"imbalanced_attention needs a vision tower with a \[CLS\] token, which"):
        sl.attach(tiny.tiny_model(family), Paint())


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_decoder_lacks_is_refused(layer: int) -> None:
    message = f"imbalanced_attention is asked to steer layer {layer}, but the decoder has layers 0 to 2"
    with pytest.raises(InputError, match=message):
        sl.attach(tiny.tiny_model("llava"), Paint(layers=(0, layer)))
