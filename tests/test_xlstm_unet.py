"""xLSTM-UNet: where the ViL blocks sit, counts by hand, the loss and the windows against slow ones, official keys."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import MacCounter, count_parameters, create_encoder
from sightline.encoders.xlstm_unet import (
    ResidualBlock,
    ViLOnMap,
    XLSTMUNet,
    XLSTMUNet3d,
    segmentation_loss,
    sliding_window_segment,
)
from sightline.errors import InputError

NANO = [name for made in (XLSTMUNet, XLSTMUNet3d) for name in made.configs if name.endswith("_nano")]


def make(name: str, **settings: Any) -> XLSTMUNet:
    torch.manual_seed(0)
    made = create_encoder(name, **{"in_chans": 2, **settings})
    assert isinstance(made, XLSTMUNet)
    return made


def meta(name: str, **settings: Any) -> XLSTMUNet:
    with torch.device("meta"):
        return make(name, **settings)


# --- Where things are ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Seven stages from 320 pixels: after 80 x 80, 20 x 20 and 5 x 5, the last two with channels for tokens.
        ("xlstm_unet_enc_2d", ["-", "conv", 128, "-", (400,), "-", (25,)]),
        # 48 x 160 x 224 comes down to 12 x 20 x 28, 6 x 10 x 14 and 6 x 5 x 7.
        ("xlstm_unet_enc_3d", ["conv", "conv", "conv", 256, 320, (210,)]),
        ("xlstm_unet_enc_2d_nano", ["-", "conv", "-", (16,)]),
        ("xlstm_unet_bot_2d", ["-"] * 7),
        ("unet_3d", ["-"] * 6),
    ],
)
def test_what_follows_each_stage(name: str, expected: list[Any]) -> None:
    made = meta(name)
    found: list[Any] = []
    for layer in made.encoder.xlstm_layers:
        if isinstance(layer, ViLOnMap):
            width = layer.vil.layer.width
            found.append((width,) if layer.channel_tokens else width)
            assert layer.vil.layer.num_heads == len(layer.vil.layer.q_proj.weight[0]) == (2 if width % 4 else 4)
            assert not layer.vil.layer.reverse
        else:
            found.append("conv" if isinstance(layer, ResidualBlock) else "-")
    assert found == expected
    assert isinstance(made.xlstm, ViLOnMap) == ("bot" in name)
    assert made.fixed == any(isinstance(entry, tuple) for entry in expected)


def vil_parameters(width: int) -> int:
    heads = 2 if width % 4 else 4
    inner = 2 * width
    gates = 2 * (3 * inner + 1) * heads
    return width + width * 2 * inner + 3 * inner * heads + inner * (4 + 1) + gates + inner + inner + inner * width


def block_parameters(dims: int, wide_in: int, wide_out: int, *, plain: bool = False) -> int:
    convolutions = (3**dims * wide_in + 1) * wide_out + (3**dims * wide_out + 1) * wide_out
    return convolutions + 4 * wide_out + (0 if plain else (wide_in + 1) * wide_out)


@pytest.mark.parametrize("name", [name for made in (XLSTMUNet, XLSTMUNet3d) for name in made.configs])
def test_parameters_by_the_rules_of_the_plan(name: str) -> None:
    made = meta(name, num_classes=14, in_chans=1)
    settings, dims = type(made).configs[name], made.dims
    widths = settings["widths"]
    stages = len(widths)
    total = block_parameters(dims, 1, widths[0]) + block_parameters(dims, widths[0], widths[0], plain=True)
    for stage, width in enumerate(widths):
        total += block_parameters(dims, widths[max(0, stage - 1)], width)
        total += block_parameters(dims, width, width, plain=True) * (stage < math.ceil(stages / 2))
    for stage in range(1, stages):
        below, here = widths[-stage], widths[-stage - 1]
        joined = here if dims == 2 and stage == stages - 1 else 2 * here
        total += (below + 1) * here + block_parameters(dims, joined, here) + (here + 1) * 14
        total += block_parameters(dims, here, here, plain=True) * (stage <= math.ceil(stages / 2))
    if "bot" in name:
        total += vil_parameters(widths[-1])
    enc = {
        "xlstm_unet_enc_2d": [128, 400, 25],
        "xlstm_unet_enc_3d": [256, 320, 210],
        "xlstm_unet_enc_2d_nano": [16],
        "xlstm_unet_enc_3d_nano": [32],
    }
    total += sum(map(vil_parameters, enc.get(name, [])))
    if name in enc:
        plain = widths[1:2] if dims == 2 else widths[:3]
        total += sum(block_parameters(dims, width, width, plain=True) for width in plain)
    assert count_parameters(made) == total
    if name.endswith("nano"):
        assert 50_000 < total < 300_000


def test_multiply_adds_of_the_bottleneck() -> None:
    counts = []
    for name in ("xlstm_unet_bot_2d_nano", "unet_2d_nano"):
        made = meta(name)
        with MacCounter(made) as counter, torch.no_grad():
            made(torch.empty(1, 2, 32, 32, device="meta"))
        counts.append(counter.macs)
    # 16 tokens of 48 in one chunk: projections, convolution, blocks of 4, gates, pairs, state, projection.
    assert counts[0] - counts[1] == 16 * (
        48 * 192 + 96 * 4 + 3 * 96 * 4 + 2 * 2 * 96 * 4 + 2 * 16 * 96 + 2 * 24 * 96 + 96 * 48
    )


# --- What it computes ---


def slow_block(block: ResidualBlock, x: Tensor, stride: int | tuple[int, ...] = 1) -> Tensor:
    conv = F.conv2d if x.ndim == 4 else F.conv3d

    def normed(values: Tensor, norm: Any) -> Tensor:
        axes = tuple(range(2, values.ndim))
        values = values - values.mean(axes, keepdim=True)
        values = values / (values.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        return values * norm.weight.view(-1, *[1] * len(axes)) + norm.bias.view(-1, *[1] * len(axes))

    one, two = block.conv1, block.conv2
    y = normed(conv(x, one.weight, one.bias, stride, 1), block.norm1)
    y = torch.where(y > 0, y, 0.01 * y)
    y = normed(conv(y, two.weight, two.bias, 1, 1), block.norm2)
    y = y + (x if block.conv3 is None else conv(x, block.conv3.weight, block.conv3.bias, stride))
    return torch.where(y > 0, y, 0.01 * y)


def enlarged(x: Tensor, factor: tuple[int, ...]) -> Tensor:
    for axis, times in enumerate(factor):
        x = x.repeat_interleave(times, dim=axis + 2)
    return x


@pytest.mark.parametrize("name", NANO)
def test_the_network_step_by_step(name: str) -> None:
    smaller = dict(slices=8, image_size=16) if "3d" in name else {}
    made = make(name, num_classes=3, **smaller).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    dims = made.dims
    pixels = torch.randn(2, 2, *made.sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = pixels
    for block in made.encoder.stem:
        x = slow_block(block, x)
    seen, skips = [x], []
    for stage, (blocks, between) in enumerate(zip(made.encoder.stages, made.encoder.xlstm_layers, strict=True)):
        for index, block in enumerate(blocks):
            x = slow_block(block, x, 2 if stage and not index else 1)
        if isinstance(between, ResidualBlock):
            x = slow_block(between, x)
        elif isinstance(between, ViLOnMap):
            # Here, in both dimensions, the channels are the tokens.
            x = between.vil(x.flatten(2)).view_as(x)
        skips.append(x)
    if isinstance(made.xlstm, ViLOnMap):
        x = skips[-1] = made.xlstm.vil(x.flatten(2).mT).mT.reshape(x.shape)
    seen += skips
    features = made(pixels, hidden_states=True)
    torch.testing.assert_close(features.tokens, x.flatten(2).mT)
    assert features.grid == tuple(side // 8 for side in made.sizes)
    torch.testing.assert_close(features.pooled, x.flatten(2).mean(2))
    for state, expected in zip(features.hidden_states, seen, strict=True):
        torch.testing.assert_close(state, expected.flatten(2).mT)
    logits = made.segment(pixels)
    assert len(logits) == len(features.maps) == 3
    for level, (widen, blocks, head) in enumerate(
        zip(made.decoder.upsample_layers, made.decoder.stages, made.decoder.seg_layers, strict=True)
    ):
        x = widen.conv(enlarged(x, (2,) * dims))
        if dims == 3 or level < 2:
            x = torch.cat([x, skips[-level - 2]], dim=1)
        for block in blocks:
            x = slow_block(block, x)
        torch.testing.assert_close(features.maps[2 - level], x)
        torch.testing.assert_close(logits[2 - level], head(x))
    assert logits[0].shape == (2, 3, *made.sizes)
    made.deep_supervision = False
    assert len(made.segment(pixels)) == 1


def test_strides_of_each_axis() -> None:
    made = make(
        "xlstm_unet_bot_3d_nano", slices=6, image_size=(16, 24), strides=(1, (1, 2, 2), 2, (1, 2, 2)), num_classes=2
    )
    assert made.steps == (2, 8, 8)
    features = made(torch.zeros(1, 2, 6, 16, 24))
    assert features.grid == (3, 2, 3)
    assert [tuple(part.shape[2:]) for part in features.maps] == [(6, 16, 24), (6, 8, 12), (3, 4, 6)]


def test_the_blocks_read_in_full_precision() -> None:
    made = make("xlstm_unet_bot_2d_nano")
    x = torch.randn(1, 48, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made.xlstm(x.bfloat16())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, made.xlstm(x.bfloat16().float()))


def test_only_the_vil_block_sees_the_whole_picture() -> None:
    # A patch in the first corner changes the last one through the bottleneck; without it, no further than convolutions
    # reach. Instance norm sees everything, and is held still here.
    torch.manual_seed(0)
    size = 128
    for vil in (True, False):
        made = make("xlstm_unet_bot_2d_nano", image_size=size, vil=vil).double()
        for part in made.modules():
            if isinstance(part, nn.InstanceNorm2d):
                part.forward = lambda input: input  # type: ignore[method-assign]
        pixels = torch.randn(1, 2, size, size, dtype=torch.float64)
        other = pixels.clone()
        other[:, :, :8, :8] += 1
        change = (made(other).tokens - made(pixels).tokens).abs().amax(-1)[0]
        assert change[0] > 1e-6
        assert (change[-1] > 1e-12) == vil


# --- The loss and the windows ---


def slow_loss(scales: list[Tensor], target: Tensor, *, batch: bool) -> float:
    weights = [1 / 2**level for level in range(len(scales))]
    if len(scales) > 1:
        weights[-1] = 0.0
    total = 0.0
    for weight, logits in zip(weights, scales, strict=True):
        step = target.shape[1] // logits.shape[2]
        # nearest-exact takes the position at the middle of the cell.
        at = (slice(step // 2, None, step),) * (target.ndim - 1)
        labels = target[(slice(None), *at)]
        log = logits.log_softmax(1)
        entropy = -log.gather(1, labels[:, None]).mean()
        chance, truth = log.exp(), F.one_hot(labels, logits.shape[1]).movedim(-1, 1).double()
        axes = tuple(range(2, logits.ndim))
        both, sums = (chance * truth).sum(axes), (chance + truth).sum(axes)
        if batch:
            both, sums = both.sum(0), sums.sum(0)
        dice = ((2 * both + 1e-5) / (sums + 1e-5))[..., 1:]
        total += weight / sum(weights) * float(entropy + (1 - dice).mean())
    return total


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_loss_against_a_slow_one(dims: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    sides = (8, 8, 8)[:dims]
    scales = [
        torch.randn(2, 4, *(side // 2**level for side in sides), generator=generator, dtype=torch.float64)
        for level in range(levels)
    ]
    target = torch.randint(0, 4, (2, *sides), generator=generator)
    expected = slow_loss(scales, target, batch=dims == 2)
    assert float(segmentation_loss(scales, target)) == pytest.approx(expected, abs=1e-9)
    assert float(segmentation_loss(scales, target[:, None])) == pytest.approx(expected, abs=1e-9)
    other = slow_loss(scales, target, batch=dims == 3)
    assert float(segmentation_loss(scales, target, batch_dice=dims == 3)) == pytest.approx(other, abs=1e-9)
    if levels == 1:
        assert float(segmentation_loss(scales[0], target)) == pytest.approx(expected, abs=1e-9)


def test_a_step_of_training_reaches_everything_that_weighs() -> None:
    made = make("xlstm_unet_bot_2d_nano", num_classes=3)
    pixels = torch.randn(2, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    target = (pixels[:, 0] > 0).long() + (pixels[:, 1] > 1).long()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = segmentation_loss(made.segment(pixels), target)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    without = [key for key, parameter in made.named_parameters() if parameter.grad is None]
    # The coarsest scale weighs nothing.
    assert without == ["decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"]


def test_windows_that_overlap() -> None:
    made = make("xlstm_unet_enc_2d_nano", num_classes=3).eval()
    pixels = torch.randn(1, 2, 32, 40, generator=torch.Generator().manual_seed(1))
    out = sliding_window_segment(made, pixels, 32, overlap=0.75)
    assert out.shape == (1, 3, 32, 40)
    assert not out.requires_grad
    left, right = (made.segment(pixels[..., at : at + 32])[0].detach() for at in (0, 8))
    torch.testing.assert_close(out[..., :8], left[..., :8])
    torch.testing.assert_close(out[..., 32:], right[..., 24:])
    # Between, a mixture in the proportion of two Gaussians of deviation 32 / 8 around the windows' middles, held from
    # below at a thousandth.
    bell = torch.exp(-((torch.arange(32.0) - 15.5) ** 2) / (2 * 4.0**2))
    weight = torch.outer(bell, bell).clamp(min=1e-3)
    one, two = weight[:, 8:], weight[:, :24]
    expected = (left[..., 8:] * one + right[..., :24] * two) / (one + two)
    torch.testing.assert_close(out[..., 8:32], expected, rtol=1e-4, atol=1e-4)
    whole = sliding_window_segment(made, pixels[..., :32], (32, 32))
    torch.testing.assert_close(whole, made.segment(pixels[..., :32])[0].detach())


# --- Sizes and other input ---


def test_sizes() -> None:
    bot = meta("xlstm_unet_bot_2d_nano")
    for size in ((224, 224), (384, 128), (16, 8)):
        assert bot(torch.empty(1, 2, *size, device="meta")).grid == (size[0] // 8, size[1] // 8)
    with pytest.raises(InputError, match="xlstm_unet_bot_2d_nano takes sides that are multiples of 8 x 8, not 20 x 32"):
        bot(torch.empty(1, 2, 20, 32, device="meta"))
    with pytest.raises(InputError, match="two or more positions in its deepest map, which 8 x 8 does not leave"):
        bot(torch.empty(1, 2, 8, 8, device="meta"))
    enc = meta("xlstm_unet_enc_2d_nano")
    with pytest.raises(
        InputError, match="tokens are channels, so that it takes one size only, 32 x 32 and not 64 x 32"
    ):
        enc(torch.empty(1, 2, 64, 32, device="meta"))
    assert meta("xlstm_unet_enc_2d_nano", image_size=(64, 32)).fixed
    # As many positions as channels count as channels for tokens.
    assert meta("xlstm_unet_enc_2d_nano", widths=(8, 16, 32, 16)).fixed
    # With more positions than channels everywhere, Enc takes other sizes as well.
    free = meta("xlstm_unet_enc_2d_nano", image_size=128)
    assert not free.fixed
    assert free(torch.empty(1, 2, 64, 256, device="meta")).grid == (8, 32)
    volume = meta("xlstm_unet_bot_3d_nano")
    assert volume(torch.empty(1, 2, 8, 32, 16, device="meta")).grid == (1, 4, 2)
    with pytest.raises(InputError, match="multiples of 8 x 8 x 8, not 12 x 32 x 32"):
        volume(torch.empty(1, 2, 12, 32, 32, device="meta"))
    with pytest.raises(InputError, match="takes volumes"):
        volume(torch.empty(1, 2, 32, 32, device="meta"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(variant="both"), "unknown variant 'both'"),
        (dict(widths=(8, 16)), "of the same 2 or more stages"),
        (dict(variant="enc", widths=(8, 16), strides=(1, 2)), "of the same 3 or more stages"),
        (dict(strides=(1, 2, 2, (2, 2, 2))), "strides numbers or 2 numbers each"),
        (dict(strides=(2, 2, 2, 2)), "1 or more and the first stride 1"),
        (dict(kernel_size=2), "kernel_size must be odd and blocks 1 or more, not 2 and 2"),
        (dict(blocks=0), "not 3 and 0"),
        (dict(slices=4), "slices must be 1 or more for volumes, and None for pictures, not 4"),
        (dict(image_size=36), "multiples of 8 x 8, not 36 x 36"),
    ],
)
def test_plans_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        meta("xlstm_unet_bot_2d_nano", **settings)


def test_what_there_is_no_answer_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="slices must be 1 or more for volumes"):
        XLSTMUNet3d()
    made = make("xlstm_unet_bot_2d_nano")
    pixels = torch.zeros(1, 2, 32, 32)
    with pytest.raises(InputError, match="has no segmentation heads; create it with num_classes"):
        made.segment(pixels)
    made = make("xlstm_unet_bot_2d_nano", num_classes=2)
    with pytest.raises(InputError, match="segments and has no logits for the whole"):
        made.logits(pixels)
    logits = made.segment(pixels)
    with pytest.raises(
        InputError, match=r"the target must be \[1, 32, 32\], as the finest logits, not \[1, 1, 16, 16\]"
    ):
        segmentation_loss(logits, torch.zeros(1, 16, 16))
    with pytest.raises(InputError, match="must hold classes from 0 to 1, not 0 to 2"):
        segmentation_loss(logits, torch.arange(3).repeat(400)[: 32 * 32].view(1, 32, 32))
    with pytest.raises(InputError, match="the background and one class or more, not 1 in all"):
        segmentation_loss(logits[0][:, :1], torch.zeros(1, 32, 32))
    with pytest.raises(InputError, match="roi_size must be a side or 2 sides"):
        sliding_window_segment(made, pixels, (32, 32, 32))
    imported = importlib.import_module

    def without_monai(name: str) -> Any:
        if name.startswith("monai"):
            raise ModuleNotFoundError(name)
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without_monai)
    with pytest.raises(InputError, match=re.escape("pip install 'sightline[medical]'")):
        segmentation_loss(logits, torch.zeros(1, 32, 32))


# --- The official code's weights ---


def official_state(made: XLSTMUNet) -> dict[str, Tensor]:
    """The weights under the official names, with all that its modules hold twice or do not use."""
    state: dict[str, Tensor] = {}
    for key, value in made.state_dict().items():
        key = re.sub(r"\.vil\.layer\.(igate|fgate|outnorm)", r".vil.layer.mlstm_cell.\1", key)
        key = key.replace(".vil.layer.conv.", ".vil.layer.conv1d.conv.")
        owner, _, _ = key.partition(".conv") if ".conv" in key else key.partition(".norm")
        block = made.get_submodule(owner) if "vil" not in key and re.search(r"\.(conv|norm)[12]\.", key) else None
        if isinstance(block, ResidualBlock) and block.conv3 is None:
            plain = re.sub(r"\.conv([12])\.", r".conv\1.conv.", key)
            plain = re.sub(r"\.norm([12])\.", r".conv\1.norm.", plain)
            twice = plain.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
            state[plain], state[twice] = value.clone(), value.clone()
            continue
        state[key] = value.clone()
    state |= {f"decoder.{key}": value.clone() for key, value in state.items() if key.startswith("encoder.")}
    for key in [key for key in state if key.endswith(".vil.norm.weight")]:
        wrapper = key.removesuffix(".vil.norm.weight")
        state[f"{wrapper}.norm.weight"], state[f"{wrapper}.norm.bias"] = state[key].clone(), state[key].clone()
    return state


@pytest.mark.parametrize("name", NANO)
def test_official_weights(tmp_path: Path, name: str) -> None:
    source = make(name, num_classes=3)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = official_state(source)
    known = [
        "encoder.stem.0.conv3.weight",
        "encoder.stem.1.conv1.conv.weight",
        "encoder.stem.1.conv2.all_modules.1.bias",
    ]
    known += ["encoder.stages.3.0.norm2.weight", "decoder.encoder.stem.0.conv1.bias", "decoder.stages.2.0.conv3.weight"]
    known += ["decoder.upsample_layers.0.conv.weight", "decoder.seg_layers.2.bias"]
    if "bot" in name:
        known += ["xlstm.norm.weight", "xlstm.vil.layer.mlstm_cell.igate.weight", "xlstm.vil.layer.conv1d.conv.bias"]
    if "enc" in name:
        known += ["encoder.xlstm_layers.3.vil.norm.weight", "encoder.xlstm_layers.1.conv1.conv.weight"]
    assert set(known) <= state.keys()
    path = tmp_path / "official.safetensors"
    save_file(state, path)
    made = make(name, num_classes=3)
    made.load_official(path)
    for key, value in made.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    make(name).load_official(path)
    del state["encoder.stages.3.0.norm2.weight"]
    save_file({**state, "other": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"missing: encoder\.stages\.3\.0\.norm2\.weight; not expected: other"):
        made.load_official(path)
