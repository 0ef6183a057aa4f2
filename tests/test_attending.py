"""Attention computed in another way: against loops, against the modelling files' own, and what is left afterwards."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import families as tiny
import pytest
import torch
from specimens import Nothing, forward_logits, generate, traces
from torch import Tensor, nn

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.pai import PAI
from sightline.methods import Method
from sightline.models import attending as module_under_test
from sightline.models.attending import Attended, Attending, AttentionSwitch, replace_attention
from sightline.models.boundary import Boundary
from sightline.models.call import Call
from sightline.models.stock_reading import prompt_attention

ROWS, HEADS, GROUPS, QUERIES, KEYS, WIDTH = 2, 6, 2, 3, 7, 4


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def attending(mask: Tensor | None, *, queries: int = QUERIES, softcap: float | None = None) -> Attending:
    """Random queries, keys and values, of which the model's own function makes zeros."""

    def own(module: Any, query: Tensor, *args: Any, **options: Any) -> Attended:
        return torch.zeros(ROWS, query.shape[2], HEADS, WIDTH), torch.zeros(ROWS, HEADS, query.shape[2], KEYS)

    return Attending(
        module=None,
        query=random(ROWS, HEADS, queries, WIDTH, seed=1),
        key=random(ROWS, GROUPS, KEYS, WIDTH, seed=2),
        value=random(ROWS, GROUPS, KEYS, WIDTH, seed=3),
        mask=mask,
        scaling=0.4,
        options={} if softcap is None else {"softcap": softcap},
        own=own,
        shows_weights=True,
    )


def bool_mask(queries: int = QUERIES) -> Tensor:
    """Causal, and the first keys of the second row are padding."""
    mask = torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries).expand(ROWS, 1, -1, -1).clone()
    mask[1, :, :, :2] = False
    return mask


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda queries: None,
    "bool": bool_mask,
    "additive": lambda queries: additive(bool_mask(queries)),
}


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("mask", MASKS)
def test_logits_weights_and_outputs_by_loops(mask: str, queries: int, softcap: float | None) -> None:
    one = attending(MASKS[mask](queries), queries=queries, softcap=softcap)
    seen = torch.ones(queries, KEYS, dtype=torch.bool).tril(KEYS - queries).expand(ROWS, 1, -1, -1)
    if mask != "none":
        seen = bool_mask(queries)
    logits, weights, outputs = one.logits(), one.weights(), one.outputs(one.weights())
    assert logits.shape == (ROWS, HEADS, queries, KEYS)
    for row in range(ROWS):
        for head in range(HEADS):
            for query in range(queries):
                group = head // (HEADS // GROUPS)
                total, mixed = 0.0, torch.zeros(WIDTH)
                for key in range(KEYS):
                    if not seen[row, 0, query, key]:
                        assert logits[row, head, query, key] == torch.finfo(torch.float32).min
                        assert weights[row, head, query, key] == 0
                        continue
                    z = 0.4 * float(one.query[row, head, query] @ one.key[row, group, key])
                    z = z if softcap is None else softcap * math.tanh(z / softcap)
                    assert float(logits[row, head, query, key]) == pytest.approx(z, abs=1e-5)
                    total += math.exp(z)
                    mixed += math.exp(z) * one.value[row, group, key]
                torch.testing.assert_close(outputs[row, query, head], mixed / total, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.logits(1), logits[:, :, -1:])
    torch.testing.assert_close(one.masked(one.unmasked(2)), logits[:, :, -2:])


def test_a_hidden_key_stays_hidden_in_half_precision() -> None:
    """An additive mask and a negative logit together leave the range of float16, and -inf times 0 would be NaN."""
    mask = additive(bool_mask(), torch.float16)
    one = attending(mask)
    low = one.masked(torch.full((ROWS, HEADS, QUERIES, KEYS), -100.0, dtype=torch.float16))
    assert low.isfinite().all()
    assert (low.softmax(dim=-1)[1, :, :, :2] == 0).all()


def test_other_logits_for_the_last_queries() -> None:
    one = attending(bool_mask())
    given = random(ROWS, HEADS, 2, KEYS, seed=9)
    output, weights = one.with_last(given)
    assert weights is not None
    expected = given.softmax(dim=-1)
    torch.testing.assert_close(weights[:, :, -2:], expected)
    torch.testing.assert_close(output[:, -2:], one.outputs(expected))
    # The others are the model's own.
    assert not weights[:, :, :-2].any()
    assert not output[:, :-2].any()
    everything, all_weights = one.with_last(random(ROWS, HEADS, QUERIES, KEYS))
    assert everything.shape == (ROWS, QUERIES, HEADS, WIDTH)
    assert all_weights is not None


# --- Against the modelling files ---


@dataclass
class Compared:
    """What has been compared so far."""

    masks: set[str] = field(default_factory=set)
    lengths: set[int] = field(default_factory=set)
    softcaps: set[float | None] = field(default_factory=set)
    windows: set[int | None] = field(default_factory=set)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {}),
    "gemma3": ("gemma3", dict(text_config=dict(sliding_window=8, layer_types=["sliding_attention"] * 3))),
    "qwen3_vl": ("qwen3_vl", {}),
    "paligemma with Gemma 2": (
        "paligemma",
        dict(
            text_config=dict(model_type="gemma2", query_pre_attn_scalar=8, sliding_window=8, attn_logit_softcapping=1.5)
        ),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "eager") for name in MODELS] + [(name, "sdpa") for name in MODELS if "Gemma 2" not in name],
)
def test_it_is_what_the_modelling_file_computes(name: str, implementation: str, padded: bool) -> None:
    family, options = MODELS[name]
    model = tiny.tiny_model(family, **options)
    softcapped = "Gemma 2" in name  # which SDPA does not do
    model.set_attn_implementation(implementation)
    batch = tiny.inputs(family, model) if padded else tiny.single(family, model, 1)
    compared = Compared()

    def compare(one: Attending) -> Attended:
        output, weights = one.stock()
        if implementation == "eager":
            assert weights is not None
            torch.testing.assert_close(one.weights(), weights, atol=1e-6, rtol=1e-5)
        length = one.query.shape[2]
        # Rows of padding see nothing, and what each function makes of that is never read.
        reads = torch.ones(one.query.shape[0], length, dtype=torch.bool)
        if length > 1:
            reads = batch["attention_mask"].bool()
        torch.testing.assert_close(one.outputs(one.weights())[reads], output[reads], atol=1e-5, rtol=1e-4)
        last, _ = one.with_last(one.logits(1))
        torch.testing.assert_close(last[reads], output[reads], atol=1e-5, rtol=1e-4)
        compared.masks.add("none" if one.mask is None else str(one.mask.dtype))
        compared.lengths.add(length)
        compared.softcaps.add(one.options.get("softcap"))
        compared.windows.add(getattr(one.module, "sliding_window", None))
        return output, weights

    layers = model.model.language_model.layers
    stock = generate(model, batch, 10).sequences
    switch = AttentionSwitch(layers[0].self_attn.config)
    undo = [replace_attention(layer.self_attn, compare) for layer in layers]
    try:
        assert torch.equal(generate(model, batch, 10).sequences, stock)
    finally:
        for back in (*undo, switch.back):
            back()
    assert {1, batch["input_ids"].shape[1]} == compared.lengths
    if implementation == "eager":
        assert "torch.float32" in compared.masks
    elif padded:
        assert "torch.bool" in compared.masks
    elif name == "llava":
        assert compared.masks == {"none"}
    assert compared.softcaps == ({1.5} if softcapped else {None})
    if name == "gemma3":
        assert compared.windows == {8}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_the_attention_over_the_prompt_is_the_unchanged_models(family: str) -> None:
    """Read while a method is attached that boosts the same layers, and against what eager attention gives."""
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model)
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Reading(Nothing):
        paper: ClassVar[str] = "reading"

        def before_prompt(self, call: Call) -> None:
            seen.append(prompt_attention(call, [0, 2]))

    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    boost = PAI(gamma=1.0)
    with sl.attach(model, boost):
        boosted = forward_logits(model, batch)
    with sl.attach(model, boost, Reading()):
        torch.testing.assert_close(forward_logits(model, batch), boosted)
    expected = torch.stack([maps[0].mean(dim=1), maps[2].mean(dim=1)], dim=1)
    real = batch["attention_mask"].bool()
    for row in range(3):
        torch.testing.assert_close(seen[0][row][:, real[row]], expected[row][:, real[row]], atol=1e-6, rtol=1e-4)


# --- Putting on and taking off ---


def test_changes_of_one_module_nest_and_are_undone() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    attention = model.model.language_model.layers[1].self_attn
    stock = forward_logits(model, batch)
    order: list[str] = []

    def change(name: str, factor: float) -> Callable[[Attending], Attended]:
        def times(one: Attending) -> Attended:
            order.append(name)
            output, weights = one.stock()
            return output * factor, weights

        return times

    switch = AttentionSwitch(attention.config)
    undo = [replace_attention(attention, change(name, factor)) for name, factor in (("a", 3.0), ("b", 0.5), ("c", 2.0))]
    forward_logits(model, batch)
    assert order == ["c", "b", "a"]
    undo.pop()()
    order.clear()
    one_and_a_half = forward_logits(model, batch)
    assert order == ["b", "a"]
    while undo:
        undo.pop()()
    assert attention not in module_under_test._CHANGES
    assert torch.equal(forward_logits(model, batch), stock)
    single = replace_attention(attention, change("alone", 1.5))
    torch.testing.assert_close(forward_logits(model, batch), one_and_a_half)
    single()
    switch.back()
    assert attention.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_switch_gives_the_config_back(implementation: str) -> None:
    model = tiny.tiny_model("llava")
    model.set_attn_implementation(implementation)
    config = model.model.language_model.config
    outer = AttentionSwitch(config)
    assert config._attn_implementation == f"sightline_{implementation}"
    inner = AttentionSwitch(config)
    inner.check()
    inner.back()
    outer.check()
    outer.back()
    assert config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_hides_its_logits_is_refused(implementation: str) -> None:
    model = tiny.tiny_model("llava")
    config = model.model.language_model.config
    config._attn_implementation = implementation
    before = traces(model)
    message = f"the attention logits cannot be reached in '{implementation}'; load the model with attn_implementation="
    with pytest.raises(InputError, match=message):
        sl.attach(model, Nothing(), PAI())
    assert traces(model) == before
    assert config._attn_implementation == implementation
    # Guidance alone does not reach inside.
    sl.attach(model, PAI(alpha=0.0)).detach()


def test_an_implementation_that_is_changed_in_the_meantime_is_noticed() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    message = (
        "the attention implementation was changed while methods were attached that work inside it; change it before"
    )
    with sl.attach(model, PAI(gamma=1.0)), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        model.set_attn_implementation("eager")
        with pytest.raises(InputError, match=message):
            model(**batch)
        with pytest.raises(InputError, match=message):
            model(torch.tensor([[5]]), past_key_values=cache)
    # What the user has set stays.
    assert model.model.language_model.config._attn_implementation == "eager"
    stock = forward_logits(model, batch)
    with sl.attach(model, PAI(gamma=1.0)):
        assert (forward_logits(model, batch) - stock).abs().max() > 1e-2


class Stop(Exception):  # noqa: N818
    """Raised inside an attention."""


def test_detaching_leaves_no_trace() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    config = model.model.language_model.config
    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    stock, before = forward_logits(model, batch), traces(model)

    @dataclass(frozen=True)
    class Failing(Method):
        paper: ClassVar[str] = "failing"

        def identity(self) -> Self:
            return self

        def install(self, boundary: Boundary) -> None:
            def fail(call: Call, one: Attending) -> Attended:
                raise Stop

            boundary.attend(boundary.anatomy.layers[1], fail)

    def is_stock() -> bool:
        left = any(attention in module_under_test._CHANGES for attention in attentions)
        return traces(model) == before and not left and config._attn_implementation == "sdpa"

    with sl.attach(model, PAI()):
        assert not is_stock()
        generate(model, batch)
    assert is_stock()
    outer = sl.attach(model, PAI(alpha=0.3))
    with pytest.raises(Stop), sl.attach(model, Failing()):
        forward_logits(model, batch)
    outer.detach()
    assert is_stock()
    assert torch.equal(forward_logits(model, batch), stock)


def test_other_models_of_the_process_are_left_alone() -> None:
    model, other = tiny.tiny_model("llava"), tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    stock = forward_logits(other, batch)
    with sl.attach(model, PAI()):
        assert torch.equal(forward_logits(other, batch), stock)
    function = sys.modules[type(attention_of(other)).__module__].eager_attention_forward
    assert function.__module__.startswith("transformers.")


def attention_of(model: Any) -> nn.Module:
    attention: nn.Module = model.model.language_model.layers[0].self_attn
    return attention
