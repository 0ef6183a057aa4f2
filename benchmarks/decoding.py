"""What a method of the decoder costs per generated token, once the prompt has been read, as a ratio to the stock model.

On the built-in model, where a step takes milliseconds and so shows every operation that is added, at batch 1 and 32;
and on a model of a real small one's shape. Targets on the built-in model: a contrastive method, which reads two views,
at most 1.6 at batch 1 and 2.1 at batch 32 (two passes would take 2); one that steers attention or hidden states at most
1.08 at batch 1. So small a model is run on one thread (OMP_NUM_THREADS=1): two wait for each other more than they help.
On the larger model that steering at most 1.05, and all of VISTA, which also puts late layers through the output head,
at most 1.27, which is what its paper measured. With numba (`sightline[cpu]`) steering one token is a compiled loop.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from shared.subjects import nano, prompt, small_vlm
from shared.timing import Row, arguments, in_turns, ratio, seconds_per_token, show

from sightline.grounding.contrastive_decoding import ContrastiveDecoding
from sightline.methods import methods, parse_methods

CHOSEN = (
    *(
        name
        for name, method in methods().items()
        if method.attaches and method.__module__.startswith("sightline.grounding.")
    ),
    "vista:gamma=0",
    "pai:gamma=1",
    "imbalanced_attention:gamma=1",
)
CONTRASTIVE = tuple(
    text for text in CHOSEN if isinstance(parse_methods(text)[0], ContrastiveDecoding) and "gamma" not in text
)
STEERING_ROUNDS = 10
"""So many times the rounds of the others."""
STEERING = ("vhr", "vista:gamma=0", "pai:gamma=1", "imbalanced_attention:gamma=1")


def measure(
    model: Any,
    name: str,
    chosen: Sequence[str],
    rows: int,
    tokens: int,
    targets: dict[str, float],
    options: argparse.Namespace,
) -> None:
    per_token = partial(seconds_per_token, model, prompt(model, rows=rows, text_tokens=20), tokens=tokens)
    cases = {"stock": partial(per_token, None), "stock once more": partial(per_token, None)}
    fitting = [text for text in chosen if text != "lacing" or name.startswith("picturebook")]  # it has a soft image
    cases |= {text: partial(per_token, parse_methods(text)) for text in fitting}
    times = in_turns(cases, options.rounds)
    lines = []
    for case, taken in times.items():
        over, most = ratio(taken, times["stock"]), targets.get(case)
        values = {"ms per token": 1e3 * statistics.median(taken), "ratio to stock": over}
        lines.append(Row(case, values, "" if most is None else f"<= {most:g}", None if most is None else over <= most))
    note = f"{name}, 100 visual tokens, {tokens} tokens a generation, the first not counted"
    show(f"Decoding at batch {rows}", note, lines, options)


def main() -> None:
    options = arguments(__doc__, rounds=7, more=add_part)
    if options.only in (None, "steering"):
        # By themselves, so that no round takes long: what is to be seen is less than a machine changes in seconds.
        model, name = nano(options.device)
        often = argparse.Namespace(**vars(options) | {"rounds": STEERING_ROUNDS * options.rounds})
        measure(model, name, STEERING, 1, 48, dict.fromkeys(STEERING, 1.08), often)
    if options.only in (None, "nano"):
        model, name = nano(options.device)
        others = [text for text in CHOSEN if text not in STEERING]
        measure(model, name, others, 1, 48, dict.fromkeys(CONTRASTIVE, 1.6), options)
        measure(model, name, CHOSEN, 32, 12, dict.fromkeys(CONTRASTIVE, 2.1), options)
    if options.only in (None, "small-vlm"):
        model, name = small_vlm(options.device, torch.float32, patches_a_side=10)
        measure(model, name, CHOSEN, 1, 6, {"vhr": 1.05, "vista:gamma=0": 1.05, "vista": 1.27}, options)


def add_part(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=("steering", "nano", "small-vlm"), help="one of the parts (default: all)")


if __name__ == "__main__":
    main()
