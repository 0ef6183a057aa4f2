"""What every encoder owes, on the small configurations of all papers."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import sightline as sl
from sightline.encoders.encoder import Encoder, count_macs, count_parameters, encoders, register_encoder

SMALL = sorted(name for name in encoders() if name.endswith(("_nano", "_pico")) and name != "msvmamba_nano")
OF_PICTURES = [name for name in SMALL if encoders()[name].inputs == "pictures"]
CLASSIFIERS = [name for name in SMALL if not name.startswith(("xlstm_unet", "unet", "convs5", "conv_lstm"))]
"""The others segment or predict frames, and have no classes."""
SIZE_BOUND = {"xlstm_unet_enc_2d_nano"}
"""Take the size only that they were made for."""


def made(name: str, num_classes: int = 3) -> Encoder:
    torch.manual_seed(5)
    return sl.create_encoder(name, num_classes=num_classes).eval()


def inputs_for(encoder: Encoder, batch: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    shape = encoder.example_shape(batch)
    return torch.rand((*shape[:-2], *size) if size else shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SMALL)
def test_features_have_the_shapes_they_say(name: str) -> None:
    encoder = made(name)
    with torch.no_grad():
        features = encoder(inputs_for(encoder))
    batch, count, width = features.tokens.shape
    assert (batch, width) == (2, encoder.width)
    assert count == torch.tensor(features.grid).prod()
    assert features.tokens.isfinite().all()
    assert features.hidden_states == ()
    for values in features.maps:
        assert len(values) == 2
        assert values.ndim >= 4
    sizes = [values.shape[-1] for values in features.maps]
    assert sizes == sorted(sizes, reverse=True), "maps come finest first"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_come_from_the_head(name: str) -> None:
    encoder = made(name)
    with torch.no_grad():
        assert encoder.logits(inputs_for(encoder)).shape == (2, 3)
    with pytest.raises(sl.InputError, match="no head"):
        made(name, num_classes=0).logits(inputs_for(encoder))


@pytest.mark.parametrize("name", SMALL)
def test_a_picture_is_encoded_the_same_alone_and_in_a_batch(name: str) -> None:
    encoder = made(name)
    pixels = inputs_for(encoder, batch=3)
    with torch.no_grad():
        together, alone = encoder(pixels).tokens, encoder(pixels[1:2]).tokens
    torch.testing.assert_close(together[1:2], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_gradients_reach_every_parameter_that_learns(name: str) -> None:
    encoder = made(name).train()
    encoder.logits(inputs_for(encoder, batch=4)).square().sum().backward()
    learning = [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert learning
    untouched = [key for key in learning if encoder.get_parameter(key).grad is None]
    assert not [key for key in untouched if not key.startswith(UNTOUCHED.get(name, ("-",)))], untouched


UNTOUCHED: dict[str, tuple[str, ...]] = {
    "lgvit_nano": ("exit_heads.",),  # the exits have logits of their own
}
"""Parameters that the logits do not depend on."""


@pytest.mark.parametrize("name", [name for name in OF_PICTURES if name not in SIZE_BOUND])
def test_other_sizes_and_grids_that_are_not_square(name: str) -> None:
    encoder = made(name)
    step = encoder.stride
    height, width = encoder.image_size
    with torch.no_grad():
        larger = encoder(inputs_for(encoder, 1, (height + step, width + 3 * step)))
    assert larger.tokens.shape[1] == torch.tensor(larger.grid).prod()
    refusal = ""
    try:
        with torch.no_grad():
            odd = encoder(inputs_for(encoder, 1, (height + 1, width)))
        assert odd.tokens.shape[1] == torch.tensor(odd.grid).prod()  # it rounds up
    except sl.InputError as error:
        refusal = str(error)
    assert not refusal or ("multiple" in refusal and f"{height + 1}" in refusal)


@pytest.mark.parametrize("name", SMALL)
def test_bad_pixels_are_named(name: str) -> None:
    encoder = made(name)
    pixels = inputs_for(encoder)
    with pytest.raises(sl.InputError, match="not a tensor of shape"):
        encoder(pixels[0])
    bad = pixels.clone()
    bad.view(-1)[7] = float("nan")
    with pytest.raises(sl.InputError, match="NaN"):
        encoder(bad)
    if encoder.inputs in ("pictures", "clips"):
        axis = 1 if encoder.inputs == "pictures" else 2
        with pytest.raises(sl.InputError, match="in_chans"):
            encoder(torch.cat([pixels, pixels], dim=axis))


@pytest.mark.parametrize("name", OF_PICTURES)
def test_settings_make_it_again(name: str) -> None:
    encoder = made(name)
    again = type(encoder)(**encoder.settings).eval()
    again.load_state_dict(encoder.state_dict())
    pixels = inputs_for(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(pixels).tokens, again(pixels).tokens)


@pytest.mark.parametrize("name", OF_PICTURES)
def test_a_stock_llava_is_built_on_it_saved_and_loaded(name: str, tmp_path) -> None:
    torch.manual_seed(3)
    vision = sl.EncoderVisionConfig(name)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=63,
        image_seq_length=vision.num_tokens,
    )
    model = LlavaForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    assert isinstance(tower, sl.EncoderVisionModel)
    pixels = inputs_for(tower.encoder, batch=1)
    ids = torch.tensor([[1, *[63] * vision.num_tokens, 5, 6]])
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=pixels)
        features = tower.encoder(pixels).tokens
        torch.testing.assert_close(tower(pixels).last_hidden_state, features)
    # The picture is read: another one changes the logits.
    with torch.no_grad():
        other = model(input_ids=ids, pixel_values=pixels.flip(-1) * 0.5)
    assert not torch.equal(before.logits, other.logits)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        after = again(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(after.logits, before.logits)
    with sl.attach(model, sl.VHR()), torch.no_grad():
        model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2, do_sample=False)


def test_a_tower_needs_an_encoder_of_pictures() -> None:
    with pytest.raises(sl.InputError, match="a vision tower takes pictures"):
        sl.EncoderVisionConfig("convs5_nano")
    with pytest.raises(sl.InputError, match="did you mean 'vit_nano'"):
        sl.EncoderVisionConfig("vit_nanno")


def test_names_are_found_by_pattern_and_unknown_ones_get_the_nearest() -> None:
    assert {"vit_tiny", "vim_tiny", "vig_tiny", "vil_tiny"} <= set(sl.list_encoders("vi*"))
    assert "litv2_small" not in sl.list_encoders("vi*")
    with pytest.raises(sl.InputError, match="did you mean 'vig_tiny'"):
        sl.create_encoder("vig_tinny")
    with pytest.raises(sl.InputError, match=r"unknown argument of vit_tiny 'dept'.*did you mean 'depth'"):
        sl.create_encoder("vit_tiny", dept=3)


@pytest.mark.parametrize("size", [0, -4, 20_000, (32, 32, 32), (32.5, 32)])
def test_sizes_that_are_no_sizes(size: object) -> None:
    with pytest.raises(sl.InputError, match="image_size must be a side or"):
        sl.create_encoder("vit_nano", image_size=size)  # type: ignore[arg-type]


def test_heads_and_channels_that_cannot_be() -> None:
    with pytest.raises(sl.InputError, match="in_chans must be 1 or more"):
        sl.create_encoder("vit_nano", in_chans=0)
    with pytest.raises(sl.InputError, match="cannot be shared by 5 heads"):
        sl.create_encoder("vit_nano", num_heads=5)


def test_the_plain_vit_has_the_published_numbers() -> None:
    """DeiT-Ti, -S and -B: 5.7, 22.1 and 86.6 M parameters; 1.25, 4.6 and 17.6 G multiply-adds."""
    for name, parameters, macs in (("tiny", 5.717, 1.254), ("small", 22.05, 4.599), ("base", 86.57, 17.56)):
        with torch.device("meta"):
            encoder = sl.create_encoder(f"vit_{name}", num_classes=1000)
        assert count_parameters(encoder) / 1e6 == pytest.approx(parameters, rel=1e-3)
        assert count_macs(f"vit_{name}") / 1e9 == pytest.approx(macs, rel=1e-3)


def test_macs_of_a_linear_map_and_a_convolution_by_hand() -> None:
    """vit_nano at 8 x 8 pixels, 2 x 2 patches: patches 4*48*64; a block on 5 tokens: qkv, out, MLP and 2*5*5*64."""
    block = 5 * 64 * (3 * 64) + 5 * 64 * 64 + 2 * 5 * 64 * 256 + 2 * 25 * 64
    assert count_macs("vit_nano", image_size=8, num_classes=10) == 4 * 48 * 64 + 4 * block + 64 * 10


def test_hidden_states_begin_with_the_embeddings_and_end_before_the_norm() -> None:
    encoder = made("vit_nano")
    pixels = inputs_for(encoder)
    with torch.no_grad():
        features = encoder(pixels, hidden_states=True)
        x, _ = encoder.embed(pixels)
    assert len(features.hidden_states) == encoder.depth + 1
    torch.testing.assert_close(features.hidden_states[0], x[:, 1:])
    torch.testing.assert_close(encoder.norm(features.hidden_states[-1]), features.tokens)


def test_a_name_is_given_once() -> None:
    class Twin(Encoder):
        configs: ClassVar[dict[str, dict[str, object]]] = {"vit_nano": {}}

    with pytest.raises(AssertionError, match="two encoders"):
        register_encoder(Twin)


def test_copies_are_independent() -> None:
    encoder = made("vit_nano")
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.pos_embed.add_(1)
    assert not torch.equal(other.pos_embed, encoder.pos_embed)
