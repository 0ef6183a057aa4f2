"""LGViT: heads against slow ones, losses by hand, and a batch that leaves early against its pictures one by one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import MacCounter, count_macs, count_parameters, create_encoder
from sightline.encoders.lgvit import (
    ExitCriterion,
    ExitOutputs,
    GlobalAggregation,
    LGViT,
    LocalPerception,
    stage_one_loss,
    stage_two_loss,
)
from sightline.encoders.vit import VisionTransformer
from sightline.errors import InputError


def nano(**settings: object) -> LGViT:
    torch.manual_seed(0)
    encoder = create_encoder("lgvit_nano", **{"width": 16, "num_classes": 5, "num_heads": 2, **settings})
    assert isinstance(encoder, LGViT)
    generator = torch.Generator().manual_seed(1)
    for name, value in encoder.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2, generator=generator)
        elif value.is_floating_point() and name.startswith(("patch_embed", "blocks", "exit_heads", "head")):
            value.normal_(std=0.3, generator=generator)
    return encoder.eval()


def pixels(batch: int = 2, height: int = 32, width: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(batch, 3, 1, 1, generator=generator)
    return colours + torch.randn(batch, 3, height, width, generator=generator)


def test_heads_and_cost_of_the_base_model() -> None:
    with torch.device("meta"):
        encoder = create_encoder("lgvit_base", num_classes=1000).eval()
        bodies = [head.body for head in encoder.exit_heads]
        macs = []
        for body in bodies:
            with MacCounter(body) as counter:
                body(torch.empty(1, 196, 768), (14, 14))
            macs.append(counter.macs / 1e9)
    assert encoder.exits == (4, 5, 6, 7, 8, 9, 10, 11)
    millions = [count_parameters(body) / 1e6 for body in bodies]
    assert millions == pytest.approx([1.193, 1.193, 1.184, 1.184, 2.360, 2.360, 2.360, 2.360], rel=0.001)
    assert macs == pytest.approx([0.233, 0.233, 0.231, 0.231, 0.119, 0.119, 0.060, 0.060], rel=0.01)
    assert count_macs("lgvit_base") == count_macs("vit_base")
    backbone = count_parameters(encoder) - count_parameters(encoder.exit_heads)
    assert backbone / 1e6 == pytest.approx(86.57, rel=0.001)
    assert count_parameters(encoder.exit_heads) - sum(map(count_parameters, bodies)) == 8 * 1000 * 769


def test_without_leaving_it_is_the_vit() -> None:
    encoder = nano()
    plain = create_encoder("vit_nano", width=16, num_heads=2, depth=8, num_classes=5).eval()
    assert isinstance(plain, VisionTransformer)
    plain.load_state_dict({key: value for key, value in encoder.state_dict().items() if "exit_heads" not in key})
    given = pixels(3, 20, 28)
    assert torch.equal(encoder.logits(given), plain.logits(given))
    assert torch.equal(encoder(given).tokens, plain(given).tokens)
    logits, layers = encoder.answer(given, ExitCriterion("confidence", threshold=1.5))
    assert torch.equal(logits, plain.logits(given))
    assert layers.tolist() == [8, 8, 8]
    assert create_encoder("lgvit_nano", num_classes=0).exits == ()


@pytest.mark.parametrize("kernel", [1, 3])
def test_local_perception(kernel: int) -> None:
    head = LocalPerception(4, kernel).double().eval()
    for name, value in head.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    x = torch.randn(2, 35, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    out = head(x, (5, 7))

    def bn(values: Tensor, norm: torch.nn.Module) -> Tensor:  # values [rows, columns, C]
        return (values - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias

    for row in range(2):
        y = x[row].reshape(5, 7, 4)
        y = bn(F.gelu(y @ head.inward[0].weight[:, :, 0, 0].T + head.inward[0].bias), head.inward[2])
        if kernel == 3:
            wide = torch.zeros(7, 9, 4, dtype=torch.double)
            wide[1:6, 1:8] = y
            taps = head.depthwise[0].weight[:, 0]
            y = sum(wide[i : i + 5, j : j + 7] * taps[:, i, j] for i in range(3) for j in range(3))
            y = bn(F.gelu(y + head.depthwise[0].bias), head.depthwise[2])
        y = bn(y @ head.outward[0].weight[:, :, 0, 0].T + head.outward[0].bias, head.outward[1])
        torch.testing.assert_close(out[row], x[row] + y.reshape(35, 4), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("stride", "left"), [(1, 35), (2, 12), (3, 6)])
def test_global_aggregation(stride: int, left: int) -> None:
    torch.manual_seed(0)
    head = GlobalAggregation(16, stride).double()
    assert head.qkv.bias is None
    x = torch.randn(2, 35, 16, dtype=torch.double)
    out = head(x, (5, 7))
    assert out.shape == (2, left, 16)
    for row in range(2):
        chosen = torch.stack([x[row, 7 * i + j] for i in range(0, 5, stride) for j in range(0, 7, stride)])
        q, k, v = (chosen @ head.qkv.weight.T).reshape(left, 3, 8, 2).unbind(1)
        weights = torch.einsum("ihd,jhd->hij", q, k).mul(2**-0.5).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", weights, v).reshape(left, 16)
        torch.testing.assert_close(out[row], head.proj(mixed), rtol=0, atol=1e-10)


@pytest.mark.parametrize("distilled", [False, True])
def test_exits_read_the_layer_that_they_stand_after(distilled: bool) -> None:
    encoder = nano(distilled=distilled).double()
    given = pixels().double()
    outputs = encoder.exit_outputs(given)
    first = [encoder.cls_token, encoder.dist_token] if distilled else [encoder.cls_token]
    x = torch.cat([*(token.expand(2, -1, -1) for token in first), encoder.patch_embed(given)], dim=1)
    x = x + encoder.pos_embed
    index = 0
    for layer, block in enumerate(encoder.blocks, start=1):
        x = block(x, (8, 8))
        if layer in (2, 3, 4, 5, 6, 7):
            head = encoder.exit_heads[index]
            features = head.body(x[:, len(first) :], (8, 8))
            answers = [each(features.mean(dim=1) + x[:, i]) for i, each in enumerate(head.heads)]
            torch.testing.assert_close(outputs.features[index], features, rtol=0, atol=1e-10)
            torch.testing.assert_close(outputs.logits[index], sum(answers) / len(answers), rtol=0, atol=1e-10)
            index += 1
    normed = encoder.norm(x)
    tops = [encoder.head, encoder.head_dist][: len(first)]
    final = sum(top(normed[:, i]) for i, top in enumerate(tops)) / len(tops)
    unnormed = sum(top(x[:, i]) for i, top in enumerate(tops)) / len(tops)
    for got, want in (
        (outputs.final_logits, final),
        (encoder.logits(given), final),
        (outputs.unnormed_logits, unnormed),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(outputs.last_tokens, x[:, len(first) :], rtol=0, atol=1e-10)
    assert encoder(given).pooled.shape == (2, 16 * len(first))
    assert encoder(given).tokens.shape == (2, 64, 16)


def made_outputs() -> ExitOutputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, generator=generator).requires_grad_()

    kinds = ("lph3", "lph3", "lph1", "lph1", "gah2", "gah2", "gah3", "gah3")
    sizes = (35, 35, 35, 35, 12, 12, 6, 6)
    return ExitOutputs(
        tuple(draw(3, 5) for _ in kinds),
        tuple(draw(3, size, 4) for size in sizes),
        draw(3, 5),
        draw(3, 5),
        draw(3, 35, 4),
        (5, 7),
        kinds,
    )


def test_stage_one() -> None:
    outputs, target = made_outputs(), torch.tensor([0, 4, 2])
    exits = tuple(range(4, 12))
    final = F.cross_entropy(outputs.final_logits, target)
    assert torch.equal(stage_one_loss(outputs, target, 6, exits=exits, depth=12), final)
    mixed = sum(i * F.cross_entropy(z, target) for i, z in zip(exits, outputs.logits, strict=True)) + 12 * final
    torch.testing.assert_close(stage_one_loss(outputs, target, 7, exits=exits, depth=12), mixed / (60 + 12))


@pytest.mark.parametrize("normed", [True, False])
def test_stage_two(normed: bool) -> None:
    outputs, target = made_outputs(), torch.tensor([0, 4, 2])
    teacher = outputs.final_logits if normed else outputs.unnormed_logits
    p = (teacher / 2).softmax(-1)
    loss = torch.zeros((), dtype=torch.double)
    for z in outputs.logits:
        kd = 4 * (p * (p / (z / 2).softmax(-1)).log()).sum() / (3 * 5)
        loss = loss + 0.6 * F.cross_entropy(z, target) + 0.4 * kd

    def subsampled(stride: int) -> Tensor:
        picks = [7 * i + j for i in range(0, 5, stride) for j in range(0, 7, stride)]
        return outputs.last_tokens[:, picks]

    f = outputs.features
    for student, goal in ((f[0], subsampled(1)), (f[3], subsampled(1)), (f[4], subsampled(2)), (f[7], subsampled(3))):
        q = goal.softmax(-1)
        loss = loss + 0.02 * (q * (q / student.softmax(-1)).log()).sum() / 3
    for e in range(3):
        loss = loss + 0.02 * (f[e] - f[3]).square().mean()
        loss = loss + 0.02 * (f[4 + e].mT @ f[4 + e] - f[7].mT @ f[7]).square().mean()
    got = stage_two_loss(outputs, target, alpha=0.4, beta=0.02, normed_teacher=normed)
    torch.testing.assert_close(got, loss)
    got.backward()
    for frozen in (outputs.final_logits, outputs.unnormed_logits, outputs.last_tokens):
        assert frozen.grad is None


def test_detached_teachers_learn_nothing_from_their_students() -> None:
    target = torch.tensor([0, 4, 2])
    outputs = made_outputs()
    attached, detached = (
        torch.autograd.grad(
            stage_two_loss(outputs, target, detach_teacher=detach), [outputs.features[3], outputs.features[0]]
        )
        for detach in (False, True)
    )
    assert not torch.allclose(attached[0], detached[0])
    assert torch.equal(attached[1], detached[1])
    alone = dataclasses.replace(outputs, kinds=("lph3",), logits=outputs.logits[:1], features=outputs.features[:1])
    assert torch.isfinite(stage_two_loss(alone, target))


def test_stage_two_trains_the_exits_only() -> None:
    encoder = nano().train()
    before = {key: value.clone() for key, value in encoder.named_parameters()}
    encoder.freeze_backbone()
    optimiser = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    outputs = encoder.exit_outputs(pixels(4), train_backbone=False)
    stage_two_loss(outputs, torch.tensor([0, 1, 2, 3])).backward()
    optimiser.step()
    for key, value in encoder.named_parameters():
        # A convolution's bias before a norm over the batch moves nothing but that norm's mean.
        if not key.startswith("exit_heads"):
            assert torch.equal(value, before[key]), key
        elif "weight" in key:
            assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize(
    ("criterion", "after"),
    [
        (ExitCriterion("confidence", threshold=0.55), 1),
        (ExitCriterion("confidence", threshold=0.65), 2),
        (ExitCriterion("confidence", threshold=0.95), None),
        (ExitCriterion("entropy", threshold=0.65), 2),
        (ExitCriterion("entropy", threshold=0.6), 3),
        (ExitCriterion("patience", patience=1), 1),
        (ExitCriterion("patience", patience=2), 4),
        (ExitCriterion("patience", patience=3), None),
        (ExitCriterion("patience_and_confidence", threshold=0.6, patience=2), 4),
        (ExitCriterion("patience_and_confidence", threshold=0.65, patience=3), 4),
        (ExitCriterion("patience_and_confidence", threshold=0.65, patience=4), None),
    ],
)
def test_criteria_by_hand(criterion: ExitCriterion, after: int | None) -> None:
    # The first class's probability at four exits: classes 1, 0, 1, 1; entropies 0.673, 0.637, 0.325 and 0.423 nats.
    runs, before, left = torch.zeros(1, dtype=torch.long), torch.full((1,), -1), None
    for number, p in enumerate([0.4, 2 / 3, 0.1, 0.15], start=1):
        logits = torch.tensor([[math.log(p), math.log(1 - p)]]) + 3
        runs, before = criterion.runs(logits, runs, before), logits.argmax(-1)
        if left is None and int(runs) >= criterion.patience:
            left = number
    assert left == after


def test_entropy_of_a_certain_answer_is_zero_and_not_nan() -> None:
    certain = torch.tensor([[0.0, -1e4, -2e4]])
    start = torch.zeros(1, dtype=torch.long)
    assert ExitCriterion("entropy", threshold=1e-6).runs(certain, start, start - 1).tolist() == [1]


CRITERIA = [
    ExitCriterion("confidence", threshold=0.97),
    ExitCriterion("entropy", threshold=0.15),
    ExitCriterion("patience", patience=2),
    ExitCriterion("patience_and_confidence", threshold=0.6, patience=2),
]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_batch_leaves_as_its_pictures_do_alone(criterion: ExitCriterion) -> None:
    encoder = nano().double()
    given = pixels(12, 20, 28).double()
    logits, layers = encoder.answer(given, criterion)
    assert len(set(layers.tolist())) > 2, "the example should have pictures that leave at different exits"
    outputs = encoder.exit_outputs(given)
    for row in range(12):
        alone, layer = encoder.answer(given[row : row + 1], criterion)
        assert layer.item() == layers[row]
        torch.testing.assert_close(alone[0], logits[row], rtol=0, atol=1e-10)
        exits = dict(zip(encoder.exits, outputs.logits, strict=True)) | {8: outputs.final_logits}
        torch.testing.assert_close(exits[int(layers[row])][row], logits[row], rtol=0, atol=1e-10)
    assert encoder.speed_up(layers) == pytest.approx(8 * 12 / sum(layers.tolist()))


def test_lower_thresholds_leave_earlier() -> None:
    encoder, given = nano(), pixels(16)
    means = [
        float(encoder.answer(given, ExitCriterion("confidence", threshold=threshold))[1].float().mean())
        for threshold in (0.0, 0.4, 0.6, 0.8, 1.0)
    ]
    assert means == sorted(means)
    assert means[0] == 2
    assert means[-1] == 8
    assert means[1] < means[3]


def test_leaving_saves_work() -> None:
    encoder = nano()
    with MacCounter(encoder) as early:
        encoder.answer(pixels(4), ExitCriterion("confidence", threshold=0.0))
    with MacCounter(encoder) as full:
        encoder.logits(pixels(4))
    assert early.macs < 0.5 * full.macs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": (0, 2)}, "exits must be rising layers from 1 to 7"),
        ({"exits": (3, 2)}, "exits must be rising layers"),
        ({"exits": (2, 8)}, "exits must be rising layers"),
        ({"exits": (2, 3)}, "each of the 2 exits needs a head, but 6 heads are given"),
        ({"exits": (2,), "heads": ("lph5",)}, "unknown head of an exit 'lph5'"),
        ({"exits": (2,), "heads": ("gah1",), "width": 20}, "cannot be shared by 8 heads"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nano(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "margin"}, "unknown kind of exit criterion 'margin'"),
        ({"threshold": -0.1}, "threshold of an exit criterion must be 0 or above"),
        ({"threshold": math.nan}, "threshold of an exit criterion must be 0 or above"),
        ({"patience": 2}, "1 for the kind 'confidence'"),
        ({"kind": "patience", "patience": 0}, "patience must be 1 or more, not 0"),
    ],
)
def test_bad_criteria(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExitCriterion(**settings)  # type: ignore[arg-type]


def test_bad_use() -> None:
    with pytest.raises(InputError, match="has no exits; create it with num_classes"):
        create_encoder("lgvit_nano").eval().answer(pixels(), ExitCriterion())
    with pytest.raises(InputError, match=r"call eval\(\) first"):
        nano().train().answer(pixels(), ExitCriterion())
    with pytest.raises(InputError, match="multiples of 4 pixels"):
        nano().answer(pixels(1, 30, 32), ExitCriterion())


def official(encoder: LGViT, *, distilled: bool) -> dict[str, Tensor]:
    """A checkpoint in the names of the official model, of `nano`'s sizes."""
    width, shapes = 16, {}

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, batch: bool = False) -> None:
        for part in ("weight", "bias", *(("running_mean", "running_var") if batch else ())):
            shapes[f"{name}.{part}"] = (width,)
        if batch:
            shapes[f"{name}.num_batches_tracked"] = ()

    shapes["deit.embeddings.cls_token"] = (1, 1, width)
    if distilled:
        shapes["deit.embeddings.distillation_token"] = (1, 1, width)
    shapes["deit.embeddings.position_embeddings"] = (1, 64 + 1 + distilled, width)
    shapes["deit.embeddings.patch_embeddings.projection.weight"] = (width, 3, 4, 4)
    shapes["deit.embeddings.patch_embeddings.projection.bias"] = (width,)
    for i in range(8):
        layer = f"deit.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.attention.{name}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        linear(f"{layer}.intermediate.dense", 4 * width, width)
        linear(f"{layer}.output.dense", width, 4 * width)
        norm(f"{layer}.layernorm_before")
        norm(f"{layer}.layernorm_after")
    classifiers = ("cls_classifier", "distillation_classifier") if distilled else ("classifier",)
    for i, kind in enumerate(encoder.kinds):
        head = f"deit.encoder.highway.{i}"
        if kind.startswith("lph"):
            for name in ("conv1.0", "conv2.0"):
                shapes[f"{head}.mlp.{name}.weight"] = (width, width, 1, 1)
                shapes[f"{head}.mlp.{name}.bias"] = (width,)
            norm(f"{head}.mlp.conv1.2", batch=True)
            norm(f"{head}.mlp.conv2.1", batch=True)
            if kind == "lph3":
                shapes[f"{head}.mlp.proj.weight"] = (width, 1, 3, 3)
                shapes[f"{head}.mlp.proj.bias"] = (width,)
                norm(f"{head}.mlp.proj_bn", batch=True)
        else:
            linear(f"{head}.mlp.qkv", 3 * width, width, bias=False)
            linear(f"{head}.mlp.proj", width, width)
        for name in classifiers:
            linear(f"{head}.{name}", 5, width)
    norm("deit.layernorm")
    linear("deit.pooler.dense", width, width)
    for name in classifiers:
        linear(name, 5, width)
    generator = torch.Generator().manual_seed(5)
    return {key: torch.rand(shape, generator=generator) if shape else torch.tensor(7) for key, shape in shapes.items()}


@pytest.mark.parametrize("distilled", [False, True])
def test_official_checkpoint(tmp_path: Path, distilled: bool) -> None:
    encoder = nano(distilled=distilled)
    state = official(encoder, distilled=distilled)
    save_file(state, tmp_path / "lgvit.safetensors")
    encoder.load_official(tmp_path / "lgvit.safetensors")
    layer = "deit.encoder.layer.3.attention.attention"
    fused = torch.cat([state[f"{layer}.{name}.weight"] for name in ("query", "key", "value")])
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, fused)
    assert torch.equal(encoder.exit_heads[0].body.depthwise[0].weight, state["deit.encoder.highway.0.mlp.proj.weight"])
    running = state["deit.encoder.highway.0.mlp.proj_bn.running_mean"]
    assert torch.equal(encoder.exit_heads[0].body.depthwise[2].running_mean, running)
    assert torch.equal(encoder.exit_heads[2].body.proj.weight, state["deit.encoder.highway.2.mlp.proj.weight"])
    name = "distillation_classifier" if distilled else "classifier"
    assert torch.equal(encoder.exit_heads[5].heads[-1].bias, state[f"deit.encoder.highway.5.{name}.bias"])
    values = sum(value.numel() for value in encoder.state_dict().values())
    assert values == sum(value.numel() for key, value in state.items() if not key.startswith("deit.pooler"))
    other = nano(distilled=distilled, image_size=(16, 40))
    other.load_official(tmp_path / "lgvit.safetensors")
    assert other.pos_embed.shape == (1, 4 * 10 + 1 + distilled, 16)
    del state["deit.encoder.layer.3.attention.attention.key.weight"]
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match=r"missing: blocks\.3\.attn\.qkv\.weight; not expected: .*query\.weight"):
        encoder.load_official(tmp_path / "broken.safetensors")
