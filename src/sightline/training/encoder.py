"""Trains an encoder on a small task, from nothing, in minutes on a CPU.

The examples are made once and kept in memory; step `s` always sees the same ones, and a checkpoint holds all that the
run is in, so a killed run goes on where it was. An encoder's paper may have a loss of its own, or train in phases
(`Encoder.training_loss`); the rest is the same for all: AdamW, a linear rise and a cosine fall of the learning rate, a
clipped gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, create_encoder, encoders
from sightline.errors import InputError, unknown
from sightline.files import write_whole
from sightline.training.encoder_tasks import Answer, Examples, Task, task
from sightline.training.run import State, append_log, claim, progress_bar

TEST_EXAMPLES = 500

_GIVES: Mapping[Answer, str] = {"class": "gives one class", "masks": "segments", "frames": "predicts frames"}
_WHO: Mapping[Answer, str] = {
    "class": "most do",
    "masks": "xlstm_unet_* and unet_* do",
    "frames": "convs5_* and conv_lstm_* do",
}


@dataclass(frozen=True)
class EncoderRecipe:
    """What a training run does; the same recipe gives the same encoder on the same machine.

    Args:
        encoder: one of `list_encoders()` that takes the task's inputs and gives its answers.
        task: one of `TASKS`.
        seed: of the weights, the order of the examples, and what is random in a step.
        examples: how many are trained on.
        learning_rate: its highest, after `warm_up` steps.
        clip: the longest gradient.
        image_size: side of the input, None for the task's.
        overrides: other arguments of the encoder.

    Raises:
        InputError: values out of range, unknown names, or an encoder that cannot learn the task.
    """

    encoder: str
    task: str = "picturebook"
    seed: int = 0
    examples: int = 2000
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: int = 50
    clip: float = 1.0
    image_size: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lowest = {"examples": 1, "steps": 1, "batch": 1, "image_size": 1, "seed": 0, "warm_up": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be {least} or more, not {value}")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf and self.clip > 0):
            raise InputError(
                f"learning_rate and clip must be above 0 and weight_decay 0 or more, not {self.learning_rate}, "
                f"{self.clip} and {self.weight_decay}"
            )
        for name in ("image_size", "in_chans", "num_classes"):
            if name in self.overrides:
                raise InputError(f"the encoder's {name} follows from the recipe and its task and is no override")
        known, wanted = encoders(), task(self.task)
        if self.encoder not in known:
            raise unknown("encoder", self.encoder, known)
        if known[self.encoder].inputs != wanted.inputs:
            raise InputError(
                f"{self.encoder} takes {known[self.encoder].inputs}, but the task {self.task} gives {wanted.inputs}"
            )
        given = _answer(known[self.encoder])
        if given != wanted.answer:
            raise InputError(
                f"{self.encoder} {_GIVES[given]}, but the task {self.task} needs one that {_GIVES[wanted.answer]}; "
                f"{_WHO[wanted.answer]}"
            )

    @property
    def size(self) -> int:
        """Side of the input."""
        return self.image_size or task(self.task).size

    def build(self) -> Encoder:
        """The encoder before training.

        Raises:
            InputError: overrides that the encoder does not know or cannot take.
        """
        wanted = task(self.task)
        depth = {"slices": self.size} if wanted.inputs == "volumes" else {}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                encoder = create_encoder(
                    self.encoder,
                    image_size=self.size,
                    in_chans=wanted.in_chans,
                    num_classes=len(wanted.classes),
                    **{**depth, **self.overrides},
                )
            except TypeError as error:  # a value of another kind than the argument's
                raise InputError(f"{self.encoder} cannot be made with {dict(self.overrides)}: {error}") from error
        for parameter in encoder.parameters():
            parameter.data = parameter.data.contiguous()  # safetensors saves no others
        return encoder


def train(
    recipe: EncoderRecipe,
    out: Path | None = None,
    *,
    checkpoint_every: int = 200,
    threads: int = 1,
    device: str = "cpu",
    quiet: bool = False,
    data: tuple[Examples, Examples] | None = None,
) -> tuple[Encoder, dict[str, float]]:
    """Runs the recipe, or what is left of it.

    Args:
        out: the run's folder: `recipe.json`, `log.jsonl` (a line every fifty steps; the last one with the scores on
            test examples), `state.safetensors`, and in the end `encoder.safetensors`; None writes nothing.
        data: examples for training and testing that have been made already.

    Returns:
        The encoder in evaluation mode, and its scores on the test split (see `evaluate`).

    Raises:
        InputError: if `out` holds a run of another recipe.
    """
    torch.set_num_threads(threads)
    wanted = task(recipe.task)
    encoder = recipe.build().to(device).train()  # before the folder is claimed: it refuses what cannot be built
    if out is not None:
        claim(recipe, out)
    learnt, tested = data or (
        wanted.examples("train", recipe.examples, recipe.size),
        wanted.examples("test", TEST_EXAMPLES if wanted.answer == "class" else 64, recipe.size),
    )
    optimizer = torch.optim.AdamW(
        _groups(encoder, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98 if recipe.steps < 5000 else 0.999),
    )
    state = None if out is None else State(out / "state.safetensors", encoder)
    first = 0 if state is None else min(state.resume("joint", optimizer), recipe.steps)
    started, losses = time.time(), list[float]()
    with progress_bar(quiet) as progress, torch.random.fork_rng():
        bar = progress.add_task(recipe.encoder, total=recipe.steps, completed=first)
        for step in range(first, recipe.steps):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # drop path and the like
            chosen = _batch(step, recipe, len(learnt.pixels))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, recipe)
            pixels, targets = _augmented(learnt.pixels[chosen], wanted, step, recipe), learnt.targets[chosen]
            loss = encoder.training_loss(pixels.to(device), targets.to(device), step, recipe.steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), recipe.clip)
            optimizer.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"{recipe.encoder}  loss {np.mean(losses[-50:]):.3f}")
            if out is not None and ((step + 1) % 50 == 0 or step + 1 == recipe.steps):
                line = {"step": step + 1, "loss": float(np.mean(losses[-50:])), "seconds": round(time.time() - started)}
                append_log(out, line)
            if state is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps):
                state.save("joint", step + 1, optimizer)
    encoder.eval()
    scores = evaluate(encoder, tested, wanted, device=device)
    if out is not None and not (out / "encoder.safetensors").exists():
        append_log(out, {"step": recipe.steps, "test": scores})
        weights = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
        write_whole(out / "encoder.safetensors", save(weights))
    return encoder, scores


@torch.no_grad()
def evaluate(
    encoder: Encoder, tested: Examples, wanted: Task, *, batch: int = 50, device: str = "cpu"
) -> dict[str, float]:
    """Scores on examples.

    Returns:
        `accuracy` for classes; for masks `dice`, the mean over the classes but the first of 2 |A and B| / (|A| + |B|)
        on all pixels together, and `dice_<class>` for each; for frames `mse` of the next frame, and `copy_mse` of
        taking the last one again.
    """
    gathered: list[Tensor] = []
    for pixels in tested.pixels.split(batch):
        if wanted.answer == "class":
            gathered.append(encoder.logits(pixels.to(device)).argmax(dim=-1).cpu())
        elif wanted.answer == "masks":
            gathered.append(segmented(encoder, pixels.to(device)).argmax(dim=1).cpu())
        else:
            errors = (_predicted(encoder, pixels.to(device)).cpu() - pixels[:, 1:]).square().flatten(1).mean(dim=1)
            copies = (pixels[:, :-1] - pixels[:, 1:]).square().flatten(1).mean(dim=1)
            gathered.append(torch.stack([errors, copies], dim=1))
    said = torch.cat(gathered)
    if wanted.answer == "class":
        return {"accuracy": float((said == tested.targets).float().mean())}
    if wanted.answer == "frames":
        mse, copied = said.mean(dim=0).tolist()
        return {"mse": mse, "copy_mse": copied}
    dice = {}
    for number, name in enumerate(wanted.classes):
        a, b = said == number, tested.targets == number
        dice[f"dice_{name}"] = float(2 * (a & b).sum() / max(1, int(a.sum() + b.sum())))
    return {"dice": float(np.mean(list(dice.values())[1:])), **dice}


def segmented(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Logits [B, classes, H, W] of the finest scale.

    Raises:
        InputError: for an encoder that does not segment.
    """
    segment = getattr(encoder, "segment", None)
    if segment is None:
        raise InputError(f"{encoder.name} does not segment; {_WHO['masks']}")
    finest: Tensor = segment(pixels)[0]
    return finest


def _answer(kind: type[Encoder]) -> Answer:
    """What encoders of a class are trained to give."""
    return "masks" if hasattr(kind, "segment") else "frames" if hasattr(kind, "predict") else "class"


def _predicted(encoder: Encoder, pixels: Tensor) -> Tensor:
    predict = getattr(encoder, "predict", None)
    if predict is None:
        raise InputError(f"{encoder.name} does not predict frames; {_WHO['frames']}")
    predicted: Tensor = predict(pixels[:, :-1])
    return predicted


def _augmented(pixels: Tensor, wanted: Task, step: int, recipe: EncoderRecipe) -> Tensor:
    """Pictures of one object are shifted by up to an eighth of a side; what leaves on one side comes in on the
    other."""
    if wanted.name not in ("picturebook", "digits"):
        return pixels
    rng = np.random.default_rng([recipe.seed, step, 1])
    most = pixels.shape[-1] // 8
    moved = [torch.roll(one, tuple(rng.integers(-most, most + 1, size=2).tolist()), dims=(-2, -1)) for one in pixels]
    return torch.stack(moved)


def _batch(step: int, recipe: EncoderRecipe, count: int) -> Tensor:
    """Which examples step `step` sees: each epoch has its own order."""
    numbers = np.arange(step * recipe.batch, (step + 1) * recipe.batch)
    epochs = {
        epoch: np.random.default_rng([recipe.seed, int(epoch)]).permutation(count) for epoch in set(numbers // count)
    }
    return torch.tensor([int(epochs[number // count][number % count]) for number in numbers])


def _rate(step: int, recipe: EncoderRecipe) -> float:
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return 0.5 * (1 + math.cos(math.pi * done))


def _groups(encoder: Encoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms, gates) and what the encoder names do not."""
    kept: set[str] = getattr(encoder, "no_weight_decay", lambda: set())()
    learning = [(name, parameter) for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    still = {name for name, parameter in learning if parameter.ndim < 2 or name in kept}
    return [
        {"params": [parameter for name, parameter in learning if name not in still], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in learning if name in still], "weight_decay": 0.0},
    ]
