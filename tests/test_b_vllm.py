"""B-VLLM: selection by the question, merging of what was selected twice, and the budget."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import families as tiny
import pytest
import torch
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.models.anatomy import Anatomy
from sightline.reduction import b_vllm
from sightline.reduction.b_vllm import (
    CLS_VECTOR,
    BVllm,
    QFormer,
    merge_targets,
    merged_down,
    merged_rows,
    select,
    tokens_each,
)
from sightline.reduction.frame_reducer import Frames
from sightline.reduction.trained_reducer import hold

SMALL: dict[str, Any] = dict(selected=4, queries=4, width=16, heads=2, weights="untrained")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip_of(model: Any, frames: int, seed: int = 0, question: int = 5) -> Frames:
    tower = randn(frames, 16, 32, seed=seed)
    vectors = {CLS_VECTOR: randn(frames, 32, seed=seed + 50)}
    features = model.model.multi_modal_projector(tower)
    return Frames(Anatomy.of(model), tower, features, (4, 4), randn(question, 32, seed=seed + 99), vectors)


def reordered(frames: Frames, order: list[int]) -> Frames:
    vectors = {CLS_VECTOR: frames.readings[CLS_VECTOR][order]}
    features = frames.features[order]
    return Frames(frames.anatomy, frames.tower[order], features, frames.grid, frames.question, vectors)


def sharp(model: Any, method: BVllm, scale: float = 6.0) -> Any:
    """The method's module, held, with queries that want something: a selection that is not flat."""
    module: Any = method.fresh(Anatomy.of(model))
    with torch.no_grad():
        module.temporal.queries.normal_(generator=torch.Generator().manual_seed(8))
        module.temporal_head.weight *= scale
    hold(model, method, module.eval())
    return module


# --- The selection ---


def test_the_selection_without_noise_is_a_softmax_at_the_temperature() -> None:
    affinity = torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.0, 0.0]])
    weights = torch.exp(affinity * 2)
    torch.testing.assert_close(select(affinity, 0.5, noisy=False), weights / weights.sum(1, keepdim=True))


def test_with_noise_the_most_selected_frame_follows_the_softmax_of_the_affinities() -> None:
    """Gumbel's property: argmax(a + noise) is distributed as softmax(a), at any temperature."""
    affinity = torch.tensor([[1.0, 2.0, 0.0]]).expand(20_000, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        selection = select(affinity, 0.5, noisy=True)
    torch.testing.assert_close(selection.sum(1), torch.ones(20_000))
    counts = Counter(selection.argmax(1).tolist())
    expected = torch.tensor([1.0, 2.0, 0.0]).softmax(0)
    for frame in range(3):
        assert counts[frame] / 20_000 == pytest.approx(float(expected[frame]), abs=0.015)


@torch.no_grad()
def test_the_affinity_is_what_the_queries_make_of_the_question_against_each_frame() -> None:
    model = tiny.tiny_model("llava")
    module = sharp(model, BVllm(**SMALL))
    question, vectors = randn(5, 32), randn(7, 32, seed=1)
    wanted = module.temporal_head(module.temporal(question, vectors[None])[0])
    pairs = [[(w, c) for c in vectors.tolist()] for w in wanted.tolist()]
    expected = [[sum(a * b for a, b in zip(*pair, strict=True)) / 32**0.5 for pair in row] for row in pairs]
    torch.testing.assert_close(module.affinity(question, vectors), torch.tensor(expected), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_places_of_a_question_do_not_drown_its_words(size: float) -> None:
    """Whatever the size of a decoder's embeddings, what tells words apart is about as large as what tells places."""
    module = sharp(tiny.tiny_model("llava"), BVllm(**SMALL)).temporal
    module.read.bias.zero_()
    read: list[Tensor] = []
    module.text_norm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    rest = size * randn(3, 32)
    for word in (size * randn(1, 32, seed=1), size * randn(1, 32, seed=2)):
        module(torch.cat([word, rest]), randn(1, 7, 32, seed=3))
    places = b_vllm._places(4, read[0].shape[-1])
    assert 0.5 < (read[0][0] - read[1][0]).norm() / (places[0] - places[2]).norm() < 4
    torch.testing.assert_close(read[0][1:], read[1][1:])


@torch.no_grad()
def test_the_frames_are_a_set_to_the_selection() -> None:
    model = tiny.tiny_model("llava")
    method = BVllm(**SMALL, merge_threshold=0.99)
    module = sharp(model, method)
    frames = clip_of(model, 6)
    order = [3, 5, 0, 1, 4, 2]
    affinity = module.affinity(frames.question, frames.readings[CLS_VECTOR])
    shuffled = module.affinity(frames.question, frames.readings[CLS_VECTOR][order])
    torch.testing.assert_close(shuffled, affinity[:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(method.tokens(reordered(frames, order)), method.tokens(frames), rtol=0, atol=1e-5)


@torch.no_grad()
def test_centred_the_selection_sees_what_differs_between_frames_at_full_size() -> None:
    model = tiny.tiny_model("llava")
    sharp(model, BVllm(**SMALL))
    frames = clip_of(model, 6)
    changes = frames.readings[CLS_VECTOR] - sum(frames.readings[CLS_VECTOR]) / 6
    vectors = 100 + 0.1 * changes  # what all frames share is a thousand times as large
    hand_made = changes / changes.square().mean().sqrt() * vectors.square().mean().sqrt()
    shared = replace(frames, readings={CLS_VECTOR: vectors})
    got = BVllm(**SMALL, centred=True).tokens(shared)
    wanted = BVllm(**SMALL).tokens(replace(frames, readings={CLS_VECTOR: hand_made}))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)
    assert len(BVllm(**SMALL).tokens(shared)) < len(got)  # flat selections become one


@torch.no_grad()
def test_the_question_decides() -> None:
    model = tiny.tiny_model("llava")
    module = sharp(model, BVllm(**SMALL))
    vectors = randn(6, 32)
    one, other = (select(module.affinity(randn(5, 32, seed=seed), vectors), 0.5, noisy=False) for seed in (1, 2))
    assert (one - other).abs().max() > 0.05


# --- Merging of rows ---


def chained() -> tuple[Tensor, Tensor]:
    """Selections of which row 2 is most like row 1 and row 1 like row 0, row 3 like none; and their content."""
    angles = torch.tensor([0.0, 0.5, 0.9])
    selection = torch.zeros(4, 3)
    selection[:3, 0], selection[:3, 1] = angles.cos(), angles.sin()
    selection[3, 2] = 1
    return torch.tensor([1.0, 10.0, 100.0, 7.0])[:, None, None], selection


def test_a_chain_of_merges_ends_at_its_root_or_loses_what_came_half_way() -> None:
    rows, selection = chained()
    assert merge_targets(selection, 0.75, "drop") == [0, 0, 1, 3]
    assert merge_targets(selection, 0.75, "root") == [0, 0, 0, 3]
    merged, kept = merged_rows(rows, selection, 0.75, "drop")
    assert kept == [0, 3]
    assert merged.flatten().tolist() == [5.5, 7.0]  # the 100 is lost
    merged, kept = merged_rows(rows, selection, 0.75, "root")
    assert kept == [0, 3]
    assert merged.flatten().tolist() == [37.0, 7.0]


def test_a_row_is_merged_above_the_threshold_only() -> None:
    rows, selection = chained()
    first = (1 + float(torch.tensor(0.5).cos())) / 2  # of rows 0 and 1; rows 1 and 2 are more alike
    assert merge_targets(selection, first + 1e-4, "root") == [0, 1, 1, 3]
    assert merge_targets(selection, first - 1e-4, "root") == [0, 0, 0, 3]
    assert merge_targets(selection, 1.0, "root") == [0, 1, 2, 3]
    merged, kept = merged_rows(rows, selection, 1.0, "root")
    assert kept == [0, 1, 2, 3]
    assert torch.equal(merged, rows)


@pytest.mark.parametrize("seed", range(21, 31))
def test_at_a_threshold_of_one_not_even_equal_rows_merge(seed: int) -> None:
    """Whose cosine, of seeds 21 and 30, is rounded to more than 1."""
    row = torch.rand(1, 8, generator=torch.Generator().manual_seed(seed))
    assert merge_targets(row.repeat(6, 1), 1.0, "root") == list(range(6))


@pytest.mark.parametrize("chain", ["root", "drop"])
def test_equal_selections_become_one(chain: Any) -> None:
    rows = randn(1, 5, 3).repeat(6, 1, 1)
    merged, kept = merged_rows(rows, torch.full((6, 4), 0.25), 0.75, chain)
    assert kept == [0]
    torch.testing.assert_close(merged, rows[:1])


# --- The budget, and merging of tokens ---


@pytest.mark.parametrize(
    ("patches", "rows", "queries", "expected"),
    [(576, 16, 32, 32), (576, 18, 32, 32), (576, 20, 32, 28), (576, 64, 32, 9), (576, 600, 32, 1), (100, 7, 32, 13)],
)
def test_the_budget(patches: int, rows: int, queries: int, expected: int) -> None:
    assert tokens_each(patches, rows, queries) == expected


def test_no_budget_is_exceeded_unless_by_a_token_a_row() -> None:
    for patches in (9, 16, 100):
        for queries in (1, 3, 4, 32):
            for rows in range(1, 40):
                assert rows * tokens_each(patches, rows, queries) <= max(patches, rows)


def test_the_most_alike_tokens_become_their_mean() -> None:
    """Tokens 0, 2, 4 look for their match among 1, 3, 5: 4 and 1 are equal in direction, 2 is near 5."""
    tokens = torch.tensor([[[1.0, 0, 0], [0, 2, 0], [0, 0.3, 1], [-1, 0, 0], [0, 4, 0], [0, 0, 1]]])
    assert merged_down(tokens, 6).tolist() == tokens.tolist()
    five = merged_down(tokens, 5)[0].tolist()
    assert five == [[1, 0, 0], [0, pytest.approx(0.3), 1], [0, 3, 0], [-1, 0, 0], [0, 0, 1]]
    four = torch.tensor([[1, 0, 0], [0, 3, 0], [-1, 0, 0], [0, 0.15, 1]])
    torch.testing.assert_close(merged_down(tokens, 4)[0], four)


@pytest.mark.parametrize("count", [5, 8])
@pytest.mark.parametrize("target", [1, 2, 3, 4])
def test_merged_tokens_carry_the_weight_of_what_they_are_made_of(count: int, target: int) -> None:
    """The last one left is the mean of all, however often it took."""
    tokens = randn(3, count, 6)
    merged = merged_down(tokens, target)
    assert merged.shape == (3, target, 6)
    if target == 1:
        torch.testing.assert_close(merged[:, 0], tokens.mean(1), rtol=0, atol=1e-5)


# --- The method ---


def test_the_defaults() -> None:
    method = BVllm()
    assert (method.selected, method.queries, method.merge_threshold, method.temperature) == (16, 32, 0.75, 0.5)
    assert (method.noise, method.chain, method.order) == ("training", "root", "query")
    assert method.identity().is_identity


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.75, 1.0])
def test_the_tokens_are_bounded_whatever_the_length(threshold: float) -> None:
    model = tiny.tiny_model("llava")
    method = BVllm(**SMALL, merge_threshold=threshold)
    sharp(model, method)
    counts = {frames: len(method.tokens(clip_of(model, frames))) for frames in (1, 2, 3, 8, 40)}
    assert max(counts.values()) <= 4 * 4
    assert counts[1] == (4 if threshold < 1 else 16)
    assert counts[40] > 4  # the selection is not flat, so that several rows are left


@torch.no_grad()
def test_step_by_step() -> None:
    """The paper's pipeline in loops, with the module's own Q-Formers."""
    model = tiny.tiny_model("llava")
    method = BVllm(**(SMALL | dict(selected=5, queries=3)), merge_threshold=0.8)
    module = sharp(model, method)
    frames = clip_of(model, 6)
    affinity = module.affinity(frames.question, frames.readings[CLS_VECTOR])
    selection = [row.mul(2).exp() / row.mul(2).exp().sum() for row in affinity]
    normed = module.frame_norm(frames.tower)
    rows = [sum(weight * frame for weight, frame in zip(row, normed, strict=True)) for row in selection]
    goes_to = list(range(5))
    for i in range(5):
        alike = [float((torch.cosine_similarity(selection[i], selection[j], dim=0) + 1) / 2) for j in range(i)]
        if alike and max(alike) > 0.8:
            goes_to[i] = goes_to[alike.index(max(alike))]
    left = [i for i in range(5) if goes_to[i] == i]
    assert 1 < len(left) < 5
    expected = []
    for root in left:
        members = [rows[i] for i in range(5) if goes_to[i] == root]
        row = sum(members) / len(members)
        read = module.spatial(frames.question, row[None])[0]
        share = min(3, int(max(1, (16 // 3) / len(left) * 3)))
        assert share == 3  # nothing to merge
        expected.append(module.projector(module.spatial_head(read)))
    torch.testing.assert_close(method.tokens(frames), torch.cat(expected), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_picture_is_read_as_it_is() -> None:
    """Of one frame every query selects all: the rows are that frame, and one is left."""
    model = tiny.tiny_model("llava")
    method = BVllm(**SMALL)
    module = sharp(model, method)
    frames = clip_of(model, 1)
    read = module.spatial(frames.question, module.frame_norm(frames.tower))[0]
    expected = module.projector(module.spatial_head(read))
    torch.testing.assert_close(method.tokens(frames), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_in_the_order_of_time_the_rows_stand_where_they_look_most() -> None:
    model = tiny.tiny_model("llava")
    settings = SMALL | dict(merge_threshold=1.0, queries=4)
    module = sharp(model, BVllm(**settings))
    frames = clip_of(model, 9, seed=3)
    by_query = BVllm(**settings).tokens(frames).unflatten(0, (4, -1))
    by_time = BVllm(**settings, order="time").tokens(frames).unflatten(0, (4, -1))
    selection = select(module.affinity(frames.question, frames.readings[CLS_VECTOR]), 0.5, noisy=False)
    places = selection.argmax(1).tolist()
    order = sorted(range(4), key=lambda row: places[row])
    assert order != [0, 1, 2, 3]
    torch.testing.assert_close(by_time, by_query[order], rtol=0, atol=1e-5)


def test_noise_is_for_training_unless_asked_for() -> None:
    model = tiny.tiny_model("llava")
    frames = clip_of(model, 6)

    def varies(noise: Any, training: bool) -> bool:
        method = BVllm(**SMALL, noise=noise)
        sharp(model, method).train(training)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            one, other = method.tokens(frames), method.tokens(frames)
        return one.shape != other.shape or not torch.equal(one, other)

    assert [varies("training", training) for training in (False, True)] == [False, True]
    assert [varies("always", training) for training in (False, True)] == [True, True]
    assert [varies("never", training) for training in (False, True)] == [False, False]


def test_the_loss_reaches_the_selector_through_the_soft_weights() -> None:
    model = tiny.tiny_model("llava")
    method = BVllm(**SMALL)
    module = sharp(model, method, scale=1.0)
    module.requires_grad_(True)
    method.tokens(clip_of(model, 6)).square().sum().backward()
    silent = {name for name, value in module.named_parameters() if value.grad is None or not value.grad.any()}
    # Text is read by queries only, so that what the last layer makes of the text itself is for nobody.
    last = ("forward_text", "text_norm")
    assert {name for name in silent if not ("layers.1" in name and name.split(".")[3] in last)} == set()


@torch.no_grad()
def test_without_a_text_input_the_question_changes_nothing_and_shares_its_row() -> None:
    model = tiny.tiny_model("llava")
    blind = BVllm(**SMALL, qformer_text_input=False)
    asking = BVllm(**SMALL)
    sharp(model, asking)  # the same weights serve both
    assert asking.one_question
    assert not blind.one_question
    one, other = (clip_of(model, 6, question=length) for length in (5, 9))
    assert torch.equal(blind.tokens(one), blind.tokens(other))
    assert not torch.equal(asking.tokens(one), asking.tokens(other))
    untold = replace(one, question=one.question[:0])
    torch.testing.assert_close(blind.tokens(one), asking.tokens(untold), rtol=0, atol=0)


def test_the_question_is_cut_on_the_left() -> None:
    former = QFormer(3, width=8, layers=2, heads=2, text_width=5, seen_width=4).eval()
    long, seen = randn(300, 5), randn(2, 6, 4, seed=1)
    with torch.no_grad():
        assert torch.equal(former(long, seen), former(long[-256:], seen))
        assert not torch.equal(former(long, seen), former(long[:256], seen))


@torch.no_grad()
def test_the_frame_vector_is_what_the_tower_holds_at_cls() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0, images_per_row=3)
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
    found: list[Frames] = []
    method = BVllm(**SMALL)
    tokens = BVllm.tokens
    try:
        BVllm.tokens = lambda self, frames: found.append(frames) or tokens(self, frames)  # type: ignore[method-assign]
        with sl.attach(model, method):
            model(**batch)
        with sl.attach(model, BVllm(**SMALL, frame_vector="mean")):
            model(**batch)
    finally:
        BVllm.tokens = tokens  # type: ignore[method-assign]
    torch.testing.assert_close(found[0].readings[CLS_VECTOR], states[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0].tower, states[:, 1:], rtol=0, atol=1e-6)
    assert found[1].readings == {}


def test_a_tower_without_cls_or_read_at_its_end_gives_means() -> None:
    for model in (tiny.tiny_model("paligemma"), tiny.tiny_model("llava", vision_feature_layer=-1)):
        assert CLS_VECTOR not in BVllm(**SMALL).readings(Anatomy.of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(selected=-1), "selected of b_vllm"),
        (dict(queries=0), "queries of b_vllm"),
        (dict(merge_threshold=1.5), "merge_threshold of b_vllm"),
        (dict(temperature=0.0), "temperature of b_vllm"),
        (dict(noise="maybe"), "noise of b_vllm"),
        (dict(chain="lost"), "chain of b_vllm"),
        (dict(order="random"), "order of b_vllm"),
        (dict(frame_vector="max"), "frame_vector of b_vllm"),
        (dict(width=30), "width of b_vllm must be a multiple of heads"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BVllm(**settings)
