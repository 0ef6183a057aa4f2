"""The checkpoint that ships: stock, small, able, and with a prior. Its answers are fixed, and so are the scenes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sightline
from sightline.benchmarks.item import Answer, get_benchmark
from sightline.models.answering import prepare, reply
from sightline.models.loading import load
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import sample_scene

FOLDER = Path(sightline.__file__).parent / "models" / "checkpoints" / "picturebook-nano"


def test_it_is_small_and_holds_nothing_but_data() -> None:
    files = list(FOLDER.iterdir())
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja"}
    assert sum(file.stat().st_size for file in files) <= 25e6


def test_plain_transformers_loads_it_and_it_answers(tmp_path: Path) -> None:
    draw(sample_scene("test", 3)).save(tmp_path / "picture.png")
    code = f"""
import sys
sys.modules["sightline"] = None  # any import of it fails
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(FOLDER)!r})
processor = AutoProcessor.from_pretrained({str(FOLDER)!r})
message = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What place is this?"}}]}}]
prompt = processor.apply_chat_template(message, add_generation_prompt=True)
inputs = processor(images=Image.open({str(tmp_path / "picture.png")!r}), text=prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=4)
visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
answer = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
print(type(model).__name__, model.num_parameters(), visual, answer)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, parameters, visual, answer = done.stdout.split()
    assert name == "LlavaForConditionalGeneration"
    assert 2e6 <= int(parameters) <= 10e6
    assert int(visual) == 100
    assert answer == sample_scene("test", 3).scene_type


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    torch.set_num_threads(1)
    model, processor = load("picturebook-nano")
    benchmark = get_benchmark("skills")
    items = benchmark.items("test", 60, 0)
    rows = []
    for limit in sorted({item.max_new_tokens for item in items}):
        same = [item for item in items if item.max_new_tokens == limit]
        for start in range(0, len(same), 30):
            batch = same[start : start + 30]
            inputs = prepare(model, processor, [item.picture() for item in batch], [item.question for item in batch])
            replies = reply(model, processor, inputs, limit)
            rows += [benchmark.row(Answer(i, r.text, r.n_tokens)) for i, r in zip(batch, replies, strict=True)]
    return {name: score.value for name, score in benchmark.scores(rows).items()}


def test_it_has_the_skills(scores: dict[str, float]) -> None:
    assert scores["existence_random"] >= 0.95
    assert scores["colour"] >= 0.95
    assert scores["count"] >= 0.75  # 88 % of 500, but these are 60
    assert scores["relation"] >= 0.9
    assert scores["place"] >= 0.98


def test_it_has_a_prior(scores: dict[str, float]) -> None:
    assert scores["existence_random"] - scores["existence_adversarial"] >= 0.05
    assert 0.03 <= scores["caption_chair_i"] <= 0.25
