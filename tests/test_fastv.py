"""FastV against a run that reads everything and hides the dropped keys."""

from __future__ import annotations

from typing import Any

import families as tiny
import pytest
import torch
from slow_narrowing import answer, attentions, cached, hiding, visual
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.methods import attach
from sightline.reduction.fastv import FastV, most_attended

FAMILIES = ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3", "paligemma"]


def dropped_by_hand(model: Any, batch: dict[str, Any], keep: float, layer: int) -> Tensor:
    """bool [B, S]: the visual tokens that are not among the best of their row."""
    weights = attentions(model, batch)[layer - 1][:, -1]
    dropped = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, places in enumerate(visual(batch)):
        columns = places.nonzero()[:, 0].tolist()
        if columns:
            best = sorted(columns, key=lambda column: -float(weights[row, column]))
            dropped[row, best[max(1, round(keep * len(columns))) :]] = True
    return dropped


def test_the_most_attended_by_hand() -> None:
    attention = torch.tensor([[0.9, 0.1, 0.3, 0.2, 0.3, 0.1], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.2] * 6])
    shown = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0] * 6]).bool()
    kept = most_attended(attention, shown, 0.5)
    assert kept.int().tolist() == [[0, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]  # 1.5 tokens are 2
    assert most_attended(attention, shown, 0.01).sum(dim=1).tolist() == [1, 1, 0]
    assert torch.equal(most_attended(attention, shown, 1.0), shown)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [1, 2])
def test_it_equals_hiding_the_dropped_keys(family: str, layer: int) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    dropped = dropped_by_hand(model, batch, 0.4, layer)
    with torch.no_grad(), hiding(model, dict.fromkeys(range(layer, 3), dropped)):
        want = model(**batch, use_cache=False).logits[:, -1]
    with torch.no_grad(), attach(model, FastV(keep=0.4, layer=layer)):
        got = model(**batch).logits[:, -1]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert (model(**batch).logits[:, -1] - want).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES[:-1])  # PaliGemma reads what was generated otherwise than a prompt
def test_an_answer_goes_on_at_the_right_positions_from_shorter_caches(family: str) -> None:
    model = tiny.tiny_model(family)
    for row in range(2):
        batch = tiny.single(family, model, row)
        dropped = dropped_by_hand(model, batch, 0.3, 2)
        tokens, scores = answer(model, batch, {2: dropped}, 4)
        with attach(model, FastV(keep=0.3)):
            out = model.generate(
                **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        length = batch["input_ids"].shape[1]
        assert out.sequences[0, length:].tolist() == tokens
        torch.testing.assert_close(torch.cat(out.logits), scores, atol=1e-4, rtol=0)
        assert cached(out.past_key_values) == [length + 3, length + 3, length + 3 - int(dropped.sum())]


def test_the_caches_of_a_batch_are_as_long_as_the_row_that_keeps_most() -> None:
    model = tiny.tiny_model("llava", text_config=dict(num_hidden_layers=5))
    batch = tiny.inputs("llava", model, images_per_row=[2, 0, 1])
    with torch.no_grad(), attach(model, FastV(keep=0.25, layer=3)):
        cache = model(**batch, use_cache=True).past_key_values
    length = batch["input_ids"].shape[1]
    dropped = visual(batch).sum(dim=1) * 3 // 4
    left = int((batch["attention_mask"].sum(dim=1) - dropped).max())
    assert cached(cache) == [length] * 3 + [left] * 2


def test_what_is_dropped_depends_on_the_question() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model, questions=[[3, 8, 9], [70, 4, 33], [8, 8, 41]])
    batch["pixel_values"][:] = batch["pixel_values"][1].clone()
    dropped = dropped_by_hand(model, batch, 0.25, 2)
    assert len({str(row.nonzero().tolist()) for row in dropped}) > 1


def test_hidden_states_of_dropped_tokens_reach_nothing() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    dropped = dropped_by_hand(model, batch, 0.25, 2)

    def last(noise: float) -> Tensor:
        def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
            return output + noise * dropped[..., None]

        handle = model.model.language_model.layers[1].register_forward_hook(disturb)
        try:
            with torch.no_grad():
                return model(**batch).logits[0, -1]
        finally:
            handle.remove()

    assert (last(0.0) - last(3.0)).abs().max() > 1e-2
    with attach(model, FastV(keep=0.25)):
        assert torch.equal(last(0.0), last(3.0))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"keep of fastv must lie in \(0, 1\], not 0"):
        FastV(keep=0)
    with pytest.raises(InputError, match=r"layer of fastv must lie in \[1, 1000\], not 0"):
        FastV(layer=0)
    with pytest.raises(InputError, match="layer of fastv must be a whole number"):
        FastV(layer=1.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fastv must act at a layer from 1 to 2, not 3"):
        attach(tiny.tiny_model("llava"), FastV(layer=3))
    with pytest.raises(InputError, match="sliding layers"):
        attach(tiny.tiny_model("gemma3"), FastV())
    with pytest.raises(InputError, match="must act at a layer from 2 on in qwen3_vl, not 1"):
        attach(tiny.tiny_model("qwen3_vl"), FastV(layer=1))
    with pytest.raises(InputError, match="do not compose"):
        attach(tiny.tiny_model("llava"), FastV(), sl.PAI())
