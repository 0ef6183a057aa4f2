"""The recipe of the built-in model: a Llava trained from nothing on the picture world, on a CPU.

Two phases. *Warm-up*: the vision tower alone learns what lies under each patch (kind, colour, size: the world's own
masks say) and, at [CLS], which kinds the picture holds and what place it is. *Joint*: the whole model learns to answer;
the warm-up's loss stays on with a small weight, so that [CLS] keeps looking at objects (the last layer's [CLS] query
gets no gradient from the language model, as in LLaVA, where it was trained by CLIP).

All questions on a picture share one sequence: the picture comes first, each question sees the picture and itself (a
block mask and restarted positions), so one row is exactly as good as a dozen prompts of the ordinary form. A quarter of
the batches are text-only: the same prompts without visual tokens, answered from the prior alone.

Step `s` always sees the same scenes, so a killed run resumes where its last checkpoint was written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from sightline.errors import InputError, unknown
from sightline.models.picturebook_vlm import (
    PATCH_SIZE,
    PICTURE_SIZE,
    PROMPT_WITH_PICTURE,
    SHAPES,
    build_model,
    build_processor,
    build_tokenizer,
)
from sightline.picturebook.draw import draw, object_ids
from sightline.picturebook.questions import Question, third, training_questions
from sightline.picturebook.scene import (
    COLOURS,
    KINDS,
    MAX_OF_A_KIND,
    PLURALS,
    SCENE_TYPES,
    SIZES,
    Scene,
    random_stream,
    sample_scene,
)
from sightline.training.run import State, append_log, checkpoint_folder, claim, progress_bar

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

IGNORED = -100
PATCHES = (PICTURE_SIZE // PATCH_SIZE) ** 2
LABEL_WORDS: tuple[tuple[str, ...], ...] = (
    KINDS,
    COLOURS,
    SIZES,
    ("left", "middle", "right"),
    ("above", "below"),
    tuple(str(number) for number in range(1, MAX_OF_A_KIND + 1)),
    tuple(PLURALS[kind] for kind in KINDS),
)
"""What a patch that an object covers is labelled with: the object's kind, colour and size, the third (across) and half
(down) of the picture that its centre is in, how many of its kind are visible, and the kind's plural."""
COVERED = PATCH_SIZE**2 // 4
"""How many of a patch's pixels an object must own for the patch to carry its label."""


@dataclass(frozen=True)
class Recipe:
    """What a training run does; the same recipe, size and seed give the same model on the same machine."""

    size: str = "nano"
    seed: int = 0
    warm_up_steps: int = 1000
    steps: int = 7300
    batch: int = 16
    warm_up_batch: int = 48
    length: int = 272
    learning_rate: float = 1e-3
    warm_up_learning_rate: float = 1e-3
    weight_decay: float = 0.05
    text_only_every: int = 4
    label_weight: float = 0.1
    word_weight: float = 0.3
    bfloat16: bool = True
    compile: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warm_up_batch", "text_only_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")

    @staticmethod
    def of(size: str, **changes: Any) -> Recipe:
        """The recipe of a size, with some values changed.

        Raises:
            InputError: for an unknown size.
        """
        if size not in SHAPES:
            raise unknown("size", size, SHAPES)
        steps = {"warm_up_steps": 400, "steps": 3000} if size == "pico" else {}
        return Recipe(size=size, **(steps | changes))


class PatchLabels(nn.Module):
    """Linear read-outs of the vision tower: kind, colour and size per patch; kinds and place at [CLS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = (len(KINDS) + 1, len(COLOURS) + 1, len(SIZES) + 1)
        self.patch = nn.Linear(width, sum(self.classes))
        self.picture = nn.Linear(width, len(KINDS) + len(SCENE_TYPES))

    def forward(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The mean of the five losses. `hidden` is [pictures, 1 + patches, width]."""
        parts = self.patch(hidden[:, 1:]).split(self.classes, dim=-1)
        losses = [
            F.cross_entropy(part.float().flatten(0, 1), labels.flatten())
            for part, labels in zip(parts, batch["patch_labels"].unbind(-1)[: len(parts)], strict=True)
        ]
        kinds, places = self.picture(hidden[:, 0]).float().split((len(KINDS), len(SCENE_TYPES)), dim=-1)
        losses.append(F.binary_cross_entropy_with_logits(kinds, batch["kinds"]))
        losses.append(F.cross_entropy(places, batch["place"]))
        return torch.stack(losses).mean()


def patch_labels(scene: Scene) -> np.ndarray:
    """The `LABEL_WORDS` of the object under each patch as class numbers, 0 where no object covers a quarter of it:
    int64 [patches, 7]."""
    ids = object_ids(scene, PICTURE_SIZE).astype(np.int64)
    side = PICTURE_SIZE // PATCH_SIZE
    patch_of_pixel = np.arange(PICTURE_SIZE) // PATCH_SIZE
    cell = patch_of_pixel[:, None] * side + patch_of_pixel[None, :]
    n = len(scene.objects)
    counts = np.bincount((cell * (n + 1) + ids + 1).ravel(), minlength=PATCHES * (n + 1)).reshape(PATCHES, n + 1)
    labels = np.zeros((PATCHES, len(LABEL_WORDS)), dtype=np.int64)
    if n:
        owner = counts[:, 1:].argmax(axis=1)
        classes = np.array(
            [
                [
                    KINDS.index(o.kind),
                    COLOURS.index(o.colour),
                    SIZES.index(o.size),
                    third(o),
                    int(o.y >= 0.5),
                    len(scene.of_kind(o.kind)) - 1,
                    KINDS.index(o.kind),
                ]
                for o in scene.objects
            ]
        )
        covered = counts[np.arange(PATCHES), owner + 1] >= COVERED
        labels[covered] = classes[owner[covered]] + 1
    return labels


def pixels(scene: Scene) -> np.ndarray:
    """The picture as the processor would give it: float32 [3, side, side] in [-1, 1]."""
    return np.asarray(draw(scene, PICTURE_SIZE), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def picture_batch(scenes: list[Scene]) -> dict[str, Tensor]:
    """Pixels and the labels of the warm-up."""
    present = [[float(kind in scene.kinds) for kind in KINDS] for scene in scenes]
    return {
        "pixel_values": torch.from_numpy(np.stack([pixels(scene) for scene in scenes])),
        "patch_labels": torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])),
        "kinds": torch.tensor(present),
        "place": torch.tensor([list(SCENE_TYPES).index(scene.scene_type) for scene in scenes]),
    }


class Packer:
    """Puts the questions on one scene into one row that shares the picture.

    Token ids of questions and answers are cached: there are only a few thousand different texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self._cache: dict[str, list[int]] = {}
        before, after = PROMPT_WITH_PICTURE.split("<image>")
        self.after_question = after.split("{question}")[1]
        image = tokenizer.convert_tokens_to_ids("<image>")
        start = [tokenizer.bos_token_id, *self.ids(before)]
        self.prefix = [*start, *[image] * PATCHES, *self.ids(after.split("{question}")[0])]
        self.prefix_without_picture = [*start, *self.ids(after.split("{question}")[0])]

    def ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def row(self, questions: list[Question], with_picture: bool) -> dict[str, np.ndarray]:
        """As many of the questions as fit: token ids, positions, branch (0 is the shared prefix, -1 padding), labels
        and the number of the question each label belongs to."""
        prefix = self.prefix if with_picture else self.prefix_without_picture
        ids = np.full(self.length, self.tokenizer.pad_token_id, dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        branch = np.full(self.length, -1, dtype=np.int64)
        positions = np.zeros(self.length, dtype=np.int64)
        at = len(prefix)
        ids[:at], branch[:at], positions[:at] = prefix, 0, np.arange(at)
        for number, question in enumerate(questions, start=1):
            prompt = self.ids(question.text + self.after_question)
            answer = [*self.ids(" " + question.answer), self.tokenizer.eos_token_id]
            end = at + len(prompt) + len(answer) - 1
            if end > self.length:
                continue
            ids[at:end] = (prompt + answer)[:-1]
            labels[end - len(answer) : end] = answer
            branch[at:end] = number
            positions[at:end] = len(prefix) + np.arange(end - at)
            at = end
        return {"input_ids": ids, "labels": labels, "branch": branch, "position_ids": positions}

    def batch(self, scenes: list[Scene], questions: list[list[Question]], with_picture: bool) -> dict[str, Tensor]:
        """The packed questions, and the pictures if they are to be seen."""
        return self.packed(questions, with_picture) | (picture_batch(scenes) if with_picture else {})

    def packed(self, questions: list[list[Question]], with_picture: bool) -> dict[str, Tensor]:
        """Rows of one length and their mask, bool [rows, 1, length, length]: prefix and own question, causally."""
        rows = [self.row(asked, with_picture) for asked in questions]
        out = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        branch = out["branch"]
        own = branch[:, :, None] == branch[:, None, :]
        shared = (branch == 0)[:, None, :]
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        out["attention_mask"] = ((own | shared) & causal)[:, None]
        return out


class Steps(Dataset[dict[str, Tensor]]):
    """The batch of each step, made from the step's number alone; without a packer, those of the warm-up."""

    def __init__(self, recipe: Recipe, packer: Packer | None) -> None:
        self.recipe, self.packer = recipe, packer

    def __len__(self) -> int:
        return self.recipe.warm_up_steps if self.packer is None else self.recipe.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        recipe, packer = self.recipe, self.packer
        if packer is None:
            first = 10_000_000 * recipe.seed + 5_000_000 + step * recipe.warm_up_batch
            return picture_batch([sample_scene("train", first + i) for i in range(recipe.warm_up_batch)])
        scenes, questions = joint_step(step, recipe.batch, recipe.seed)
        return packer.batch(scenes, questions, with_picture=step % recipe.text_only_every != 0)


def joint_step(step: int, batch: int, seed: int) -> tuple[list[Scene], list[list[Question]]]:
    """The scenes of a step of the joint phase and, for each, its questions in the order in which they are packed."""
    first = 10_000_000 * seed + step * batch
    scenes = [sample_scene("train", first + i) for i in range(batch)]
    rng = random_stream("questions", "joint", "train", seed, step)
    # Counting comes last and needs kinds that occur more than once: half of the scenes without one give way.
    for i, scene in enumerate(scenes):
        if len(scene.kinds) == len(scene.visible) and rng.random() < 0.5:
            scenes[i] = sample_scene("train", first + 4_000_000 + i)
    questions: list[list[Question]] = []
    for scene in scenes:
        asked = training_questions(scene, rng)
        questions.append([asked[i] for i in rng.permutation(len(asked))])
    return scenes, questions


def text_corpus(n_scenes: int = 2000) -> Iterator[str]:
    """The texts that the tokenizer learns from."""
    rng = random_stream("corpus")
    for index in range(n_scenes):
        for question in training_questions(sample_scene("train", index), rng):
            yield PROMPT_WITH_PICTURE.format(question=question.text) + " " + question.answer


@dataclass
class Seen:
    """What the vision tower and the projector gave in a forward."""

    tower: Tensor
    """[pictures, 1 + patches, vision width]"""
    projected: Tensor
    """[pictures, patches, width]"""


def answer_loss(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Seen | None]:
    """Cross-entropy of the answers; the logits where there are labels; what was seen, if there are pictures."""
    parts: list[Tensor] = []
    modules = (model.model.vision_tower, model.model.multi_modal_projector)
    handles = [
        modules[0].register_forward_hook(lambda module, args, output: parts.append(output.last_hidden_state)),
        modules[1].register_forward_hook(lambda module, args, output: parts.append(output)),
    ]
    try:
        hidden = model.model(
            input_ids=batch["input_ids"],
            pixel_values=batch.get("pixel_values"),
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    wanted = batch["labels"] != IGNORED
    logits = model.lm_head(hidden[wanted]).float()
    return F.cross_entropy(logits, batch["labels"][wanted]), logits, Seen(*parts) if parts else None


def word_loss(model: LlavaForConditionalGeneration, projected: Tensor, labels: Tensor, words: Tensor) -> Tensor:
    """Visual tokens as words: the output head, which shares its matrix with the word embeddings, should read kind,
    colour, size, place and number off a projected patch that an object covers.

    A question's word and the patch it asks about then resemble each other, and attention has one match to learn instead
    of one a kind.

    Args:
        model: the model.
        projected: the projector's output, [pictures, patches, width].
        labels: `patch_labels`, [pictures, patches, 7].
        words: the token ids of all the classes, in the order of `LABEL_WORDS`.

    Returns:
        The mean of the seven cross-entropies.
    """
    covered = labels[..., 0] > 0
    logits = model.lm_head(projected[covered]).float()
    losses = []
    for column, names in enumerate(words.split([len(names) for names in LABEL_WORDS])):
        losses.append(F.cross_entropy(logits, names[labels[..., column][covered] - 1]))
    return torch.stack(losses).mean()


def validation_step(step: int, batch: int, seed: int) -> tuple[list[Scene], list[list[Question]]]:
    """Scenes of the validation split, and the questions on each."""
    rng = random_stream("questions", "joint", "validation", seed, step)
    scenes = [sample_scene("validation", step * batch + i) for i in range(batch)]
    return scenes, [training_questions(scene, rng) for scene in scenes]


def whole_answers(hits: Tensor, rows: Tensor, branches: Tensor) -> dict[tuple[int, int], bool]:
    """Row and number of a question -> whether its answer is right in every token.

    Args:
        hits: bool [L], of each label whether the likeliest token is it.
        rows: int [L], where it is.
        branches: int [L], the number of its question in the row, from 1.
    """
    whole: dict[tuple[int, int], bool] = {}
    for hit, row, number in zip(*(one.tolist() for one in (hits, rows, branches)), strict=True):
        whole[row, number] = whole.get((row, number), True) and hit
    return whole


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration, recipe: Recipe, packer: Packer, batches: int = 8
) -> dict[str, float]:
    """Teacher-forced accuracy of whole answers on the validation split, by kind of question, and the mean loss."""
    right: dict[str, list[bool]] = {}
    losses: list[float] = []
    for step in range(batches):
        scenes, asked = validation_step(step, recipe.batch, recipe.seed)
        batch = moved(packer.batch(scenes, asked, True), model.device)
        loss, logits, _ = answer_loss(model, batch)
        losses.append(loss.item())
        wanted = batch["labels"] != IGNORED
        hit = logits.argmax(-1) == batch["labels"][wanted]
        row, column = wanted.nonzero(as_tuple=True)
        for (r, number), is_right in whole_answers(hit, row, batch["branch"][row, column]).items():
            right.setdefault(asked[r][number - 1].task, []).append(is_right)
    return {"loss": float(np.mean(losses))} | {task: float(np.mean(hits)) for task, hits in sorted(right.items())}


def train(
    recipe: Recipe,
    out: Path,
    *,
    checkpoint_every: int = 500,
    threads: int = 1,
    device: str = "cpu",
    workers: int = 1,
    quiet: bool = False,
) -> Path:
    """Runs the recipe, or what is left of it, and returns the folder of the finished checkpoint, `out/checkpoint`.

    `threads` compute the steps on a CPU, `workers` are processes that draw the pictures.

    `out` holds `recipe.json`, `log.jsonl` (one line a hundred steps: loss, learning rate, seconds, and validation
    accuracy where measured), the tokenizer, and `state.safetensors` while the run goes on.

    Raises:
        InputError: if `out` holds a run of another recipe.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    claim(recipe, out)

    tokenizer = _tokenizer(recipe, out / "tokenizer")
    packer = Packer(tokenizer, recipe.length)
    model = build_model(recipe.size, tokenizer, seed=recipe.seed)
    tower = model.model.vision_tower
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        labels = PatchLabels(tower.config.hidden_size)
    if recipe.compile:
        for layer in (*tower.encoder.layers, *model.model.language_model.layers):
            layer.compile(dynamic=False)
    modules = nn.ModuleDict({"model": model, "labels": labels}).to(device)
    run = _Run(recipe, out, modules, packer, checkpoint_every, workers, quiet)
    run.phase("warm-up", recipe.warm_up_steps, recipe.warm_up_learning_rate)
    run.phase("joint", recipe.steps, recipe.learning_rate)
    with checkpoint_folder(out) as folder:
        model.save_pretrained(folder)
        build_processor(tokenizer).save_pretrained(folder)
    return out / "checkpoint"


class _Run:
    """The loop under both phases."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        modules: nn.ModuleDict,
        packer: Packer,
        checkpoint_every: int,
        workers: int,
        quiet: bool,
    ) -> None:
        self.recipe, self.out, self.modules, self.packer = recipe, out, modules, packer
        self.model: Any = modules["model"]
        self.labels = modules["labels"]
        words = [packer.ids(f" {word}")[0] for names in LABEL_WORDS for word in names]
        self.words = torch.tensor(words, device=str(self.model.device))
        self.state = State(out / "state.safetensors", self.modules)
        self.checkpoint_every, self.workers, self.quiet = checkpoint_every, workers, quiet
        self.started = time.time()

    def phase(self, name: str, total: int, rate: float) -> None:
        """Runs one phase from where the saved state left it."""
        optimizer = torch.optim.AdamW(_groups(self.modules, self.recipe.weight_decay), lr=rate, betas=(0.9, 0.98))
        first = min(self.state.resume(name, optimizer), total)
        data = Steps(self.recipe, self.packer if name == "joint" else None)
        loader = DataLoader(
            data, batch_size=None, sampler=range(first, total), num_workers=self.workers, prefetch_factor=8
        )
        losses: list[float] = []
        with progress_bar(self.quiet) as progress:
            bar = progress.add_task(name, total=total, completed=first)
            for done, batch in enumerate(loader, start=first + 1):
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule(done - 1, total)
                losses.append(self._step(name, moved(batch, self.model.device), optimizer))
                progress.update(bar, advance=1, description=f"{name}  loss {np.mean(losses[-50:]):.3f}")
                if done % 100 == 0 or done == total:
                    self._log(name, done, total, losses)
                    losses.clear()
                if done % self.checkpoint_every == 0 or done == total:
                    self.state.save(name, done, optimizer)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.recipe.bfloat16)

    def _step(self, phase: str, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
        """One step of the optimiser; the loss of the phase's own task."""
        with self._precision():
            if phase == "warm-up":
                loss = total = self.labels(
                    self.model.model.vision_tower(batch["pixel_values"]).last_hidden_state, batch
                )
            else:
                loss, _, seen = answer_loss(self.model, batch)
                total = loss if seen is None else loss + self._side_losses(seen, batch)
        total.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def _side_losses(self, seen: Seen, batch: dict[str, Tensor]) -> Tensor:
        words = word_loss(self.model, seen.projected, batch["patch_labels"], self.words)
        return self.recipe.label_weight * self.labels(seen.tower, batch) + self.recipe.word_weight * words

    def _log(self, phase: str, done: int, total: int, losses: list[float]) -> None:
        line: dict[str, Any] = {"phase": phase, "step": done, "loss": round(float(np.mean(losses)), 4)}
        line["seconds"] = round(time.time() - self.started)
        if phase == "joint" and (done % 500 == 0 or done == total):
            with self._precision():
                line["validation"] = validate(self.model, self.recipe, self.packer)
        append_log(self.out, line)


def _tokenizer(recipe: Recipe, folder: Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer, learnt once: the weights mean its entries, whatever texts the world gives by then."""
    if not folder.exists():
        scratch = folder.with_suffix(".partial")
        shutil.rmtree(scratch, ignore_errors=True)
        build_tokenizer(text_corpus(), SHAPES[recipe.size].vocabulary).save_pretrained(scratch)
        scratch.rename(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _groups(modules: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(modules.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def schedule(step: int, total: int) -> float:
    """Linear rise over 200 steps, then constant, then a linear fall to nothing over the last fifth."""
    return min(1.0, (step + 1) / 200, (total - step) / (total / 5))
