"""Trains a method that reduces visual tokens, and the decoder with it: one with weights of its own (`TrainedReducer`),
or one that wants a decoder that has learned with it (it has a `per_step`).

The start is a trained model. Its vision tower stays as it is; the method's module learns, and by default connector and
decoder with it, to answer the picture world's questions *with the method attached*: a step reads its rows through the
same hooks as later use does. The loss is the cross-entropy of the answers, and what the method adds of its own
(`TrainedReducer.training_loss`); each step may have settings of its own (`TrainedReducer.per_step`).

Rows. Where the reduction depends on the picture alone, all questions on a picture share a row, as in
`sightline.training.nano`. Where it depends on the question (`one_question`), a row holds one question, the tasks by
turns; rows are padded on both sides so that all answers begin at one column, and methods see only what comes before it.
Methods across pictures (`frames`) learn on films, whose frames are pictures of one prompt, or with `frames=1` on single
pictures as the others do. Every `text_only_every` steps the rows hold no picture, so that the decoder keeps its
language.

Step `s` always sees the same rows, so a killed run resumes where its last checkpoint was written.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sightline.errors import InputError
from sightline.methods import Method, attach, methods, parse_methods
from sightline.models.anatomy import Anatomy
from sightline.models.loading import load
from sightline.models.picturebook_vlm import PICTURE_SIZE
from sightline.picturebook.films import FILM_FRAMES, draw_film, film_questions, sample_film
from sightline.picturebook.questions import Question
from sightline.picturebook.scene import Split, random_stream
from sightline.reduction.trained_reducer import AUTO, UNTRAINED, TrainedReducer, hold, save
from sightline.training.nano import (
    IGNORED,
    PATCHES,
    Packer,
    joint_step,
    moved,
    pixels,
    schedule,
    validation_step,
    whole_answers,
)
from sightline.training.run import State, append_log, checkpoint_folder, claim, progress_bar

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase, ProcessorMixin

LARGEST_MASK = 4
"""GB of the mask of a step's rows, which says of every two columns of each row whether one sees the other."""


@dataclass(frozen=True)
class ReduceRecipe:
    """What a training run does; the same recipe gives the same weights on the same machine.

    Args:
        method: the short form of a method that is trained, such as `mqt:max_tokens=64`. Its `weights` are what the
            module starts from if they are a file or a folder; `auto` and `untrained` start afresh.
        model: picturebook-nano, or the checkpoint folder of an earlier run of `sightline train nano` or `reduce`.
        seed: of the module's first weights, of the rows, and of what is random in a step.
        batch: pictures (or films) a step.
        length: columns of a row of questions that share a picture; questions that do not fit are left out. The columns
            of a film's further frames come on top.
        learning_rate: of connector and decoder, at its highest.
        module_learning_rate: of the method's module, at its highest.
        text_only_every: every so many steps rows hold no picture; 0 for never.
        bfloat16: compute in it; weights stay float32.
        train_decoder: whether connector and decoder are trained too, or the module alone.
        frames: of a film, for methods across pictures; 1: they learn on pictures.

    Raises:
        InputError: for numbers out of range, or a method that is unknown, has nothing to train, or is switched off.
    """

    method: str
    model: str = "picturebook-nano"
    seed: int = 0
    steps: int = 2000
    batch: int = 16
    length: int = 272
    learning_rate: float = 3e-4
    module_learning_rate: float = 1e-3
    weight_decay: float = 0.05
    text_only_every: int = 8
    bfloat16: bool = True
    train_decoder: bool = True
    frames: int = 16

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("text_only_every", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name} must be {low} or more, not {getattr(self, name)}")
        for name in ("learning_rate", "module_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number from 0 on, not {getattr(self, name)!r}")
        method = self.reducer()
        low, high = FILM_FRAMES
        on_films = across_pictures(method) and self.frames != 1
        if on_films and not low <= self.frames <= high:
            raise InputError(f"frames must be 1, for pictures, or lie in [{low}, {high}], not {self.frames}")
        mask = self.batch * film_columns(self.length, self.frames) ** 2 / 1e9
        if on_films and not _asks_once(method) and mask > LARGEST_MASK:
            raise InputError(
                f"the mask of {self.batch} films of {self.frames} frames a step would take {mask:.0f} GB, and at most "
                f"{LARGEST_MASK} are allowed: give a smaller batch, or fewer frames"
            )
        if not self.train_decoder and not isinstance(method, TrainedReducer):
            raise InputError(f"{method.paper} has no weights of its own: without the decoder there is nothing to train")

    def reducer(self) -> Method:
        """The method."""
        chosen = parse_methods(self.method)
        if len(chosen) != 1 or not _is_trained(type(chosen[0])):
            known = [name for name, kind in methods().items() if _is_trained(kind)]
            raise InputError(f"{self.method} cannot be trained: give one of the methods that are, {', '.join(known)}")
        if chosen[0].is_identity:
            raise InputError(f"{self.method} is switched off at these settings: there is nothing to train")
        return chosen[0]

    @property
    def on_films(self) -> bool:
        """Whether the rows hold films, not single pictures."""
        return self.frames > 1 and across_pictures(self.reducer())

    def sees_pictures(self, step: int) -> bool:
        """Whether the rows of a step hold pictures; the module alone learns nothing from rows without."""
        every = self.text_only_every
        return not (self.train_decoder and every > 0 and step % every == every - 1)


def across_pictures(method: Method) -> bool:
    """Whether the method reads all pictures of a row together, and so can be trained on films."""
    return isinstance(method, TrainedReducer) and method.frames


def _asks_once(method: Method) -> bool:
    return isinstance(method, TrainedReducer) and method.one_question


def _is_trained(kind: type[Method]) -> bool:
    return hasattr(kind, "per_step")


# --- Rows ---


def film_columns(length: int, frames: int) -> int:
    """Columns of a row of questions on a film, of which `length` would do for one picture."""
    return length + (frames - 1) * PATCHES


class FilmPacker(Packer):
    """Packs the questions on a film behind its frames, as `Packer` does behind a picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, frames: int) -> None:
        super().__init__(tokenizer, film_columns(length, frames))
        image = tokenizer.convert_tokens_to_ids("<image>")
        at = self.prefix.index(image)
        self.prefix[at:at] = [image] * PATCHES * (frames - 1)


def asked_alone(packer: Packer, questions: list[Question]) -> dict[str, Tensor]:
    """A row for each question, as `Packer.packed` gives them, but with an ordinary mask [rows, length]: padded on the
    left before the prompt, so that all answers begin at one column, and on the right, where nothing is hidden because
    nothing is read any more."""
    prompts = [[*packer.prefix, *packer.ids(one.text + packer.after_question)] for one in questions]
    answers = [[*packer.ids(" " + one.answer), packer.tokenizer.eos_token_id] for one in questions]
    begin, longest = max(map(len, prompts)), max(map(len, answers))
    shape = (len(questions), begin + longest - 1)
    ids = torch.full(shape, packer.tokenizer.pad_token_id)
    labels, branch = torch.full(shape, IGNORED), torch.full(shape, -1)
    mask = torch.ones(shape, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, end = begin - len(prompt), begin + len(answer) - 1
        ids[row, first:end] = torch.tensor((prompt + answer)[:-1])
        labels[row, begin - 1 : end] = torch.tensor(answer)
        branch[row, first:end] = 1
        mask[row, :first] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": ids, "labels": labels, "branch": branch, "position_ids": positions, "attention_mask": mask}


def one_each(questions: list[list[Question]], rng: np.random.Generator) -> list[Question]:
    """One of the questions on each picture, of the task that was least often taken so far."""
    taken: Counter[str] = Counter()
    chosen = []
    for asked in questions:
        order = [asked[place] for place in rng.permutation(len(asked))]
        chosen.append(min(order, key=lambda question: taken[question.task]))
        taken[chosen[-1].task] += 1
    return chosen


@dataclass(frozen=True)
class Rows:
    """The rows of a step."""

    tensors: dict[str, Tensor]
    """As `Packer.batch` gives them; `pixel_values` [pictures of all rows, 3, side, side], if pictures are seen."""
    questions: list[list[Question]]
    """Those on each row's picture, in the order of the branches (from 1)."""


class Steps(Dataset[Rows]):
    """The rows of each step, made from the step's number alone."""

    def __init__(self, recipe: ReduceRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.method = recipe, recipe.reducer()
        self.on_films = recipe.on_films
        self.packer = self.text = Packer(tokenizer, recipe.length)
        if self.on_films:
            self.packer = FilmPacker(tokenizer, recipe.length, recipe.frames)

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Rows:
        recipe = self.recipe
        if not recipe.sees_pictures(step):
            _, questions = joint_step(step, recipe.batch, recipe.seed)
            return Rows(self.text.packed(questions, with_picture=False), questions)
        if self.on_films:
            return self._films("train", step, 10_000_000 * recipe.seed)
        scenes, questions = joint_step(step, recipe.batch, recipe.seed)
        return self._rows(questions, np.stack([pixels(scene) for scene in scenes]), "train", step)

    def validation(self, step: int) -> Rows:
        """Rows of the validation split."""
        if self.on_films:
            return self._films("validation", step, 0)
        scenes, questions = validation_step(step, self.recipe.batch, self.recipe.seed)
        return self._rows(questions, np.stack([pixels(scene) for scene in scenes]), "validation", step)

    def _films(self, split: Split, step: int, start: int) -> Rows:
        recipe = self.recipe
        rng = random_stream("film questions", split, recipe.seed, step)
        first = start + step * recipe.batch
        films = [sample_film(split, first + number, frames=recipe.frames) for number in range(recipe.batch)]
        questions = [film_questions(film, rng) for film in films]
        asked = [[some[place] for place in rng.permutation(len(some))] for some in questions]
        frames = np.concatenate([draw_film(film, PICTURE_SIZE) for film in films])
        return self._rows(asked, frames.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1, split, step)

    def _rows(self, questions: list[list[Question]], pictures: np.ndarray, split: Split, step: int) -> Rows:
        if _asks_once(self.method):
            chosen = one_each(questions, random_stream("one question", split, self.recipe.seed, step))
            tensors, questions = asked_alone(self.packer, chosen), [[question] for question in chosen]
        else:
            tensors = self.packer.packed(questions, with_picture=True)
        return Rows(tensors | {"pixel_values": torch.from_numpy(pictures)}, questions)


# --- A step ---


@dataclass(frozen=True)
class Answered:
    """What came of the rows of a step. L is the number of labels."""

    loss: Tensor
    """The mean cross-entropy of the answers."""
    own: Tensor | None
    """What the method adds to it."""
    hits: Tensor
    """bool [L]: whether the label is the likeliest token."""
    row: Tensor
    """int [L]"""
    branch: Tensor
    """int [L]: the number of the question in its row."""
    visual_tokens: int
    """How many there are in the rows, without those that the method took away before the decoder."""


def answered(model: LlavaForConditionalGeneration, method: Method | None, batch: dict[str, Tensor]) -> Answered:
    """Reads the rows of a step with the method attached; for None, with the model as it is."""
    labels, branch = batch["labels"], batch["branch"]
    chosen = () if method is None else (method,)
    with attach(model, *chosen) as attachment:
        if chosen and batch["attention_mask"].ndim == 2:
            attachment.answers_from(1 + int((labels[0] != IGNORED).nonzero()[0]))
        hidden = model.model(
            input_ids=batch["input_ids"],
            pixel_values=batch.get("pixel_values"),
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        call = attachment.call
        own = None
        if call is None:
            visual_tokens = int((batch["input_ids"] == model.config.image_token_id).sum())
        else:
            assert call.columns is not None
            if torch.is_grad_enabled() and isinstance(method, TrainedReducer):
                own = method.training_loss(call)
            visual_tokens = sum(call.visual_tokens)
            # A method that narrows decoder layers leaves fewer columns at the end: what is gone is visual, and so lies
            # before all that has labels. What a method put in counts as the first column, which has no label.
            columns = call.columns[:, -hidden.shape[1] :].clamp(min=0)
            labels, branch = labels.gather(1, columns), branch.gather(1, columns)
    wanted = labels != IGNORED
    logits = model.lm_head(hidden[wanted]).float()
    return Answered(
        F.cross_entropy(logits, labels[wanted]),
        own,
        logits.argmax(-1) == labels[wanted],
        wanted.nonzero()[:, 0],
        branch[wanted],
        visual_tokens,
    )


def train(
    recipe: ReduceRecipe,
    out: Path,
    *,
    checkpoint_every: int = 500,
    validate_every: int = 500,
    validation_batches: int = 8,
    threads: int = 1,
    device: str = "cpu",
    workers: int = 1,
    quiet: bool = False,
) -> Path:
    """Runs the recipe, or what is left of it, and returns the folder of the finished checkpoint, `out/checkpoint`.

    The folder holds a stock model, its processor, and in `reducer.safetensors` the method's own weights.
    `threads` compute the steps on a CPU, `workers` are processes that draw the pictures.

    `out` also holds `recipe.json`, `log.jsonl` (a line every fifty steps: loss, the method's own loss, seconds, and
    validation where measured), and `state.safetensors`. Validation is the mean loss and the share of answers that are
    right in every token, given those before, by task; the log's first line has those of the model at the start without
    the method, but for films, which it has never seen.

    Raises:
        InputError: if `out` holds a run of another recipe, the model is not of the built-in model's form, or the method
            cannot work on it.
    """
    torch.set_num_threads(threads)
    model, processor = _loaded(recipe, device)
    method = recipe.reducer()
    if isinstance(method, TrainedReducer):
        method = method.settled(Anatomy.of(model))
    module = _held(model, method, recipe.seed)
    claim(recipe, out)
    tokenizer = cast("Any", processor).tokenizer
    steps = Steps(recipe, tokenizer)
    trained = nn.ModuleDict({"module": module})
    if recipe.train_decoder:
        inner = model.model
        for name, part in (("connector", inner.multi_modal_projector), ("decoder", inner.language_model)):
            trained[name] = part
        trained["head"] = model.lm_head
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(_groups(trained, recipe), betas=(0.9, 0.98))
    state = State(out / "state.safetensors", trained)
    first = min(state.resume("joint", optimizer), recipe.steps)
    precision = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16)
    if first == 0 and not steps.on_films and not (out / "log.jsonl").exists():
        with precision:
            append_log(out, {"step": 0, "without": validate(model, None, steps, validation_batches)})
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, recipe.steps),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    started, losses, own = time.time(), list[float](), list[float]()
    with progress_bar(quiet) as progress, torch.random.fork_rng():
        bar = progress.add_task(method.paper, total=recipe.steps, completed=first)
        for done, rows in enumerate(loader, start=first + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * schedule(done - 1, recipe.steps)
            seed = recipe.seed * 1_000_003 + done - 1
            torch.manual_seed(seed)  # dropout and the like in the method's module
            module.train()
            with_pictures = "pixel_values" in rows.tensors
            now = cast("Any", method).per_step(random.Random(seed)) if with_pictures else None
            with precision:
                result = answered(model, now, moved(rows.tensors, model.device))
                total = result.loss if result.own is None else result.loss + result.own
            total.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if with_pictures:
                losses.append(result.loss.item())
            if result.own is not None:
                own.append(result.own.item())
            progress.update(bar, advance=1, description=f"{method.paper}  loss {np.mean(losses[-50:] or [0]):.3f}")
            last = done == recipe.steps
            if done % 50 == 0 or done % validate_every == 0 or last:
                line: dict[str, Any] = {"step": done, "seconds": round(time.time() - started)}
                means = {name: float(np.mean(some)) for name, some in (("loss", losses), ("own", own)) if some}
                line |= {name: round(value, 4) for name, value in means.items()}
                if done % validate_every == 0 or last:
                    with precision:
                        line["validation"] = validate(model, method, steps, validation_batches)
                append_log(out, line)
                losses.clear()
                own.clear()
            if done % checkpoint_every == 0 or last:
                state.save("joint", done, optimizer)
    with checkpoint_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if isinstance(method, TrainedReducer):
            save(method, module, folder)
    return out / "checkpoint"


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration, method: Method | None, steps: Steps, batches: int
) -> dict[str, float]:
    """Teacher-forced accuracy of whole answers on the validation split, by task, the mean loss, and the visual tokens
    a row that reach the decoder; with the method attached, or, for None, of the model as it is."""
    right: dict[str, list[bool]] = {}
    losses: list[float] = []
    tokens: list[float] = []
    if isinstance(method, TrainedReducer):
        method.module(Anatomy.of(model)).eval()
    for step in range(batches):
        rows = steps.validation(step)
        result = answered(model, method, moved(rows.tensors, model.device))
        losses.append(result.loss.item())
        tokens.append(result.visual_tokens / len(rows.questions))
        for (r, number), is_right in whole_answers(result.hits, result.row, result.branch).items():
            right.setdefault(rows.questions[r][number - 1].task, []).append(is_right)
    accuracies = {task: round(float(np.mean(hits)), 4) for task, hits in sorted(right.items())}
    return {"loss": round(float(np.mean(losses)), 4), "visual_tokens": round(float(np.mean(tokens)), 2)} | accuracies


# --- The model before and after ---


def _loaded(recipe: ReduceRecipe, device: str) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """The model, with nothing to train yet."""
    loaded: Any
    loaded, processor = load(recipe.model, dtype="float32", device=device)
    if loaded.config.model_type != "llava" or loaded.config.image_seq_length != PATCHES:
        raise InputError(
            f"{recipe.model} is not of the built-in model's form, whose questions methods are trained on: give "
            "picturebook-nano, or the checkpoint folder of a run of `sightline train nano` or `sightline train reduce`"
        )
    return loaded.requires_grad_(False), processor


def _held(model: LlavaForConditionalGeneration, method: Method, seed: int) -> nn.Module:
    """The method's module as training begins, in use on the model; an empty one, if it has none."""
    anatomy = Anatomy.of(model)
    if not isinstance(method, TrainedReducer):
        method.check(anatomy)
        return nn.Module()
    module = method.fresh(anatomy, seed=seed).to(model.device)
    if method.weights not in (AUTO, UNTRAINED):
        module.load_state_dict(method.module(anatomy).state_dict())
    hold(model, method, module)
    method.check(anatomy)
    return module


def _groups(trained: nn.ModuleDict, recipe: ReduceRecipe) -> list[dict[str, Any]]:
    """What is trained, by the highest learning rate and by whether it decays."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.named_parameters():
        rate = recipe.module_learning_rate if name.startswith("module.") else recipe.learning_rate
        # A connector that the method does without gets gradients of zero, and is to stay as it is.
        decays = parameter.ndim > 1 and not name.startswith("connector.")
        groups.setdefault((rate, recipe.weight_decay * decays), []).append(parameter)
    return [
        {"params": some, "highest": rate, "lr": rate, "weight_decay": decay} for (rate, decay), some in groups.items()
    ]
