"""How much sooner FasterVLM has read a prompt, against what the operations that it saves promise.

A Llava with the decoder of Qwen2-0.5B reads 729 visual tokens and 40 of text. The picture is encoded beforehand, as
`generate` does it, and timed apart. All that the method does besides (reading the [CLS] attention in the tower,
choosing, dropping) counts against it: what its tower takes longer than the stock one is added to its reading. Target:
at least 80 % of the ratio of operations.

At batch 1 a short prompt is too short to keep the processor busy while it fetches the weights, with or without us: the
last column compares with the stock decoder on a prompt that never had more tokens.

The operations are counted by the formula below, which is itself compared with torch's counter on a model without data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from shared.subjects import prompt, small_vlm
from shared.timing import Row, arguments, in_turns, now, ratio, show
from torch.utils.flop_counter import FlopCounterMode

from sightline.methods import attach
from sightline.reduction.fastervlm import FasterVLM

SIDE, TEXT = 27, 40
KEEPS = (1.0, 0.25, 0.05)
BATCHES = (1, 4)
LEAST_SHARE = 0.8


def operations(config: Any, tokens: int) -> int:
    """Multiplications and additions of a decoder of SwiGLU layers that reads a prompt; attention is counted whole, as
    torch counts it, without leaving out the causal half.

    Sum over layers of 2 (n (2 d^2 + 2 d d_kv + 3 d m) + 2 n^2 d): queries and output, keys and values, feed-forward;
    scores and their weighted sum.
    """
    d, m, n = config.hidden_size, config.intermediate_size, tokens
    d_kv = config.num_key_value_heads * d // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * (n * (2 * d**2 + 2 * d * d_kv + 3 * d * m) + 2 * n**2 * d))


def counted(model: Any, tokens: int) -> int:
    """What torch counts for the same on a decoder that has shapes but no weights."""
    with torch.device("meta"):
        config = copy.deepcopy(model.config.text_config)
        config._attn_implementation = "eager"
        decoder = type(model.model.language_model)(config)
        embeds = torch.empty(1, tokens, config.hidden_size)
        mask = torch.empty(1, 1, tokens, tokens)
        positions = torch.empty(1, tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
    return int(counter.get_total_flops())


class Reading:
    """Reads the prompt with a share of its visual tokens, and notes the time of tower and decoder apart."""

    def __init__(self, model: Any, inputs: dict[str, Any], keep: float) -> None:
        self.model, self.inputs, self.method = model, inputs, FasterVLM(keep=keep)
        self.tower: list[float] = []
        self.decoder: list[float] = []

    @torch.no_grad()
    def __call__(self) -> float:
        rest = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        with attach(self.model, self.method):
            start = now(self.model.device)
            pictures = self.model.model.get_image_features(pixel_values=self.inputs["pixel_values"])
            encoded = now(self.model.device)
            self.model(**rest, mm_encoder_outputs={"image": pictures}, use_cache=True, logits_to_keep=1)
            done = now(self.model.device)
        self.tower.append(encoded - start)
        self.decoder.append(done - encoded)
        return done - start


@torch.no_grad()
def seconds_for_as_many(model: Any, rows: int, tokens: int) -> float:
    """What the stock decoder takes for a prompt that never had more tokens."""
    embeds = torch.zeros(rows, tokens, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype)
    embeds.normal_(generator=torch.Generator(model.device).manual_seed(0))
    start = now(model.device)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
    model.lm_head(hidden[:, -1:])
    return now(model.device) - start


def measure(model: Any, name: str, batch: int, options: argparse.Namespace) -> None:
    config = model.config.text_config
    inputs = prompt(model, rows=batch, text_tokens=TEXT)
    readings = {keep: Reading(model, inputs, keep) for keep in KEEPS}
    tokens = {keep: max(1, round(keep * SIDE**2)) + TEXT for keep in KEEPS}
    cases: dict[str, Callable[[], float]] = {f"{keep}": reading for keep, reading in readings.items()}
    cases |= {f"as {keep}": partial(seconds_for_as_many, model, batch, tokens[keep]) for keep in KEEPS[1:]}
    times = in_turns(cases, options.rounds)

    stock, rows = readings[KEEPS[0]], []
    for keep, reading in readings.items():
        values: dict[str, float | int | str] = {
            "visual tokens": tokens[keep] - TEXT,
            "tower s": statistics.median(reading.tower[1:]),
            "decoder s": statistics.median(reading.decoder[1:]),
        }
        if keep == KEEPS[0]:
            rows.append(Row("stock", values))
            continue
        towers = zip(reading.tower[1:], stock.tower[1:], strict=True)
        own = [
            decoder + max(0.0, more - less) for decoder, (more, less) in zip(reading.decoder[1:], towers, strict=True)
        ]
        speed_up = ratio(stock.decoder[1:], own)
        saved = operations(config, tokens[KEEPS[0]]) / operations(config, tokens[keep])
        values |= {"speed-up": speed_up, "operations / fewer": saved, "share": speed_up / saved}
        values["time / stock with as many"] = ratio(own, times[f"as {keep}"])
        rows.append(Row(f"keep {keep:g}", values, f"share >= {LEAST_SHARE:g}", speed_up / saved >= LEAST_SHARE))
    formula = [operations(config, count) / counted(model, count) for count in (tokens[KEEPS[-1]], tokens[KEEPS[0]])]
    note = (
        f"{name}, attention {config._attn_implementation}; operations by the formula over those by torch's counter: "
        f"{formula[0]:.4f} at {tokens[KEEPS[-1]]} tokens, {formula[1]:.4f} at {tokens[KEEPS[0]]}"
    )
    show(f"Reading a prompt at batch {batch}", note, rows, options)


def main() -> None:
    options = arguments(__doc__, rounds=3)
    model, name = small_vlm(options.device, torch.float32, patches_a_side=SIDE)
    for batch in BATCHES:
        measure(model, name, batch, options)


if __name__ == "__main__":
    main()
