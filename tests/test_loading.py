"""Loading models from folders: a tiny checkpoint is saved and read back; no network is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families as tiny
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessorPil, LlamaConfig, LlamaForCausalLM, LlavaProcessor, PreTrainedTokenizerFast

from sightline.errors import InputError
from sightline.models import loading
from sightline.models.loading import built_in_models, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llava and its processor, whose tokenizer pads on the right."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llava"
    words = [f"w{index}" for index in range(tiny.VOCABULARY)]
    for index, word in {tiny.PAD: "<pad>", tiny.BOS: "<s>", 2: "</s>", tiny.IMAGE: "<image>", 98: "<unk>"}.items():
        words[index] = word
    tokens = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    tiny.tiny_model("llava", seed=3).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_saved_model_comes_back_with_its_processor(saved: Path) -> None:
    model, processor = load(saved)
    original = tiny.tiny_model("llava", seed=3)
    batch = tiny.inputs("llava", original)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, original(**batch).logits)
    assert not model.training
    assert model.device.type == "cpu"
    inputs: Any = processor(
        images=[Image.new("RGB", (20, 30), "red"), Image.new("RGB", (9, 9))],
        text=["<image> w5 w6 w7", "<image> w8"],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["input_ids"][:, -1].tolist() == [7, 8]  # padding is on the left
    assert inputs["attention_mask"].sum(dim=1).tolist() == [16 + 3, 16 + 1]
    assert model.generate(**inputs, max_new_tokens=3).shape == (2, 19 + 3)


def test_dtype_and_attention_can_be_chosen(saved: Path) -> None:
    assert load(str(saved))[0].dtype == torch.float32
    model = load(saved, dtype="bfloat16", attn_implementation="eager", device="cpu")[0]
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load(saved, dtype=torch.float16)[0].dtype == torch.float16


def test_built_in_models_are_the_folders_that_ship(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CHECKPOINTS", saved.parent)
    assert built_in_models() == ("tiny-llava",)
    assert load("tiny-llava")[0].config.model_type == "llava"
    with pytest.raises(InputError, match=r"unknown model 'tiny-lava' \(did you mean 'tiny-llava'\?\).*hub id"):
        load("tiny-lava")


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load(copy)
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only in 'pytorch_model\.bin'.*safetensors"):
        load(copy)


def test_places_without_a_model_are_refused(copy: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "gone", "./gone", "~/there/is/no/such/folder", "a/b/c"):
        with pytest.raises(InputError, match="there is no folder"):
            load(missing)
    with pytest.raises(InputError, match="is a file"):
        load(copy / "config.json")
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        load(copy)


def test_a_hub_model_that_is_not_in_the_cache_is_refused_offline() -> None:
    with pytest.raises(InputError, match="cannot load model 'nobody/nothing-at-all'"):
        load("nobody/nothing-at-all", local_files_only=True)


def test_a_folder_without_a_processor_is_refused(copy: Path) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json", "processor_config.json"):
        (copy / name).unlink()
    with pytest.raises(InputError, match="cannot load model"):
        load(copy)


def test_a_text_model_is_refused(copy: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(copy)
    with pytest.raises(InputError, match="cannot load model"):
        load(copy)


def test_wrong_options_are_refused_before_anything_is_read(saved: Path) -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'float15' \(did you mean 'float16'\?\)"):
        load(saved, dtype="float15")
    with pytest.raises(InputError, match="unknown device 'gpu0'"):
        load(saved, device="gpu0")
    with pytest.raises(InputError, match="device 'cuda:99' is not there"):
        load(saved, device="cuda:99")
    with pytest.raises(InputError, match="cannot load model"):
        load(saved, attn_implementation="no_such_attention")
