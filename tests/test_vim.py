"""Vim: sizes, the mixers against transformers' Mamba and slow ones, the class token's place, steps, official keys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.layers import resized_positions
from sightline.encoders.vim import Vim
from sightline.errors import InputError
from sightline.mixers.bidirectional_mamba import BidirectionalMamba, Mamba, SelectiveBranch

WIDTH, STATES = 12, 5


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stirred(module: Any, seed: int = 0) -> Any:
    """With weights large enough for every part to matter, in float64."""
    module = module.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(draw(*parameter.shape, seed=seed + number) / 3)
    return module


def small(**options: Any) -> Vim:
    torch.manual_seed(0)
    sizes = dict(image_size=16, embed_dim=WIDTH, depth=3, patch_size=4, d_state=STATES, num_classes=7)
    return stirred(Vim(**sizes | options))


# --- Sizes ---


@pytest.mark.parametrize(("name", "millions"), [("tiny", 7.15), ("small", 25.8), ("base", 97.6)])
def test_parameters_are_as_published(name: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(f"vim_{name}", num_classes=1000)
    assert count_parameters(encoder) == pytest.approx(millions * 1e6, rel=0.001)


def test_multiply_adds_are_those_of_the_layers_and_two_scans() -> None:
    d, e, n, r, tokens = 192, 384, 16, 12, 197
    linear = d * 2 * e + e * d + 2 * (e * (r + 2 * n) + r * e)
    assert count_macs("vim_tiny") == 24 * tokens * (linear + 2 * e * (4 + 4 * n)) + 196 * 768 * d + d * 1000


def test_multiply_adds_grow_with_the_pixels_and_not_with_their_square() -> None:
    short, long = (count_macs("vim_tiny", image_size=size) for size in (224, 1248))
    assert long / short == pytest.approx((1248 / 224) ** 2, rel=0.01)
    assert count_macs("vit_tiny", image_size=1248) / long > 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("vim_tiny", (224, 224), (14, 14)),
        ("vim_tiny", (384, 384), (24, 24)),
        ("vim_small", (224, 160), (14, 10)),
        ("vim_tiny_stride8", (224, 224), (27, 27)),
        ("vim_tiny_stride8", (384, 240), (47, 29)),
    ],
)
def test_other_sizes(name: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    with torch.device("meta"):
        features = create_encoder(name, depth=1)(torch.empty(1, 3, *size))
        made_for_it = create_encoder(name, depth=1, image_size=size)
    assert features.grid == grid
    assert features.tokens.shape[1] == grid[0] * grid[1]
    assert made_for_it.pos_embed.shape[1] == grid[0] * grid[1] + 1


# --- The mixers ---


def as_transformers(ours: Mamba, width: int) -> MambaMixer:
    config = MambaConfig(hidden_size=width, state_size=STATES, num_hidden_layers=1, conv_kernel=4, expand=2)
    theirs = MambaMixer(config, layer_idx=0).double().eval()
    theirs.load_state_dict({key.removeprefix("ahead."): value for key, value in ours.state_dict().items()})
    return theirs


@torch.no_grad()
@pytest.mark.parametrize(("width", "length"), [(12, 9), (33, 1), (16, 2)])
def test_one_direction_is_the_mamba_of_transformers(width: int, length: int) -> None:
    ours = stirred(Mamba(width, d_state=STATES))
    x = draw(2, length, width)
    expected = as_transformers(ours, width)(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-6, atol=1e-6)  # theirs keeps some of it in float32


def slow_direction(branch: SelectiveBranch, u: Tensor, z: Tensor) -> Tensor:
    """The equations for inputs [B, L, E] in the order of the direction, gated as in the official code."""
    batch, length, channels = u.shape
    y = torch.zeros_like(u)
    A = -branch.A_log.exp()
    for b in range(batch):
        h = torch.zeros(channels, STATES, dtype=u.dtype)
        for t in range(length):
            seen = branch.conv1d.bias.clone()
            for back in range(4):
                if t - back >= 0:
                    seen += branch.conv1d.weight[:, 0, 3 - back] * u[b, t - back]
            seen = seen * torch.sigmoid(seen)
            low, B, C = (branch.x_proj.weight @ seen).split([branch.dt_rank, STATES, STATES])
            step = torch.log1p(torch.exp(branch.dt_proj.weight @ low + branch.dt_proj.bias))
            h = torch.exp(step[:, None] * A) * h + torch.outer(step * seen, B)
            y[b, t] = h @ C + branch.D * seen
    return y * z * torch.sigmoid(z)


@torch.no_grad()
def test_the_bidirectional_mixer_is_its_equations() -> None:
    ours = stirred(BidirectionalMamba(WIDTH, d_state=STATES))
    x = draw(2, 7, WIDTH)
    u, z = (x @ ours.in_proj.weight.T).chunk(2, dim=-1)
    forward = slow_direction(ours.ahead, u, z)
    backward = slow_direction(ours.back, u.flip(1), z.flip(1)).flip(1)
    expected = (forward + backward) / 2 @ ours.out_proj.weight.T
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_with_equal_weights_the_directions_commute_with_flipping() -> None:
    ours = stirred(BidirectionalMamba(WIDTH, d_state=STATES))
    x = draw(2, 7, WIDTH)
    assert (ours(x.flip(1)).flip(1) - ours(x)).abs().max() > 1e-3
    ours.back.load_state_dict(ours.ahead.state_dict())
    torch.testing.assert_close(ours(x.flip(1)).flip(1), ours(x), rtol=1e-10, atol=1e-10)


def test_who_reads_whom() -> None:
    """Two directions: every token reads all; one: itself and those before it."""
    for mixer, causal in ((BidirectionalMamba(WIDTH), False), (Mamba(WIDTH), True)):
        mixer, x = stirred(mixer), draw(1, 6, WIDTH).requires_grad_()
        for t in range(6):
            (gradient,) = torch.autograd.grad(mixer(x)[0, t].sum(), x)
            reached = gradient[0].abs().amax(-1) > 0
            assert reached.tolist() == [not causal or source <= t for source in range(6)]


@torch.no_grad()
def test_steps_of_the_mixer_are_the_whole_pass() -> None:
    mixer = stirred(Mamba(WIDTH, d_state=STATES))
    x, state = draw(2, 9, WIDTH), mixer.init_state(2)
    whole = mixer(x)
    for t in range(9):
        token, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(token, whole[:, t], rtol=1e-10, atol=1e-10)


def test_the_start_of_the_weights() -> None:
    torch.manual_seed(0)
    encoder = Vim(image_size=32, patch_size=4, embed_dim=64, depth=4, num_classes=10)
    mixer = encoder.blocks[1].mixer
    for branch in (mixer.ahead, mixer.back):
        torch.testing.assert_close(-branch.rates(), torch.arange(1.0, 17.0).expand(128, 16))
        assert (branch.D == 1).all()
        assert 0.4 < branch.dt_proj.weight.abs().max() <= 0.5
    steps = F.softplus(mixer.ahead.dt_proj.bias)
    assert 0.0009 < steps.min() < 0.003
    assert 0.05 < steps.max() < 0.101
    torch.testing.assert_close(F.softplus(mixer.back.dt_proj.bias), torch.full((128,), math.log(2)))
    assert 0.85 < mixer.out_proj.weight.abs().max() * math.sqrt(128) * math.sqrt(4) <= 1
    assert encoder.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    symmetric = Vim(image_size=32, patch_size=4, embed_dim=64, depth=1, symmetric_init=True)
    assert F.softplus(symmetric.blocks[0].mixer.back.dt_proj.bias).max() < 0.101


def test_single_precision_at_least_under_autocast_and_in_half_precision() -> None:
    encoder = create_encoder("vim_nano", depth=2, num_classes=3).eval()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = encoder(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = encoder(pixels, hidden_states=True)
        half = encoder.bfloat16()(pixels.bfloat16(), hidden_states=True)
    assert mixed.hidden_states[-1].dtype == half.hidden_states[-1].dtype == torch.float32
    assert half.tokens.dtype == torch.bfloat16
    for other in (mixed, half):
        assert (other.tokens.float() - exact.tokens).abs().mean() < 0.03


# --- The stack ---


@torch.no_grad()
def test_the_stack_is_the_official_bookkeeping() -> None:
    """Add the branch of the layer before, then norm; the class token in the middle, with its own position."""
    encoder = small()
    pixels = draw(2, 3, 16, 16)
    patches = F.conv2d(pixels, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=4)
    patches = patches.flatten(2).mT
    hidden = torch.cat([patches[:, :8], encoder.cls_token.expand(2, 1, WIDTH), patches[:, 8:]], dim=1)
    hidden = hidden + encoder.pos_embed

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    residual = None
    for block in encoder.blocks:
        residual = hidden if residual is None else residual + hidden
        hidden = block.mixer(norm(residual, block.norm.weight))
    final = norm(residual + hidden, encoder.norm.weight)
    features = encoder(pixels, hidden_states=True)
    torch.testing.assert_close(features.pooled, final[:, 8], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(features.tokens, final[:, [*range(8), *range(9, 17)]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(encoder.logits(pixels), final[:, 8] @ encoder.head.weight.T + encoder.head.bias)
    assert len(features.hidden_states) == 4
    torch.testing.assert_close(encoder.norm(features.hidden_states[-1]), features.tokens)
    assert features.maps[0].shape == (2, WIDTH, 4, 4)
    torch.testing.assert_close(features.maps[0][:, :, 1, 2], features.tokens[:, 6])


def test_drop_path_rises_to_the_last_block() -> None:
    encoder = small(drop_path=0.3)
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.15, 0.3])


@torch.no_grad()
@pytest.mark.parametrize("place", ["middle", "head"])
def test_the_class_token_keeps_its_place_on_another_grid(place: Any) -> None:
    """From 4 x 4 patches to 3 x 5: its entry is the 9th of 17, and the 8th of 16; the patches' are resized alone."""
    encoder = small(class_token=place)
    assert encoder.positions((4, 4)) is encoder.pos_embed
    table, before, after = encoder.pos_embed, *((8, 7) if place == "middle" else (0, 0))
    patches = torch.cat([table[:, :before], table[:, before + 1 :]], dim=1)
    expected = resized_positions(patches, (4, 4), (3, 5))
    found = encoder.positions((3, 5))
    assert torch.equal(found[:, after], table[:, before])
    assert torch.equal(torch.cat([found[:, :after], found[:, after + 1 :]], dim=1), expected)
    pixels = draw(1, 3, 12, 20)
    x, grid, middle = encoder.embed(pixels)
    assert (grid, middle) == ((3, 5), after)
    torch.testing.assert_close(x[:, after], encoder.cls_token[:, 0] + table[:, before])
    torch.testing.assert_close(encoder(pixels).pooled, encoder.norm(last_of(encoder, x, grid))[:, after])


def last_of(encoder: Vim, x: Tensor, grid: tuple[int, int]) -> Tensor:
    for block in encoder.blocks:
        x = block(x, grid)
    return x


@torch.no_grad()
def test_tokens_are_streamed_through_one_direction() -> None:
    encoder = small(directions=1)
    pixels = draw(2, 3, 16, 12)
    features = encoder(pixels)
    x, _, middle = encoder.embed(pixels)
    state, outputs = encoder.init_state(2), []
    for token in x.unbind(1):
        output, state = encoder.step(token, state)
        outputs.append(output)
    torch.testing.assert_close(outputs.pop(middle), features.pooled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack(outputs, dim=1), features.tokens, rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="vim reads tokens in both directions; to stream, set directions=1"):
        small().init_state(2)


def test_patches_that_overlap() -> None:
    encoder = small(patch_stride=2)
    features = encoder(draw(1, 3, 16, 10))
    assert features.grid == (7, 4)
    shifted = encoder(draw(1, 3, 16, 12)).grid
    assert shifted == (7, 5)


# --- Official checkpoints ---


def official(encoder: Vim, grid: int) -> dict[str, Tensor]:
    """A state dict with the names and shapes of hustvl/Vim, by rule."""
    d, n = encoder.width, encoder.d_state
    e, r = 2 * d, math.ceil(d / 16)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, grid * grid + 1, d),
        "patch_embed.proj.weight": (d, 3, encoder.patch_size, encoder.patch_size),
        "patch_embed.proj.bias": (d,),
        "norm_f.weight": (d,),
        "head.weight": (encoder.num_classes, d),
        "head.bias": (encoder.num_classes,),
    }
    for layer in range(len(encoder.blocks)):
        shapes |= {f"layers.{layer}.norm.weight": (d,)}
        mixer = f"layers.{layer}.mixer"
        shapes |= {f"{mixer}.in_proj.weight": (2 * e, d), f"{mixer}.out_proj.weight": (d, e)}
        shapes |= {f"{mixer}.A_log": (e, n), f"{mixer}.A_b_log": (e, n), f"{mixer}.D": (e,), f"{mixer}.D_b": (e,)}
        for end in ("", "_b"):
            shapes |= {f"{mixer}.conv1d{end}.weight": (e, 1, 4), f"{mixer}.conv1d{end}.bias": (e,)}
            shapes |= {f"{mixer}.x_proj{end}.weight": (r + 2 * n, e)}
            shapes |= {f"{mixer}.dt_proj{end}.weight": (e, r), f"{mixer}.dt_proj{end}.bias": (e,)}
    return {key: draw(*shape, seed=number, dtype=torch.float32) for number, (key, shape) in enumerate(shapes.items())}


def test_official_checkpoints_load(tmp_path: Path) -> None:
    encoder = create_encoder("vim_nano", depth=2, num_classes=5)
    state = official(encoder, 8)
    save_file(state, tmp_path / "vim.safetensors")
    encoder.load_official(tmp_path / "vim.safetensors")
    mixer = encoder.blocks[1].mixer
    for ours, theirs in (
        (encoder.pos_embed, "pos_embed"),
        (encoder.norm.weight, "norm_f.weight"),
        (encoder.blocks[0].norm.weight, "layers.0.norm.weight"),
        (mixer.in_proj.weight, "layers.1.mixer.in_proj.weight"),
        (mixer.out_proj.weight, "layers.1.mixer.out_proj.weight"),
        (mixer.ahead.A_log, "layers.1.mixer.A_log"),
        (mixer.back.A_log, "layers.1.mixer.A_b_log"),
        (mixer.ahead.D, "layers.1.mixer.D"),
        (mixer.back.D, "layers.1.mixer.D_b"),
        (mixer.ahead.dt_proj.bias, "layers.1.mixer.dt_proj.bias"),
        (mixer.back.dt_proj.bias, "layers.1.mixer.dt_proj_b.bias"),
        (mixer.back.conv1d.weight, "layers.1.mixer.conv1d_b.weight"),
        (mixer.back.x_proj.weight, "layers.1.mixer.x_proj_b.weight"),
    ):
        assert torch.equal(ours, state[theirs]), theirs


def test_official_checkpoints_of_another_grid_are_resized_around_the_class_token(tmp_path: Path) -> None:
    encoder = create_encoder("vim_nano", depth=1, num_classes=5, image_size=(24, 32))
    state = official(encoder, 7)
    save_file(state, tmp_path / "vim.safetensors")
    encoder.load_official(tmp_path / "vim.safetensors")
    table = state["pos_embed"]
    assert torch.equal(encoder.pos_embed[:, 24], table[:, 24])
    patches = torch.cat([table[:, :24], table[:, 25:]], dim=1)
    expected = resized_positions(patches, (7, 7), (6, 8))
    assert torch.equal(torch.cat([encoder.pos_embed[:, :24], encoder.pos_embed[:, 25:]], dim=1), expected)


def test_all_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    encoder = create_encoder("vim_nano", depth=1, num_classes=5)
    state = official(encoder, 8)
    del state["layers.0.mixer.D_b"], state["norm_f.weight"]
    state["layers.0.mixer.gamma"] = torch.zeros(3)
    state["pos_embed"] = torch.zeros(1, 60, 64)
    save_file(state, tmp_path / "vim.safetensors")
    before = encoder.pos_embed.clone()
    message = (
        "missing: blocks.0.mixer.back.D, norm.weight; not expected: blocks.0.mixer.gamma; of another shape: "
        r"pos_embed is \[1, 60, 64\] and should be \[1, 65, 64\]"
    )
    with pytest.raises(InputError, match=message):
        encoder.load_official(tmp_path / "vim.safetensors")
    assert torch.equal(encoder.pos_embed, before)


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(directions=3), "directions of vim must be 1 or 2, not 3"),
        (dict(class_token="midle"), r"unknown class_token of vim 'midle' \(did you mean 'middle'\?\)"),
        (dict(depth=0), "depth of vim must be 1 or more, not 0"),
        (dict(patch_stride=5), "patch_stride of vim must be from 1 to 4, not 5"),
        (dict(d_state=0), "d_state, d_conv and expand of a Mamba mixer must be 1 or more, not 64, 0, 4 and 2"),
        (dict(image_size=30), "multiples of 4 pixels, not 30 x 30; the nearest size is 32 x 32"),
    ],
)
def test_settings_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_encoder("vim_nano", **options)


def test_pictures_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(InputError, match="vim takes pictures of 4 pixels a side at least, not 2 x 16"):
        small(patch_stride=2)(torch.zeros(1, 3, 2, 16))
