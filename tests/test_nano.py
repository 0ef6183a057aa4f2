"""The built-in model's recipe: packed questions are exactly ordinary prompts, runs resume, checkpoints are stock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sightline.errors import InputError
from sightline.models.picturebook_vlm import PROMPT_WITH_PICTURE, build_model, build_processor, build_tokenizer
from sightline.picturebook.draw import draw, object_ids
from sightline.picturebook.questions import training_questions
from sightline.picturebook.scene import PLURALS, random_stream, sample_scene
from sightline.training.nano import (
    IGNORED,
    LABEL_WORDS,
    Packer,
    Recipe,
    answer_loss,
    patch_labels,
    picture_batch,
    text_corpus,
    train,
    word_loss,
)

TINY = dict(size="pico", warm_up_steps=3, steps=5, batch=2, warm_up_batch=2, length=180, compile=False, bfloat16=False)


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return build_tokenizer(text_corpus(200), 512)


@pytest.mark.parametrize(("size", "low", "high"), [("nano", 2e6, 10e6), ("pico", 0, 0.6e6)])
def test_sizes(size: str, low: float, high: float, tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert low <= build_model(size, tokenizer).num_parameters() <= high


def test_any_text_survives_the_tokenizer(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for text in ("Is there a boat in the image?", "Ünïcode, 漢字 and 🐟!", "  spaces   stay "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template_gives_the_prompt_of_training(tokenizer) -> None:  # type: ignore[no-untyped-def]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is there?"}]}
    prompt = build_processor(tokenizer).apply_chat_template([message], add_generation_prompt=True)
    assert prompt == PROMPT_WITH_PICTURE.format(question="What is there?")


@pytest.mark.parametrize("with_picture", [True, False])
def test_packed_questions_equal_ordinary_prompts(with_picture: bool, tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = build_model("pico", tokenizer, seed=3).eval()
    processor = build_processor(tokenizer)
    scenes = [sample_scene("train", index) for index in (1, 2)]
    rng = random_stream("test packing")
    asked = [training_questions(scene, rng) for scene in scenes]
    batch = Packer(tokenizer, 420).batch(scenes, asked, with_picture)
    with torch.no_grad():
        loss, logits, _ = answer_loss(model, batch)
    labels = batch["labels"][batch["labels"] != IGNORED]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))

    single = []
    for scene, questions in zip(scenes, asked, strict=True):
        for question in questions:
            prompt = PROMPT_WITH_PICTURE.format(question=question.text)
            if with_picture:
                inputs = processor(images=draw(scene), text=prompt, return_tensors="pt")
            else:
                inputs = tokenizer(prompt.replace("<image>", ""), return_tensors="pt")
            answer = tokenizer(" " + question.answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
            prompt_ids = inputs["input_ids"]
            ids = torch.cat([prompt_ids, answer], dim=1)
            with torch.no_grad():
                out = model(input_ids=ids, pixel_values=inputs.get("pixel_values")).logits
            single.append(out[0, prompt_ids.shape[1] - 1 :])
    torch.testing.assert_close(logits, torch.cat(single), atol=2e-4, rtol=1e-3)


def test_pixels_are_those_of_the_processor(tokenizer) -> None:  # type: ignore[no-untyped-def]
    scene = sample_scene("test", 5)
    ours = picture_batch([scene])["pixel_values"]
    theirs = build_processor(tokenizer).image_processor(images=draw(scene), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_patch_labels_against_counting_pixels() -> None:
    for index in range(10):
        scene = sample_scene("train", index)
        ids, labels = object_ids(scene), patch_labels(scene)
        for patch in range(100):
            top, left = 8 * (patch // 10), 8 * (patch % 10)
            owners, counts = np.unique(ids[top : top + 8, left : left + 8], return_counts=True)
            best = max(((c, -o) for o, c in zip(owners, counts, strict=True) if o >= 0), default=(0, 0))
            if best[0] < 16:
                assert labels[patch].tolist() == [0] * 7
            else:
                thing = scene.objects[-best[1]]
                across = "left" if thing.x < 1 / 3 else "middle" if thing.x < 2 / 3 else "right"
                down = "above" if thing.y < 0.5 else "below"
                words = [names[label - 1] for names, label in zip(LABEL_WORDS, labels[patch], strict=True)]
                number = sum(other.kind == thing.kind and not other.hidden for other in scene.objects)
                assert words == [thing.kind, thing.colour, thing.size, across, down, str(number), PLURALS[thing.kind]]


def test_a_stopped_run_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sightline.training import nano

    recipe = Recipe(**TINY)  # type: ignore[arg-type]
    whole = train(recipe, tmp_path / "whole", checkpoint_every=2, quiet=True)

    save = nano.State.save

    def save_and_stop(self, phase, step, optimizer):  # type: ignore[no-untyped-def]
        save(self, phase, step, optimizer)
        if (phase, step) in stops:
            stops.remove((phase, step))
            raise KeyboardInterrupt

    monkeypatch.setattr(nano.State, "save", save_and_stop)
    stops = {("warm-up", 2), ("joint", 2), ("joint", 4)}
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped", checkpoint_every=2, quiet=True)
    resumed = train(recipe, tmp_path / "stopped", checkpoint_every=2, quiet=True)
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()

    with pytest.raises(InputError, match="another recipe"):
        train(Recipe(**(TINY | {"seed": 1})), tmp_path / "stopped", quiet=True)  # type: ignore[arg-type]


def test_plain_transformers_loads_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = train(Recipe(**TINY), tmp_path, quiet=True)  # type: ignore[arg-type]
    draw(sample_scene("test", 0)).save(tmp_path / "picture.png")
    code = f"""
import sys
sys.modules["sightline"] = None  # any import of it fails
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(checkpoint)!r})
processor = AutoProcessor.from_pretrained({str(checkpoint)!r})
message = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is there?"}}]}}]
prompt = processor.apply_chat_template(message, add_generation_prompt=True)
inputs = processor(images=Image.open({str(tmp_path / "picture.png")!r}), text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=3)
print(type(model).__name__, int((inputs["input_ids"] == model.config.image_token_id).sum()), output.shape[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, visual, length = done.stdout.split()
    assert name == "LlavaForConditionalGeneration"
    assert int(visual) == 100
    assert int(length) > 100
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in log] == ["warm-up", "joint"]
    assert set(log[-1]["validation"]) >= {"loss", "existence", "colour"}


def test_bad_recipes_are_refused() -> None:
    with pytest.raises(InputError, match="steps must be 1 or more"):
        Recipe(steps=0)
    with pytest.raises(InputError, match="did you mean 'nano'"):
        build_model("nanno", None)  # type: ignore[arg-type]


def test_visual_tokens_as_words_by_hand(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = build_model("pico", tokenizer, seed=1)
    words = torch.tensor([tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for n in LABEL_WORDS for w in n])
    assert len(set(words[:40].tolist())) == 40  # one token a word
    projected = torch.randn(1, 3, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[[2, 1, 3, 1, 2, 4, 2], [0] * 7, [24, 8, 1, 3, 1, 1, 24]]])
    probabilities = (projected[0] @ model.lm_head.weight.T).softmax(-1)
    firsts = [0, 24, 32, 35, 38, 40, 44]  # where each set of words begins
    wanted = [
        -probabilities[patch, words[first + label - 1]].log()
        for patch in (0, 2)
        for first, label in zip(firsts, labels[0, patch].tolist(), strict=True)
    ]
    torch.testing.assert_close(word_loss(model, projected, labels, words), torch.stack(wanted).mean())


def test_queries_and_keys_start_equal(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = build_model("pico", tokenizer, seed=1)
    for layer in model.model.language_model.layers:
        assert torch.equal(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
