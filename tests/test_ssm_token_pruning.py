"""ToP-ViM: which tokens stay, and that scans over them keep the distances, against scans over all with silent ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.ssm_token_pruning import Kept, TopVim, kept_patches, taken
from sightline.encoders.vim import Vim
from sightline.errors import InputError
from sightline.mixers.bidirectional_mamba import ScanInputs, SelectiveBranch

WIDTH, STATES = 8, 3


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module: Any, seed: int = 0) -> Any:
    module = module.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.add_(draw(*parameter.shape, seed=seed + number) / 3)
    return module


SIZES: dict[str, Any] = dict(image_size=(12, 20), embed_dim=WIDTH, depth=4, patch_size=4, d_state=STATES, num_classes=5)


def small(**options: Any) -> TopVim:
    torch.manual_seed(0)
    return stirred(TopVim(**SIZES | dict(prune_layers=(1, 3), keep_ratio=0.6) | options))


# --- How many stay ---


@pytest.mark.parametrize(
    ("ratio", "counts"), [(0.8, [157, 125, 101]), (0.75, [147, 111, 83]), (0.7, [139, 97, 69]), (1.0, [197, 197])]
)
def test_token_counts_are_those_of_the_official_rule(ratio: float, counts: list[int]) -> None:
    tokens, found = 197, []
    for _ in counts:
        tokens = kept_patches(tokens - 1, ratio) + 1
        found.append(tokens)
    assert found == counts


def test_hidden_states_shrink_and_features_keep_the_grid() -> None:
    encoder = small()
    features = encoder(draw(2, 3, 12, 20), hidden_states=True)
    # 15 patches: ceil(9) = 9 is odd, 8 stay; ceil(4.8) = 5 is odd, 4 stay.
    assert [state.shape[1] for state in features.hidden_states] == [15, 15, 8, 8, 4]
    assert features.grid == (3, 5)
    assert features.tokens.shape == (2, 15, WIDTH)
    assert features.maps[0].shape == (2, WIDTH, 3, 5)


def test_published_configurations() -> None:
    for size, millions in (("tiny", 7.15), ("small", 25.8)):
        with torch.device("meta"):
            encoder = create_encoder(f"top_vim_{size}", num_classes=1000)
        assert count_parameters(encoder) == pytest.approx(millions * 1e6, rel=0.001)
    d, e, n, r = 192, 384, 16, 12
    token = d * 2 * e + e * d + 2 * (e * (r + 2 * n) + r * e) + 2 * e * (4 + 4 * n)
    tokens = 10 * 197 + 10 * 147 + 4 * 111
    assert count_macs("top_vim_tiny") == tokens * token + 196 * 768 * d + d * 1000
    published = count_macs("top_vim_small", prune_layers=(5, 10, 15), keep_ratio=0.8)
    assert published / count_macs("vim_small") == pytest.approx(0.7, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["zero token", "frozen", "previous", "none"])
@pytest.mark.parametrize("options", [dict(keep_ratio=1.0), dict(prune_layers=())])
def test_without_pruning_it_is_vim(alignment: Any, options: dict[str, Any]) -> None:
    encoder = small(alignment=alignment, **options)
    vim = stirred(Vim(**SIZES))
    vim.load_state_dict(encoder.state_dict())
    pixels = draw(2, 3, 12, 20)
    found, expected = encoder(pixels, hidden_states=True), vim(pixels, hidden_states=True)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-10, atol=1e-10)


# --- Which stay ---


def test_scores_by_hand() -> None:
    forward, backward = torch.tensor([[[1.0, -3.0], [0.0, 4.0]]]), torch.tensor([[[2.0, 1.0], [-1.0, -6.0]]])

    def score(**options: Any) -> list[float]:
        return small(**options).score([forward, backward])[0].tolist()

    assert score() == [1.5, 0.0]
    assert score(importance="mean") == [0.5, -1.5]
    assert score(importance="l1") == [2.5, 1.5]
    assert score(importance="l2") == [6.5, 2.5]
    assert score(score_from="forward") == [0.5, 2.0]
    assert score(score_from="backward") == [1.5, 0.0]


def test_the_best_patches_stay_in_order_and_the_class_token_always() -> None:
    """Also where it scores least, in every row, wherever it stands."""
    scores = torch.tensor([[5.0, 1.0, -9.0, 7.0, 2.0, 6.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0, -9.0, 6.0]])
    class_index = torch.tensor([[2], [5]])
    assert small(keep_ratio=0.5).choose(scores, class_index).tolist() == [[2, 3, 5], [4, 5, 6]]
    assert small(keep_ratio=0.6).choose(scores, class_index).tolist() == [[0, 2, 3, 5, 6], [2, 3, 4, 5, 6]]
    middle = small(keep_ratio=0.6, class_place="middle", alignment="none")
    assert middle.choose(scores, class_index).tolist() == [[0, 3, 2, 5, 6], [2, 3, 5, 4, 6]]


def test_the_selection_is_that_of_the_official_code_but_for_its_mistakes() -> None:
    """Its steps, row by row, with the class token protected in each."""
    encoder = small(keep_ratio=0.7, class_place="middle", alignment="none")
    scores = draw(3, 17)
    for row, chosen in zip(scores, encoder.choose(scores, torch.full((3, 1), 8)).tolist(), strict=True):
        row = row.clone()
        row[8] = -math.inf
        count = math.ceil(16 * 0.7)
        count += count % 2 == 0
        best = sorted(row.argsort(descending=True)[: count - 1].tolist())
        assert chosen == [*best[: len(best) // 2], 8, *best[len(best) // 2 :]]
        assert chosen.index(8) == len(chosen) // 2


def followed(encoder: TopVim, pixels: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Positions and tokens after each block, and scores of each block that prunes, by a pass of our own."""
    x, grid, middle = encoder.embed(pixels)
    kept = Kept(x, middle, encoder.alignment)
    positions, tokens, scores = [], [], []
    for number, block in enumerate(encoder.blocks, start=1):
        x, outputs, reads = block(x, grid, kept)
        positions.append(kept.positions)
        tokens.append(x)
        if number in encoder.prune_layers:
            scores.append((outputs[0] + outputs[1]).clamp_min(0).mean(-1))
            chosen = encoder.choose(scores[-1], kept.class_index)
            kept.drop(chosen, [read.step for read in reads])
            x = taken(x, chosen)
    return positions, tokens, scores


@torch.no_grad()
@pytest.mark.parametrize("place", ["in order", "middle"])
def test_dropped_tokens_keep_their_last_features(place: Any) -> None:
    encoder = small(class_place=place, alignment="none" if place == "middle" else "previous")
    pixels = draw(3, 3, 12, 20)
    features = encoder(pixels)
    positions, tokens, _ = followed(encoder, pixels)
    expected = torch.empty(3, 16, WIDTH, dtype=torch.float64)
    for where, values in zip(positions, tokens, strict=True):
        for row in range(3):
            expected[row, where[row]] = values[row]
    expected = encoder.norm(expected)
    torch.testing.assert_close(features.pooled, expected[:, 7])
    torch.testing.assert_close(features.tokens, expected[:, [*range(7), *range(8, 16)]])
    # Rows keep different tokens; the last block saw the class token, and not all others.
    assert positions[-1].shape == (3, 5)
    assert len({tuple(row) for row in positions[-1].tolist()}) > 1
    assert (positions[-1] == 7).any(1).all()


@torch.no_grad()
def test_the_backward_score_belongs_to_its_own_token() -> None:
    """The outputs of a block are in the order of the tokens: without gaps they add up to what the mixer gives."""
    encoder = small()
    x, grid, middle = encoder.embed(draw(1, 3, 12, 20))
    block = encoder.blocks[0]
    mixed, outputs, reads = block.mixer(block.normed(x), grid, Kept(x, middle, "none"))
    torch.testing.assert_close((outputs[0] + outputs[1]) / 2 @ block.mixer.out_proj.weight.T, mixed)
    gate = F.silu(block.mixer.in_proj(block.normed(x)).chunk(2, dim=-1)[1])
    torch.testing.assert_close(outputs[1], block.mixer.back.scan(reads[1]).flip(1) * gate)


def test_scores_carry_no_gradient_and_the_rest_does() -> None:
    encoder = small().train()
    assert not encoder.score([draw(1, 3, 4).requires_grad_()] * 2).requires_grad
    encoder.logits(draw(2, 3, 12, 20)).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


# --- The alignment ---


def reads_of(branch: SelectiveBranch, tokens: int, seed: int) -> ScanInputs:
    channels = len(branch.D)
    step = F.softplus(draw(2, tokens, channels, seed=seed + 1))
    B, C = draw(2, tokens, STATES, seed=seed + 2), draw(2, tokens, STATES, seed=seed + 3)
    return ScanInputs(draw(2, tokens, channels, seed=seed), step, B, C)


@torch.no_grad()
@pytest.mark.parametrize("alignment", ["zero token", "frozen", "previous"])
def test_scans_over_what_stays_are_scans_over_all_with_silent_tokens(alignment: Any) -> None:
    """Twice some tokens go, others in each row. Afterwards a scan of each direction, with the gaps, is the scan over
    all 16 tokens in which those that went bring nothing."""
    encoder = small(alignment=alignment)
    mixer = encoder.blocks[0].mixer
    branches = (mixer.ahead, mixer.back)
    kept = Kept(torch.zeros(2, 16, WIDTH), 7, alignment)
    first = torch.tensor([[0, 2, 3, 7, 8, 11, 12, 15], [1, 4, 6, 7, 8, 9, 10, 14]])
    second = torch.tensor([[0, 3, 4, 6], [1, 3, 5, 7]])
    # Steps that all had when the first and the second went, of each direction in its order; of both by position.
    early = [F.softplus(draw(2, 16, 2 * WIDTH, seed=seed)) for seed in (50, 51)]
    late = [F.softplus(draw(2, 8, 2 * WIDTH, seed=seed)) for seed in (52, 53)]
    kept.drop(first, early)
    kept.drop(second, late)
    assert torch.equal(kept.positions, first.gather(1, second))
    reads = [reads_of(branch, 4, seed=10 * number) for number, branch in enumerate(branches)]
    gaps = kept.gaps(branches, reads)
    for direction, (branch, read, gap) in enumerate(zip(branches, reads, gaps, strict=True)):
        found = branch.scan(read, gap)
        channels = 2 * WIDTH
        assert (branch.scan(read) - found).abs().max() > 1e-3
        for row in range(2):
            places = kept.positions[row].tolist()
            before = first[row].tolist()
            order = list(range(16)) if direction == 0 else list(range(15, -1, -1))
            in_order = places if direction == 0 else places[::-1]
            full = ScanInputs(
                torch.zeros(1, 16, channels, dtype=torch.float64),
                torch.zeros(1, 16, channels, dtype=torch.float64),
                torch.zeros(1, 16, STATES, dtype=torch.float64),
                torch.zeros(1, 16, STATES, dtype=torch.float64),
            )
            for time, position in enumerate(order):
                if position in in_order:
                    index = in_order.index(position)
                    for whole, part in zip(full, read, strict=True):
                        whole[0, time] = part[row, index]
                elif alignment == "zero token":
                    full.step[0, time] = torch.log1p(branch.dt_proj.bias.exp())
                elif alignment == "previous":
                    earlier = [index for index, place in enumerate(in_order) if order.index(place) < time]
                    if earlier:
                        full.step[0, time] = read.step[row, earlier[-1]]
                elif position in before:
                    index = before.index(position)
                    full.step[0, time] = late[direction][row, index if direction == 0 else 7 - index]
                else:
                    full.step[0, time] = early[direction][row, time]
            expected = branch.scan(full)[0, [order.index(place) for place in in_order]]
            torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_gaps_change_what_the_encoder_sees() -> None:
    pixels = draw(2, 3, 12, 20)
    pooled = [small(alignment=alignment)(pixels).pooled for alignment in ("zero token", "frozen", "previous", "none")]
    for number, one in enumerate(pooled):
        assert all((one - other).abs().max() > 1e-4 for other in pooled[:number])


@torch.no_grad()
def test_frozen_gaps_with_all_that_was_dropped_together_are_none() -> None:
    """Tokens that go before the first or after the last that stays leave no gap."""
    encoder = small(alignment="frozen")
    branches = (encoder.blocks[0].mixer.ahead, encoder.blocks[0].mixer.back)
    for alignment in ("zero token", "frozen", "previous"):
        kept = Kept(torch.zeros(2, 16, WIDTH), 7, alignment)
        kept.drop(torch.tensor([[5, 6, 7, 8]] * 2), [F.softplus(draw(2, 16, 2 * WIDTH))] * 2)
        reads = [reads_of(branch, 4, seed=3) for branch in branches]
        for branch, read, gap in zip(branches, reads, kept.gaps(branches, reads), strict=True):
            torch.testing.assert_close(branch.scan(read, gap), branch.scan(read), rtol=1e-12, atol=1e-12)


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep_ratio=0.0), r"keep_ratio of ssm_token_pruning must lie in \(0, 1\], not 0.0"),
        (dict(keep_ratio=1.2), r"keep_ratio of ssm_token_pruning must lie in \(0, 1\], not 1.2"),
        (dict(prune_layers=(0, 2)), r"prune_layers of ssm_token_pruning must be from 1 to 4, not \[0, 2\]"),
        (dict(prune_layers=(5,)), r"prune_layers of ssm_token_pruning must be from 1 to 4, not \[5\]"),
        (dict(importance="clp"), r"unknown importance of ssm_token_pruning 'clp' \(did you mean 'clip'\?\)"),
        (dict(score_from="forwards"), r"unknown score_from of ssm_token_pruning .*did you mean 'forward'"),
        (dict(alignment="frosen"), r"unknown alignment of ssm_token_pruning .*did you mean 'frozen'"),
        (dict(class_place="centre"), "unknown class_place of ssm_token_pruning 'centre'"),
        (dict(class_place="middle"), "class_place='middle' of ssm_token_pruning needs alignment='none', not 'zero"),
    ],
)
def test_settings_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_encoder("top_vim_nano", **options)
