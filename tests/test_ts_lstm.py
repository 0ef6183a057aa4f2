"""TS-LSTM and Temporal-Inception: written-out references, what segments see, and frame encoders in front."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.encoders.encoder import count_parameters, create_encoder
from sightline.encoders.frame_by_frame import FrameFeatures, OnClips
from sightline.encoders.ts_lstm import TSLSTM, FrameBaseline, TemporalInception
from sightline.errors import InputError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lived_in(model: Any) -> Any:
    """With batch norms that have seen data; those before an LSTM have some negative scales, those before a ReLU none,
    so that it lets something through."""
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            part.running_mean.uniform_(-0.5, 0.5, generator=generator)
            part.running_var.uniform_(0.5, 2.0, generator=generator)
            least = 0.3 if isinstance(part, torch.nn.BatchNorm2d) else -1.0
            torch.nn.init.uniform_(part.weight, least, 1, generator=generator)
            torch.nn.init.uniform_(part.bias, least, 1, generator=generator)
    return model.double().eval()


def ts_lstm(**options: Any) -> TSLSTM:
    torch.manual_seed(0)
    return lived_in(TSLSTM(num_classes=4, feature_dim=5, hidden=6, **options))


def inception(**options: Any) -> TemporalInception:
    torch.manual_seed(0)
    model = lived_in(TemporalInception(num_classes=4, feature_dim=5, hidden=6, **options))
    with torch.no_grad():
        for part in model.reduce:
            part[0].weight.abs_()  # else one channel's ReLU may let nothing through
    return model


# --- TS-LSTM ---


def norm(frame: Tensor, part: Any, training: bool) -> Tensor:
    mean = frame.mean(dim=0) if training else part.running_mean
    variance = frame.var(dim=0, unbiased=False) if training else part.running_var
    return (frame - mean) / (variance + 1e-5).sqrt() * part.weight + part.bias


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_ts_lstm_is_its_equations(training: bool, pool: str) -> None:
    model = ts_lstm(pool=pool).train(training)
    x = randn(3, 25, 5)
    vectors = []
    for s in range(3):
        steps = torch.stack([norm(x[:, 8 * s + t], model.norms[s], training) for t in range(8)])
        vectors.append(steps.max(dim=0).values if pool == "max" else steps.mean(dim=0))
    h = c = torch.zeros(3, 6, dtype=torch.float64)
    lstm = model.lstm
    for vector in vectors:
        gates = vector @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = (gates[:, 6 * k : 6 * k + 6] for k in range(4))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    logits = model.logits(x)
    torch.testing.assert_close(logits, norm(h, model.norm, training) @ model.head.weight.T + model.head.bias)


def test_running_statistics_take_every_step() -> None:
    model = TSLSTM(feature_dim=2, segments=2, hidden=2).double()
    x = randn(4, 6, 2)
    model(x)
    mean = torch.zeros(2, dtype=torch.float64)
    for t in range(3, 6):
        mean = 0.9 * mean + 0.1 * x[:, t].mean(dim=0)
    torch.testing.assert_close(model.norms[1].running_mean, mean)


def test_segments_see_no_order_within_themselves() -> None:
    x = randn(2, 25, 5)
    within = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4, 15, *range(8, 15), *range(16, 25)])
    across = torch.tensor([*range(8, 16), *range(8), *range(16, 25)])
    three, one = ts_lstm(), ts_lstm(segments=1)
    torch.testing.assert_close(three.logits(x[:, within]), three.logits(x), atol=1e-10, rtol=0)
    assert (three.logits(x[:, across]) - three.logits(x)).abs().max() > 1e-3
    for order in (within, across, torch.randperm(25, generator=torch.Generator().manual_seed(0))):
        torch.testing.assert_close(one.logits(x[:, order]), one.logits(x), atol=1e-10, rtol=0)


def test_the_25th_frame_is_not_read() -> None:
    x = randn(2, 25, 5)
    other = x.clone()
    other[:, 24] = 1e3
    assert torch.equal(ts_lstm().logits(x), ts_lstm().logits(other))
    other[:, 23] = 1e3
    assert not torch.equal(ts_lstm().logits(x), ts_lstm().logits(other))


def test_features_of_segments() -> None:
    model = ts_lstm(segments=5)
    features = model(randn(2, 12, 5), hidden_states=True)
    assert (features.grid, features.tokens.shape) == ((5,), (2, 5, 6))
    assert torch.equal(features.pooled, features.tokens[:, -1])
    assert [each.shape for each in features.hidden_states] == [(2, 5, 5), (2, 5, 6)]


def test_the_start_of_the_official_code() -> None:
    torch.manual_seed(0)
    model = TSLSTM(feature_dim=20, hidden=20, init="uniform_all", num_classes=3)
    assert all(0.05 < weight.abs().max() <= 0.1 for weight in model.parameters() if weight.numel() > 10)
    assert 0.2 < (model.norms[0].weight < 0).double().mean() < 0.8
    assert torch.all(TSLSTM(feature_dim=20, hidden=20).norms[0].weight == 1)


# --- Temporal-Inception ---


def conv(x: Tensor, part: Any) -> Tensor:
    """[B, C, D, T] by hand: sums over taps, batch norm, ReLU."""
    weight, reach = part[0].weight, part[0].weight.shape[-1] // 2
    steps = x.shape[-1]
    out = part[0].bias[:, None, None].expand(len(x), -1, x.shape[2], steps).clone()
    for t in range(steps):
        for tap in range(weight.shape[-1]):
            if 0 <= t + tap - reach < steps:
                out[..., t] += torch.einsum("oc,bcd->bod", weight[:, :, 0, tap], x[..., t + tap - reach])
    centred = (out - part[1].running_mean[:, None, None]) / (part[1].running_var[:, None, None] + 1e-5).sqrt()
    return (centred * part[1].weight[:, None, None] + part[1].bias[:, None, None]).clamp(min=0)


def test_temporal_inception_is_its_layers() -> None:
    model = inception()
    x = randn(2, 25, 5)
    maps = x.transpose(1, 2)[:, None]
    for pool, branches, steps in zip((2, 2, 2, 3), model.stages, (12, 6, 3, 1), strict=True):
        found = []
        for branch in branches:
            values = conv(maps, branch)
            found.append(torch.stack([values[..., pool * k : pool * (k + 1)].amax(-1) for k in range(steps)], dim=-1))
        maps = torch.cat(found, dim=1)
    assert maps.shape == (2, 16, 5, 1)
    for part in model.reduce:
        maps = conv(maps, part)
    features = model(x)
    torch.testing.assert_close(features.tokens, maps[..., 0], atol=1e-10, rtol=0)
    assert features.tokens.abs().max() > 1e-3
    hidden = norm(maps[:, 0, :, 0] @ model.hidden[0].weight.T + model.hidden[0].bias, model.hidden[1], False)
    torch.testing.assert_close(features.pooled, hidden.clamp(min=0), atol=1e-10, rtol=0)
    torch.testing.assert_close(model.logits(x), hidden.clamp(min=0) @ model.head.weight.T + model.head.bias)


def test_lengths_along_time() -> None:
    model = inception()
    assert model.lengths(25) == [25, 12, 6, 3, 1]
    states = model(randn(1, 25, 5), hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [25, 12, 6, 3, 1]
    assert model.frames == 24
    for frames in (24, 47):
        assert model(randn(1, frames, 5)).tokens.shape == (1, 1, 5)
    for frames in (23, 48):
        with pytest.raises(InputError, match=f"24 to 47 frames, not {frames}"):
            model(randn(1, frames, 5))


def test_features_share_their_weights_until_the_linear_maps() -> None:
    model = inception()
    x, order = randn(2, 25, 5), torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(model(x[:, :, order]).tokens, model(x).tokens[:, :, order], atol=1e-12, rtol=0)
    assert (model(x).tokens.std(dim=2) > 1e-4).any()


def test_what_the_first_dropout_drops() -> None:
    x = randn(64, 25, 5)
    for kind, whole in (("map", True), ("element", False)):
        model = inception(drop=0.5, drop_kind=kind)
        kept = model(x).tokens
        model.drop_map.train()
        torch.manual_seed(0)
        dropped = model(x).tokens
        gone = (dropped == 0) & (kept != 0)
        assert gone.any()
        assert (dropped != 0).any()
        assert torch.equal(gone.any(dim=2), (dropped == 0).all(dim=2)) is whole
        torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


# --- Sizes, baselines and clips ---


def test_sizes_of_the_configurations() -> None:
    def lstm(inputs: int, hidden: int) -> int:
        return 4 * hidden * (inputs + hidden + 2)

    def conv_bn(inputs: int, outputs: int, kernel: int) -> int:
        return inputs * outputs * kernel + 3 * outputs

    temporal = sum(conv_bn(c, c, k) for c in (1, 2, 4, 8) for k in (5, 7))
    temporal += conv_bn(16, 4, 1) + conv_bn(4, 2, 1) + conv_bn(2, 1, 1)
    expected = {
        "ts_lstm": 3 * 2 * 4096 + lstm(4096, 512) + 2 * 512 + 513 * 101,
        "temporal_inception": temporal + 4097 * 1024 + 2 * 1024 + 1025 * 101,
        "two_stream_mean": 4097 * 101,
        "two_stream_max": 4097 * 101,
        "two_stream_lstm": lstm(4096, 512) + 513 * 101,
    }
    for name, count in expected.items():
        with torch.device("meta"):
            assert count_parameters(create_encoder(name, num_classes=101)) == count


def test_baselines() -> None:
    x = randn(2, 6, 5)
    for kind in ("mean", "max", "lstm"):
        torch.manual_seed(0)
        model = FrameBaseline(kind=kind, num_classes=3, feature_dim=5, hidden=4).double()
        pooled = {
            "mean": x.sum(dim=1) / 6,
            "max": x.sort(dim=1).values[:, -1],
            "lstm": x[:, 0] if model.lstm is None else model.lstm(x)[1][0][0],
        }[kind]
        torch.testing.assert_close(model.logits(x), pooled @ model.head.weight.T + model.head.bias)
        assert model(x).grid == (6,)


def test_two_streams_of_frames() -> None:
    rgb = FrameFeatures("vit_nano", image_size=8, settings=dict(depth=1, width=8, num_heads=2), frozen=True)
    flow = FrameFeatures("vit_nano", image_size=8, in_chans=2, settings=dict(depth=1, width=4, num_heads=2))
    model = OnClips([rgb, flow], TSLSTM(feature_dim=12, hidden=6, num_classes=3)).eval()
    clips = randn(2, 7, 3, 8, 8).float(), randn(2, 7, 2, 8, 8).float()
    features = torch.stack(
        [torch.cat([rgb.encoder(clips[0][:, t]).pooled, flow.encoder(clips[1][:, t]).pooled], 1) for t in range(7)], 1
    )
    torch.testing.assert_close(model.frame_features(*clips), features)
    torch.testing.assert_close(model.logits(*clips), model.aggregator.logits(features))
    torch.testing.assert_close(model(*clips).tokens, model.aggregator(features).tokens)
    model.train().logits(*clips).sum().backward()
    assert all((weight.grad is None) is (weight in set(rgb.parameters())) for weight in model.parameters())
    with pytest.raises(InputError, match=r"2 stream\(s\) take as many clips, not 1"):
        model(clips[0])
    with pytest.raises(InputError, match="an aggregator takes frame features"):
        OnClips([rgb], rgb.encoder)


# --- Errors ---


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (TSLSTM, dict(segments=0), "segments must be 1 or more"),
        (TSLSTM, dict(pool="sum"), "unknown pool of ts_lstm"),
        (TSLSTM, dict(init="uniform"), "unknown init of ts_lstm"),
        (TSLSTM, dict(feature_dim=0), "feature_dim must be 1 or more"),
        (TemporalInception, dict(kernels=(4,)), "odd widths"),
        (TemporalInception, dict(drop_kind="channel"), "unknown drop_kind"),
        (FrameBaseline, dict(kind="median"), "unknown kind of a baseline"),
    ],
)
def test_wrong_settings(made: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**options)


def test_wrong_features() -> None:
    model = ts_lstm()
    with pytest.raises(InputError, match="feature_dim=5, but the features have 6"):
        model(randn(2, 6, 6))
    with pytest.raises(InputError, match="3 frames or more, one for each segment, not 2"):
        model(randn(2, 2, 5))
    with pytest.raises(InputError, match=r"takes frame features \[B, T, D\]"):
        model(randn(2, 5))
    with pytest.raises(InputError, match="batches of 2 clips or more"):
        model.train()(randn(1, 6, 5))
    with pytest.raises(InputError, match="at least one frame"):
        FrameBaseline(feature_dim=5).double()(randn(2, 0, 5))
