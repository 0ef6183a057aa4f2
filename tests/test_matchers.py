"""Checkpoints that say what in a picture matches a text: the maps by finite differences, and what is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import sightline as sl
from sightline.errors import InputError
from sightline.grounding import matchers
from sightline.grounding.agla import Agla, matching_pixels
from sightline.grounding.matchers import BlipMatching, ImageTextModel, clean, gradcam
from sightline.methods import attach
from sightline.models.answering import prepare

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "is", "there", "a", "boat", "in", "the", "image", "?", "house"]
TEXT = "Is there a boat in the image?"
SMALL: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2)
VISION: dict[str, Any] = dict(image_size=12, patch_size=4, num_hidden_layers=2, **SMALL)


def save(folder: Path, model_class: Any, config: Any, seed: int) -> str:
    """A model with large random weights, a tokenizer of words, and the normalisation of its pictures. The seed is one
    with which `pictures()` and `QUESTIONS` fit a little (similarity above 0): else hardly a pixel would go."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = dict(
        vocab_size=len(WORDS) + 2,
        encoder_hidden_size=16,
        max_position_embeddings=40,
        num_hidden_layers=4,
        bos_token_id=13,
        sep_token_id=3,
        pad_token_id=0,
        eos_token_id=3,
        **SMALL,
    )
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=8)
    return save(tmp_path_factory.mktemp("blip"), transformers.BlipForImageTextRetrieval, config, 3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    text = dict(
        vocab_size=len(WORDS),
        num_hidden_layers=2,
        max_position_embeddings=20,
        eos_token_id=3,
        bos_token_id=2,
        pad_token_id=0,
        **SMALL,
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return save(tmp_path_factory.mktemp("clip"), transformers.CLIPModel, config, 7)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    matchers._loaded.cache_clear()


def picture(height: int = 12, width: int = 12, seed: int = 0) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def normalised(picture: Tensor) -> Tensor:
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    return ((picture - mean) / std)[None]


# --- GradCAM ---


def test_gradcam_of_one_head_of_cross_attention_in_closed_form() -> None:
    """With score = w . (P V), the derivative after P is V w: what a key's value adds to the score."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(length, 6, generator=generator) for length in (3, 5, 5))
    weight = torch.randn(6, generator=generator)
    probabilities = (query @ key.T).requires_grad_().softmax(dim=-1)[None, None]
    score = (probabilities @ value @ weight).sum()
    expected = [
        [float(p) * max(0.0, float(v @ weight)) for p, v in zip(row, value, strict=True)]
        for row in probabilities[0, 0].detach()
    ]
    torch.testing.assert_close(gradcam(probabilities, score)[0], torch.tensor(expected))
    assert 0 < sum(x == 0 for row in expected for x in row) < 15  # some speak for it, some against


def test_gradcam_cuts_each_heads_gradient_before_it_averages() -> None:
    attention = torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]]).requires_grad_()
    weight = torch.tensor([[[2.0, -4.0]], [[-1.0, 6.0]]])
    assert gradcam(attention, (attention * weight).sum()).tolist() == [[0.25, 1.5]]


def differences(score: Callable[[Tensor | None], tuple[float, Tensor]], step: float = 1e-4) -> Tensor:
    """P * relu(dscore/dP), the mean over heads, the derivatives by central differences. `score` gives the score with
    something added to P, and P."""
    _, attention = score(None)
    gradient = torch.zeros_like(attention)
    for place in range(attention.numel()):
        nudge = torch.zeros_like(attention).flatten()
        nudge[place] = step
        up, down = (score(sign * nudge.reshape(attention.shape))[0] for sign in (1, -1))
        gradient.view(-1)[place] = (up - down) / (2 * step)
    return (attention * gradient.clamp(min=0)).mean(dim=1)[0]


@torch.no_grad()
def nudged(
    module: nn.Module, add: Tensor | None, run: Callable[[], float], outputs: Callable[..., Tensor]
) -> tuple[float, Tensor]:
    """Runs with something added to the attention of a module, whose output `outputs(P, args, kwargs)` gives."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        seen.append(output[1])
        weights = output[1] if add is None else output[1] + add
        return (outputs(weights, args, kwargs), weights)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        return run(), seen[0]
    finally:
        handle.remove()


def split(states: Tensor) -> Tensor:
    """[1, length, 16] -> [1, 2 heads, length, 8]."""
    return states.unflatten(-1, (2, 8)).transpose(1, 2)


def test_blips_map_is_gradcam_of_the_middle_cross_attention_for_match(blip: str) -> None:
    model = transformers.BlipForImageTextRetrieval.from_pretrained(blip, attn_implementation="eager").double().eval()
    pixels = normalised(picture()).double()
    # [ENC], which is the last of the vocabulary, in the place of [CLS]; then the words, and [SEP].
    words = [WORDS.index(word) for word in ("is", "there", "a", "boat", "in", "the", "image", "?")]
    ids, plain = torch.tensor([[len(WORDS) + 1, *words, 3]]), torch.tensor([[2, *words, 3]])
    module: Any = model.text_encoder.encoder.layer[2].crossattention.get_submodule("self")

    def outputs(weights: Tensor, args: Any, kwargs: Any) -> Tensor:
        return (weights @ split(module.value(kwargs["encoder_hidden_states"]))).transpose(1, 2).flatten(2)

    def run() -> float:
        return float(model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).itm_score[0, 1])

    cam = differences(lambda add: nudged(module, add, run, outputs))
    expected = cam[1:9, 1:].mean(dim=0).reshape(3, 3)
    assert (expected > 0).any()
    match = matchers._loaded(blip).match(picture(), TEXT)
    torch.testing.assert_close(match.relevance, expected.float(), atol=1e-6, rtol=1e-3)
    with torch.no_grad():
        cosine = model(input_ids=plain, pixel_values=pixels, use_itm_head=False).itm_score
    assert match.similarity == pytest.approx(float(cosine), abs=1e-5)


def test_clips_map_is_the_weighted_attention_of_the_last_layer(clip: str) -> None:
    model = transformers.CLIPModel.from_pretrained(clip, attn_implementation="eager").double().eval()
    pixels = normalised(picture()).double()
    ids = torch.tensor([[2, 4, 5, 6, 7, 8, 9, 10, 11, 3]])
    ids[0, 1] = 1  # "Is" is not lowered by this tokenizer, and so unknown
    module: Any = model.vision_model.encoder.layers[-1].self_attn

    def outputs(weights: Tensor, args: Any, kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        return module.out_proj((weights @ split(module.v_proj(hidden))).transpose(1, 2).flatten(2))

    def run() -> float:
        found = model(input_ids=ids, pixel_values=pixels)
        return float(found.logits_per_image / model.logit_scale.exp())

    cam = differences(lambda add: nudged(module, add, run, outputs))
    expected = cam[0, 1:].reshape(3, 3)
    assert (expected > 0).any()
    match = matchers._loaded(clip).match(picture(), TEXT)
    torch.testing.assert_close(match.relevance, expected.float(), atol=1e-7, rtol=1e-3)
    assert match.similarity == pytest.approx(nudged(module, None, run, outputs)[0], abs=1e-5)


def test_a_picture_that_is_no_square_is_stretched(clip: str) -> None:
    loaded = matchers._loaded(clip)
    assert loaded.pixels(picture(30, 18)).shape == (1, 3, 12, 12)
    flat = torch.tensor([0.6, 0.5, 0.3])[:, None, None].expand(3, 30, 18)
    torch.testing.assert_close(loaded.pixels(flat)[0, :, 3, 4], torch.tensor([1.0, 0.0, -1.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["blip", "clip"])
def test_long_texts_are_cut_and_empty_ones_say_nothing(name: str, request: pytest.FixtureRequest) -> None:
    loaded = matchers._loaded(request.getfixturevalue(name))
    longest = {"blip": 35, "clip": 20}[name]
    assert loaded.words("boat " * 60)["input_ids"].shape == (1, longest)
    assert loaded.match(picture(), "boat " * 60).relevance.shape == (3, 3)
    if name == "blip":
        assert loaded.match(picture(), "").relevance.tolist() == [[0.0] * 3] * 3


def test_a_vocabulary_without_enc_leaves_cls(blip: str) -> None:
    loaded = matchers._loaded(blip)
    assert isinstance(loaded, BlipMatching)
    ids = torch.tensor([[2, 7, 3]])
    assert loaded._encoding(ids).tolist() == [[14, 7, 3]]
    loaded.model.config.text_config.vocab_size = 13
    assert loaded._encoding(ids).tolist() == [[2, 7, 3]]
    loaded.tokenizer.add_tokens(["[ENC]"])
    assert loaded._encoding(ids).tolist() == [[13, 7, 3]]


def test_texts_are_cleaned_as_blip_cleans_captions() -> None:
    assert clean('  Is "There" (a)  DOG; here?! \n') == "is there a dog here?"
    assert clean("word " * 60) == " ".join(["word"] * 50)


# --- With a model ---


@dataclass(frozen=True)
class Scripted(ImageTextModel):
    """Likes bright pixels when it is asked about a boat, dark ones else; notes what it is asked."""

    asked: list[str]

    def match(self, picture: Tensor, text: str) -> matchers.Match:
        assert torch.is_grad_enabled()
        assert not picture.is_inference()
        self.asked.append(text)
        return matchers.Match(picture.mean(dim=0)[::8, ::8] * (1 if "boat" in text else -1), 0.4)


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return sl.load("picturebook-nano")


def pictures() -> list[Image.Image]:
    return [Image.linear_gradient("L").resize((80, 80)).rotate(90 * turn).convert("RGB") for turn in range(3)]


QUESTIONS = ["Is there a boat in the image?", "What place is this?", "Tell me, is there a boat?"]


def test_a_checkpoint_is_asked_with_the_question_alone(
    nano: tuple[Any, Any], clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = nano
    scripted = Scripted([])
    monkeypatch.setattr(matchers, "_loaded", lambda name: scripted)
    batch = prepare(model, processor, pictures(), QUESTIONS)
    assert (batch["attention_mask"] == 0).any()
    with attach(model, Agla(matcher=clip), processor=processor):
        with torch.inference_mode():
            answered = model(**batch).logits[:, -1]
        model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2)
    assert scripted.asked == QUESTIONS * 2
    # The branch sees what matches: by hand, with two stock models.
    pixels = batch["pixel_values"] * 0.5 + 0.5
    keep = [matching_pixels(*_scripted_map(p, q), 80, 80) for p, q in zip(pixels, QUESTIONS, strict=True)]
    masked = {**batch, "pixel_values": ((pixels * torch.stack(keep)[:, None]) - 0.5) / 0.5}
    with torch.no_grad():
        own, branch = model(**batch).logits[:, -1], model(**masked).logits[:, -1]
    plausible = own.softmax(dim=-1) >= 0.5 * own.softmax(dim=-1).amax(dim=-1, keepdim=True)
    assert torch.equal(plausible, answered.isfinite())
    torch.testing.assert_close(answered[plausible], (own + 2 * branch)[plausible], atol=1e-3, rtol=0)


def _scripted_map(picture: Tensor, text: str) -> tuple[Tensor, float]:
    return picture.mean(dim=0)[::8, ::8] * (1 if "boat" in text else -1), 0.4


@pytest.mark.parametrize("prompt", ["USER: <image>\nIs there a boat? ASSISTANT:", "<image>Is there a boat?"])
def test_the_question_of_a_prompt_that_somebody_wrote_by_hand(
    prompt: str, nano: tuple[Any, Any], clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _questions(nano, clip, monkeypatch, prompt) == ["Is there a boat?"]


def test_a_question_before_the_picture_is_found_too(
    nano: tuple[Any, Any], clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asked,) = _questions(nano, clip, monkeypatch, "USER: Is there a boat? <image> ASSISTANT:")
    assert asked.endswith("Is there a boat?")


def _questions(nano: tuple[Any, Any], clip: str, monkeypatch: pytest.MonkeyPatch, prompt: str) -> list[str]:
    model, processor = nano
    scripted = Scripted([])
    monkeypatch.setattr(matchers, "_loaded", lambda name: scripted)
    inputs = processor(images=pictures()[0], text=prompt, return_tensors="pt")
    with attach(model, Agla(matcher=clip), processor=processor), torch.no_grad():
        model(**inputs)
    return scripted.asked


@pytest.mark.parametrize("name", ["blip", "clip"])
def test_a_checkpoint_works_in_every_mode_and_leaves_nothing_behind(
    name: str, nano: tuple[Any, Any], request: pytest.FixtureRequest
) -> None:
    model, processor = nano
    batch = prepare(model, processor, pictures(), QUESTIONS)
    with attach(model, Agla(matcher=request.getfixturevalue(name), beta=0.0), processor=processor):
        with torch.inference_mode():
            first = model(**batch).logits[:, -1].clone()  # loads it, too
        with torch.no_grad():
            again = model(**batch).logits[:, -1]
            for row, (image, text) in enumerate(zip(pictures(), QUESTIONS, strict=True)):
                alone = model(**prepare(model, processor, [image], [text])).logits[0, -1]
                torch.testing.assert_close(alone, again[row], atol=1e-3, rtol=0)
        options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))
    torch.testing.assert_close(first, again, atol=1e-4, rtol=0)
    with torch.no_grad():
        assert (model(**batch).logits[:, -1] * 3 - again).abs().max() > 1e-2  # the branch saw something else
    loaded = matchers._loaded(request.getfixturevalue(name))
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert not [module for module in loaded.model.modules() if module._forward_hooks]


# --- Errors ---


def test_what_cannot_be_used_is_refused_when_attached(nano: tuple[Any, Any], clip: str, tmp_path: Path) -> None:
    model, processor = nano
    with pytest.raises(InputError, match=r"model's tokenizer is needed: attach.*processor=processor"):
        attach(model, Agla(matcher=clip))
    missing = str(tmp_path / "missing")
    with pytest.raises(InputError, match=f"cannot load the matcher '{missing}'"):
        attach(model, Agla(matcher=missing), processor=processor)
    captioner = transformers.BlipConfig(architectures=["BlipForConditionalGeneration"])
    captioner.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match="must be a checkpoint of BlipForImageTextRetrieval or CLIPModel, not of 'blip'"
    ):
        attach(model, Agla(matcher=str(tmp_path)), processor=processor)


def test_weights_that_could_run_code_are_not_read(nano: tuple[Any, Any], clip: str, tmp_path: Path) -> None:
    model, processor = nano
    for file in Path(clip).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    batch = prepare(model, processor, pictures()[:1], QUESTIONS[:1])
    with attach(model, Agla(matcher=str(tmp_path)), processor=processor):
        with pytest.raises(InputError, match="cannot load the matcher"):
            model(**batch)
