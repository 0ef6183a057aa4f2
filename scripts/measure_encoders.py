"""Trains small encoders side by side and writes what was seen to `docs/results/encoders.jsonl`.

    python scripts/measure_encoders.py --jobs 2

Each comparison has arms of equal budget (the same examples, steps, batch and learning rate) and three seeds. A line is
one arm with one seed; lines that are there already are not measured again, so a killed run goes on where it was.
`scripts/write_docs.py` makes `docs/encoders.md` of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "encoders.jsonl"
SEEDS = (0, 1, 2)
EXITS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Confidences at which pictures leave LGViT."""
CONTEXT, HORIZON = 20, 100
"""Frames given and frames made in a rollout."""


@dataclass(frozen=True)
class Arm:
    """One encoder of a comparison."""

    comparison: str
    name: str
    encoder: str
    task: str
    examples: int
    steps: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 32
    learning_rate: float = 1e-3


def _arms() -> Iterator[Arm]:
    yield from _scarce("digits", 200)
    yield from _scarce("picturebook", 300)
    block = dict(task="digits", examples=1000, steps=800)
    for control in ("frozen", "random", "mlp"):
        yield Arm("frozen language block", control, "lm4visual_nano", overrides={"control": control}, **block)
    yield Arm("frozen language block", "no block", "vit_nano", **block)
    small = dict(width=64, depth=6, num_heads=4, exits=(2, 3, 4, 5), heads=("lph3", "lph1", "gah2", "gah3"))
    yield Arm("early exit", "LGViT", "lgvit_nano", "digits", 1000, 3000, small, learning_rate=2e-3)
    for task, steps in (("cells", 500), ("coins", 150)):
        for name, encoder in (("xLSTM-UNet", "xlstm_unet_bot_2d_nano"), ("U-Net", "unet_2d_nano")):
            yield Arm(f"segmentation: {task}", name, encoder, task, 400, steps, batch=8, learning_rate=2e-3)
    for name, encoder in (("xLSTM-UNet", "xlstm_unet_bot_3d_nano"), ("U-Net", "unet_3d_nano")):
        yield Arm("segmentation: volumes", name, encoder, "volumes", 60, 300, batch=2, learning_rate=2e-3)
    for name, encoder in (("ConvS5", "convs5_nano"), ("ConvLSTM", "conv_lstm_nano")):
        yield Arm("next frames", name, encoder, "bouncing", 200, 1000, batch=8)
    for name, encoder in (("LRCN", "lrcn_nano"), ("ViViT, factorised", "vivit_fe_nano")):
        overrides = {"frozen": False} if encoder.startswith("vivit") else {}
        yield Arm("actions", name, encoder, "clips", 1000, 2000, overrides)
    yield from _scarce("picturebook", 2000)


def _scarce(task: str, examples: int) -> Iterator[Arm]:
    for name, encoder in (
        ("ViT", "vit_nano"),
        ("DHVT", "dhvt_nano"),
        ("Hyena-ViT", "hyena_vit_nano"),
        ("Hyena-ViT hybrid", "hyena_vit_hybrid_nano"),
    ):
        yield Arm(f"scarce data: {examples} of {task}", name, encoder, task, examples, 800)


ARMS = tuple(_arms())
LAST = "scarce data: 2000 of picturebook"
"""Measured after all the others."""


@cache
def _data(task: str, examples: int, size: int) -> Any:
    from sightline.training.encoder import TEST_EXAMPLES
    from sightline.training.encoder_tasks import TASKS

    wanted = TASKS[task]
    tests = TEST_EXAMPLES if wanted.answer == "class" else 64
    return wanted.examples("train", examples, size), wanted.examples("test", tests, size)


def measure(arm: Arm, seed: int, device: str) -> dict[str, Any]:
    """Trains one arm on a device, scores it on the CPU, and gives its line."""
    import torch

    from sightline.encoders.encoder import count_parameters
    from sightline.training.encoder import EncoderRecipe, train

    torch.set_num_threads(1)
    recipe = EncoderRecipe(
        arm.encoder,
        arm.task,
        seed=seed,
        examples=arm.examples,
        steps=arm.steps,
        batch=arm.batch,
        learning_rate=arm.learning_rate,
        overrides=arm.overrides,
    )
    data = _data(arm.task, arm.examples, recipe.size)
    started = time.perf_counter()
    encoder, scores = train(recipe, quiet=True, data=data, device=device)
    encoder.cpu()
    seconds = time.perf_counter() - started
    learning = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    if arm.comparison == "early exit":
        learning = count_parameters(encoder)  # the second stage has frozen the backbone
        scores |= exits(encoder, data[1])
    if arm.task == "bouncing":
        scores |= rollout(encoder, recipe.size)
    line = {"comparison": arm.comparison, "arm": arm.name, "seed": seed, "scores": scores, "seconds": round(seconds)}
    return {**line, "parameters": learning, "recipe": {**asdict(recipe), "overrides": dict(arm.overrides)}}


def exits(encoder: Any, tested: Any) -> dict[str, float]:
    """Accuracy of early exit at each confidence, layers run on average, and time against the whole encoder.

    The pictures are answered one by one, as the paper does; the whole encoder answers the same ones in the same turns.
    """
    from sightline.encoders.lgvit import ExitCriterion

    found: dict[str, float] = {}
    for confidence in EXITS:
        criterion = ExitCriterion(kind="confidence", threshold=confidence)
        logits, layers = encoder.answer(tested.pixels, criterion)
        ratios = []
        for picture in tested.pixels[:100].split(1):
            began = time.perf_counter()
            encoder.answer(picture, criterion)
            middle = time.perf_counter()
            encoder.logits(picture)
            ratios.append((time.perf_counter() - middle, middle - began))
        found[f"accuracy at {confidence}"] = float((logits.argmax(dim=-1) == tested.targets).float().mean())
        found[f"layers at {confidence}"] = float(layers.float().mean())
        found[f"speed-up at {confidence}"] = sum(whole for whole, _ in ratios) / sum(early for _, early in ratios)
    return found


def rollout(encoder: Any, size: int) -> dict[str, float]:
    """Mean squared error of frames that are made from those made before: the first ten, and the last ten of a hundred;
    beside it that of the last frame given, shown for ever."""
    from sightline.training.encoder_tasks import bouncing

    pixels = bouncing("test", 16, size, CONTEXT + HORIZON).pixels
    made = encoder.rollout(pixels[:, :CONTEXT], HORIZON)
    truth, still = pixels[:, CONTEXT:], pixels[:, CONTEXT - 1 : CONTEXT]
    return {
        "rollout mse, frames 1-10": float((made[:, :10] - truth[:, :10]).square().mean()),
        "rollout mse, frames 91-100": float((made[:, -10:] - truth[:, -10:]).square().mean()),
        "still mse, frames 91-100": float((still - truth[:, -10:]).square().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--only", nargs="+", default=[], help="comparisons that start so")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.exists() else []
    done = {(line["comparison"], line["arm"], line["seed"]) for line in lines}
    wanted = [
        (arm, seed)
        for last in (False, True)
        for seed in SEEDS
        for arm in ARMS
        if (arm.comparison == LAST) is last
        and (arm.comparison, arm.name, seed) not in done
        and (not given.only or arm.comparison.startswith(tuple(given.only)))
    ]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(measure, arm, seed, given.device) for arm, seed in wanted]
        for finished in as_completed(waiting):
            line = finished.result()
            with given.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            main_score = statistics.fmean([next(iter(line["scores"].values()))])
            print(
                f"{line['comparison']} | {line['arm']} | seed {line['seed']} | {main_score:.4f} | {line['seconds']} s"
            )


if __name__ == "__main__":
    main()
