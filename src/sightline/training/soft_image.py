"""Trains a soft image for `sightline.grounding.lacing`: features [patches, D] that tell a model nothing of a picture.

As in the paper (Zhao et al. 2025, arXiv:2411.14279): it starts as N(0, 1) / sqrt(D), stands where the projector's
features of a picture would stand, and is trained on next-token prediction of the answers. There it is trained together
with the language model, on a tenth of the pictures of the second stage. Here the model is finished and frozen, every
prompt shows the soft image, and nothing else is trained: the best that one fixed picture can do for all questions is to
leave the model to its prior, so the loss should come down to that of the prompts without a picture.

The questions are those that the built-in model was trained on. Step `s` always sees the same ones, so a killed run
resumes where its last checkpoint was written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.files import write_whole
from sightline.grounding.lacing import SOFT_IMAGE, untrained
from sightline.models.loading import load
from sightline.training.nano import (
    PATCHES,
    Packer,
    answer_loss,
    joint_step,
    moved,
    schedule,
    validation_step,
)
from sightline.training.run import State, append_log, claim, progress_bar

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class SoftImageRecipe:
    """What a training run does; the same recipe gives the same soft image on the same machine."""

    model: str = "picturebook-nano"
    seed: int = 0
    steps: int = 400
    batch: int = 8
    length: int = 272
    learning_rate: float = 1e-2
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")


def train(
    recipe: SoftImageRecipe,
    out: Path,
    *,
    checkpoint_every: int = 100,
    validation_batches: int = 16,
    threads: int = 1,
    device: str = "cpu",
    quiet: bool = False,
) -> Path:
    """Runs the recipe, or what is left of it, and returns the finished file, `out/soft_image.safetensors`.

    `out` also holds `recipe.json`, `log.jsonl` (a line every fifty steps: loss, seconds; the last one with the mean
    losses on the validation split of a real picture, of the soft image and of no picture), and `state.safetensors`.

    Raises:
        InputError: if `out` holds a run of another recipe, or the model is not of the built-in model's form.
    """
    torch.set_num_threads(threads)
    model, packer = _loaded(recipe, device)
    claim(recipe, out)
    width = int(model.lm_head.in_features)
    soft = nn.ParameterDict({SOFT_IMAGE: nn.Parameter(untrained(PATCHES, width, seed=recipe.seed).to(model.device))})
    optimizer = torch.optim.AdamW(
        soft.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    state = State(out / "state.safetensors", soft)
    first = min(state.resume("joint", optimizer), recipe.steps)
    started, losses = time.time(), list[float]()
    with progress_bar(quiet) as progress, showing(model, soft[SOFT_IMAGE]):
        bar = progress.add_task(SOFT_IMAGE, total=recipe.steps, completed=first)
        for done in range(first + 1, recipe.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(done - 1, recipe.steps)
            _, questions = joint_step(done - 1, recipe.batch, recipe.seed)
            loss, _, _ = answer_loss(model, moved(packer.packed(questions, with_picture=True), model.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"soft image  loss {np.mean(losses[-50:]):.3f}")
            if done % 50 == 0 or done == recipe.steps:
                line = {"step": done, "loss": round(float(np.mean(losses)), 4), "seconds": round(time.time() - started)}
                append_log(out, line)
                losses.clear()
            if done % checkpoint_every == 0 or done == recipe.steps:
                state.save("joint", done, optimizer)
    trained = soft[SOFT_IMAGE].detach()
    if first < recipe.steps:
        append_log(
            out, {"step": recipe.steps, "validation": compare(model, packer, trained, recipe, validation_batches)}
        )
    final = out / f"{SOFT_IMAGE}.safetensors"
    write_whole(final, save({SOFT_IMAGE: trained.cpu().contiguous()}))
    return final


@contextmanager
def showing(model: LlavaForConditionalGeneration, soft: Tensor) -> Iterator[None]:
    """Inside, prompts that are read without pixels show the soft image wherever they hold a picture's tokens."""
    image = int(model.config.image_token_id)

    def put(module: nn.Module, args: tuple[Tensor], embeds: Tensor) -> Tensor:
        visual = args[0] == image
        shown = soft.to(embeds.dtype).repeat(int(visual.sum()) // len(soft), 1)
        return embeds.masked_scatter(visual[..., None], shown)

    handle = model.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def compare(
    model: LlavaForConditionalGeneration, packer: Packer, soft: Tensor, recipe: SoftImageRecipe, batches: int
) -> dict[str, float]:
    """The mean loss of the same answers on the validation split, with the picture, the soft image, and no picture."""
    losses: dict[str, list[float]] = {"picture": [], SOFT_IMAGE: [], "no_picture": []}
    for step in range(batches):
        scenes, questions = validation_step(step, recipe.batch, recipe.seed)
        with_picture = moved(packer.batch(scenes, questions, True), model.device)
        losses["picture"].append(answer_loss(model, with_picture)[0].item())
        del with_picture["pixel_values"]
        with showing(model, soft):
            losses[SOFT_IMAGE].append(answer_loss(model, with_picture)[0].item())
        # Cut to the same questions: without the picture's tokens more of them would fit into a row.
        shorter = Packer(packer.tokenizer, packer.length - PATCHES)
        without = moved(shorter.packed(questions, False), model.device)
        losses["no_picture"].append(answer_loss(model, without)[0].item())
    return {name: round(float(np.mean(values)), 4) for name, values in losses.items()}


def _loaded(recipe: SoftImageRecipe, device: str) -> tuple[LlavaForConditionalGeneration, Packer]:
    """The frozen model, and what packs its prompts."""
    loaded: Any
    processor: Any
    loaded, processor = load(recipe.model, dtype="float32", device=device)
    if loaded.config.model_type != "llava" or loaded.config.image_seq_length != PATCHES:
        raise InputError(
            f"{recipe.model} is not of the built-in model's form, whose questions the soft image is trained on: give "
            "picturebook-nano, or the checkpoint folder of a run of `sightline train nano`"
        )
    return loaded.requires_grad_(False), Packer(processor.tokenizer, recipe.length)
