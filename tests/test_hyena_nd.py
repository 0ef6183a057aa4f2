"""Hyena N-D: the FFT against sums over taps, filters and operator against loops, what is kept, and the Hyena-ViT."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.hyena_nd import HyenaViT
from sightline.errors import InputError
from sightline.mixers.attention import Attention
from sightline.mixers.hyena import Hyena, ImplicitFilter, fft_convolution


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(module: nn.Module, seed: int = 0, spread: float = 0.5) -> Any:
    """The module in float64 with other parameters, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
    return module.double().eval()


def summed(u: Tensor, h: Tensor) -> Tensor:
    """The linear convolution, tap by tap."""
    out = torch.zeros_like(u)
    for at in itertools.product(*(range(side) for side in u.shape[2:])):
        for tap in itertools.product(*(range(side) for side in h.shape[1:])):
            source = [place - step for place, step in zip(at, tap, strict=True)]
            if min(source) >= 0:
                out[(..., *at)] += h[(..., *tap)] * u[(..., *source)]
    return out


# --- The convolution ---


@pytest.mark.parametrize("grid", [(7,), (4, 4), (5, 3), (1, 6), (3, 2, 5), (2, 3, 2, 2)])
def test_the_fft_gives_the_sum_over_taps(grid: tuple[int, ...]) -> None:
    u, h, bias = numbers(2, 3, *grid), numbers(3, *grid, seed=1), numbers(3, seed=2)
    expected = summed(u, h)
    torch.testing.assert_close(fft_convolution(u, h), expected, atol=1e-10, rtol=1e-10)
    with_bias = expected + u * bias.reshape(-1, *[1] * len(grid))
    torch.testing.assert_close(fft_convolution(u, h, bias), with_bias, atol=1e-10, rtol=1e-10)
    single = fft_convolution(u.float(), h.float(), bias.float())
    torch.testing.assert_close(single, with_bias.float(), atol=1e-5, rtol=1e-5)


def test_a_filter_may_be_shorter_than_the_map() -> None:
    u, h = numbers(1, 2, 5, 6), numbers(2, 3, 2, seed=1)
    torch.testing.assert_close(fft_convolution(u, h), summed(u, h), atol=1e-10, rtol=1e-10)


def test_half_precision_is_transformed_in_single() -> None:
    u, h = numbers(1, 2, 6, 5).to(torch.bfloat16), numbers(2, 6, 5, seed=1).to(torch.bfloat16)
    out = fft_convolution(u, h)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fft_convolution(u.float(), h.float()).to(torch.bfloat16))


def test_the_gradients_of_the_convolution() -> None:
    values = [numbers(1, 2, 3, 4), numbers(2, 3, 4, seed=1), numbers(2, seed=2)]
    assert torch.autograd.gradcheck(fft_convolution, [value.requires_grad_() for value in values])


# --- Filters ---


def network(made: ImplicitFilter, index: int, x: Tensor) -> Tensor:
    layers = list(made.networks[index].children())
    for layer in layers[:-1]:
        x = torch.sin(made.frequency * (layer.weight @ x + layer.bias))
    return layers[-1].weight @ x


@pytest.mark.parametrize("window", ["standard", "learn", "none"])
def test_product_filters_by_hand(window: Any) -> None:
    made = randomised(ImplicitFilter(4, (4, 6), filter_width=5, emb_dim=5, window=window))
    taps = made((4, 6))
    deltas = torch.linspace(-3.0701134573253944, -15.350567286626973, 4).double()
    for row, column in itertools.product(range(4), range(6)):
        expected = torch.ones(4, dtype=torch.float64)
        for axis, step in enumerate((row, column)):
            factor = network(made, axis, made.positions[step])
            if window != "none":
                own = made.windows[axis]
                delta = own.deltas[0] if window == "learn" else deltas
                factor = factor * (torch.exp(-step / 5 * delta.abs()) + (own.shift if window == "learn" else 0))
            expected = expected * factor
        torch.testing.assert_close(taps[:, row, column], expected, atol=1e-6, rtol=1e-6)
    assert torch.linalg.matrix_rank(taps.detach(), rtol=1e-9).tolist() == [1] * 4


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("window", ["standard", "learn", "symmetric", "none"])
def test_full_filters_by_hand(window: Any, root: bool) -> None:
    made = randomised(ImplicitFilter(3, (5, 4), kind="full", filter_width=6, window=window, sqrt_decay=root))
    taps = made((5, 4))
    fixed = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 3).double()
    for row, column in itertools.product(range(5), range(4)):
        expected = network(made, 0, torch.cat([made.positions[row], made.positions[column]]))
        own = made.windows[0]
        if window == "standard":
            decay = torch.exp(-(row + column) / 4 * fixed.abs())
        elif window == "learn":
            decay = torch.exp(-row / 4 * own.deltas[0].abs() - column / 4 * own.deltas[1].abs())
        elif window == "symmetric":
            decay = torch.exp(-(row + column) * own.deltas[0].abs())
        if window != "none":
            decay = decay.sqrt() if root else decay
            expected = expected * (decay if window == "standard" else decay + own.shift)
        torch.testing.assert_close(taps[:, row, column], expected, atol=1e-6, rtol=1e-6)
    assert min(torch.linalg.matrix_rank(taps.detach(), rtol=1e-9).tolist()) > 1


def test_the_position_table() -> None:
    table = ImplicitFilter(2, (5, 3), emb_dim=7).positions
    assert table.shape == (5, 7)
    bands = (1e-4, (1e-4 + 2) / 2, 2.0)
    for step in range(5):
        angles = [2 * math.pi * step / 5 * band for band in bands]
        expected = [step / 4, *map(math.cos, angles), *(-math.sin(angle) for angle in angles)]
        assert table[step].tolist() == pytest.approx(expected, abs=1e-6)
    # With three features, as published, cosine and sine are all but constant.
    plain = ImplicitFilter(2, (14, 14)).positions
    assert (plain[:, 1] - 1).abs().max() < 1e-6
    assert plain[:, 2].abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["product", "full", "direct"])
def test_a_tap_keeps_its_value_on_other_grids(kind: Any) -> None:
    operator = randomised(Hyena(3, (6, 6), filter=kind, filter_width=4))
    built = operator.filter((6, 6))
    small = operator.filter((4, 5))
    torch.testing.assert_close(small, built[:, :4, :5], atol=1e-12, rtol=0)
    large = operator.filter((9, 3))
    torch.testing.assert_close(large[:, :6], built[:, :, :3], atol=1e-12, rtol=0)
    if kind != "direct":
        # The decay goes on: positions are counted in patches of the built grid.
        assert large.shape == (3, 9, 3)
        assert large[:, 8].abs().max() > 0
        standard = ImplicitFilter(3, (6, 6), kind=kind)
        torch.testing.assert_close(standard.rows(9)[:, 0], torch.arange(9) / 5)


# --- The operator ---


def looped(operator: Hyena, x: Tensor, grid: tuple[int, ...], turned: bool = False) -> Tensor:
    """One sample [L, D] of a `standard` or `rotated` operator, with the short filter written as a sum."""
    order, axes = operator.order, len(grid)
    inner = (x @ operator.in_proj.weight.T + operator.in_proj.bias).T.reshape(-1, *grid)
    short = operator.short_filter.bias.reshape(-1, *[1] * axes).expand(len(inner), *grid).clone()
    for at in itertools.product(*(range(side) for side in grid)):
        for tap in itertools.product(*[range(3)] * axes):
            source = [place + step - 1 for place, step in zip(at, tap, strict=True)]
            if all(0 <= place < side for place, side in zip(source, grid, strict=True)):
                short[(slice(None), *at)] += (
                    operator.short_filter.weight[(slice(None), 0, *tap)] * inner[(slice(None), *source)]
                )
    parts = short.split(operator.width)
    value = parts[-1]
    taps = operator.filter(grid).unflatten(0, (order - 1, -1))
    for step in range(order - 1):
        value = value * parts[order - 1 - step]
        turn = list(range(1, axes + 1)) if turned and step == 0 else []
        value = value.flip(turn)
        bias = operator.bias[step].reshape(-1, *[1] * axes)
        value = (summed(value[None], taps[step])[0] + value * bias).flip(turn)
    value = value * parts[0]
    return value.flatten(1).T @ operator.out_proj.weight.T + operator.out_proj.bias


@pytest.mark.parametrize("direction", ["standard", "rotated"])
@pytest.mark.parametrize(
    ("grid", "options"),
    [((3, 4), {}), ((4, 3), dict(order=3, filter="full")), ((2, 3, 2), dict(filter="full")), ((5,), dict(order=4))],
)
@torch.no_grad()
def test_the_operator_by_loops(grid: tuple[int, ...], options: dict[str, Any], direction: Any) -> None:
    operator = randomised(Hyena(2, grid, filter_width=4, direction=direction, **options))
    x = numbers(2, math.prod(grid), 2)
    expected = torch.stack([looped(operator, sample, grid, direction == "rotated") for sample in x])
    torch.testing.assert_close(operator(x, grid), expected, atol=1e-10, rtol=1e-10)
    single = copy.deepcopy(operator).float()
    torch.testing.assert_close(single(x.float(), grid), expected.float(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_four_directions_are_four_flipped_operators() -> None:
    """With the flips around the long convolution written out; the short filter sees the picture as it is."""
    grid, width = (3, 4), 2
    for direction in ("4dir", "4dirp"):
        operator = randomised(Hyena(width, grid, direction=direction, filter_width=4))
        x = numbers(1, 12, width)
        last, gate, value = operator.short_filter(operator.in_proj(x).mT.unflatten(2, grid)).split(width, dim=1)
        found = []
        for flip in ([], [2, 3], [3], [2]):
            u = (value * gate).flip(flip)
            mixed = summed(u, operator.filter(grid)) + u * operator.bias[0][:, None, None]
            found.append((mixed * last.flip(flip)).flip(flip))
        stacked = torch.stack(found, dim=-1)  # [1, D, rows, columns, 4]
        if direction == "4dir":
            merged = (stacked * operator.mix.weight[0]).sum(-1) + operator.mix.bias
        else:
            merged = operator.mix(stacked.movedim(1, 3).flatten(3)).movedim(3, 1)
        torch.testing.assert_close(operator(x, grid), operator.out_proj(merged.flatten(2).mT), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_parallel_reads_the_short_filters_in_runs() -> None:
    """Direction h takes the channels 3 D h ... 3 D (h + 1) of the short filter, as in the official code."""
    grid, width = (3, 3), 2
    operator = randomised(Hyena(width, grid, direction="parallel", filter_width=4))
    x = numbers(1, 9, width)
    short = operator.short_filter(operator.in_proj(x).mT.unflatten(2, grid))
    assert short.shape[1] == 4 * 3 * width
    outs = []
    for run in short.split(3 * width, dim=1):
        last, gate, value = run.split(width, dim=1)
        u = value * gate
        outs.append((summed(u, operator.filter(grid)) + u * operator.bias[0][:, None, None]) * last)
    expected = operator.out_proj(torch.cat(outs, dim=1).flatten(2).mT)
    torch.testing.assert_close(operator(x, grid), expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_flips_of_the_picture_flip_the_output_of_equally_mixed_directions() -> None:
    for grid, dims in (((4, 5), ([1], [2], [1, 2])), ((2, 3, 4), ([1], [3], [1, 2, 3]))):
        operator = randomised(Hyena(3, grid, direction="4dir", filter_width=4))
        short = operator.short_filter.weight
        for axis in range(2, short.ndim):  # a short filter that no flip changes
            short.copy_((short + short.flip(axis)) / 2)
        operator.mix.weight.fill_(1 / 2 ** len(grid))
        x = numbers(2, math.prod(grid), 3)
        out = operator(x, grid).unflatten(1, grid)
        for dim in dims:
            flipped = operator(x.unflatten(1, grid).flip(dim).flatten(1, len(grid)), grid).unflatten(1, grid)
            torch.testing.assert_close(flipped, out.flip(dim), atol=1e-10, rtol=1e-10)
        operator.mix.weight[0, 0] += 0.5
        assert not torch.allclose(operator(x.flip(1), grid).flip(1), operator(x, grid))


@pytest.mark.parametrize(
    ("direction", "rows", "columns"),
    [("standard", (0, 7), (0, 8)), ("rotated", (5, 13), (6, 12)), ("4dir", (0, 13), (0, 12))],
)
def test_what_a_token_sees(direction: Any, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """One row and column more than the quadrant: the short filter's."""
    operator = randomised(Hyena(4, (14, 13), direction=direction, window="none", filter_width=8))
    x = numbers(1, 14 * 13, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(operator(x, (14, 13))[0, 6 * 13 + 7].sum(), x)
    seen = gradient[0].abs().sum(-1).unflatten(0, (14, 13)) > 1e-12 * gradient.abs().max()
    inside = torch.zeros(14, 13, dtype=torch.bool)
    inside[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    assert torch.equal(seen, inside)


def test_the_gradients_of_the_operator() -> None:
    operator = randomised(Hyena(2, (2, 3), filter_width=3, filter="full", window="learn", direction="4dir"))
    x = numbers(1, 6, 2).requires_grad_()
    parameters = list(operator.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: operator(x, (2, 3)), [x, *parameters])
    operator(x, (2, 3)).sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)


@torch.no_grad()
def test_the_released_scale_is_one_sixteenth_for_eight_patches() -> None:
    right = randomised(Hyena(3, (8, 8), filter_width=4))
    scaled = randomised(Hyena(3, (8, 8), filter_width=4, released_scale=True))
    for operator in (right, scaled):
        operator.bias.zero_()
        operator.out_proj.bias.zero_()
    x = numbers(1, 64, 3)
    torch.testing.assert_close(scaled(x, (8, 8)) * 16, right(x, (8, 8)), atol=1e-10, rtol=1e-10)


# --- What is kept in eval mode ---


def test_filters_are_kept_as_long_as_nothing_changes() -> None:
    operator = randomised(Hyena(3, (4, 4), filter_width=4))
    made = []
    operator.filter.register_forward_hook(lambda *_: made.append(1))
    x = numbers(1, 16, 3)

    def fresh() -> Tensor:
        other = copy.deepcopy(operator).train()
        with torch.no_grad():
            return other(x, (4, 4))

    with torch.no_grad():
        first = operator(x, (4, 4))
        assert torch.equal(operator(x, (4, 4)), first)
        assert len(made) == 1
        operator(x, (2, 8))
        operator(x, (2, 8))
        assert len(made) == 2  # another grid
        operator.filter.frequency.mul_(1.5)
        changed = operator(x, (4, 4))
        assert len(made) == 3
    count = len(made)
    assert torch.equal(changed, fresh())
    assert not torch.allclose(changed, first)
    made[count:] = []
    with torch.no_grad():
        operator.load_state_dict({key: value * 0.9 for key, value in operator.state_dict().items()})
        assert torch.equal(operator(x, (4, 4)), fresh())
        for parameter in operator.filter.parameters():
            parameter.data = parameter.data * 1.1
        assert torch.equal(operator(x, (4, 4)), fresh())
        operator(x, (4, 4))
        made.clear()
        operator.train()
        operator.eval()
        operator(x, (4, 4))
        operator.train()
        operator(x, (4, 4))
        operator(x, (4, 4))
        assert len(made) == 3


def test_nothing_is_kept_where_gradients_are_asked_for() -> None:
    operator = randomised(Hyena(3, (4, 4), filter_width=4))
    x = numbers(1, 16, 3)
    for _ in range(2):
        operator(x, (4, 4)).sum().backward()
    assert operator.filter.frequency.grad is not None
    with torch.inference_mode():
        inside = operator(x, (4, 4))
    with torch.no_grad():
        assert torch.equal(operator(x, (4, 4)), inside)
    operator.requires_grad_(False)
    operator(x.clone().requires_grad_(), (4, 4)).sum().backward()  # a tensor of inference mode could not be saved


# --- Sizes and names ---


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (dict(filter="product"), 196_010),
        (dict(filter="full"), 175_338),
        (dict(direction="4dir"), 196_015),
        (dict(direction="4dirp"), 343_658),
        (dict(direction="parallel"), 323_882),
        (dict(filter="direct"), 229_632 - 192 * 14 * 14 - 192),  # the official second filter is never read
    ],
)
def test_the_parameters_of_a_layer(options: dict[str, Any], count: int) -> None:
    assert count_parameters(Hyena(192, (14, 14), **options)) == count


def test_the_multiply_adds_of_a_layer() -> None:
    x = torch.empty(2, 16, 3)
    transform = 64 * 6  # 8 x 8 points
    one = 2 * (2 * transform + 2 * 64 + 2 * 16) + transform
    assert Hyena(3, (4, 4)).mixing_macs(x, (4, 4)) == 3 * (one + 2 * 16)
    four = 8 * (2 * transform + 2 * 64 + 2 * 16) + transform
    assert Hyena(3, (4, 4), direction="4dir", order=3).mixing_macs(x, (4, 4)) == 3 * (2 * four + 8 * 16)


def test_the_models() -> None:
    hyena, attention = 175_338, 148_224
    rest = 16 * 16 * 3 * 192 + 192 + 196 * 192 + 384 + 192_000 + 1000 + 12 * (2 * 384 + 8 * 192 * 192 + 5 * 192)
    for name, blocks in (("hyena_vit_tiny", 12), ("hyena_vit_hybrid_tiny", 7)):
        with torch.device("meta"):
            encoder = create_encoder(name, num_classes=1000)
        assert count_parameters(encoder) == rest + blocks * hyena + (12 - blocks) * attention
    assert 1.0e9 < count_macs("hyena_vit_tiny") < 1.3e9
    for name in ("hyena_vit_nano", "hyena_vit_hybrid_nano"):
        assert 50_000 < count_parameters(create_encoder(name)) < 300_000


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("hyena", "hhhhhhhhhhhh"),
        ("hyena_attention", "hhhhhhhaaaaa"),
        ("attention_hyena", "aaaaaaahhhhh"),
        ("alternating", "hahahahahaha"),
    ],
)
def test_layouts(layout: Any, expected: str) -> None:
    encoder = create_encoder("hyena_vit_nano", layout=layout, depth=12)
    kinds = {Hyena: "h", Attention: "a"}
    assert "".join(kinds[type(block.attn)] for block in encoder.blocks) == expected
    for index, block in enumerate(encoder.blocks):
        if isinstance(block.attn, Hyena):
            assert block.attn.direction == ("rotated" if index % 2 == 0 else "standard")


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (56, 56)])
def test_sizes(size: tuple[int, int]) -> None:
    encoder = randomised(create_encoder("hyena_vit_hybrid_nano"), spread=0.05)
    features = encoder(numbers(2, 3, *size))
    assert features.grid == (size[0] // 4, size[1] // 4)
    assert features.tokens.shape == (2, math.prod(features.grid), 64)
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))


def test_the_first_token_of_a_standard_model_sees_next_to_nothing() -> None:
    """Why the released pooling by the top left patch is not followed."""
    encoder = randomised(create_encoder("hyena_vit_nano", direction="standard", depth=2), spread=0.2)
    pixels = numbers(1, 3, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(pixels).tokens[0, 0].sum(), pixels)
    patches = gradient[0].abs().sum(0).unflatten(0, (8, 4)).unflatten(2, (8, 4)).sum((1, 3))
    seen = patches > 1e-12 * patches.max()
    assert seen[:3, :3].all()
    assert seen.sum() == 9


# --- Official checkpoints ---


def official(encoder: HyenaViT, width: int, side: int, units: int) -> dict[str, Tensor]:
    """A state dict with the keys and shapes of the official code, with the buffers that it saves."""
    hidden, state, filter = 4 * width, {}, encoder.operator["filter"]
    learned = encoder.window == "learn"
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, side * side, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(encoder.depth):
        at = f"blocks.{block}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
        shapes |= {f"{at}.mlp.fc1.weight": (hidden, width), f"{at}.mlp.fc1.bias": (hidden,)}
        shapes |= {f"{at}.mlp.fc2.weight": (width, hidden), f"{at}.mlp.fc2.bias": (width,)}
        at += ".attn"
        if not encoder.is_hyena(block):
            shapes |= {f"{at}.qkv.weight": (3 * width, width), f"{at}.qkv.bias": (3 * width,)}
            shapes |= {f"{at}.proj.weight": (width, width), f"{at}.proj.bias": (width,)}
            continue
        shapes |= {f"{at}.in_proj.weight": (3 * width, width), f"{at}.in_proj.bias": (3 * width,)}
        shapes |= {f"{at}.out_proj.weight": (width, width), f"{at}.out_proj.bias": (width,)}
        shapes |= {f"{at}.short_filter.weight": (3 * width, 1, 3, 3), f"{at}.short_filter.bias": (3 * width,)}
        if encoder.direction == "4dir":
            shapes |= {f"{at}.linear_mix.weight": (1, 4), f"{at}.linear_mix.bias": (1,)}
        if filter == "direct":
            shapes |= {f"{at}.filter": (2, width, side, side), f"{at}.bias": (2, width)}
            continue
        at += ".filter_fn"
        shapes |= {f"{at}.bias": (width,), f"{at}.pos_emb.z": (1, side, 3), f"{at}.pos_emb.t": (1, side, 1)}
        for name in ("implicit_filter",) if filter == "full" else ("Ximplicit_filter", "Yimplicit_filter"):
            sizes = ((6 if filter == "full" else 3, units), (units, units), (units, units), (units, width))
            for layer, (before, after) in enumerate(sizes):
                shapes[f"{at}.{name}.{2 * layer}.weight"] = (after, before)
                if layer < 3:
                    shapes[f"{at}.{name}.{2 * layer}.bias"] = (after,)
                    shapes[f"{at}.{name}.{2 * layer + 1}.freq"] = (1, units)
        if filter == "full":
            shapes |= {f"{at}.modulation.{axis}deltas": (1, 1, width) for axis in "XY"}
            shapes |= {f"{at}.modulation.shift": (1, 1, width)} if learned else {}
        else:
            shapes |= {f"{at}.{axis}modulation.deltas": (1, 1, width) for axis in "XY"}
            shapes |= {f"{at}.{axis}modulation.shift": (1, 1, width) for axis in "XY"} if learned else {}
    generator = torch.Generator().manual_seed(1)
    for key, shape in shapes.items():
        state[key] = torch.randn(shape, generator=generator)
    for key in [key for key in state if key.endswith(".freq")]:  # one parameter under many names
        state[key] = state[key.split(".filter_fn")[0] + ".filter_fn." + FIRST_FREQUENCY[filter]]
    return {key: value.clone() for key, value in state.items()}


FIRST_FREQUENCY = {"product": "Ximplicit_filter.1.freq", "full": "implicit_filter.1.freq"}


@pytest.mark.parametrize(
    "options",
    [
        dict(filter="full", layout="hyena_attention", direction="seq"),
        dict(filter="product", direction="4dir"),
        dict(filter="product", window="learn"),
        dict(filter="full", window="learn"),
        dict(filter="direct"),
    ],
)
def test_official_checkpoints(options: dict[str, Any], tmp_path: Path) -> None:
    encoder = create_encoder("hyena_vit_nano", width=8, depth=3, num_heads=2, filter_width=4, **options)
    assert isinstance(encoder, HyenaViT)
    given = official(encoder, 8, 8, 4)
    save_file(given, tmp_path / "official.safetensors")
    encoder.load_official(tmp_path / "official.safetensors")
    first = encoder.blocks[0].attn
    assert torch.equal(first.in_proj.weight, given["blocks.0.attn.in_proj.weight"])
    if options["filter"] == "direct":
        assert torch.equal(first.filter((8, 8)), given["blocks.0.attn.filter"][0])
        assert torch.equal(first.bias, given["blocks.0.attn.bias"][:1])
        return
    at = "blocks.0.attn.filter_fn"
    assert torch.equal(first.bias[0], given[f"{at}.bias"])
    assert torch.equal(first.filter.positions, given[f"{at}.pos_emb.z"][0])
    names = ("implicit_filter",) if options["filter"] == "full" else ("Ximplicit_filter", "Yimplicit_filter")
    for index, name in enumerate(names):
        for layer in range(4):
            expected = given[f"{at}.{name}.{2 * layer}.weight"]
            assert torch.equal(first.filter.networks[index][layer].weight, expected)
    if options.get("window") == "learn":
        windows = first.filter.windows
        if options["filter"] == "full":
            assert torch.equal(windows[0].deltas[1], given[f"{at}.modulation.Ydeltas"][0, 0])
            assert torch.equal(windows[0].shift, given[f"{at}.modulation.shift"][0, 0])
        else:
            assert torch.equal(windows[1].deltas[0], given[f"{at}.Ymodulation.deltas"][0, 0])
            assert torch.equal(windows[1].shift, given[f"{at}.Ymodulation.shift"][0, 0])
    del given["norm.bias"], given[f"{at}.pos_emb.z"]
    given["head_dist.weight"] = torch.zeros(1)
    save_file(given, tmp_path / "broken.safetensors")
    with pytest.raises(
        InputError, match=r"missing: blocks\.0\.attn\.filter\.positions, norm\.bias; not expected: head_"
    ):
        encoder.load_official(tmp_path / "broken.safetensors")


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(filter="produce"), r"unknown filter of Hyena 'produce' \(did you mean 'product'"),
        (dict(direction="5dir"), "unknown direction of Hyena '5dir'"),
        (dict(window="symettric"), r"unknown window of Hyena 'symettric' \(did you mean 'symmetric'"),
        (dict(order=1), "the order of Hyena must be 2 or more, not 1"),
        (dict(emb_dim=4), "emb_dim of a Hyena filter must be odd and 3 or more, not 4"),
        (dict(window="symmetric"), "the symmetric window of a Hyena filter is for filter='full'"),
        (dict(sqrt_decay=True), "sqrt_decay of a Hyena filter is for filter='full'"),
        (dict(grid=(2, 2, 2, 2)), "must have one, two or three axes"),
        (dict(grid=(0, 2)), "must have one, two or three axes of 1 or more"),
    ],
)
def test_bad_options_of_the_operator(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Hyena(4, **{"grid": (3, 3), **options})


def test_bad_options_of_the_model_and_bad_grids() -> None:
    with pytest.raises(InputError, match=r"unknown layout of a Hyena-ViT 'hyena_atention' \(did you mean"):
        create_encoder("hyena_vit_nano", layout="hyena_atention")
    with pytest.raises(InputError, match="unknown direction of a Hyena-ViT 'rotated'"):
        create_encoder("hyena_vit_nano", direction="rotated")
    operator = Hyena(4, (3, 3))
    with pytest.raises(InputError, match=r"a grid of 2 axes and no others; 10 tokens on the grid \(3, 3\) do not fit"):
        operator(torch.zeros(1, 10, 4), (3, 3))
    with pytest.raises(InputError, match="a grid of 2 axes"):
        operator(torch.zeros(1, 9, 4), (9,))
