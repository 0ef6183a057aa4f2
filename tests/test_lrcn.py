"""LRCN: the cell against torch's, rows of several sequences, the CNN's shapes, and captions by exhaustive search."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, MacCounter, count_parameters, create_encoder
from sightline.encoders.frame_by_frame import FrameFeatures
from sightline.encoders.lrcn import LRCN, FlaggedLSTM, FrameCNN, flow_picture, late_fusion, mirrored_flow
from sightline.encoders.lrcn_captions import CaptionDecoder, retrieval_ranks
from sightline.errors import InputError


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def strong_lstm(inputs: int, hidden: int, static: int | None = None) -> FlaggedLSTM:
    torch.manual_seed(0)
    return FlaggedLSTM(inputs, hidden, static=static, spread=1.0).double()


# --- The cell ---


def test_the_cell_is_torchs_with_its_gates_in_another_order() -> None:
    lstm = strong_lstm(3, 4)
    other = torch.nn.LSTM(3, 4, batch_first=True).double()
    order = torch.tensor([0, 1, 3, 2])  # i, f, o, g here; i, f, g, o there
    with torch.no_grad():
        torch.nn.init.uniform_(lstm.input.bias)
        other.weight_ih_l0.copy_(lstm.input.weight.view(4, 4, 3)[order].flatten(0, 1))
        other.weight_hh_l0.copy_(lstm.recurrent.weight.view(4, 4, 4)[order].flatten(0, 1))
        other.bias_ih_l0.copy_(lstm.input.bias.view(4, 4)[order].flatten())
        other.bias_hh_l0.zero_()
    x = randn(2, 5, 3, dtype=torch.float64)
    h, (last, cell) = lstm(x)
    expected, (expected_last, expected_cell) = other(x)
    torch.testing.assert_close(h, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close((last, cell), (expected_last[0], expected_cell[0]), atol=1e-10, rtol=0)


def test_two_sequences_in_one_row_are_as_if_alone() -> None:
    lstm = strong_lstm(3, 4)
    one, two = randn(1, 4, 3, dtype=torch.float64), randn(1, 3, 3, seed=1, dtype=torch.float64)
    flags = torch.tensor([[0, 1, 1, 1, 0, 1, 1]])
    row, _ = lstm(torch.cat([one, two], dim=1), flags)
    torch.testing.assert_close(row, torch.cat([lstm(one)[0], lstm(two)[0]], dim=1), atol=1e-12, rtol=0)
    leaked, _ = lstm(torch.cat([one, two], dim=1))
    assert (row - leaked)[:, 4:].abs().max() > 1e-3
    # A state that is passed on is used, unless the first flag says that a sequence begins.
    _, state = lstm(one[:, :2])
    torch.testing.assert_close(lstm(one[:, 2:], state=state)[0], lstm(one)[0][:, 2:], atol=1e-12, rtol=0)
    torch.testing.assert_close(lstm(one, flags[:, :4], state=state)[0], lstm(one)[0], atol=1e-12, rtol=0)


def test_static_input_is_input_joined_to_every_step() -> None:
    lstm = strong_lstm(3, 4, static=2)
    assert lstm.static is not None
    joined = strong_lstm(5, 4)
    with torch.no_grad():
        joined.input.weight.copy_(torch.cat([lstm.input.weight, lstm.static.weight], dim=1))
        joined.recurrent.weight.copy_(lstm.recurrent.weight)
    x, static = randn(2, 5, 3, dtype=torch.float64), randn(2, 2, seed=1, dtype=torch.float64)
    expected, _ = joined(torch.cat([x, static[:, None].expand(-1, 5, -1)], dim=2))
    torch.testing.assert_close(lstm(x, static=static)[0], expected, atol=1e-12, rtol=0)


def test_without_recurrence_and_memory_steps_are_independent() -> None:
    lstm = strong_lstm(3, 4)
    with torch.no_grad():
        lstm.recurrent.weight.zero_()
        lstm.input.bias[4:8] = -1e9  # the forget gate is shut
    x = randn(1, 5, 3, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(lstm(x)[0][:, order], lstm(x[:, order])[0], atol=1e-12, rtol=0)


def test_gradients_of_the_cell() -> None:
    torch.manual_seed(0)
    lstm = FlaggedLSTM(2, 2, static=1, spread=1.0).double()
    flags = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]])
    names = [name for name, _ in lstm.named_parameters()]

    def run(x: Tensor, static: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), (x, flags, static))[0]

    inputs = [randn(2, 4, 2, dtype=torch.float64), randn(2, 1, dtype=torch.float64), *lstm.parameters()]
    assert torch.autograd.gradcheck(run, [each.detach().requires_grad_() for each in inputs])


# --- Activities ---


def small_cnn(**options: Any) -> FrameCNN:
    torch.manual_seed(0)
    return FrameCNN(image_size=65, channels=(4, 6, 8, 8, 4), fc=5, **options).eval()


def small_lrcn(num_classes: int = 3) -> LRCN:
    torch.manual_seed(0)
    settings = dict(channels=(4, 6, 8, 8, 4), fc=16)
    model = LRCN(image_size=65, num_classes=num_classes, frame_settings=settings, hidden=4).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.xavier_uniform_(weight, gain=3.0)
        else:
            torch.nn.init.uniform_(weight, -0.2, 0.5)
    return model


def test_the_sizes_of_the_papers_network() -> None:
    with torch.device("meta"):
        cnn = FrameCNN(num_classes=1000).eval()
        model = LRCN(num_classes=101).eval()
    features = cnn(torch.empty(2, 3, 227, 227, device="meta"))
    assert [each.shape[1:] for each in features.maps] == [(96, 55, 55), (384, 13, 13), (384, 6, 6)]
    assert (features.grid, features.pooled.shape) == ((6, 6), (2, 4096))
    convs = (96 * 3 * 49 + 96) + (384 * 48 * 25 + 384) + (512 * 384 * 9 + 512) + (512 * 256 * 9 + 512)
    convs += 384 * 256 * 9 + 384
    fc6 = 384 * 36 * 4096 + 4096
    head = 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert count_parameters(cnn) == convs + fc6 + head
    assert count_parameters(model) == convs + fc6 + 4 * 256 * (4096 + 256 + 1) + 256 * 101 + 101
    with MacCounter(cnn) as counter:
        cnn(torch.empty(1, 3, 227, 227, device="meta"))
    macs = 111**2 * 96 * 147 + 26**2 * 384 * 1200 + 169 * (512 * 3456 + 512 * 2304 + 384 * 2304) + 384 * 36 * 4096
    assert counter.macs == macs


def test_the_cnn_rounds_pooled_sizes_up_and_keeps_its_size() -> None:
    cnn = small_cnn()
    for height, width in ((65, 65), (100, 130), (70, 200)):
        made = FrameCNN(image_size=(height, width), channels=(4, 6, 8, 8, 4), fc=5).eval()
        assert made(randn(1, 3, height, width)).maps[-1].shape[-2:] == made.grid
    pixels = randn(2, 3, 65, 65)
    x = F.relu(cnn.conv1(pixels))
    assert x.shape[-1] == 30
    pooled = torch.stack([x[..., 2 * k : 2 * k + 3].amax(-1) for k in range(15)], dim=-1)
    pooled = torch.stack([pooled[..., 2 * k : 2 * k + 3, :].amax(-2) for k in range(15)], dim=-2)
    norm = torch.stack(
        [
            pooled[:, c] / (1 + 1e-4 / 5 * pooled[:, max(0, c - 2) : c + 3].square().sum(1)) ** 0.75
            for c in range(pooled.shape[1])
        ],
        dim=1,
    )
    torch.testing.assert_close(cnn(pixels).maps[0], norm)
    with pytest.raises(InputError, match="was made for 65 x 65 pixels, not 90 x 65"):
        cnn(randn(1, 3, 90, 65))
    with pytest.raises(InputError, match="from 65 x 65 pixels"):
        FrameCNN(image_size=(30, 64))


def test_frames_go_through_the_cnn_one_by_one() -> None:
    model = small_lrcn()
    clip = randn(2, 3, 3, 65, 65)
    features = model(clip, hidden_states=True)
    cnn = model.frame_features.encoder
    for b in range(2):
        frames = torch.stack([cnn(clip[b, t][None]).pooled[0] for t in range(3)])
        assert frames.std(dim=0).max() > 1e-2
        torch.testing.assert_close(features.hidden_states[0][b], frames, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(features.tokens[b], model.lstm(frames[None])[0][0], atol=1e-4, rtol=1e-4)
    assert features.grid == (3,)


def test_the_prediction_is_the_mean_of_the_steps_softmaxes() -> None:
    model = small_lrcn()
    clip = randn(2, 4, 3, 65, 65)
    steps = model.step_logits(clip)
    assert steps.shape == (2, 4, 3)
    assert steps.std(dim=1).min() > 1e-3
    torch.testing.assert_close(model.logits(clip).softmax(dim=-1), steps.softmax(dim=-1).mean(dim=1))


def test_the_loss_counts_every_step() -> None:
    model = small_lrcn()
    clip, labels = randn(2, 3, 3, 65, 65), torch.tensor([2, 0])
    steps = model.step_logits(clip).log_softmax(dim=-1)
    expected = -sum(steps[b, t, labels[b]] for b in range(2) for t in range(3)) / 6
    torch.testing.assert_close(model.loss(clip, labels), expected)
    each = torch.tensor([[1, -1, 2], [0, 0, -1]])
    counted = [(0, 0, 1), (0, 2, 2), (1, 0, 0), (1, 1, 0)]
    torch.testing.assert_close(model.loss(clip, each), -sum(steps[entry] for entry in counted) / 4)
    flags = torch.tensor([[0, 1, 0], [0, 1, 1]])
    row = model.step_logits(clip, flags)
    torch.testing.assert_close(row[:1, 2:], model.step_logits(clip[:1, 2:]))
    model.train().loss(clip, labels, flags).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_any_encoder_of_pictures_reads_the_frames() -> None:
    model = create_encoder("lrcn_nano", num_classes=4, frame_settings=dict(depth=1, class_token=False)).eval()
    assert isinstance(model, LRCN)
    clip = randn(2, 3, 3, 40, 24)
    tokens = model.frame_features.encoder(clip[1]).tokens
    torch.testing.assert_close(model(clip, hidden_states=True).hidden_states[0][1], tokens.mean(dim=1))
    assert model.stride == 4
    with pytest.raises(InputError, match="multiples of 4 pixels"):
        model(randn(1, 2, 3, 33, 32))


def test_frozen_frames_have_no_gradient_and_stay_in_eval_mode() -> None:
    frames = FrameFeatures("vit_nano", image_size=8, settings=dict(depth=1, drop_path=0.5), frozen=True).train()
    assert not frames.encoder.training
    assert not frames(randn(1, 2, 3, 8, 8)).requires_grad
    assert not any(weight.requires_grad for weight in frames.parameters())
    with pytest.raises(InputError, match=r"clips are \[B, T, C, H, W\]"):
        frames(randn(2, 3, 8, 8))
    with pytest.raises(InputError, match="lrcn_nano takes clips"):
        FrameFeatures("lrcn_nano")


def test_an_official_file_is_loaded(tmp_path: Path) -> None:
    model = LRCN(image_size=65, num_classes=3, frame_settings=dict(channels=(4, 6, 8, 8, 4), fc=5), hidden=4)
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.0": (4, 3, 7, 7), "conv2.0": (6, 2, 5, 5), "conv3.0": (8, 6, 3, 3), "conv4.0": (8, 4, 3, 3),
        "conv5.0": (4, 4, 3, 3), "fc6.0": (5, 4), "lstm1.0": (16, 5), "lstm1.1": (16,), "lstm1.2": (16, 4),
        "fc8-final.0": (3, 4),
    }  # fmt: skip
    blobs = {key: randn(*shape, seed=index) for index, (key, shape) in enumerate(shapes.items())}
    blobs |= {
        key.replace(".0", ".1"): randn(shape[0], seed=50 + index)
        for index, (key, shape) in enumerate(shapes.items())
        if key.endswith(".0") and not key.startswith("lstm")
    }
    save_file(blobs, tmp_path / "lrcn.safetensors")
    model.load_official(tmp_path / "lrcn.safetensors")
    assert len(blobs) == len(model.state_dict())
    assert torch.equal(model.lstm.recurrent.weight, blobs["lstm1.2"])
    assert torch.equal(model.head.bias, blobs["fc8-final.1"])
    cnn = model.frame_features.encoder
    assert isinstance(cnn, FrameCNN)
    assert torch.equal(cnn.conv5.weight, blobs["conv5.0"])
    assert torch.equal(cnn.fc6.bias, blobs["fc6.1"])
    del blobs["lstm1.1"]
    save_file(blobs | {"fc9.0": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=r"missing: lstm\.input\.bias; not expected: fc9\.0"):
        model.load_official(tmp_path / "wrong.safetensors")


def test_flow_pictures() -> None:
    flow = torch.zeros(2, 1, 3)
    flow[:, 0, 0] = torch.tensor([3.0, -4.0])
    flow[:, 0, 1] = torch.tensor([-100.0, 0.0])
    picture = flow_picture(flow)
    assert picture[:, 0, 0].tolist() == [48.0, -64.0, 80.0]
    assert picture[:, 0, 1].tolist() == [-128.0, 0.0, 127.0]
    mirrored = mirrored_flow(flow)
    assert mirrored[:, 0, 2].tolist() == [-3.0, -4.0]
    assert mirrored[:, 0, 1].tolist() == [100.0, 0.0]
    mixed = late_fusion(torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]]), 1 / 3)
    torch.testing.assert_close(mixed, torch.tensor([[1 / 6 + 1 / 2, 1 / 6 + 1 / 6]]))


# --- Captions ---


def decoder(variant: str = "factored", vocabulary: int = 4, seed: int = 0) -> CaptionDecoder:
    torch.manual_seed(seed)
    made = CaptionDecoder(vocabulary, 3, variant=variant, embedding=5, hidden=6)
    for weight in made.parameters():
        torch.nn.init.uniform_(weight, -1.5, 1.5)
    return made.double()


def slow_log_p(made: CaptionDecoder, picture: Tensor, words: list[int], end: bool = True) -> float:
    """One word after the other through states that are kept by hand."""
    total, states, read = 0.0, None, 0
    for word in [*words, 0] if end else words:
        logits, states = made(picture[None], torch.tensor([[read]]), states)
        total += logits[0, 0].log_softmax(dim=0)[word].item()
        read = word
    return total


@pytest.mark.parametrize("variant", ["one_layer", "unfactored", "factored"])
def test_where_the_picture_comes_in(variant: str) -> None:
    made = decoder(variant)
    words, picture = torch.tensor([[0, 2, 1]]), randn(1, 3, dtype=torch.float64)
    x = made.embed(words)
    if variant == "factored":
        h = made.upper(made.lower(x)[0], static=picture)[0]  # type: ignore[misc]
    else:
        h = made.lower(x, static=picture)[0]
        h = h if made.upper is None else made.upper(h)[0]
    torch.testing.assert_close(made(picture, words)[0], made.output(h))
    lstms = {"one_layer": 1, "unfactored": 2, "factored": 2}[variant]
    width = 4 * 6 * (5 + 6 + 1 + 3) + (lstms - 1) * 4 * 6 * (6 + 6 + 1)
    assert count_parameters(made) == 4 * 5 + width + 4 * 6 + 4


def test_padding_is_not_scored() -> None:
    made = decoder()
    pictures = randn(2, 3, dtype=torch.float64)
    captions = torch.tensor([[2, 1, 3, 0], [1, 0, -1, -1]])
    scores = made.word_log_probabilities(pictures, captions)
    assert scores[1, 2:].tolist() == [0.0, 0.0]
    expected = [slow_log_p(made, pictures[0], [2, 1, 3]), slow_log_p(made, pictures[1], [1])]
    assert scores.sum(dim=1).tolist() == pytest.approx(expected)
    assert made.loss(pictures, captions).item() == pytest.approx(-sum(expected) / 6)


def test_a_wide_beam_finds_the_likeliest_caption() -> None:
    found = set()
    for seed in range(6):
        made = decoder(seed=seed)
        picture = randn(1, 3, seed=seed, dtype=torch.float64)
        candidates = {
            words: slow_log_p(made, picture[0], list(words), end=len(words) < 3)
            for length in range(4)
            for words in itertools.product((1, 2, 3), repeat=length)
        }
        best = max(candidates, key=candidates.__getitem__)
        found.add(len(best))
        assert made.generate(picture, beams=64, max_words=3) == [list(best)]
        greedy: list[int] = []
        for _ in range(3):
            options = [slow_log_p(made, picture[0], [*greedy, word], end=False) for word in range(4)]
            word = options.index(max(options))
            if word == 0:
                break
            greedy.append(word)
        assert made.generate(picture, max_words=3) == [greedy]
    assert len(found) > 1


def test_two_beams_by_hand() -> None:
    """The search that keeps two captions, written out without states."""
    for seed in range(4):
        made = decoder(seed=seed)
        picture = randn(1, 3, seed=seed + 9, dtype=torch.float64)
        alive, done = [[]], []
        for _ in range(4):
            grown = [[*words, word] for words in alive for word in range(4)]
            grown.sort(key=lambda words: -slow_log_p(made, picture[0], words, end=False))
            done += [words for words in grown[:2] if words[-1] == 0]
            alive = [words for words in grown[:2] if words[-1] != 0]
        best = max(done + alive, key=lambda words: slow_log_p(made, picture[0], words, end=False))
        assert made.generate(picture, beams=2, max_words=4) == [[word for word in best if word]]


def test_samples_follow_the_sharpened_distribution() -> None:
    made = decoder()
    picture = randn(1, 3, dtype=torch.float64)
    logits = made(picture, torch.tensor([[0]]))[0][0, 0]
    expected = (0.5 * logits).softmax(dim=0) * 2000
    generator = torch.Generator().manual_seed(0)
    options = dict(sample=True, inverse_temperature=0.5, max_words=1, generator=generator)
    captions = made.generate(picture.expand(2000, -1), **options)
    counts = [sum(caption == ([word] if word else []) for caption in captions) for word in range(4)]
    assert sum(counts) == 2000
    assert sum((n - e) ** 2 / e for n, e in zip(counts, expected.tolist(), strict=True)) < 16.3  # p = 0.001


def test_retrieval() -> None:
    made = decoder()
    pictures = randn(3, 3, dtype=torch.float64)
    captions = torch.tensor([[2, 1, 0], [3, 0, -1]])
    plain = [[slow_log_p(made, one, words) for words in ([2, 1], [3])] for one in pictures]
    assert made.retrieval_scores(pictures, captions, normalise=False).tolist() == [pytest.approx(row) for row in plain]
    prior = [math.log(sum(math.exp(row[s]) for row in plain) / 3) for s in range(2)]
    expected = [pytest.approx([row[s] - prior[s] for s in range(2)]) for row in plain]
    assert made.retrieval_scores(pictures, captions).tolist() == expected
    scores = torch.tensor([[5.0, 1.0, 2.0], [4.0, 3.0, 0.0]])
    of_pictures, of_captions = retrieval_ranks(scores, torch.tensor([1, 0, 0]))
    assert of_pictures.tolist() == [2, 1]
    assert of_captions.tolist() == [2, 2, 1]


# --- Errors ---


def test_wrong_inputs() -> None:
    model = small_lrcn()
    with pytest.raises(InputError, match="clips of one frame or more"):
        model(torch.zeros(1, 0, 3, 65, 65))
    with pytest.raises(InputError, match=r"one a frame, \[1, 2\], not \[1, 3\]"):
        model.step_logits(torch.zeros(1, 2, 3, 65, 65), torch.ones(1, 3))
    with pytest.raises(InputError, match="has no head"):
        small_lrcn(num_classes=0).step_logits(torch.zeros(1, 1, 3, 65, 65))
    assert isinstance(model, Encoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beams=0), "beams and max_words must be 1 or more"),
        (dict(beams=2, sample=True), "not both"),
        (dict(sample=True, inverse_temperature=0.0), "inverse_temperature positive"),
    ],
)
def test_wrong_options_of_generation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decoder().generate(torch.zeros(1, 3, dtype=torch.float64), **options)


def test_wrong_captions() -> None:
    made = decoder()
    with pytest.raises(InputError, match=r"unknown variant of the caption decoder 'factor'.*did you mean 'factored'"):
        CaptionDecoder(4, variant="factor")
    with pytest.raises(InputError, match="a word, not 1 entries"):
        CaptionDecoder(1)
    with pytest.raises(InputError, match=r"\[B, L\], one a picture, not \[1, 2\] for 2"):
        made.loss(torch.zeros(2, 3).double(), torch.tensor([[1, 0]]))
    with pytest.raises(InputError, match="word ids from 0 to 3"):
        made.loss(torch.zeros(1, 3).double(), torch.tensor([[4, 0]]))
