"""Counted costs of reading a prompt: worked numbers, torch's own counter, the cache that is really filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import lines, small_run
from PIL import Image
from tiny_checkpoint import save_tiny_checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from sightline.benchmarks.flops import DecoderShape, PromptCost, costs_of, stock_cost
from sightline.errors import InputError
from sightline.methods import attach, parse_methods
from sightline.models.answering import prepare
from sightline.models.loading import load

LLAVA_7B = DecoderShape(layers=32, width=4096, query_width=4096, key_width=4096, mlp=11008)
TEXT, VISUAL = 60, 576


def share(tokens: list[int]) -> float:
    """Of what the whole prompt takes, in per cent."""
    return round(100 * LLAVA_7B.prefill_flops(tokens) / LLAVA_7B.prefill_flops(TEXT + VISUAL), 1)


def test_the_worked_numbers_of_llava_7b() -> None:
    assert round(LLAVA_7B.prefill_flops(TEXT + VISUAL) / 1e12, 2) == 8.45
    before = {288: 54.1, 144: 31.5, 58: 18.2, 29: 13.7, 1: 9.4}
    assert {kept: share([TEXT + kept] * 32) for kept in before} == before
    assert share([636] * 2 + [TEXT + 288] * 30) == 57.0  # FastV after layer 2
    # Every second layer reads a fifth of the visual tokens.
    assert share([636 if layer % 2 == 0 else TEXT + 115 for layer in range(32)]) == pytest.approx(63.5, abs=0.1)
    whole = LLAVA_7B.cache_bytes(636)
    assert whole == 32 * 636 * 2 * 4096 * 2
    assert round(100 * LLAVA_7B.cache_bytes(TEXT + 58) / whole, 1) == 18.6
    assert round(100 * LLAVA_7B.cache_bytes([636] * 2 + [TEXT + 288] * 30) / whole, 1) == 57.5
    assert LLAVA_7B.cache_bytes(636, 4) == 2 * whole


@pytest.mark.parametrize("head_dim", [8, 12])
def test_torch_counts_the_same_where_heads_share_keys(head_dim: int) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=head_dim,
        attn_implementation="eager",
    )
    shape = DecoderShape.of(config)
    assert shape == DecoderShape(3, 48, 6 * head_dim, 2 * head_dim, 80)
    model = LlamaModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(inputs_embeds=torch.zeros(1, 17, 48)).past_key_values
    assert counter.get_total_flops() == shape.prefill_flops(17)
    held = sum(2 * layer.keys.nbytes for layer in cache.layers)
    assert held == shape.cache_bytes(17, 4)


def test_a_number_for_every_layer_is_needed() -> None:
    with pytest.raises(InputError, match="32 layers needs as many numbers of tokens, not 3"):
        LLAVA_7B.prefill_flops([1, 2, 3])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "pico"))


@pytest.fixture(scope="module")
def loaded(checkpoint: str) -> tuple[Any, Any]:
    return load(checkpoint)


def counted(loaded: tuple[Any, Any], method: str, questions: list[str]) -> tuple[list[PromptCost], Any, list[int]]:
    """The costs of each row, the cache that generation leaves, and the rows' own lengths."""
    model, processor = loaded
    pictures = [Image.effect_noise((80, 80), 20 + 30 * row).convert("RGB") for row in range(len(questions))]
    inputs = prepare(model, processor, pictures, questions)
    with attach(model, *parse_methods(method), processor=processor) as attached:
        output = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
        assert attached.call is not None
        costs = costs_of(attached.call, DecoderShape.of(model.config.text_config), 4)
    return costs, output.past_key_values, inputs["attention_mask"].sum(dim=1).tolist()


QUESTIONS = ["Is there a cat?", "Is there a cat to the left or to the right of the big green umbrella?"]


@pytest.mark.parametrize("method", ["fastervlm:keep=0.1", "ritual", "fastv:keep=0.1", "fastv:keep=0.3,layer=1"])
def test_what_is_counted_is_what_the_cache_holds(loaded: tuple[Any, Any], method: str) -> None:
    ((cost,), cache, _) = counted(loaded, method, QUESTIONS[:1])
    # The last of the two tokens is not fed back, so the cache holds the prompt and one more.
    held = sum(2 * len(layer.keys) * layer.keys[0, :, 1:].nbytes for layer in cache.layers)
    assert cost.cache_bytes == held


def test_visual_tokens_are_a_mean_over_layers_and_streams_cost_their_rows(loaded: tuple[Any, Any]) -> None:
    shape = DecoderShape.of(loaded[0].config.text_config)
    layers = shape.layers
    ((cost,), _, (length,)) = counted(loaded, "fastervlm:keep=0.1", QUESTIONS[:1])
    assert cost == stock_cost(shape, length - 90, 10, 4)
    ((cost,), _, _) = counted(loaded, "fastv:keep=0.1,layer=1", QUESTIONS[:1])
    assert cost.visual_tokens == pytest.approx((100 + 10 * (layers - 1)) / layers)
    assert cost.flops == shape.prefill_flops([length] + [length - 90] * (layers - 1))
    ((cost,), _, _) = counted(loaded, "ritual", QUESTIONS[:1])
    assert cost.flops == 2 * shape.prefill_flops(length), "a second row reads the changed picture"
    assert cost.visual_tokens == 100


@pytest.mark.parametrize("method", ["fastervlm:keep=0.1", "ritual", "fastv:keep=0.1,layer=2"])
def test_padding_is_not_counted(loaded: tuple[Any, Any], method: str) -> None:
    together, _, lengths = counted(loaded, method, QUESTIONS)
    assert lengths[0] < lengths[1]
    alone = [counted(loaded, method, [question])[0][0] for question in QUESTIONS]
    assert together == alone


def test_a_run_has_the_counts_of_every_answer(checkpoint: str, tmp_path: Path) -> None:
    methods = ["none", "fastervlm:keep=1", "fastervlm:keep=0.1"]
    found = small_run(checkpoint, tmp_path / "run", methods, items=3).methods
    rows = {(row["method"], row["id"]): row for row in lines(tmp_path / "run")}
    shape = DecoderShape.of(load(checkpoint)[0].config.text_config)
    for (method, item), row in rows.items():
        stock = rows["none", item]
        assert row["prefill_flops_given"] == stock["prefill_flops"] == stock["prefill_flops_given"]
        if method == methods[2]:
            assert row["layer_visual_tokens"] == 10
            assert shape.cache_bytes(90, 4) == row["cache_bytes_given"] - row["cache_bytes"]
        else:
            assert (row["prefill_flops"], row["cache_bytes"]) == (stock["prefill_flops"], stock["cache_bytes"])
    assert [one.flops_ratio for one in found[:2]] == [1, 1]
    assert found[2].flops_ratio is not None
    assert 0.1 < found[2].flops_ratio < 0.5
    assert [one.layer_visual_tokens for one in found] == [100, 100, 10]
