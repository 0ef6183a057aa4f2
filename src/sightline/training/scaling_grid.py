"""A grid of small vision-language models: decoders of several sizes, each reading several numbers of visual tokens.
What `sightline.probes.scaling_law` is fitted to.

The vision tower and the connector of the built-in model stay as they are. A picture's 10 x 10 features are computed
once and kept; for T visual tokens they are averaged over T squares of equal size. A decoder of its own for each cell,
of Llama form, is trained from nothing on packed questions of the picture world, in the built-in model's tokens, behind
a norm and one matrix that bring the features to its width.

All cells of a seed see the same scenes and questions in the same order, and are validated on the same ones: rows have
the same room for text, whatever T is. The size of a cell is the number of parameters of its layers; the embedding,
which is the head as well, is not in it.

A finished cell is one line in `grid.jsonl`; a killed run goes on with the cells that are missing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from sightline.errors import InputError
from sightline.files import write_whole
from sightline.models.loading import load
from sightline.picturebook.questions import Question, training_questions
from sightline.picturebook.scene import Scene, random_stream
from sightline.probes.scaling_law import Cells
from sightline.training.nano import (
    IGNORED,
    PATCHES,
    Packer,
    joint_step,
    pixels,
    schedule,
    validation_step,
    whole_answers,
)
from sightline.training.run import claim, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRID = "grid.jsonl"
SIDE = math.isqrt(PATCHES)
PARTS = ("input_ids", "labels", "branch", "position_ids")
HEAD = 24
"""Width of an attention head."""
CAPTIONS = ("short_caption", "long_caption")
"""Kinds of question that have many right answers, of which one is demanded: trained on, not scored."""


@dataclass(frozen=True)
class ScalingRecipe:
    """What a grid holds; the same recipe gives the same grid on the same machine.

    Args:
        model: whose tower, connector and tokenizer are used.
        shapes: width and number of layers of each decoder; widths are multiples of 24.
        tokens: numbers of visual tokens, squares that divide the picture's 10 x 10 evenly: 1, 4, 25, 100.
        seeds: of weights and of scenes; each seed is a whole grid.
        steps, batch: of training, and scenes a step.
        scenes: how many different ones a seed is trained on; they come again, with other questions.
        text_length: tokens of text in a row, the prompt's own included.
        validation_batches: of `batch` scenes each.
    """

    model: str = "picturebook-nano"
    shapes: tuple[tuple[int, int], ...] = ((48, 3), (96, 4), (144, 4), (192, 5))
    tokens: tuple[int, ...] = (1, 4, 25, 100)
    seeds: tuple[int, ...] = (0,)
    steps: int = 2000
    batch: int = 16
    scenes: int = 8000
    text_length: int = 172
    validation_batches: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "scenes", "validation_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}")
        for width, layers in self.shapes:
            if width < 1 or width % HEAD or layers < 1:
                raise InputError(
                    f"a decoder's width must be a multiple of {HEAD}, and it needs a layer, not {width}x{layers}"
                )
        for tokens in self.tokens:
            side = math.isqrt(max(tokens, 0))
            if tokens < 1 or side**2 != tokens or SIDE % side:
                raise InputError(f"the number of visual tokens must be 1, 4, 25 or 100, not {tokens}")
        for name in ("shapes", "tokens", "seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} must hold one at least")

    @property
    def cells(self) -> list[Cell]:
        """In the order in which they are trained: the longest first."""
        all_cells = [
            Cell(*shape, tokens, seed) for shape, tokens, seed in product(self.shapes, self.tokens, self.seeds)
        ]
        return sorted(all_cells, key=lambda cell: (-cell.parameters, -cell.tokens, cell.seed))

    def check_fit(self) -> None:
        """Raises `InputError` where the law could not be fitted to the grid, before it is trained."""
        Cells.of((cell.parameters, cell.tokens, 0.5) for cell in self.cells)

    @property
    def period(self) -> int:
        """After so many steps the same scenes come again."""
        return max(1, self.scenes // self.batch)


@dataclass(frozen=True)
class Cell:
    """One model of the grid."""

    width: int
    layers: int
    tokens: int
    seed: int

    @property
    def parameters(self) -> int:
        """Of the decoder's layers: attention, feed-forward of twice the width, norms."""
        return self.layers * (4 * self.width**2 + 3 * self.width * 2 * self.width + 2 * self.width)


class TextPacker(Packer):
    """As `Packer`, with a single place for the picture, `first`, which `widened` makes room at, and `length` for the
    rest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        super().__init__(tokenizer, length + 1)
        self.image: Any = tokenizer.convert_tokens_to_ids("<image>")
        self.first = self.prefix.index(self.image)
        self.prefix = [*self.prefix[: self.first + 1], *self.prefix[self.first + PATCHES :]]

    def texts(self, questions: list[list[Question]]) -> Tensor:
        """int16 [rows, 4, length + 1]: token ids, labels, branch and positions, as `row` makes them."""
        rows = [self.row(own, with_picture=True) for own in questions]
        return torch.from_numpy(np.stack([np.stack([row[part] for part in PARTS]) for row in rows]).astype(np.int16))

    def widened(self, texts: Tensor, tokens: int) -> dict[str, Tensor]:
        """The rows with `tokens` places for the picture, and their mask as in `Packer.packed`."""
        before, place, after = texts.long().split([self.first, 1, texts.shape[-1] - self.first - 1], dim=-1)
        parts = dict(
            zip(PARTS, torch.cat([before, place.expand(-1, -1, tokens), after], dim=-1).unbind(1), strict=True)
        )
        columns = torch.arange(parts["branch"].shape[-1], device=texts.device)
        later = columns >= self.first + tokens
        visual = (columns >= self.first) & ~later
        read = later & (parts["branch"] >= 0)
        positions = torch.where(visual, columns, parts["position_ids"] + read * (tokens - 1))
        branch = parts["branch"]
        seen = (branch[:, :, None] == branch[:, None, :]) | (branch == 0)[:, None, :]
        causal = columns[:, None] >= columns[None, :]
        return parts | {"position_ids": positions, "attention_mask": (seen & causal)[:, None]}


class SmallVLM(nn.Module):
    """A decoder of Llama form that reads features of pictures."""

    def __init__(self, cell: Cell, vocabulary: int, feature_width: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=cell.width,
            intermediate_size=2 * cell.width,
            num_hidden_layers=cell.layers,
            num_attention_heads=cell.width // HEAD,
            head_dim=HEAD,
            max_position_embeddings=1024,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            self.decoder = LlamaModel(config)
            self.connector = nn.Sequential(nn.LayerNorm(feature_width), nn.Linear(feature_width, cell.width))
            self._initialise(cell)

    @torch.no_grad()
    def _initialise(self, cell: Cell) -> None:
        """As the built-in model's decoder is (`sightline.models.picturebook_vlm`), for the same reasons; features start
        as large as embeddings."""
        for name, parameter in self.decoder.named_parameters():
            if parameter.ndim > 1:
                inner = 0.85 * cell.width**-0.5
                out = inner * (2 * cell.layers) ** -0.5
                narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.1 if "embed_tokens" in name else out if narrow else inner)
        for layer in self.decoder.layers:
            attention: Any = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        matrix: Any = self.connector[1]
        nn.init.normal_(matrix.weight, std=0.1 * matrix.in_features**-0.5)
        nn.init.zeros_(matrix.bias)

    def forward(self, features: Tensor, batch: dict[str, Tensor], first: int) -> Tensor:
        """The logits where there are labels, [labels, vocabulary]. `features` are [rows, T, width], and stand from the
        row's column `first` on."""
        embeds = self.decoder.embed_tokens(batch["input_ids"])
        visual = self.connector(features).to(embeds.dtype)
        tokens = visual.shape[1]
        embeds = torch.cat([embeds[:, :first], visual, embeds[:, first + tokens :]], dim=1)
        hidden = self.decoder(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).last_hidden_state
        return F.linear(hidden[batch["labels"] != IGNORED], self.decoder.embed_tokens.weight)


@dataclass(frozen=True)
class Source:
    """What all cells of a seed are trained and validated on."""

    tokenizer: PreTrainedTokenizerBase
    train: Tensor
    """float16 [period * batch, 100, width]: features of the scenes, in the order of the steps."""
    texts: Tensor
    """int16 [steps, batch, 4, text_length + 1]: `TextPacker.texts` of each step."""
    validation: Tensor
    """As `train`."""
    asked: tuple[tuple[tuple[Question, ...], ...], ...]
    """What is validated on: the questions of each scene of each batch."""

    def share(self) -> None:
        """Puts the features where other processes can read them without a copy."""
        for tensor in (self.train, self.texts, self.validation):
            tensor.share_memory_()


def pooled(features: Tensor, tokens: int) -> Tensor:
    """[pictures, 100, width] in raster order -> [pictures, tokens, width]: means over squares of equal size."""
    side = math.isqrt(tokens)
    square = features.float().transpose(1, 2).unflatten(-1, (SIDE, SIDE))
    return F.avg_pool2d(square, SIDE // side).flatten(2).transpose(1, 2)


def source(recipe: ScalingRecipe, seed: int, device: str, *, quiet: bool = False) -> Source:
    """Encodes the scenes of a seed.

    Raises:
        InputError: if the model is not of the built-in model's form.
    """
    loaded: Any
    loaded, processor = load(recipe.model, dtype="float32", device=device)
    if loaded.config.model_type != "llava" or loaded.config.image_seq_length != PATCHES:
        raise InputError(
            f"{recipe.model} is not of the built-in model's form, whose questions the grid is trained on: give "
            "picturebook-nano, or the checkpoint folder of a run of `sightline train nano`"
        )

    def encoded(scenes: list[Scene]) -> Tensor:
        values = torch.from_numpy(np.stack([pixels(scene) for scene in scenes])).to(loaded.device)
        return torch.stack(tuple(loaded.get_image_features(values).pooler_output)).half().cpu()

    packer = TextPacker(processor.tokenizer, recipe.text_length)
    features, texts, held_out = list[Tensor](), list[Tensor](), list[Tensor]()
    validation = [validation_step(step, recipe.batch, seed) for step in range(recipe.validation_batches)]
    with progress_bar(quiet) as progress, torch.no_grad():
        for step in progress.track(range(recipe.steps), description=f"scenes and questions of seed {seed}"):
            scenes, questions = asked(recipe, seed, step)
            texts.append(packer.texts(questions))
            if step < recipe.period:
                features.append(encoded(scenes))
        for scenes, _ in validation:
            held_out.append(encoded(scenes))
    return Source(
        processor.tokenizer,
        torch.cat(features),
        torch.stack(texts),
        torch.cat(held_out),
        tuple(tuple(tuple(own) for own in questions) for _, questions in validation),
    )


def asked(recipe: ScalingRecipe, seed: int, step: int) -> tuple[list[Scene], list[list[Question]]]:
    """The scenes of a step and the questions on them: other ones each time that the scenes come."""
    scenes, questions = joint_step(step % recipe.period, recipe.batch, seed)
    if step < recipe.period:
        return scenes, questions
    rng = random_stream("questions", "scaling", seed, step)
    drawn = [training_questions(scene, rng) for scene in scenes]
    return scenes, [[own[i] for i in rng.permutation(len(own))] for own in drawn]


def train_cell(recipe: ScalingRecipe, cell: Cell, given: Source, device: str = "cpu") -> dict[str, Any]:
    """Trains one model and returns its line of the grid.

    It holds the cell (width, layers, tokens, seed), its parameters, text_tokens (mean length of a prompt without
    picture and answer), loss and, by kind of question, accuracy (whole answers, teacher-forced) and n.
    """
    started = time.time()
    packer = TextPacker(given.tokenizer, recipe.text_length)
    model = SmallVLM(cell, len(given.tokenizer), given.train.shape[-1]).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe.steps)
        place = step % recipe.period * recipe.batch
        features = pooled(given.train[place : place + recipe.batch].to(device), cell.tokens)
        batch = packer.widened(given.texts[step].to(device), cell.tokens)
        logits = model(features, batch, packer.first)
        F.cross_entropy(logits, batch["labels"][batch["labels"] != IGNORED]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = validate(recipe, cell, model.eval(), packer, given, device)
    about = {"width": cell.width, "layers": cell.layers, "tokens": cell.tokens, "seed": cell.seed}
    return about | {"parameters": cell.parameters} | found | {"seconds": round(time.time() - started, 1)}


@torch.no_grad()
def validate(
    recipe: ScalingRecipe, cell: Cell, model: SmallVLM, packer: TextPacker, given: Source, device: str
) -> dict[str, Any]:
    """Loss; accuracy of whole answers and number of them by kind of question; the mean length of a prompt's text."""
    right: dict[str, list[bool]] = {}
    losses, lengths = list[float](), list[int]()
    for step, questions in enumerate(given.asked):
        batch = packer.widened(packer.texts([list(own) for own in questions]).to(device), cell.tokens)
        place = step * recipe.batch
        features = pooled(given.validation[place : place + recipe.batch].to(device), cell.tokens)
        logits = model(features, batch, packer.first)
        wanted = batch["labels"] != IGNORED
        labels = batch["labels"][wanted]
        losses.append(F.cross_entropy(logits, labels).item())
        row, column = wanted.nonzero(as_tuple=True)
        answers = whole_answers(logits.argmax(-1) == labels, row, batch["branch"][row, column])
        for (r, number), hit in answers.items():
            question = questions[r][number - 1]
            right.setdefault(question.task, []).append(hit)
            lengths.append(len(packer.ids(question.text + packer.after_question)))
    return {
        "text_tokens": round(len(packer.prefix) - 1 + float(np.mean(lengths)), 2),
        "loss": round(float(np.mean(losses)), 4),
        "accuracy": {task: round(float(np.mean(hits)), 5) for task, hits in sorted(right.items())},
        "n": {task: len(hits) for task, hits in sorted(right.items())},
    }


def train_grid(
    recipe: ScalingRecipe,
    out: Path,
    *,
    jobs: int = 1,
    threads: int = 1,
    device: str = "cpu",
    quiet: bool = False,
    told: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Trains the cells that `out`/grid.jsonl does not have yet and returns all its lines.

    Args:
        recipe: the grid.
        out: its folder; `recipe.json` in it says of which recipe it is.
        jobs: cells that are trained at the same time, each in a process of its own.
        threads: of each job.
        device: where all of them are.
        quiet: draw no progress bars.
        told: is given each line as it comes.

    Raises:
        InputError: if `out` holds a grid of another recipe, or the model is not of the built-in model's form.
    """
    if jobs < 1:
        raise InputError(f"jobs must be 1 or more, not {jobs}")
    claim(recipe, out)
    torch.set_num_threads(threads)
    lines = read_grid(out / GRID) if (out / GRID).exists() else []
    done = {Cell(line["width"], line["layers"], line["tokens"], line["seed"]) for line in lines}
    for seed in recipe.seeds:
        missing = [cell for cell in recipe.cells if cell.seed == seed and cell not in done]
        if not missing:
            continue
        given = source(recipe, seed, device, quiet=quiet)
        with progress_bar(quiet) as progress:
            bar = progress.add_task(f"models of seed {seed}", total=len(missing))
            for line in _trained(recipe, missing, given, jobs, threads, device):
                lines.append(line)
                write_whole(out / GRID, "".join(json.dumps(one) + "\n" for one in lines))
                progress.update(bar, advance=1)
                if told is not None:
                    told(line)
    return lines


def read_grid(file: Path) -> list[dict[str, Any]]:
    """The lines of a grid.

    Raises:
        InputError: if the file cannot be read or holds anything else.
    """
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    wanted = {"width", "layers", "tokens", "seed", "parameters", "text_tokens", "accuracy"}
    if not all(isinstance(line, dict) and wanted <= line.keys() for line in lines):
        raise InputError(f"{file} is no grid of `sightline scaling`")
    return lines


def _trained(
    recipe: ScalingRecipe, cells: Sequence[Cell], given: Source, jobs: int, threads: int, device: str
) -> Iterator[dict[str, Any]]:
    """The lines of cells of one seed, as they are done."""
    if min(jobs, len(cells)) == 1:
        for cell in cells:
            yield train_cell(recipe, cell, given, device)
        return
    context: Any = torch.multiprocessing.get_context("spawn")  # a device cannot be used again after a fork
    given.share()
    pool = ProcessPoolExecutor(min(jobs, len(cells)), context, _begin, (recipe, given, threads, device))
    try:
        for done in as_completed([pool.submit(_one, cell) for cell in cells]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


_JOB: tuple[ScalingRecipe, Source, str] | None = None


def _begin(recipe: ScalingRecipe, given: Source, threads: int, device: str) -> None:
    """What a process of the pool starts with."""
    global _JOB
    torch.set_num_threads(threads)
    _JOB = (recipe, given, device)


def _one(cell: Cell) -> dict[str, Any]:
    assert _JOB is not None
    recipe, given, device = _JOB
    return train_cell(recipe, cell, given, device)


def grid_cells(lines: Sequence[dict[str, Any]], task: str) -> list[tuple[float, float, float]]:
    """(parameters, visual tokens, error) of each line for a kind of question, or for "all" of those that are scored:
    the mean over the kinds."""
    found = []
    for line in lines:
        own = scored(line)
        if task == "all" or task in own:
            accuracy = float(np.mean(list(own.values()))) if task == "all" else own[task]
            found.append((float(line["parameters"]), float(line["tokens"]), 1 - accuracy))
    return found


def scored(line: dict[str, Any]) -> dict[str, float]:
    """Kind of question -> accuracy, without captions."""
    accuracy: dict[str, float] = line["accuracy"]
    return {task: value for task, value in accuracy.items() if task not in CAPTIONS}
