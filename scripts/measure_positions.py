"""Finding a needle among pictures in prompts longer than those trained on, by how visual tokens are numbered (V2PE).

    python scripts/measure_positions.py --seeds 0 1 2

A decoder of two layers with rotary positions reads pictures of 32 tokens, each after a word of text; one token of one
picture is a needle of 64 kinds, and the answer is its kind. It is trained on prompts of up to 7 pictures, at most 233
tokens, with visual steps of one, or drawn for each picture, or all of 1/16; then asked at 1, 4 and 8 times that length
with several steps. A line of `docs/results/positions.jsonl` is one decoder, length and step; lines that are
there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sightline.reduction.v2pe import STEPS, scaled_positions

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "positions.jsonl"
PICTURE, PICTURES, TIMES = 32, 7, (1, 4, 8)
NEEDLES, FILLERS = 64, 8
WORD, QUESTION = NEEDLES + FILLERS, NEEDLES + FILLERS + 1
ASKED_WITH = (1.0, 1 / 4, 1 / 16, 1 / 64, 1 / 256)
TRAINED_WITH = ("1", "random", "1/16")
BATCH, ASKED = 16, 128


def prompts(rows: int, pictures: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [rows, S], which picture each column belongs to [S], and the answers [rows]."""
    visual = torch.randint(NEEDLES, NEEDLES + FILLERS, (rows, pictures, PICTURE), generator=generator)
    needles, place, picture = (
        torch.randint(most, (rows,), generator=generator) for most in (NEEDLES, PICTURE, pictures)
    )
    visual[torch.arange(rows), picture, place] = needles
    ids = F.pad(visual, (1, 0), value=WORD).flatten(1)
    ids = F.pad(ids, (0, 1), value=QUESTION)
    images = torch.arange(pictures)[:, None].repeat(1, PICTURE)
    images = F.pad(F.pad(images, (1, 0), value=-1).flatten(), (0, 1), value=-1)
    return ids, images, needles


def steps_of(trained_with: str, pictures: int, rng: Random) -> list[float]:
    if trained_with == "random":
        return [rng.choice(STEPS) for _ in range(pictures)]
    return [1.0 if trained_with == "1" else 1 / 16] * pictures


def read(model: Any, ids: Tensor, images: Tensor, steps: list[float]) -> Tensor:
    """Logits [rows, vocabulary] after the question."""
    positions = scaled_positions(torch.arange(len(images))[None], images[None], steps).expand(len(ids), -1)
    mask = torch.ones_like(ids)  # or steps that are not one would be taken for ends of packed prompts
    logits: Tensor = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits
    return logits[:, -1]


def train(trained_with: str, seed: int, steps: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=QUESTION + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator, rng = torch.Generator().manual_seed(seed), Random(seed)
    for _ in range(steps):
        pictures = rng.randint(1, PICTURES)
        ids, images, answers = prompts(BATCH, pictures, generator)
        loss = F.cross_entropy(read(model, ids, images, steps_of(trained_with, pictures, rng)), answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, times: int, step: float) -> float:
    generator = torch.Generator().manual_seed(1000 + times)
    right = 0
    pictures = PICTURES * times
    for _ in range(ASKED // BATCH):
        ids, images, answers = prompts(BATCH, pictures, generator)
        right += int((read(model, ids, images, [step] * pictures).argmax(dim=1) == answers).sum())
    return right / (ASKED // BATCH * BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    done = {(line["trained_with"], line["seed"], line["training_steps"]) for line in map(json.loads, lines)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds:
        for trained_with in TRAINED_WITH:
            if (trained_with, seed, given.steps) in done:
                continue
            began = time.monotonic()
            model = train(trained_with, seed, given.steps)
            seconds = round(time.monotonic() - began, 1)
            found = [
                {
                    "trained_with": trained_with,
                    "seed": seed,
                    "training_steps": given.steps,
                    "training_seconds": seconds,
                    "times": times,
                    "pictures": PICTURES * times,
                    "step": step,
                    "asked": ASKED,
                    "accuracy": accuracy(model, times, step),
                }
                for times in TIMES
                for step in ASKED_WITH
            ]
            with given.out.open("a") as file:  # a decoder's lines at once, so that it is measured whole or not at all
                file.writelines(json.dumps(line) + "\n" for line in found)
            table = {times: [round(one["accuracy"], 2) for one in found if one["times"] == times] for times in TIMES}
            print(f"seed {seed}, trained with {trained_with}: {seconds} s, {table}", flush=True)


if __name__ == "__main__":
    main()
