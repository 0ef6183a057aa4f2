"""The tensor arithmetic of prompts: dropping columns, hiding pictures, stacking views, against loops over lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.models.rows import View, causal, gather_mask, hide_keys, map_mask, stack_masks, stack_views

CLOSED = torch.finfo(torch.float32).min


@dataclass
class Column:
    """One column of one row, with the place that it came from."""

    place: int
    position: list[int]
    visual: bool
    real: bool
    kept: bool = True


def random_view(seed: int, rows: int = 4, length: int = 12, axes: int | None = None, layers: int = 2) -> View:
    """Left-padded rows of different lengths, with visual tokens in one or two runs, or none. An embedding says where it
    stands: 100 * row + column."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, 5, (rows, 1), generator=generator)
    padding[0] = 0
    places = torch.arange(length).expand(rows, -1)
    real = places >= padding
    visual = (torch.rand(rows, length, generator=generator) < 0.5) & real
    visual[:, -1] = False
    visual[1] = False
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    if axes is not None:
        positions = positions + torch.randint(0, 3, (axes, rows, length), generator=generator)
    embeds = (100.0 * torch.arange(rows)[:, None] + places)[..., None].expand(-1, -1, 3).clone()
    deepstack = tuple(torch.rand(int(visual.sum()), 3, generator=generator) for _ in range(layers))
    return View(embeds, positions, visual, real, deepstack)


def random_keep(view: View, seed: int) -> Tensor:
    return torch.rand(int(view.visual.sum()), generator=torch.Generator().manual_seed(1000 + seed)) < 0.4


def columns_of(view: View, keep: Tensor) -> list[list[Column]]:
    """The same as lists, with `keep` dealt out to the visual columns row after row."""
    flags = iter(keep.tolist())
    positions = view.positions if view.positions.ndim == 3 else view.positions[None]
    table = []
    for row in range(len(view.embeds)):
        columns = []
        for place in range(view.embeds.shape[1]):
            visual = bool(view.visual[row, place])
            kept = next(flags) if visual else True
            position = [int(axis[row, place]) for axis in positions]
            columns.append(Column(place, position, visual, bool(view.real[row, place]), kept))
        table.append(columns)
    return table


def left(columns: list[Column]) -> list[Column]:
    return [column for column in columns if column.real and column.kept]


# --- Dropping visual tokens ---


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("axes", [None, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_keeping_equals_lists_from_which_columns_are_deleted(seed: int, axes: int | None, compact: bool) -> None:
    view = random_view(seed, axes=axes)
    keep = random_keep(view, seed)
    short, columns = view.keeping(keep, compact=compact)
    table = columns_of(view, keep)
    longest = max(len(left(row)) for row in table)
    assert short.embeds.shape == (4, longest, 3)
    assert columns.shape == short.visual.shape == short.real.shape == (4, longest)
    for row, every in enumerate(table):
        stay = left(every)
        start = longest - len(stay)
        assert short.real[row].tolist() == [False] * start + [True] * len(stay)
        assert columns[row, start:].tolist() == [column.place for column in stay]
        assert short.embeds[row, start:, 0].tolist() == [100.0 * row + column.place for column in stay]
        assert short.visual[row].tolist() == [False] * start + [column.visual for column in stay]
        for at, column in enumerate(stay, start):
            gone = sum(not other.kept for other in every[: column.place])
            closed_up = gone if compact and axes is None else 0
            want = [position - closed_up for position in column.position]
            assert short.positions[..., row, at].reshape(-1).tolist() == want
    for before, after in zip(view.deepstack, short.deepstack, strict=True):
        assert torch.equal(after, torch.stack([one for one, stays in zip(before, keep.tolist(), strict=True) if stays]))
        assert len(after) == int(short.visual.sum())


def test_keeping_by_hand() -> None:
    # Row 0: P t v v v t; row 1: t v t t t t. P is padding, the second and third picture token of row 0 go.
    visual = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    positions = torch.tensor([[0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]])
    view = View(torch.arange(12.0).reshape(2, 6, 1), positions, visual, real)
    keep = torch.tensor([True, False, False, True])
    short, columns = view.keeping(keep, compact=True)
    assert short.embeds.shape == (2, 6, 1)  # the longest row keeps all
    assert columns[0].tolist()[3:] == [1, 2, 5]
    assert short.embeds[0, 3:, 0].tolist() == [1.0, 2.0, 5.0]
    assert short.positions[0].tolist()[3:] == [0, 1, 2]
    assert short.real.long().tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert short.visual.long().tolist() == [[0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    kept, _ = view.keeping(keep, compact=False)
    assert kept.positions[0].tolist()[3:] == [0, 1, 4]
    none, columns = view.keeping(torch.zeros(4, dtype=torch.bool), compact=True)
    assert columns[0].tolist()[3:] == [1, 5]
    assert columns[1].tolist() == [0, 2, 3, 4, 5]
    assert none.positions[1].tolist() == [0, 1, 2, 3, 4]
    assert not none.visual.any()


def test_keeping_everything_takes_away_only_what_all_rows_have_as_padding() -> None:
    view = random_view(3)
    wide = View(
        embeds=torch.nn.functional.pad(view.embeds, (0, 0, 2, 0)),
        positions=torch.nn.functional.pad(view.positions, (2, 0)),
        visual=torch.nn.functional.pad(view.visual, (2, 0)),
        real=torch.nn.functional.pad(view.real, (2, 0)),
        deepstack=view.deepstack,
    )
    short, columns = wide.keeping(torch.ones(int(view.visual.sum()), dtype=torch.bool), compact=True)
    assert torch.equal(columns, torch.arange(2, 14).expand(4, -1))
    for name in ("embeds", "positions", "visual", "real"):
        assert torch.equal(getattr(short, name), getattr(view, name))


# --- Other pictures, no picture ---


def test_with_features_puts_them_in_the_places_of_the_pictures_in_order() -> None:
    view = random_view(5)
    count = int(view.visual.sum())
    features = -torch.arange(count, dtype=torch.float64)[:, None].expand(-1, 3)
    before = view.embeds.clone()
    other = view.with_features(features, [layer + 1 for layer in view.deepstack])
    order = iter(range(count))
    for row in range(4):
        for place in range(12):
            want = -float(next(order)) if view.visual[row, place] else 100.0 * row + place
            assert other.embeds[row, place].tolist() == [want] * 3
    assert other.embeds.dtype == torch.float32
    assert torch.equal(view.embeds, before)
    assert torch.equal(other.deepstack[1], view.deepstack[1] + 1)
    assert other.positions is view.positions
    assert other.real is view.real


@pytest.mark.parametrize("axes", [None, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_without_picture_equals_lists_without_the_visual_columns(seed: int, axes: int | None) -> None:
    view = random_view(seed, axes=axes)
    hidden = view.without_picture(keep_positions=False)
    for row, every in enumerate(columns_of(view, random_keep(view, seed))):
        text = [column for column in every if column.real and not column.visual]
        assert hidden.real[row].nonzero()[:, 0].tolist() == [column.place for column in text]
        for axis in range(axes or 1):
            first = min(column.position[axis] for column in every if column.real)
            got = hidden.positions[..., row, :].reshape(-1, 12)[axis][hidden.real[row]].tolist()
            assert got == list(range(first, first + len(text)))
    assert not hidden.visual.any()
    assert hidden.deepstack == ()
    assert hidden.positions.min() >= 0
    kept = view.without_picture(keep_positions=True)
    assert torch.equal(kept.positions, view.positions)
    assert torch.equal(kept.real, hidden.real)


def test_without_picture_by_hand() -> None:
    visual = torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    real = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()
    view = View(torch.zeros(1, 6, 1), torch.tensor([[0, 1, 2, 3, 4, 5]]), visual, real)  # counted from one, as Gemma
    assert view.without_picture(keep_positions=False).positions[0, [1, 4, 5]].tolist() == [1, 2, 3]


# --- Masks ---


def slow_square(mask: Tensor, columns: Tensor, real: Tensor) -> list[list[list[bool]]]:
    """Which key each query sees after dropping, from the open entries of the mask before it."""
    rows, length = columns.shape
    seen = []
    for row in range(rows):
        old = mask[row if len(mask) > 1 else 0, 0]
        place = columns[row].tolist()
        seen.append(
            [
                [bool(old[place[q], place[k]]) and (bool(real[row, k]) or q == k) for k in range(length)]
                for q in range(length)
            ]
        )
    return seen


def random_square(seed: int, rows: int, length: int) -> Tensor:
    """Bool [rows, 1, length, length]: causal, some of what lies ahead open too, every query sees itself."""
    ahead = torch.rand(rows, 1, length, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    return causal(rows, length, length, torch.device("cpu")) | ahead


@pytest.mark.parametrize("rows", [1, 4], ids=["shared", "by row"])
@pytest.mark.parametrize("seed", range(3))
def test_a_square_mask_loses_the_same_queries_and_keys(seed: int, rows: int) -> None:
    view = random_view(seed)
    short, columns = view.keeping(random_keep(view, seed), compact=True)
    square = random_square(seed, rows, 12)
    want = slow_square(square, columns, short.real)
    assert gather_mask(square, columns, short.real)[:, 0].tolist() == want
    additive = torch.zeros(square.shape).masked_fill(~square, CLOSED)
    got = gather_mask(additive, columns, short.real)
    assert got.eq(0)[:, 0].tolist() == want
    assert got[got != 0].eq(CLOSED).all()
    both = gather_mask({"full_attention": square, "sliding_attention": None}, columns, short.real)
    assert both["full_attention"][:, 0].tolist() == want
    assert both["sliding_attention"] is None


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_layers_that_slide_see_a_window_of_what_is_left(seed: int, additive: bool) -> None:
    view, window = random_view(seed), 3
    short, columns = view.keeping(random_keep(view, seed), compact=True)
    whole = random_square(seed, 4, 12)
    back = torch.arange(12)[:, None] - torch.arange(12)
    sliding = whole & ((back < window) | (torch.rand(12, 12, generator=torch.Generator().manual_seed(seed)) < 0.1))
    was_seen, want = (slow_square(mask, columns, short.real) for mask in (sliding, whole))
    for row, square in enumerate(want):
        for query, keys in enumerate(square):
            for key in range(len(keys)):
                near = 0 <= query - key < window
                keys[key] = was_seen[row][query][key] or (keys[key] and near)
    masks = {"full_attention": whole, "sliding_attention": sliding}
    if additive:
        masks = {kind: torch.zeros(mask.shape).masked_fill(~mask, CLOSED) for kind, mask in masks.items()}
    got = gather_mask(masks, columns, short.real, window)["sliding_attention"]
    assert (got.eq(0) if additive else got)[:, 0].tolist() == want


@pytest.mark.parametrize("mask", [None, torch.ones(4, 12, dtype=torch.long)], ids=["none", "2-D"])
def test_a_mask_by_row_becomes_what_is_real_also_when_there_was_none(mask: Any) -> None:
    view = random_view(1)
    short, columns = view.keeping(random_keep(view, 1), compact=False)
    got = gather_mask(mask, columns, short.real)
    assert got.dtype == torch.long
    assert got.tolist() == short.real.long().tolist()


@pytest.mark.parametrize("queries", [1, 3, 6])
@pytest.mark.parametrize("additive", [False, True])
def test_hidden_keys_are_closed_to_all_but_themselves(queries: int, additive: bool) -> None:
    square = causal(2, queries, 6, torch.device("cpu"))
    hidden = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]]).bool()
    mask = torch.zeros(square.shape).masked_fill(~square, CLOSED) if additive else square
    before = mask.clone()
    got = hide_keys(mask, hidden)
    seen = got == 0 if additive else got
    for row in range(2):
        for query in range(queries):
            itself = 6 - queries + query
            want = [k <= itself and (not hidden[row, k] or k == itself) for k in range(6)]
            assert seen[row, 0, query].tolist() == want
    assert torch.equal(mask, before)
    assert seen.any(dim=-1).all()  # no query sees nothing at all


def test_hiding_every_key_of_a_row_leaves_each_query_itself() -> None:
    got = hide_keys(causal(1, 4, 4, torch.device("cpu")), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(got[0, 0], torch.eye(4, dtype=torch.bool))
    masked = hide_keys(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16), torch.ones(1, 4, dtype=torch.bool))
    assert masked.dtype == torch.bfloat16
    assert masked.softmax(dim=-1).isfinite().all()


def test_causal() -> None:
    assert causal(2, 2, 4, torch.device("cpu"))[1, 0].long().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_map_mask() -> None:
    ones = torch.ones(1, 2)
    assert map_mask(None, lambda mask: mask) is None
    assert torch.equal(map_mask(ones, lambda mask: mask if mask is None else mask * 2), ones * 2)
    assert map_mask({"a": None, "b": None}, lambda mask: ones) == {"a": ones, "b": ones}


# --- Stacking ---

REAL = [torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(), torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()]


def test_masks_by_row_are_stacked() -> None:
    both = [[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]]
    assert stack_masks(torch.ones(2, 3), REAL, queries=3).tolist() == both
    assert stack_masks(None, REAL, queries=3).tolist() == both
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert stack_masks(None, [everything, everything], queries=1) is None
    assert stack_masks(torch.ones(2, 3), [everything, everything], queries=1).tolist() == [[1, 1, 1]] * 4


@pytest.mark.parametrize("queries", [1, 3])
def test_square_masks_are_stacked_and_hide_what_each_view_hides(queries: int) -> None:
    square = causal(2, queries, 3, torch.device("cpu"))
    got = stack_masks(square, REAL, queries)
    assert got.shape == (4, 1, queries, 3)
    for index, row in enumerate([*REAL[0], *REAL[1]]):
        for query in range(queries):
            itself = 3 - queries + query
            assert got[index, 0, query].tolist() == [k <= itself and (bool(row[k]) or k == itself) for k in range(3)]
    additive = stack_masks(torch.zeros(2, 1, queries, 3).masked_fill(~square, CLOSED), REAL, queries)
    assert torch.equal(additive == 0, got)
    shared = stack_masks(square[:1], REAL, queries)
    assert torch.equal(shared, got)


def test_where_the_family_gives_no_square_mask_one_is_made_if_a_view_hides_something() -> None:
    got = stack_masks({"full_attention": None, "sliding_attention": None}, REAL, queries=1)
    want = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]]).bool()
    assert torch.equal(got["full_attention"][:, 0, 0], want)
    assert torch.equal(got["sliding_attention"][:, 0, 0], want)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert stack_masks({"full_attention": None}, [everything, everything], queries=1) == {"full_attention": None}


def test_a_sliding_layer_that_holds_fewer_keys_holds_the_last_ones() -> None:
    window = torch.ones(2, 1, 1, 2, dtype=torch.bool)
    got = stack_masks({"sliding_attention": window}, REAL, queries=1)["sliding_attention"]
    assert got[:, 0, 0].long().tolist() == [[1, 1], [1, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("axes", [None, 3])
def test_views_are_stacked_one_under_the_other(axes: int | None) -> None:
    view = random_view(2, axes=axes)
    other = view.with_features(torch.ones(int(view.visual.sum()), 3), [layer + 5 for layer in view.deepstack])
    text = view.without_picture(keep_positions=False)
    stacked = stack_views([view, other, text])
    assert torch.equal(stacked["inputs_embeds"], torch.cat([view.embeds, other.embeds, text.embeds]))
    assert stacked["position_ids"].shape == ((12, 12) if axes is None else (axes, 12, 12))
    for index, one in enumerate([view, other, text]):
        rows = slice(4 * index, 4 * index + 4)
        assert torch.equal(stacked["position_ids"][..., rows, :], one.positions)
        assert torch.equal(stacked["visual_pos_masks"][rows], one.visual)
    places = stacked["visual_pos_masks"]
    for layer, features in enumerate(stacked["deepstack_visual_embeds"]):
        # What the decoder adds, place by place: the view's own features, and nothing in the view without a picture.
        added = torch.zeros(12, 12, 3)
        added[places] = features
        assert torch.equal(added[:4][view.visual], view.deepstack[layer])
        assert torch.equal(added[4:8][view.visual], view.deepstack[layer] + 5)
        assert not added[8:].any()


def test_views_without_deepstack_say_nothing_about_visual_places() -> None:
    assert set(stack_views([random_view(2, layers=0)])) == {"inputs_embeds", "position_ids"}
