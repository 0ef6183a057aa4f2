"""MSVMamba and VMamba: their scans against loops over places of the map with the official code's own names, published
sizes, and official checkpoints written by rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import MacCounter, count_parameters
from sightline.encoders.msvmamba import ConvFeed, ConvHalving, PatchMerge, ScanBlock, VisualStateSpaceModel
from sightline.errors import InputError
from sightline.mixers.cross_scan import MS2D, SS2D
from sightline.mixers.scan_orders import CROSS_ROUTES

CONFIGS: Any = VisualStateSpaceModel.configs


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def randomised(module: Any) -> Any:
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=number, scale=0.5))
    return module


def on_meta(name: str, **settings: Any) -> VisualStateSpaceModel:
    with torch.device("meta"):
        return VisualStateSpaceModel(**{**CONFIGS[name], **settings}, num_classes=1000).eval()


# --- Scans, place by place ---


def places(route: str, high: int, wide: int) -> list[tuple[int, int]]:
    walked = [(row, column) for row in range(high) for column in range(wide)]
    if route.startswith("column"):
        walked = [(row, column) for column in range(wide) for row in range(high)]
    return walked[::-1] if route.endswith("reversed") else walked


def slow_s6(tokens: list[Tensor], weights: dict[str, Tensor], number: int) -> list[Tensor]:
    """Set `number` of parameters of the official layout: A_logs [K E, N], Ds [K E]."""
    inner, states = tokens[0].shape[0], weights["A_logs"].shape[1]
    rank = weights["dt_projs_weight"].shape[2]
    own = slice(number * inner, (number + 1) * inner)
    A, skip = -weights["A_logs"][own].exp(), weights["Ds"][own]
    h, outputs = torch.zeros(inner, states, dtype=tokens[0].dtype), []
    for u in tokens:
        low, B, C = (weights["x_proj_weight"][number] @ u).split([rank, states, states])
        delta = torch.log1p((weights["dt_projs_weight"][number] @ low + weights["dt_projs_bias"][number]).exp())
        h = (delta[:, None] * A).exp() * h + delta[:, None] * B[None] * u[:, None]
        outputs.append(h @ C + skip * u)
    return outputs


def slow_routes(values: Tensor, routes: tuple[str, ...], weights: dict[str, Tensor], numbers: list[int]) -> Tensor:
    """The sum of the routes over a map [E, H, W], each scanned alone."""
    total = torch.zeros_like(values)
    for route, number in zip(routes, numbers, strict=True):
        walked = places(route, *values.shape[1:])
        for place, y in zip(walked, slow_s6([values[(slice(None), *p)] for p in walked], weights, number), strict=True):
            total[(slice(None), *place)] += y
    return total


def channel_norm(values: Tensor, weights: dict[str, Tensor]) -> Tensor:
    normed = F.layer_norm(values.movedim(0, -1), values.shape[:1], weights["out_norm.weight"], weights["out_norm.bias"])
    return normed.movedim(-1, 0)


def depthwise(values: Tensor, weights: dict[str, Tensor], name: str, stride: int = 1) -> Tensor:
    kernel = weights[name + ".weight"]
    padding = kernel.shape[-1] // 2
    answer = F.conv2d(values[None], kernel, weights.get(name + ".bias"), stride, padding, groups=len(values))
    return F.silu(answer[0])


def slow_ss2d(x: Tensor, grid: tuple[int, int], weights: dict[str, Tensor], *, gated: bool) -> Tensor:
    """One picture's tokens [L, D]."""
    projected = x @ weights["in_proj.weight"].T
    inner = len(weights["out_norm.weight"])
    values = depthwise(projected[:, :inner].T.unflatten(1, grid), weights, "conv2d")
    y = channel_norm(slow_routes(values, CROSS_ROUTES, weights, [0, 1, 2, 3]), weights).flatten(1).T
    if gated:
        y = y * F.silu(projected[:, inner:])
    return y @ weights["out_proj.weight"].T


def slow_ms2d(
    x: Tensor,
    grid: tuple[int, int],
    weights: dict[str, Tensor],
    *,
    arxiv: bool,
    gated: bool,
    full_route: str = "raster",
) -> Tensor:
    """One picture's tokens [L, D], as on the branch of the arXiv models (parameters of the low routes first, norms
    before the sum) or on that of the NeurIPS models."""
    projected = x @ weights["in_proj.weight"].T
    inner = len(weights["out_norm.weight"])
    values = projected[:, :inner].T.unflatten(1, grid)
    high, low = depthwise(values, weights, "conv2d"), depthwise(values, weights, "conv2d_b1", stride=2)
    routes = [r for r in ("raster", "raster_reversed", "column", "column_reversed") if r != full_route]
    walked = [place for route in routes for place in places(route, *low.shape[1:])]
    scanned = slow_s6([low[(slice(None), *place)] for place in walked], weights, 0 if arxiv else 1)
    full = slow_routes(high, (full_route,), weights, [1 if arxiv else 0])
    if arxiv:
        full = channel_norm(full, weights)
        norm = (weights["out_norm.weight"], weights["out_norm.bias"])
        scanned = [F.layer_norm(y, y.shape, *norm) for y in scanned]
    merged = torch.zeros_like(low)
    for place, y in zip(walked, scanned, strict=True):
        merged[(slice(None), *place)] += y
    if arxiv:
        y = full + F.interpolate(merged[None], size=grid, mode="bilinear", align_corners=False)[0]
    else:
        y = channel_norm(full + F.interpolate(merged[None], size=grid, mode="nearest")[0], weights)
    mean = y.mean(dim=(1, 2))
    scale = torch.sigmoid(weights["se.fc.2.weight"] @ torch.relu(weights["se.fc.0.weight"] @ mean))
    y = (y * scale[:, None, None]).flatten(1).T
    if gated:
        y = y * F.silu(projected[:, inner:])
    return y @ weights["out_proj.weight"].T


def official_names(mixer: SS2D, *, low_first: bool = False) -> dict[str, Tensor]:
    """A mixer's weights under the official names and in the official layout."""
    scan = {"x_proj": "x_proj_weight", "dt_proj": "dt_projs_weight", "dt_bias": "dt_projs_bias"}
    flat = {"A_log": "A_logs", "D": "Ds"}
    modules = {"conv": "conv2d", "conv_low": "conv2d_b1", "se.fc1": "se.fc.0", "se.fc2": "se.fc.2"}
    renamed = {}
    for key, value in mixer.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if module != "ssm":
            renamed[f"{modules.get(module, module)}.{leaf}"] = value
            continue
        value = value.flip(0) if low_first else value
        renamed[scan.get(leaf) or flat[leaf]] = value if leaf in scan else value.flatten(0, 1)
    return renamed


@pytest.mark.parametrize("states", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("grid", [(3, 4), (1, 2), (5, 1)])
def test_the_cross_scan_is_four_loops_over_the_map(grid: tuple[int, int], gated: bool, states: int) -> None:
    mixer = randomised(SS2D(4, d_state=states, gated=gated, conv_bias=gated))
    x = drawn(2, grid[0] * grid[1], 4)
    expected = torch.stack([slow_ss2d(row, grid, official_names(mixer), gated=gated) for row in x])
    torch.testing.assert_close(mixer(x, grid), expected, atol=1e-10, rtol=1e-10)
    single = mixer.float()(x.float(), grid)
    torch.testing.assert_close(single, expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arxiv", [True, False])
@pytest.mark.parametrize("grid", [(3, 4), (7, 5), (1, 1)])
def test_the_multi_scale_scan_is_two_loops_over_two_maps(grid: tuple[int, int], arxiv: bool) -> None:
    settings: Any = {} if arxiv else dict(norm_routes=False, upsample="nearest", gated=False, ssm_ratio=1.0)
    mixer = randomised(MS2D(8, **settings))
    x = drawn(2, grid[0] * grid[1], 8)
    weights = official_names(mixer, low_first=arxiv)
    expected = torch.stack([slow_ms2d(row, grid, weights, arxiv=arxiv, gated=arxiv) for row in x])
    torch.testing.assert_close(mixer(x, grid), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("full_route", CROSS_ROUTES)
def test_any_route_can_have_the_full_resolution(full_route: str) -> None:
    mixer = randomised(MS2D(8, full_route=full_route, d_state=2))
    x, grid = drawn(1, 15, 8), (5, 3)
    weights = official_names(mixer, low_first=True)
    expected = slow_ms2d(x[0], grid, weights, arxiv=True, gated=True, full_route=full_route)
    torch.testing.assert_close(mixer(x, grid)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("make", [lambda: SS2D(2, d_state=2, ssm_ratio=1.0), lambda: MS2D(2, ssm_ratio=1.0)])
def test_gradients(make: Any) -> None:
    mixer = randomised(make())
    assert torch.autograd.gradcheck(lambda x: mixer(x, (3, 2)), (drawn(1, 6, 2).requires_grad_(),))


def test_low_routes_carry_their_state_over_unless_it_is_reset() -> None:
    carried, reset = randomised(MS2D(4)), randomised(MS2D(4, reset_between_routes=True))
    low = drawn(2, 8, 2, 3)
    with torch.no_grad():
        ours, theirs = carried._scan_low(low), reset._scan_low(low)
    weights = official_names(reset)
    for row in range(2):
        for number, route in enumerate(("raster_reversed", "column", "column_reversed")):
            walked = places(route, 2, 3)
            alone = torch.stack(slow_s6([low[(row, slice(None), *p)] for p in walked], weights, 1), dim=1)
            part = slice(6 * number, 6 * number + 6)
            torch.testing.assert_close(theirs[row, :, part], alone)
            assert torch.allclose(ours[row, :, part], alone) == (number == 0)


def test_a_state_that_forgets_at_once_leaves_a_map_of_each_token_alone() -> None:
    mixer = randomised(SS2D(4, gated=False))
    with torch.no_grad():
        mixer.ssm.A_log.fill_(12.0)
        mixer.conv.weight.zero_()
        mixer.conv.weight[:, :, 1, 1] = 1
    x = drawn(1, 12, 4)
    changed = x.clone()
    changed[:, 5] += 1
    moved = (mixer(x, (3, 4)) - mixer(changed, (3, 4))).abs().amax(dim=-1)[0] > 1e-12
    assert moved.nonzero().flatten().tolist() == [5]


def test_scanned_tokens_and_counted_work() -> None:
    assert SS2D(16).scanned_tokens((7, 7)) == 4 * 49
    assert MS2D(16).scanned_tokens((7, 7)) == 49 + 3 * 16
    assert MS2D(16).scanned_tokens((14, 10)) == 140 * 7 // 4
    x, inner, rank, states = torch.zeros(2, 12, 20), 40, 2, 3
    per_token = inner * (rank + 2 * states) + rank * inner + 9 * inner * states + inner
    assert SS2D(20, d_state=3).mixing_macs(x, (3, 4)) == 2 * 4 * 12 * per_token
    assert MS2D(20, d_state=3).mixing_macs(x, (3, 4)) == 2 * (12 + 3 * 2 * 2) * per_token


def test_the_start_is_mamba_s() -> None:
    ssm = SS2D(64, d_state=5).ssm
    assert ssm.A_log.shape == (4, 128, 5)
    torch.testing.assert_close(ssm.A_log.exp()[3, 7], torch.arange(1.0, 6.0))
    assert (ssm.D == 1).all()
    step = F.softplus(ssm.dt_bias.detach())
    assert (step > 0.99e-3).all()
    assert (step < 0.101).all()
    assert abs(float(step.log().mean()) - math.log(1e-2)) < 0.3
    assert float(ssm.dt_proj.detach().abs().max()) <= 4**-0.5


def test_half_precision_keeps_the_state_in_single() -> None:
    mixer = MS2D(8).eval()
    x = drawn(1, 64, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = mixer(x, (8, 8))
    torch.testing.assert_close(rough.float(), mixer(x, (8, 8)), atol=0.02, rtol=0.1)


# --- Parts of the encoder ---


def test_merging_takes_the_upper_left_then_the_lower_left_then_the_right_ones() -> None:
    merge = PatchMerge(1)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    x = torch.arange(1.0, 13.0).reshape(1, 12, 1)
    merged, grid = merge(x, (3, 4))
    assert grid == (2, 2)
    assert merged[0].tolist() == [[1, 5, 2, 6], [3, 7, 4, 8], [9, 0, 10, 0], [11, 0, 12, 0]]


def test_halving_by_a_convolution_rounds_up() -> None:
    halve, x = ConvHalving(2).double(), drawn(1, 15, 2)
    halved, grid = halve(x, (5, 3))
    assert grid == (3, 2)
    expected = halve.norm(F.conv2d(x.mT.unflatten(2, (5, 3)), halve.conv.weight, halve.conv.bias, 2, 1).flatten(2).mT)
    torch.testing.assert_close(halved, expected)


@pytest.mark.parametrize("post_norm", [True, False])
def test_a_block_by_hand(post_norm: bool) -> None:
    block = randomised(ScanBlock(4, SS2D(4), ConvFeed(4, 8), drop_path=0.0, post_norm=post_norm))
    x, grid = drawn(1, 6, 4), (2, 3)

    def feed(t: Tensor) -> Tensor:
        hidden = t @ block.feed.linear1.weight.T + block.feed.linear1.bias
        convolved = F.conv2d(hidden.mT.unflatten(2, grid), block.feed.conv.weight, block.feed.conv.bias, 1, 1, groups=8)
        return F.gelu(hidden + convolved.flatten(2).mT) @ block.feed.linear2.weight.T + block.feed.linear2.bias

    y = x + block.mixer(F.layer_norm(x, (4,), block.norm1.weight, block.norm1.bias), grid)
    norm = (block.norm2.weight, block.norm2.bias)
    fed = F.layer_norm(feed(y), (4,), *norm) if post_norm else feed(F.layer_norm(y, (4,), *norm))
    torch.testing.assert_close(block(x, grid), y + fed)


# --- Published sizes ---


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("msvmamba_nano", 6.86, 0.88),
        ("msvmamba_micro", 11.9, 1.5),
        ("msvmamba_tiny", 33.0, 4.6),
        ("vmamba_tiny_s1l8", 30.2, 4.9),
        ("vmamba_small_s2l15", 50.1, 8.7),
        ("vmamba_base_s2l15", 88.6, 15.4),
        ("vmamba_vanilla_tiny", 22.9, 5.6),
        ("msvmamba_v2_tiny", 32, 5.0),
        ("msvmamba_v2_small", 50, 8.8),
        ("msvmamba_v2_base", 91, 16.3),
    ],
)
def test_published_parameters_and_work(name: str, parameters: float, macs: float) -> None:
    model = on_meta(name)
    millions = count_parameters(model) / 1e6
    if isinstance(parameters, int):  # published without decimals
        assert round(millions) == parameters
    else:
        assert millions == pytest.approx(parameters, rel=0.005)
    with MacCounter(model) as counter, torch.no_grad():
        model.logits(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.macs / 1e9 == pytest.approx(macs, rel=0.03)


@pytest.mark.parametrize("name", ["msvmamba_pico", "msvmamba_nano", "msvmamba_v2_tiny", "vmamba_tiny_s1l8"])
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (224, 100)])
def test_sizes(name: str, size: tuple[int, int]) -> None:
    model = on_meta(name)
    features = model(torch.empty(2, 3, *size, device="meta"), hidden_states=True)
    halvings = len(model.depths) - 1
    assert model.stride == 4 * 2**halvings
    grids = [tuple(math.ceil(side / (4 * 2**stage)) for side in size) for stage in range(halvings + 1)]
    assert [tuple(values.shape[2:]) for values in features.maps] == grids
    assert features.grid == grids[-1]
    assert features.tokens.shape == (2, math.prod(grids[-1]), model.width)
    assert len(features.hidden_states) == 1 + sum(model.depths)


def test_the_features_of_a_small_model() -> None:
    torch.manual_seed(0)
    model = VisualStateSpaceModel(**CONFIGS["msvmamba_pico"], num_classes=5).eval()
    pixels = drawn(2, 3, 36, 52).float()
    features = model(pixels, hidden_states=True)
    assert features.grid == (5, 7)
    torch.testing.assert_close(features.tokens, model.norm(features.hidden_states[-1]))
    torch.testing.assert_close(features.maps[-1].flatten(2).mT, features.tokens)
    torch.testing.assert_close(features.maps[0].flatten(2).mT, features.hidden_states[2])
    torch.testing.assert_close(model.logits(pixels), model.head(features.tokens.mean(dim=1)))


# --- Official checkpoints ---


def official_state(name: str, **settings: Any) -> dict[str, Tensor]:
    """Names and shapes of the official code, by its rules, filled with random numbers."""
    values = {**CONFIGS[name], **settings}
    width, depths = values["width"], values["depths"]
    multi, stem, feed = values.get("scan") != "cross", values.get("stem", "patch"), values.get("feed", "conv")
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[name + ".weight"] = weight
        if bias:
            shapes[name + ".bias"] = weight[:1]

    if stem == "patch":
        add("patch_embed.0", width, 3, 4, 4)
        add("patch_embed.2", width)
    else:
        add("patch_embed.0", width // 2, 3, 3, 3)
        add("patch_embed.2", width // 2)
        add("patch_embed.5", width, width // 2, 3, 3)
        add("patch_embed.7", width)
    for stage, depth in enumerate(depths):
        dim = width * 2**stage
        inner, states = int(dim * values.get("ssm_ratio", 2.0)), values.get("d_state", 1)
        rank, sets = math.ceil(dim / 16), 2 if multi else 4
        hidden = int(dim * values.get("feed_ratio", 2.0))
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}."
            add(block + "norm", dim)
            add(block + "op.in_proj", inner * (2 if values.get("gated", True) else 1), dim, bias=False)
            add(block + "op.conv2d", inner, 1, 3, 3, bias=values.get("conv_bias", True))
            shapes[block + "op.x_proj_weight"] = (sets, rank + 2 * states, inner)
            shapes[block + "op.dt_projs_weight"] = (sets, inner, rank)
            shapes[block + "op.dt_projs_bias"] = (sets, inner)
            shapes[block + "op.A_logs"] = (sets * inner, states)
            shapes[block + "op.Ds"] = (sets * inner,)
            add(block + "op.out_norm", inner)
            add(block + "op.out_proj", dim, inner, bias=False)
            if multi:
                add(block + "op.conv2d_b1", inner, 1, 7, 7)
                add(block + "op.se.fc.0", inner // 8, inner, bias=False)
                add(block + "op.se.fc.2", inner, inner // 8, bias=False)
            if feed == "conv":
                add(block + "convFFN.linear1", hidden, dim, 1, 1)
                add(block + "convFFN.dwc", hidden, 1, 3, 3)
                add(block + "convFFN.linear2", dim, hidden, 1, 1)
            elif feed == "mlp":
                add(block + "mlp.fc1", hidden, dim)
                add(block + "mlp.fc2", dim, hidden)
            if feed != "none":
                add(block + "norm2", dim)
        if stage < len(depths) - 1:
            if values.get("halving", "merge") == "merge":
                add(f"layers.{stage}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
                add(f"layers.{stage}.downsample.norm", 4 * dim)
            else:
                add(f"layers.{stage}.downsample.1", 2 * dim, dim, 3, 3)
                add(f"layers.{stage}.downsample.3", 2 * dim)
    last = width * 2 ** (len(depths) - 1)
    add("classifier.norm", last)
    add("classifier.head", 10, last)
    return {key: drawn(*shape, seed=number, scale=0.3).float() for number, (key, shape) in enumerate(shapes.items())}


def slow_block(x: Tensor, grid: tuple[int, int], weights: dict[str, Tensor], name: str) -> Tensor:
    """A block of the named model on one picture's tokens [L, D], from its official weights."""
    gated = name in ("msvmamba_nano", "msvmamba_v2_base", "vmamba_vanilla_tiny")
    scan = {key.removeprefix("op."): value for key, value in weights.items() if key.startswith("op.")}
    normed = F.layer_norm(x, x.shape[1:], weights["norm.weight"], weights["norm.bias"])
    if name.startswith("vmamba"):
        x = x + slow_ss2d(normed, grid, scan, gated=gated)
    else:
        x = x + slow_ms2d(normed, grid, scan, arxiv="v2" not in name, gated=gated)
    if name == "vmamba_vanilla_tiny":
        return x

    def norm(t: Tensor) -> Tensor:
        return F.layer_norm(t, t.shape[1:], weights["norm2.weight"], weights["norm2.bias"])

    if name.startswith("vmamba"):
        hidden = F.gelu(norm(x) @ weights["mlp.fc1.weight"].T + weights["mlp.fc1.bias"])
        return x + hidden @ weights["mlp.fc2.weight"].T + weights["mlp.fc2.bias"]

    def conv_feed(t: Tensor) -> Tensor:
        names = (f"convFFN.{part}.{kind}" for part in ("linear1", "dwc", "linear2") for kind in ("weight", "bias"))
        w1, b1, w, b, w2, b2 = (weights[key] for key in names)
        hidden = F.conv2d(t.T.unflatten(1, grid)[None], w1, b1)
        hidden = F.gelu(hidden + F.conv2d(hidden, w, b, 1, 1, groups=len(w)))
        return F.conv2d(hidden, w2, b2)[0].flatten(1).T

    return x + (norm(conv_feed(x)) if "v2" in name else conv_feed(norm(x)))


@pytest.mark.parametrize(
    "name", ["msvmamba_nano", "msvmamba_v2_tiny", "msvmamba_v2_base", "vmamba_small_s2l15", "vmamba_vanilla_tiny"]
)
def test_official_checkpoints_load(name: str, tmp_path: Path) -> None:
    small: Any = dict(width=16, depths=(1, 2))
    state = official_state(name, **small)
    save_file(state, tmp_path / "official.safetensors")
    model = VisualStateSpaceModel(**{**CONFIGS[name], **small}, num_classes=10).eval()
    model.load_official(tmp_path / "official.safetensors")
    # Every number arrived, and the last block is the official one with the official weights.
    given = torch.cat([value.flatten() for value in state.values()])
    ours = torch.cat([value.flatten() for value in model.state_dict().values()])
    assert torch.equal(ours.sort().values, given.sort().values)
    block = "layers.1.blocks.1."
    weights = {key.removeprefix(block): value.double() for key, value in state.items() if key.startswith(block)}
    x, grid = drawn(1, 15, 32), (3, 5)
    expected = slow_block(x[0], grid, weights, name)
    torch.testing.assert_close(model.stages[1].blocks[1].double()(x, grid)[0], expected, atol=1e-9, rtol=1e-9)
    for ours_name, key in (("norm", "classifier.norm"), ("head", "classifier.head"), ("stem.conv1", "patch_embed.0")):
        assert torch.equal(model.state_dict()[ours_name + ".weight"], state[key + ".weight"])
    assert torch.equal(model.state_dict()["stages.0.blocks.0.norm1.bias"], state["layers.0.blocks.0.norm.bias"])


def test_names_of_vmamba_s_first_checkpoints(tmp_path: Path) -> None:
    small: Any = dict(width=16, depths=(1,))
    state = official_state("vmamba_vanilla_tiny", **small)
    changes = {"patch_embed.0": "patch_embed.proj", "patch_embed.2": "patch_embed.norm", "classifier.": ""}
    changes |= {"blocks.0.norm": "blocks.0.ln_1", "blocks.0.op.": "blocks.0.self_attention."}
    old = {}
    for key, value in state.items():
        for now, then in changes.items():
            key = key.replace(now, then)
        old[key] = value
    assert not set(old) & set(state)
    save_file(old, tmp_path / "old.safetensors")
    save_file(state, tmp_path / "new.safetensors")
    one, other = (
        VisualStateSpaceModel(**{**CONFIGS["vmamba_vanilla_tiny"], **small}, num_classes=10) for _ in range(2)
    )
    one.load_official(tmp_path / "old.safetensors")
    other.load_official(tmp_path / "new.safetensors")
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    small: Any = dict(width=16, depths=(1,))
    state = official_state("msvmamba_nano", **small)
    del state["layers.0.blocks.0.op.Ds"]
    state["layers.0.blocks.0.op.A_logs"] = torch.zeros(63, 1)
    state["layers.0.blocks.0.op.x_proj_bias"] = torch.zeros(2)
    save_file(state, tmp_path / "wrong.safetensors")
    model = VisualStateSpaceModel(**{**CONFIGS["msvmamba_nano"], **small}, num_classes=10)
    with pytest.raises(InputError) as refusal:
        model.load_official(tmp_path / "wrong.safetensors")
    message = str(refusal.value)
    assert "missing: stages.0.blocks.0.mixer.ssm.D;" in message
    assert "not expected: stages.0.blocks.0.mixer.x_proj_bias;" in message
    assert "stages.0.blocks.0.mixer.ssm.A_log is [63, 1] and should be [2, 32, 1]" in message


# --- Bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scan="multiscale"), r"unknown scan of a visual state space model 'multiscale' \(did you mean"),
        (dict(stem="pixel"), "unknown stem"),
        (dict(halving="pool"), "unknown halving"),
        (dict(feed="moe"), "unknown feed"),
        (dict(upsample="cubic"), "unknown upsample of MS2D 'cubic'; known: bilinear, nearest"),
        (dict(full_route="snake_rows"), "unknown route 'snake_rows'"),
        (dict(scan="cross", routes=("raster", "spiral")), "unknown route 'spiral'"),
        (dict(scan="cross", routes=()), "routes must name one or more of raster"),
        (dict(depths=()), r"one or more blocks for each stage, not \(\)"),
        (dict(depths=(1, 0)), r"one or more blocks for each stage, not \(1, 0\)"),
        (dict(d_state=0), "d_state must be 1 or more, not 0"),
        (dict(ssm_ratio=0.0), "ssm_ratio 0.0 leaves no channels of a width of 32"),
        (dict(stem="conv", patch_size=2), 'stem="conv" needs patch_size 4 and an even width, not 2 and 32'),
        (dict(image_size=30), "multiples of 4 pixels, not 30 x 30"),
    ],
)
def test_what_cannot_be_made(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VisualStateSpaceModel(**{**CONFIGS["msvmamba_pico"], **settings})


def test_what_cannot_be_read() -> None:
    model = VisualStateSpaceModel(**CONFIGS["msvmamba_pico"])
    with pytest.raises(InputError, match="multiples of 4 pixels, not 32 x 34; the nearest size is 32 x 32"):
        model(torch.zeros(1, 3, 32, 34))
    with pytest.raises(InputError, match=r"5 tokens are not those of a grid \(2, 2\)"):
        SS2D(4)(torch.zeros(1, 5, 4), (2, 2))
    with pytest.raises(InputError, match="one token a place"):
        SS2D(4)(torch.zeros(1, 4, 4), (1, 2, 2))
