"""How much sooner a prompt has been read with fewer visual tokens, against what the operations that are saved promise.

A Llava reads a picture and 40 tokens of text: by default one with the decoder of Qwen2-0.5B and 729 visual tokens; with
`--shape llava-1.5-7b` one of the size of LLaVA-1.5-7B and its 576. Weights are random and made on the device. FasterVLM
drops tokens before the decoder, FastV after its second layer.

The picture is encoded beforehand, as `generate` does it, and timed apart. All that a method does besides (reading the
[CLS] attention in the tower, watching a layer's attention, choosing, dropping) counts against it: what its tower takes
longer than the stock one is added to its reading. Target: at least 80 % of the ratio of operations.

At batch 1 a short prompt is too short to keep a processor busy while it fetches the weights, with or without us: one
column compares with the stock decoder on a prompt that never had more tokens. With `--device cuda` there is the peak of
the memory too, beside the weights.

The operations are counted by `sightline.benchmarks.flops`, which is itself compared with torch's counter on a model
without data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from shared.subjects import SHAPES, prompt, small_vlm
from shared.timing import Row, arguments, in_turns, now, ratio, show
from torch.utils.flop_counter import FlopCounterMode

from sightline.benchmarks.flops import DecoderShape
from sightline.methods import Method, attach, methods, parse_methods

TEXT = 40
KEEPS = (0.5, 0.25, 0.1, 0.05)
METHODS = ("fastervlm", "fastv")
BATCHES = (1, 4)
LEAST_SHARE = 0.8


def counted(model: Any, tokens: int) -> int:
    """What torch counts for reading so many tokens with a decoder that has shapes but no weights."""
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
    """Reads the prompt with methods, and notes the time of tower and decoder apart, and the peak of memory."""

    def __init__(self, model: Any, inputs: dict[str, Any], methods: tuple[Method, ...]) -> None:
        self.model, self.inputs, self.methods = model, inputs, methods
        self.tower: list[float] = []
        self.decoder: list[float] = []
        self.layer_tokens: list[int] | None = None
        self.read = inputs["input_ids"].shape[1]
        self.memory = 0

    @torch.no_grad()
    def __call__(self) -> float:
        rest = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        device = self.model.device
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        with attach(self.model, *self.methods) as attached:
            start = now(device)
            pictures = self.model.model.get_image_features(pixel_values=self.inputs["pixel_values"])
            encoded = now(device)
            self.model(**rest, mm_encoder_outputs={"image": pictures}, use_cache=True, logits_to_keep=1)
            done = now(device)
            if (call := attached.call) is not None:
                self.read, self.layer_tokens = call.prompt_length - call.dropped, call.layer_tokens
        if device.type == "cuda":
            self.memory = torch.cuda.max_memory_allocated(device) - before
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
    """Prints what comes out at one batch size."""
    config = model.config.text_config
    shape = DecoderShape.of(config)
    inputs = prompt(model, rows=batch, text_tokens=TEXT)
    visual = int(model.config.image_seq_length)
    specs = [f"{method}:keep={keep:g}" for method in METHODS if method in methods() for keep in options.keep]
    stock = Reading(model, inputs, ())
    readings = {spec: Reading(model, inputs, parse_methods(spec)) for spec in specs}
    fewer = {keep: max(1, round(keep * visual)) + TEXT for keep in options.keep}
    cases: dict[str, Callable[[], float]] = {"stock": stock, **readings}
    cases |= {f"as {keep:g}": partial(seconds_for_as_many, model, batch, tokens) for keep, tokens in fewer.items()}
    times = in_turns(cases, options.rounds)

    rows = [Row("stock", {"visual tokens": visual, **_seconds(stock), **_memory(stock)})]
    whole = shape.prefill_flops(visual + TEXT)
    for spec, reading in readings.items():
        towers = zip(reading.tower[1:], stock.tower[1:], strict=True)
        own = [
            decoder + max(0.0, more - less) for decoder, (more, less) in zip(reading.decoder[1:], towers, strict=True)
        ]
        speed_up = ratio(stock.decoder[1:], own)
        saved = whole / shape.prefill_flops(reading.layer_tokens or reading.read)
        values: dict[str, float | int | str] = {
            "visual tokens": min(reading.layer_tokens or [reading.read]) - TEXT,
            **_seconds(reading),
            "speed-up": speed_up,
            "operations / fewer": saved,
            "share": speed_up / saved,
            **_memory(reading),
        }
        if reading.layer_tokens is None:
            values["time / stock with as many"] = ratio(own, times[f"as {spec.rpartition('=')[2]}"])
        rows.append(Row(spec, values, f"share >= {LEAST_SHARE:g}", speed_up / saved >= LEAST_SHARE))
    formula = [shape.prefill_flops(count) / counted(model, count) for count in (min(fewer.values()), visual + TEXT)]
    note = (
        f"{name}, attention {config._attn_implementation}; operations by the formula over those by torch's counter: "
        f"{formula[0]:.4f} at {min(fewer.values())} tokens, {formula[1]:.4f} at {visual + TEXT}"
    )
    show(f"Reading a prompt at batch {batch}", note, rows, options)


def _seconds(reading: Reading) -> dict[str, float | int | str]:
    tower, decoder = statistics.median(reading.tower[1:]), statistics.median(reading.decoder[1:])
    return {"first token s": tower + decoder, "tower s": tower, "decoder s": decoder}


def _memory(reading: Reading) -> dict[str, float | int | str]:
    return {"peak MB": round(reading.memory / 1e6)} if reading.memory else {}


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-0.5b", help="default: %(default)s")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
        parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS), help="shares (default: %(default)s)")
        parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="rows (default: 1 4)")

    options = arguments(__doc__, rounds=3, more=more)
    model, name = small_vlm(options.device, getattr(torch, options.dtype), shape=options.shape)
    for batch in options.batch:
        measure(model, name, batch, options)


if __name__ == "__main__":
    main()
