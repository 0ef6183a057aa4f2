"""Path Ensemble: the sum of the paths is the ViT, and every path can be taken out, scaled and accounted for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import count_macs, count_parameters, create_encoder
from sightline.encoders.path_ensemble import (
    PathEnsemble,
    harmless_paths,
    high_frequency_gap,
    self_distillation_loss,
)
from sightline.encoders.vit import VisionTransformer
from sightline.errors import InputError


def nano(**settings: object) -> PathEnsemble:
    torch.manual_seed(0)
    encoder = create_encoder(
        "path_ensemble_nano", **{"width": 24, "num_heads": 3, "depth": 3, "num_classes": 5, **settings}
    )
    for name, parameter in encoder.named_parameters():
        if name.startswith(("blocks", "norm", "head")):
            torch.nn.init.normal_(parameter, std=0.3)
    assert isinstance(encoder, PathEnsemble)
    return encoder.eval()


def plain(encoder: PathEnsemble, **settings: object) -> VisionTransformer:
    vit = create_encoder("vit_nano", **{"width": 24, "num_heads": 3, "depth": 3, "num_classes": 5, **settings})
    state = encoder.state_dict()
    state.pop("ensemble_scale", None)
    vit.load_state_dict(state)
    assert isinstance(vit, VisionTransformer)
    return vit.eval()


def pixels(batch: int = 2, height: int = 20, width: int = 28) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "millions", "macs"), [("tiny", 5.717, 1.25), ("small", 22.05, 4.6), ("base", 86.57, 17.56)]
)
def test_counts(size: str, millions: float, macs: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(f"path_ensemble_{size}", num_classes=1000)
    assert count_parameters(encoder) / 1e6 == pytest.approx(millions, rel=0.005)
    assert encoder.ensemble_scale.shape == (25, encoder.width)
    assert count_macs(f"path_ensemble_{size}") / 1e9 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("ensemble_scale", [True, False])
@pytest.mark.parametrize("extra", [{}, {"class_token": False}, {"layer_scale": 0.1}])
def test_all_paths_are_the_vit_bit_for_bit(extra: dict[str, object], ensemble_scale: bool) -> None:
    encoder = nano(ensemble_scale=ensemble_scale, **extra)
    vit = plain(encoder, **extra)
    got, want = encoder(pixels(), hidden_states=True), vit(pixels(), hidden_states=True)
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.pooled, want.pooled)
    assert torch.equal(encoder.logits(pixels()), vit.logits(pixels()))
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, want.hidden_states, strict=True))


def test_a_dropped_path_is_dropped_from_trunk_and_ensemble_alike() -> None:
    encoder = nano(drop_path=0.5).train()
    vit = plain(encoder, drop_path=0.5).train()
    torch.manual_seed(3)
    got = encoder(pixels(6)).tokens
    torch.manual_seed(3)
    assert torch.equal(got, vit(pixels(6)).tokens)


def slow_paths(encoder: PathEnsemble, given: Tensor) -> list[Tensor]:
    x, grid = encoder.embed(given)
    paths = [x]
    for block in encoder.blocks:
        entered = sum(paths)
        attended = block.attn(block.norm1(entered), grid)
        paths.append(attended)
        paths.append(block.mlp(block.norm2(entered + attended)))
    return paths


def test_paths_pruning_and_scale_against_the_sum_written_out() -> None:
    encoder = nano().double()
    given = pixels().double()
    torch.nn.init.normal_(encoder.ensemble_scale)
    encoder.pruned = (5, 0)
    assert encoder.pruned == (0, 5)
    paths = slow_paths(encoder, given)
    weights = encoder.ensemble_scale.clone()
    weights[[0, 5]] = 0
    scaled = [weight * path for weight, path in zip(weights, paths, strict=True)]
    torch.testing.assert_close(encoder.paths(given), torch.stack(scaled), rtol=0, atol=1e-10)
    tokens = encoder.norm(sum(scaled))
    torch.testing.assert_close(encoder(given).tokens, tokens[:, 1:], rtol=0, atol=1e-10)
    torch.testing.assert_close(encoder.logits(given), encoder.head(tokens[:, 0]), rtol=0, atol=1e-10)


def test_pruning_leaves_the_trunk_as_it_is() -> None:
    encoder, given = nano(), pixels()
    before = encoder(given, hidden_states=True)
    encoder.pruned = (0, 1, 6)
    after = encoder(given, hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(before.hidden_states, after.hidden_states, strict=True))
    assert not torch.allclose(before.tokens, after.tokens)


def test_ablation_takes_out_exactly_one_path() -> None:
    encoder, given = nano().double(), pixels().double()
    paths = slow_paths(encoder, given)
    logits = encoder.ablated_logits(given)
    assert logits.shape == (7, 2, 5)
    for out in range(7):
        rest = sum(path for index, path in enumerate(paths) if index != out)
        torch.testing.assert_close(logits[out], encoder.head(encoder.norm(rest)[:, 0]), rtol=0, atol=1e-10)
        encoder.pruned = (out,)
        torch.testing.assert_close(encoder.logits(given), logits[out], rtol=0, atol=1e-10)


@pytest.mark.parametrize("class_token", [True, False])
def test_attributions_add_up_to_the_logits(class_token: bool) -> None:
    encoder = nano(class_token=class_token, pruned=(2,)).double()
    torch.nn.init.normal_(encoder.ensemble_scale)
    given = pixels().double()
    parts, constant = encoder.attributions(given)
    assert parts.shape == (7, 2, 5)
    assert float(parts[2].abs().max().detach()) == 0
    torch.testing.assert_close(parts.sum(dim=0) + constant, encoder.logits(given), rtol=0, atol=1e-12)


def test_partial_ensembles_and_self_distillation() -> None:
    encoder, given = nano().double(), pixels().double()
    paths = slow_paths(encoder, given)
    logits = encoder.partial_logits(given, (1, 2))
    for got, upto in zip(logits, (3, 5, 7), strict=True):
        torch.testing.assert_close(got, encoder.head(encoder.norm(sum(paths[:upto]))[:, 0]), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[-1], encoder.logits(given), rtol=0, atol=1e-10)
    target = torch.tensor([1, 4])
    loss = self_distillation_loss(logits, target, weight=0.7, temperature=3.0)
    p = (logits[-1] / 3).softmax(dim=-1)
    divergences = [(p * (p.log() - (short / 3).softmax(dim=-1).log())).sum(dim=-1).mean() for short in logits[:2]]
    expected = F.cross_entropy(logits[-1], target) + 0.7 * 9 * (divergences[0] + divergences[1]) / 2
    torch.testing.assert_close(loss, expected)
    assert torch.equal(self_distillation_loss(logits[-1:], target), F.cross_entropy(logits[-1], target))


def test_the_teacher_of_self_distillation_learns_from_the_classes_only() -> None:
    whole = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    short = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = torch.tensor([0, 1, 2])
    got = torch.autograd.grad(self_distillation_loss([short, whole], target), [whole, short])
    (alone,) = torch.autograd.grad(F.cross_entropy(whole, target), [whole])
    assert torch.equal(got[0], alone)
    assert got[1].abs().max() > 0


def test_gradient_of_the_scale() -> None:
    encoder = nano(depth=1, width=6, num_heads=2, image_size=8).double()
    given = pixels(1, 8, 8).double()

    def loss(scale: Tensor) -> Tensor:
        return torch.func.functional_call(encoder, {"ensemble_scale": scale}, (given,)).pooled.sum(dim=0)

    torch.autograd.gradcheck(loss, [torch.rand(3, 6, dtype=torch.double).add(0.5).requires_grad_()])


def test_harmless_paths() -> None:
    encoder, given = nano(pruned=(3,)), pixels(9)
    target = torch.randint(5, (9,), generator=torch.Generator().manual_seed(2))
    right = int((encoder.logits(given).argmax(-1) == target).sum())
    expected = []
    for path in (0, 1, 2, 4, 5, 6):
        encoder.pruned = (3, path)
        if int((encoder.logits(given).argmax(-1) == target).sum()) >= right:
            expected.append(path)
    encoder.pruned = (3,)
    assert harmless_paths(encoder, given, target) == tuple(expected)


def test_high_frequency_gap() -> None:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    chequers = ((-1.0) ** (rows + columns)).flatten()[None, :, None]
    flat = torch.ones_like(chequers)
    gap = high_frequency_gap(2.0 * chequers + 0.5 * flat, (4, 6))
    torch.testing.assert_close(gap, torch.tensor([4.0]).log().double())


def test_scale_is_kept_out_of_weight_decay_and_other_sizes_are_taken() -> None:
    encoder = nano()
    assert "ensemble_scale" in encoder.no_weight_decay()
    assert encoder(pixels(1, 16, 40)).grid == (4, 10)
    with torch.device("meta"):
        assert create_encoder("path_ensemble_tiny")(torch.empty(1, 3, 384, 224)).tokens.shape == (1, 24 * 14, 192)


def test_bad_input() -> None:
    for pruned in ((7,), (-1,), range(7)):
        with pytest.raises(InputError, match="pruned must be paths from 0 to 6, and not all of them"):
            nano(pruned=pruned)
    encoder = nano()
    for layers in ((0,), (3,), (2, 1)):
        with pytest.raises(InputError, match="layers must be rising from 1 to 2"):
            encoder.partial_logits(pixels(), layers)
    headless = create_encoder("path_ensemble_nano")
    for ask in (headless.attributions, headless.ablated_logits):
        with pytest.raises(InputError, match="path_ensemble_nano has no head"):
            ask(pixels())
    with pytest.raises(InputError, match="no public official code"):
        encoder.load_official("x.safetensors")
