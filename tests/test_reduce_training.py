"""Training methods that reduce visual tokens: labels follow what the decoder reads, a stopped run goes on, and what a
run leaves is found by the method."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from command_line import call, refused
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from torch import Tensor, nn

import sightline as sl
from sightline import methods as registry
from sightline.errors import InputError
from sightline.methods import Method
from sightline.models.anatomy import Anatomy
from sightline.models.answering import prepare
from sightline.models.call import Call, Encoded, Reduced
from sightline.models.narrowing import Chosen, LayerInput
from sightline.picturebook.questions import Question, training_questions
from sightline.picturebook.scene import random_stream, sample_scene
from sightline.reduction.frame_reducer import FrameReducer, Frames
from sightline.reduction.layer_reducer import LayerReducer
from sightline.reduction.trained_reducer import TOWER, TrainedReducer, connector_input, hold
from sightline.training.nano import IGNORED, Packer, picture_batch
from sightline.training.reduce import FilmPacker, ReduceRecipe, Steps, answered, asked_alone, one_each, train, validate
from sightline.training.run import State

QUICK: dict[str, Any] = dict(validation_batches=1, workers=0, quiet=True)


@dataclass(frozen=True)
class Pooled(TrainedReducer):
    """The tower's features, pooled to so many places, through a linear map."""

    paper: ClassVar[str] = "pooled"
    structure: ClassVar[tuple[str, ...]] = ("bias",)
    changes: ClassVar[frozenset[str]] = frozenset({"which visual tokens reach the decoder"})

    tokens: int = 4
    bias: bool = True

    @property
    def is_identity(self) -> bool:
        return self.tokens == 0

    def identity(self) -> Self:
        return replace(self, tokens=0)

    def build(self, anatomy: Anatomy) -> nn.Module:
        linear = nn.Linear(anatomy.vision_config.hidden_size, anatomy.text_config.hidden_size, bias=self.bias)
        return nn.Sequential(linear, nn.Dropout(0.2))

    def readings(self, anatomy: Anatomy) -> dict[str, Any]:
        return {TOWER: connector_input(self.paper, anatomy)}

    def pooled(self, tower: Tensor) -> Tensor:
        """[pictures, n, C] -> [pictures, tokens, C]."""
        return torch.stack([part.mean(dim=1) for part in tower.tensor_split(self.tokens, dim=1)], dim=1)

    def reduced(self, call: Call, encoded: Encoded) -> Reduced:
        features = self.module(call.boundary.anatomy)(self.pooled(encoded.readings[TOWER]))
        keep = torch.zeros(len(encoded.features), dtype=torch.bool)
        for row in call.images:
            for first, _ in row:
                keep[first : first + self.tokens] = True
        return Reduced(keep, features.flatten(0, 1).to(encoded.features.dtype))

    def per_step(self, rng: random.Random) -> Self:
        return replace(self, tokens=rng.randint(1, self.tokens))


@dataclass(frozen=True)
class Asked(Pooled):
    """The same, with the mean embedding of the question added."""

    paper: ClassVar[str] = "asked"

    @property
    def one_question(self) -> bool:
        return True

    def reduced(self, call: Call, encoded: Encoded) -> Reduced:
        told = torch.stack([call.question(row).mean(dim=0) for row in range(call.rows)])
        plain = super().reduced(call, encoded)
        assert plain.features is not None
        return Reduced(plain.keep, plain.features + told.repeat_interleave(self.tokens, dim=0))

    def training_loss(self, call: Call) -> Tensor:
        weight: Any = self.module(call.boundary.anatomy)[0].weight  # type: ignore[index]
        return 0.1 * weight.square().sum()


@dataclass(frozen=True)
class MeanFrame(FrameReducer):
    """All frames' mean, pooled."""

    paper: ClassVar[str] = "mean_frame"

    @property
    def is_identity(self) -> bool:
        return False

    def identity(self) -> Self:
        return self

    def readings(self, anatomy: Anatomy) -> dict[str, Any]:
        return {TOWER: connector_input(self.paper, anatomy)}

    def build(self, anatomy: Anatomy) -> nn.Module:
        return nn.Linear(anatomy.vision_config.hidden_size, anatomy.text_config.hidden_size)

    def tokens(self, frames: Frames) -> Tensor:
        tokens: Tensor = self.module(frames.anatomy)(frames.tower.mean(dim=0)[:7])
        return tokens


@dataclass(frozen=True)
class LastPatches(LayerReducer):
    """From the third layer on the last five visual tokens."""

    paper: ClassVar[str] = "last_patches"

    def identity(self) -> Self:
        return self

    def layers(self, depth: int) -> Sequence[int]:
        return (2,)

    def choose(self, call: Call, here: LayerInput) -> Chosen:
        visual = here.columns.visual
        return Chosen(visual & (visual.flip(1).cumsum(dim=1).flip(1) <= 5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("pico") / "checkpoint")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return sl.load(checkpoint, dtype="float32")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (Pooled, Asked, MeanFrame):
        monkeypatch.setitem(registry._REGISTERED, method.paper, method)


def recipe_of(checkpoint: Path, method: str = "pooled", **changes: Any) -> ReduceRecipe:
    return ReduceRecipe(method, **{"model": str(checkpoint), "steps": 5, "batch": 2, "length": 200, **changes})


def held(model: Any, method: TrainedReducer) -> Any:
    """A fresh module, in use on the model."""
    module = method.fresh(Anatomy.of(model), seed=3).eval()
    hold(model, method, module)
    return module


def some_questions(count: int) -> tuple[dict[str, Tensor], list[list[Question]]]:
    """The pictures of two scenes, and questions on each."""
    scenes = [sample_scene("train", index) for index in (4, 9)]
    rng = random_stream("test reduce")
    pictures = {"pixel_values": picture_batch(scenes)["pixel_values"]}
    return pictures, [training_questions(scene, rng)[:count] for scene in scenes]


# --- Labels ---


def by_hand(model: Any, packer: Packer, features: Tensor, asked: Question) -> tuple[list[float], list[bool]]:
    """Each answer token's loss and whether it is the likeliest, where a picture's features [k, D] stand between the
    words of an ordinary prompt."""
    embed = model.get_input_embeddings()
    image = packer.prefix.index(model.config.image_token_id)
    after = [one for one in packer.prefix[image:] if one != model.config.image_token_id]
    after += packer.ids(asked.text + packer.after_question)
    answer = [*packer.ids(" " + asked.answer), packer.tokenizer.eos_token_id]
    parts = [embed(torch.tensor(packer.prefix[:image])), features, embed(torch.tensor(after + answer[:-1]))]
    hidden = model.model.language_model(inputs_embeds=torch.cat(parts)[None]).last_hidden_state[0, -len(answer) :]
    logits = model.lm_head(hidden)
    losses = -logits.log_softmax(-1)[range(len(answer)), answer]
    return losses.tolist(), (logits.argmax(-1) == torch.tensor(answer)).tolist()


@torch.no_grad()
def test_labels_follow_the_places_that_are_left(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    method = Pooled(tokens=3)
    module = held(model, method)
    packer = Packer(processor.tokenizer, 260)
    pictures, questions = some_questions(6)
    batch = packer.packed(questions, with_picture=True) | pictures
    result = answered(model, method, batch)
    tower = model.model.vision_tower(pictures["pixel_values"]).last_hidden_state[:, 1:]
    features = module(method.pooled(tower))
    expected: dict[tuple[int, int], list[bool]] = {}
    losses: list[float] = []
    wanted = batch["labels"] != IGNORED
    rows, numbers = wanted.nonzero()[:, 0].tolist(), batch["branch"][wanted].tolist()
    packed = set(zip(rows, numbers, strict=True))
    for row, number in sorted(packed):
        values, hits = by_hand(model, packer, features[row], questions[row][number - 1])
        losses += values
        expected[row, number] = hits
    assert len(packed) > 8
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    found: dict[tuple[int, int], list[bool]] = {}
    for row, number, hit in zip(result.row.tolist(), result.branch.tolist(), result.hits.tolist(), strict=True):
        found.setdefault((row, number), []).append(hit)
    assert found == expected
    assert result.visual_tokens == 6
    assert result.own is None


@torch.no_grad()
def test_a_method_that_reads_the_question_does_not_see_the_answer(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    method = Asked(tokens=2)
    module = held(model, method)
    packer = Packer(processor.tokenizer, 200)
    pictures, questions = some_questions(9)
    chosen = [min(questions[0], key=lambda one: len(one.text)), max(questions[1], key=lambda one: len(one.text))]
    result = answered(model, method, asked_alone(packer, chosen) | pictures)
    tower = model.model.vision_tower(pictures["pixel_values"]).last_hidden_state[:, 1:]
    plain = module(method.pooled(tower))
    losses, hits = [], []
    for row, asked in enumerate(chosen):
        words = packer.prefix[packer.prefix.index(model.config.image_token_id) + 100 :]
        words = words + packer.ids(asked.text + packer.after_question)
        told = model.get_input_embeddings()(torch.tensor(words)).mean(dim=0)
        values, right = by_hand(model, packer, plain[row] + told, asked)
        losses += values
        hits += right
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result.hits.tolist() == hits


@torch.no_grad()
@pytest.mark.parametrize("method", [LastPatches(), sl.VoCo(tokens=2, weights="untrained"), sl.V2PE(delta=0.25)])
def test_packed_rows_are_prompts_one_by_one(method: Method, loaded: tuple[Any, Any]) -> None:
    """Fewer columns at the end, more columns, fractions of positions."""
    model, processor = loaded
    packer = Packer(processor.tokenizer, 230)
    pictures, questions = some_questions(4)
    batch = packer.packed(questions, with_picture=True) | pictures
    result = answered(model, method, batch)
    losses: list[float] = []
    hits: list[bool] = []
    seen = {(r, b) for r, b in zip(result.row.tolist(), result.branch.tolist(), strict=True)}
    for row, number in sorted(seen):
        asked = questions[row][number - 1]
        answer = [*packer.ids(" " + asked.answer), packer.tokenizer.eos_token_id]
        prompt = [*packer.prefix, *packer.ids(asked.text + packer.after_question)]
        with sl.attach(model, method):
            logits = model(
                input_ids=torch.tensor([prompt + answer[:-1]]),
                pixel_values=pictures["pixel_values"][row : row + 1],
                use_cache=False,
            ).logits[0, -len(answer) :]
        losses += (-logits.log_softmax(-1)[range(len(answer)), answer]).tolist()
        hits += (logits.argmax(-1) == torch.tensor(answer)).tolist()
    assert len(seen) > 5
    assert result.loss.item() == pytest.approx(sum(losses) / len(losses), abs=2e-5)
    assert result.hits.tolist() == hits


def test_validation_counts_whole_answers(checkpoint: Path, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    method = Pooled(tokens=3)
    held(model, method)
    recipe = recipe_of(checkpoint, "pooled:tokens=3")
    steps = Steps(recipe, processor.tokenizer)
    model.lm_head.weight.data[:, 0] += 1e-3  # no ties
    found = validate(model, method, steps, 2)
    right: dict[str, list[bool]] = {}
    for step in range(2):
        rows = steps.validation(step)
        with torch.no_grad():
            result = answered(model, method, rows.tensors)
        for row in range(2):
            for number in set(result.branch[result.row == row].tolist()):
                mine = (result.row == row) & (result.branch == number)
                right.setdefault(rows.questions[row][number - 1].task, []).append(bool(result.hits[mine].all()))
    assert {task: round(sum(some) / len(some), 4) for task, some in right.items()} == {
        name: value for name, value in found.items() if name not in ("loss", "visual_tokens")
    }
    assert found["visual_tokens"] == 3
    assert validate(model, None, steps, 1)["visual_tokens"] == 100


# --- Rows ---


def test_rows_of_one_question_begin_their_answers_together(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    packer = Packer(processor.tokenizer, 200)
    _, questions = some_questions(9)
    chosen = [*questions[0][:3], *questions[1][-3:]]
    rows = asked_alone(packer, chosen)
    begins = (rows["labels"] != IGNORED).int().argmax(dim=1)
    assert begins.unique().numel() == 1
    for row, asked in enumerate(chosen):
        prompt = [*packer.prefix, *packer.ids(asked.text + packer.after_question)]
        answer = [*packer.ids(" " + asked.answer), packer.tokenizer.eos_token_id]
        first = int(rows["attention_mask"][row].argmax())
        length = len(prompt) + len(answer) - 1
        assert rows["input_ids"][row, first : first + length].tolist() == (prompt + answer)[:-1]
        assert rows["position_ids"][row, first : first + length].tolist() == list(range(length))
        assert rows["labels"][row][rows["labels"][row] != IGNORED].tolist() == answer
        assert first + len(prompt) - 1 == int(begins[row])
        assert rows["attention_mask"][row, first:].all()
        assert not rows["attention_mask"][row, :first].any()


def test_films_are_learned_in_the_form_in_which_they_are_asked_about(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    packer = FilmPacker(processor.tokenizer, 272, 16)
    frames = [Image.new("RGB", (80, 80))] * 16
    asked = prepare(loaded[0], processor, [frames], ["Which came first?"])["input_ids"][0].tolist()
    assert asked == packer.prefix + packer.ids("Which came first?" + packer.after_question)


def test_tasks_take_turns() -> None:
    scenes = [sample_scene("train", index) for index in range(36)]
    rng = random_stream("test turns")
    questions = [training_questions(scene, rng) for scene in scenes]
    chosen = one_each(questions, random_stream("one"))
    assert all(one in asked for one, asked in zip(chosen, questions, strict=True))
    often = Counter(one.task for one in chosen)
    always = Counter(task for asked in questions for task in {one.task for one in asked})
    common = [often[task] for task, count in always.items() if count > 30]
    assert len(common) > 2
    assert max(common) - min(common) <= 3
    # Left to chance, a third of them would ask whether something is there.
    assert often["existence"] <= 7


def test_a_step_is_made_from_its_number(checkpoint: Path, loaded: tuple[Any, Any]) -> None:
    recipe = recipe_of(checkpoint, text_only_every=3, steps=20)
    steps = Steps(recipe, loaded[1].tokenizer)
    assert [recipe.sees_pictures(step) for step in range(6)] == [True, True, False, True, True, False]
    assert "pixel_values" not in steps[2].tensors
    image = loaded[0].config.image_token_id
    assert not (steps[2].tensors["input_ids"] == image).any()
    assert steps[1].tensors["pixel_values"].shape == (2, 3, 80, 80)
    for step in (1, 2):
        again = Steps(recipe, loaded[1].tokenizer)[step]
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in steps[step].tensors.items())
    assert all(replace(recipe, text_only_every=0).sees_pictures(step) for step in range(9))
    assert replace(recipe, train_decoder=False).sees_pictures(2)


# --- Runs ---


def test_a_run_learns_and_the_method_finds_what_it_learned(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[[Steps, int], Any] = Steps.__getitem__
    monkeypatch.setattr(Steps, "__getitem__", lambda self, step: make(self, 0))
    method = Pooled(tokens=4)
    recipe = recipe_of(checkpoint, steps=25, learning_rate=0.02, module_learning_rate=0.05, text_only_every=0)
    final = train(recipe, tmp_path, **QUICK)
    model, processor = sl.load(final)
    rows = Steps(recipe, processor.tokenizer)[0]
    losses = []
    for one in (sl.load(checkpoint, dtype="float32")[0], model):
        if one is not model:
            held(one, method)
        with torch.no_grad():
            losses.append(answered(one, method, rows.tensors).loss.item())
    assert losses[1] < 0.7 * losses[0]
    before, after = load_file(checkpoint / "model.safetensors"), load_file(final / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("vision_tower" in name or "projector" in name), name
    with sl.attach(model, Pooled(tokens=2)) as attachment:
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is there?"}]}],
            add_generation_prompt=True,
        )
        inputs = processor(text=prompt, return_tensors="pt", images=picture_of(3))
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert attachment.visual_tokens == [2]
    with pytest.raises(InputError, match="bias=True"):
        sl.attach(model, Pooled(bias=False))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["without"]["visual_tokens"] == 100
    assert log[-1]["step"] == 25
    assert log[-1]["validation"]["visual_tokens"] == 4
    assert {"loss", "existence", "colour"} <= set(log[-1]["validation"])


def picture_of(index: int) -> Any:
    from sightline.picturebook.draw import draw

    return draw(sample_scene("test", index))


@pytest.mark.parametrize("method", ["pooled", "asked"])
def test_a_stopped_run_ends_like_an_uninterrupted_one(
    method: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(checkpoint, method, text_only_every=3, learning_rate=0.01)
    options: dict[str, Any] = dict(checkpoint_every=2, **QUICK)
    whole = train(recipe, tmp_path / "whole", **options)
    save: Callable[..., None] = State.save
    stops = {2, 4}

    def save_and_stop(self: State, phase: str, step: int, optimizer: Any) -> None:
        save(self, phase, step, optimizer)
        if step in stops:
            stops.remove(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "save", save_and_stop)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped", **options)
        assert not (tmp_path / "stopped" / "checkpoint").exists()
    resumed = train(recipe, tmp_path / "stopped", **options)
    for file in ("model.safetensors", "reducer.safetensors"):
        assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    log = (tmp_path / "stopped" / "log.jsonl").read_text()
    assert log.count("without") == 1
    assert ('"own"' in log) == (method == "asked")
    again = train(recipe, tmp_path / "stopped", **options)  # what is finished is finished
    assert (again / "reducer.safetensors").read_bytes() == (whole / "reducer.safetensors").read_bytes()
    assert (tmp_path / "stopped" / "log.jsonl").read_text() == log
    with pytest.raises(InputError, match="another recipe"):
        train(replace(recipe, seed=1), tmp_path / "stopped", **options)


def test_what_is_trained(checkpoint: Path, tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    fresh = Pooled().fresh(Anatomy.of(loaded[0]), seed=0).state_dict()
    start = load_file(checkpoint / "model.safetensors")

    def changes(**recipe: Any) -> tuple[bool, bool, Path]:
        final = train(recipe_of(checkpoint, steps=1, **recipe), tmp_path / str(len(recipe)), **QUICK)
        module, model = load_file(final / "reducer.safetensors"), load_file(final / "model.safetensors")
        return (
            any(not torch.equal(fresh[name], tensor) for name, tensor in module.items()),
            any(not torch.equal(start[name], tensor) for name, tensor in model.items()),
            final,
        )

    # Rows without pictures do not reach the module; without its decoder, nothing else is trained.
    assert changes(text_only_every=1)[:2] == (False, True)
    *changed, trained = changes(train_decoder=False, text_only_every=1)
    assert changed == [True, False]
    # A run can start from the weights of another; one that starts from its checkpoint alone has fresh ones.
    further = recipe_of(trained, f"pooled:weights={trained}", steps=1, module_learning_rate=0.0, train_decoder=False)
    final = train(further, tmp_path / "further", **QUICK)
    kept, ours = (load_file(folder / "reducer.safetensors") for folder in (final, trained))
    assert all(torch.equal(kept[name], tensor) for name, tensor in ours.items())
    anew = train(replace(further, method="pooled"), tmp_path / "anew", **QUICK)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in load_file(anew / "reducer.safetensors").items())


def test_methods_across_pictures_learn_on_films(checkpoint: Path, tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    recipe = recipe_of(checkpoint, "mean_frame", steps=2, batch=1, text_only_every=2, length=160)
    steps = Steps(recipe, loaded[1].tokenizer)
    rows = steps[0]
    assert rows.tensors["pixel_values"].shape == (16, 3, 80, 80)
    assert rows.tensors["pixel_values"].amin() >= -1
    assert rows.tensors["pixel_values"].amax() <= 1
    image = rows.tensors["input_ids"][0] == loaded[0].config.image_token_id
    assert image.sum() == 1600
    assert image.nonzero()[-1] - image.nonzero()[0] == 1599
    assert rows.questions != steps.validation(0).questions
    assert "pixel_values" not in steps[1].tensors
    train(recipe, tmp_path, **QUICK)
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert line["validation"]["visual_tokens"] == 7
    assert {"order", "flash"} & set(line["validation"])


def test_methods_across_pictures_learn_on_single_pictures(
    checkpoint: Path, tmp_path: Path, loaded: tuple[Any, Any]
) -> None:
    recipe = recipe_of(checkpoint, "videollm_mod:r=0.1", steps=1, frames=1)
    rows, other = (Steps(one, loaded[1].tokenizer)[0] for one in (recipe, replace(recipe, method="pooled")))
    assert all(torch.equal(rows.tensors[name], tensor) for name, tensor in other.tensors.items())
    final = train(recipe, tmp_path, **QUICK)
    first, last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "without" in first
    assert "colour" in last["validation"]
    assert load_file(final / "reducer.safetensors").keys() == {"0.score.weight", "1.score.weight"}


def test_a_method_without_weights_trains_the_decoder(checkpoint: Path, tmp_path: Path) -> None:
    final = train(recipe_of(checkpoint, "v2pe:random=true", steps=1), tmp_path, **QUICK)
    assert not (final / "reducer.safetensors").exists()
    before, after = load_file(checkpoint / "model.safetensors"), load_file(final / "model.safetensors")
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


# --- The command, and bad input ---


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(checkpoint), "--steps", "1", "--batch", "1", "--threads", "1", "--no-decoder"]
    arguments += ["--module-learning-rate", "0.01", "--out", str(tmp_path / "run")]
    result = call("train", "reduce", "--method", "pooled:tokens=2", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run" / "checkpoint")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["method"], recipe["steps"], recipe["train_decoder"]) == ("pooled:tokens=2", 1, False)
    assert recipe["module_learning_rate"] == 0.01
    assert "another recipe" in refused("train", "reduce", "--method", "pooled:tokens=3", *arguments)
    assert "did you mean 'pooled'" in refused("train", "reduce", "--method", "poolled", *arguments)


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("poold", {}, "did you mean 'pooled'"),
        ("fastervlm", {}, "fastervlm cannot be trained: give one of the methods that are, .*mqt.*pooled"),
        ("pooled+vista", {}, "cannot be trained"),
        ("none", {}, "cannot be trained"),
        ("pooled:tokens=0", {}, "switched off at these settings"),
        ("pooled", {"steps": 0}, "steps must be 1 or more, not 0"),
        ("pooled", {"batch": 0}, "batch must be 1 or more, not 0"),
        ("pooled", {"text_only_every": -1}, "text_only_every must be 0 or more, not -1"),
        ("mean_frame", {"frames": 4}, r"frames must be 1, for pictures, or lie in \[16, 2048\], not 4"),
        ("pooled", {"learning_rate": float("nan")}, "learning_rate must be a number from 0 on, not nan"),
        ("pooled", {"module_learning_rate": -1.0}, "module_learning_rate must be a number from 0 on, not -1.0"),
        ("mean_frame", {"frames": 1000}, "of 16 films of 1000 frames a step would take 161 GB, and at most 4 are"),
        ("v2pe", {"train_decoder": False}, "v2pe has no weights of its own: without the decoder"),
    ],
)
def test_bad_recipes_are_refused(method: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ReduceRecipe(method, **changes)


def test_a_model_of_another_form_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = sl.load(checkpoint)
    model.config.image_seq_length = 16
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is not of the built-in model's form"):
        train(recipe_of(tmp_path / "other"), tmp_path / "run", **QUICK)
    with pytest.raises(InputError, match="no file '/nowhere'"):
        train(recipe_of(checkpoint, "pooled:weights=/nowhere"), tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
