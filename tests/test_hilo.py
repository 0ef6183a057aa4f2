"""HiLo, window and spatial-reduction attention: against loops over tokens, and where they are plain attention."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sightline.encoders.encoder import MacCounter, count_parameters
from sightline.errors import InputError
from sightline.mixers.attention import Attention
from sightline.mixers.hilo import HiLo
from sightline.mixers.mixer import Mixer
from sightline.mixers.spatial_reduction import SpatialReductionAttention
from sightline.mixers.window_attention import WindowAttention

GRIDS = [(4, 4), (3, 5), (1, 1)]


def tokens(grid: tuple[int, int], width: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], width, generator=generator, dtype=torch.float64)


def seeded(mixer: Mixer) -> Mixer:
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return mixer.double().eval()


def windows(grid: tuple[int, int], side: int) -> list[list[int]]:
    """The tokens of each window, windows and tokens in raster order; what the grid's end cuts off is missing."""
    found: dict[tuple[int, int], list[int]] = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            found.setdefault((row // side, column // side), []).append(row * grid[1] + column)
    return [found[key] for key in sorted(found)]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, heads: int, reads: list[list[int]]) -> Tensor:
    """Softmax attention of each token, written as sums: `reads[i]` are the keys that query i sees."""
    rows, width = [], query.shape[-1] // heads
    for index, seen in enumerate(reads):
        parts = []
        for head in range(heads):
            cut = slice(head * width, (head + 1) * width)
            scores = [float(query[index, cut] @ key[other, cut]) / math.sqrt(width) for other in seen]
            weights = [math.exp(score) for score in scores]
            total = sum(weights)
            parts.append(sum(weight / total * value[other, cut] for weight, other in zip(weights, seen, strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def in_windows(qkv: Tensor, heads: int, grid: tuple[int, int], side: int) -> Tensor:
    reads: list[list[int]] = [[] for _ in range(len(qkv))]
    for window in windows(grid, side):
        for index in window:
            reads[index] = window
    return one_by_one(*qkv.chunk(3, dim=-1), heads, reads)


def slow_hilo(mixer: HiLo, x: Tensor, grid: tuple[int, int]) -> Tensor:
    parts = []
    if mixer.high_heads:
        parts.append(mixer.high_proj(in_windows(mixer.high_qkv(x), mixer.high_heads, grid, mixer.window_size)))
    if mixer.low_heads:
        averages = torch.stack([x[window].mean(dim=0) for window in windows(grid, mixer.window_size)])
        key, value = mixer.low_key_value(averages).chunk(2, dim=-1)
        everything = [list(range(len(averages)))] * len(x)
        parts.append(mixer.low_proj(one_by_one(mixer.low_query(x), key, value, mixer.low_heads, everything)))
    return torch.cat(parts, dim=-1)


def slow_window(mixer: WindowAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    return mixer.proj(in_windows(mixer.qkv(x), mixer.num_heads, grid, mixer.window_size))


def slow_reduction(mixer: SpatialReductionAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    fewer, side = x, mixer.reduction
    if mixer.reduce is not None:
        rows = []
        for window in windows(grid, side):
            total = mixer.reduce.bias
            for index in window:
                row, column = divmod(index, grid[1])
                total = total + mixer.reduce.weight[:, :, row % side, column % side] @ x[index]
            rows.append(total)
        fewer = mixer.norm(torch.stack(rows))
    key, value = mixer.key_value(fewer).chunk(2, dim=-1)
    mixed = one_by_one(mixer.query(x), key, value, mixer.num_heads, [list(range(len(fewer)))] * len(x))
    return mixer.proj(mixed)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("window_size", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_hilo_is_the_loop_over_tokens(grid: tuple[int, int], window_size: int, alpha: float) -> None:
    mixer, x = seeded(HiLo(12, 4, alpha=alpha, window_size=window_size)), tokens(grid, 12)
    expected = torch.stack([slow_hilo(mixer, picture, grid) for picture in x])  # type: ignore[arg-type]
    torch.testing.assert_close(mixer(x, grid), expected, rtol=0, atol=1e-12)
    single = mixer.float()(x.float(), grid)
    torch.testing.assert_close(single, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_the_two_it_is_compared_with_are_their_loops(grid: tuple[int, int]) -> None:
    x = tokens(grid, 8)
    for side in (1, 2, 3):
        window = seeded(WindowAttention(8, 2, window_size=side))
        expected = torch.stack([slow_window(window, picture, grid) for picture in x])  # type: ignore[arg-type]
        torch.testing.assert_close(window(x, grid), expected, rtol=0, atol=1e-12)
        reduced = seeded(SpatialReductionAttention(8, 2, reduction=side))
        expected = torch.stack([slow_reduction(reduced, picture, grid) for picture in x])  # type: ignore[arg-type]
        torch.testing.assert_close(reduced(x, grid), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_where_they_are_plain_attention() -> None:
    grid, x = (3, 5), tokens((3, 5), 12)
    plain = seeded(Attention(12, 3))
    expected = plain(x, grid)
    query_key_value = plain.qkv.weight, plain.qkv.bias

    window = WindowAttention(12, 3, window_size=6).double()
    window.load_state_dict(plain.state_dict())
    torch.testing.assert_close(window(x, grid), expected, rtol=0, atol=1e-12)

    one = HiLo(12, 3, alpha=0.5, window_size=1).double()
    assert (one.low_heads, one.high_heads) == (3, 0)
    reduced = SpatialReductionAttention(12, 3, reduction=1).double()
    for mixer, query, key_value, proj in (
        (one, one.low_query, one.low_key_value, one.low_proj),
        (reduced, reduced.query, reduced.key_value, reduced.proj),
    ):
        for part, value in zip(("weight", "bias"), query_key_value, strict=True):
            getattr(query, part).copy_(value[:12])
            getattr(key_value, part).copy_(value[12:])
            getattr(proj, part).copy_(getattr(plain.proj, part))
        torch.testing.assert_close(mixer(x, grid), expected, rtol=0, atol=1e-12)

    high = HiLo(12, 3, alpha=0.0, window_size=5).double()  # one window holds the whole grid
    high.high_qkv.load_state_dict(plain.qkv.state_dict())
    high.high_proj.load_state_dict(plain.proj.state_dict())
    torch.testing.assert_close(high(x, grid), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_high_heads_see_their_window_and_low_heads_only_averages() -> None:
    grid, mixer = (4, 6), seeded(HiLo(12, 4, alpha=0.5))
    x = tokens(grid, 12)
    before = mixer(x, grid)
    # Rows 0 and 1, columns 2 and 3 are one window: swap two of its tokens. Its average stays.
    swapped = x.clone()
    swapped[:, [2, 9]] = x[:, [9, 2]]
    after = mixer(swapped, grid)
    elsewhere = [index for index in range(24) if index not in (2, 3, 8, 9)]
    torch.testing.assert_close(after[:, elsewhere], before[:, elsewhere], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[:, [2, 9]], before[:, [9, 2]], rtol=0, atol=1e-12)
    # Another content of the window: the Hi-Fi half, which comes first, changes there only, the Lo-Fi half everywhere.
    other = x.clone()
    other[:, [2, 3, 8, 9]] += 1.0
    change = (mixer(other, grid) - before).abs()
    assert change[:, elsewhere, :6].max() < 1e-12
    assert change[:, elsewhere, 6:].min() > 1e-9
    assert change[:, [2, 3, 8, 9], :6].min() > 1e-9


@pytest.mark.parametrize(
    ("alpha", "heads", "parameters", "macs"),
    [
        (0.0, (0, 12), 590_208, 116_200_000),
        (0.5, (6, 6), 516_480, 83_467_776),
        (0.9, (10, 2), 549_248, 77_700_000),
        (1.0, (12, 0), 590_208, 79_630_000),
    ],
)
def test_the_size_of_a_layer(alpha: float, heads: tuple[int, int], parameters: int, macs: int) -> None:
    with torch.device("meta"):
        mixer = HiLo(384, 12, alpha=alpha, qkv_bias=False)
        x = torch.empty(2, 196, 384)
    assert (mixer.low_heads, mixer.high_heads) == heads
    assert count_parameters(mixer) == parameters
    with MacCounter(mixer) as counter:
        mixer(x, (14, 14))
    assert counter.macs == pytest.approx(2 * macs, rel=5e-4)
    if alpha == 0.5:
        assert counter.macs == 2 * macs


def test_the_multiply_adds_of_the_other_two() -> None:
    # N D^2 for each full-width linear map; windows of 49 tokens; a quarter of the keys.
    square, squares = 196 * 384 * 384, 196 * 196 * 384
    with torch.device("meta"):
        x = torch.empty(1, 196, 384)
        window, reduced = WindowAttention(384, 12), SpatialReductionAttention(384, 12)
    for mixer, macs in (
        (window, 4 * square + 2 * 196 * 49 * 384),
        (reduced, int((1 + 0.5 + 1 + 1) * square) + 2 * squares // 4),
    ):
        with MacCounter(mixer) as counter:
            mixer(x, (14, 14))
        assert counter.macs == macs


def test_the_number_of_low_heads_is_rounded_down() -> None:
    assert [HiLo(12, 3, alpha=alpha).low_heads for alpha in (0.9, 0.3, 0.0, 1.0)] == [2, 0, 0, 3]


@pytest.mark.parametrize("grid", [(4, 2), (3, 5)])
def test_gradients(grid: tuple[int, int]) -> None:
    x = tokens(grid, 4, batch=1).requires_grad_()
    for made in (HiLo(4, 2, alpha=0.5), WindowAttention(4, 2, window_size=2), SpatialReductionAttention(4, 2)):
        mixer = seeded(made)
        assert torch.autograd.gradcheck(partial(mixer, grid=grid), (x,))
        mixer(x, grid).square().sum().backward()
        assert all(parameter.grad is not None for parameter in mixer.parameters())


@torch.no_grad()
def test_a_batch_is_its_rows() -> None:
    grid, x = (3, 5), tokens((3, 5), 8, batch=3)
    for made in (HiLo(8, 2, alpha=0.5), WindowAttention(8, 2, window_size=2), SpatialReductionAttention(8, 2)):
        mixer = seeded(made)
        rows = torch.cat([mixer(row[None], grid) for row in x])
        torch.testing.assert_close(mixer(x, grid), rows, rtol=0, atol=1e-12)


def test_what_is_refused() -> None:
    for make in (HiLo, SpatialReductionAttention, WindowAttention):
        with pytest.raises(InputError, match="the width 10 cannot be shared by 4 heads"):
            make(10, 4)
    for make in (HiLo, WindowAttention):
        with pytest.raises(InputError, match="window_size must be 1 or more tokens a side, not 0"):
            make(12, 4, window_size=0)
    with pytest.raises(InputError, match="reduction must be 1 or more tokens a side, not 0"):
        SpatialReductionAttention(12, 4, reduction=0)
    for alpha in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match="alpha must be from 0 to 1"):
            HiLo(12, 4, alpha=alpha)
    for mixer in (HiLo(12, 4), SpatialReductionAttention(12, 4), WindowAttention(12, 4)):
        with pytest.raises(InputError, match=r"not 10 on \(3, 3\)"):
            mixer(torch.zeros(1, 10, 12), (3, 3))
