"""ConvSSM against plain complex loops and a per-pixel S5 layer, ConvLSTM against its equations, and the predictor."""

from __future__ import annotations

import cmath
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.encoders.convs5 import ConvS5
from sightline.encoders.encoder import MacCounter, count_parameters
from sightline.errors import InputError
from sightline.mixers.conv_lstm import ConvLSTM
from sightline.mixers.convolutional_state import ConvSSM, hippo_legs, phi


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_ssm(**options: Any) -> ConvSSM:
    torch.manual_seed(0)
    ssm = ConvSSM(3, 8, **options).double()
    with torch.no_grad():
        ssm.log_step.add_(2.0)  # steps so large that the state forgets within a few frames
    return ssm


def slow_ssm(ssm: ConvSSM, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The equations with complex convolutions, frame by frame, the discretisation by division."""
    values = torch.complex(ssm.lambda_re, ssm.lambda_im)
    decay = torch.exp(values * ssm.log_step.exp())
    kernel = ((decay - 1) / values)[:, None, None, None] * torch.complex(ssm.B[0], ssm.B[1])
    outputs = []
    for frame in u:
        driven = F.conv2d(frame.to(kernel.dtype), kernel, padding=kernel.shape[-1] // 2)
        state = decay[:, None, None] * state + driven
        weight = torch.complex(ssm.C[0], ssm.C[1])
        outputs.append(2 * F.conv2d(state, weight, padding=weight.shape[-1] // 2).real)
    return torch.stack(outputs), state


# --- The layer ---


@pytest.mark.parametrize("scan", ["loop", "doubling", "chunked"])
@pytest.mark.parametrize(("kernel_in", "kernel_out", "frames"), [(3, 3, 7), (1, 5, 1), (5, 1, 12)])
def test_all_frames_at_once_are_the_equations(scan: Any, kernel_in: int, kernel_out: int, frames: int) -> None:
    ssm = small_ssm(kernel_in=kernel_in, kernel_out=kernel_out, scan=scan)
    u = randn(frames, 2, 3, 5, 4)
    start = torch.complex(randn(2, 4, 5, 4, seed=1), randn(2, 4, 5, 4, seed=2))
    for state in (None, start):
        y, last = ssm(u, state)
        zero = ssm.init_state(2, (5, 4))
        assert not zero.abs().any()
        expected, expected_last = slow_ssm(ssm, u, zero if state is None else state)
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(last, expected_last, atol=1e-10, rtol=1e-10)
    single = ssm.float()(u.float())[0]
    torch.testing.assert_close(single.double(), slow_ssm(ssm.double(), u, zero)[0], atol=1e-5, rtol=1e-5)


def test_steps_and_parts_are_the_whole_pass() -> None:
    ssm = small_ssm()
    u = randn(9, 2, 3, 4, 5)
    whole, last = ssm(u)
    first, state = ssm(u[:4])
    second, end = ssm(u[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-10, rtol=0)
    discrete, state = ssm.discretise(), ssm.init_state(2, (4, 5))
    for frame, expected in zip(u, whole, strict=True):
        again, _ = ssm.step(frame, state)
        y, state = ssm.step(frame, state, discrete)
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(y, again, atol=0, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-10, rtol=0)


def test_with_pointwise_kernels_it_is_an_s5_layer_at_every_pixel() -> None:
    ssm = small_ssm(kernel_in=1, kernel_out=1)
    u = randn(6, 2, 3, 3, 2)
    y, _ = ssm(u)
    for pixel in ((0, 0), (2, 1)):
        for clip in range(2):
            series = u[:, clip, :, pixel[0], pixel[1]]
            state = [0j] * 4
            for t, inputs in enumerate(series.tolist()):
                for p in range(4):
                    value = complex(ssm.lambda_re[p].item(), ssm.lambda_im[p].item())
                    step = math.exp(ssm.log_step[p].item())
                    decay = cmath.exp(value * step)
                    drive = sum(complex(*ssm.B[:, p, c, 0, 0].tolist()) * inputs[c] for c in range(3))
                    state[p] = decay * state[p] + (decay - 1) / value * drive
                for c in range(3):
                    out = sum((complex(*ssm.C[:, c, p, 0, 0].tolist()) * state[p]).real for p in range(4))
                    assert y[t, clip, c, pixel[0], pixel[1]].item() == pytest.approx(2 * out, abs=1e-10)


@pytest.mark.parametrize("scan", ["loop", "doubling", "chunked"])
def test_gradients(scan: Any) -> None:
    torch.manual_seed(1)
    ssm = ConvSSM(2, 4, kernel_in=3, kernel_out=1, scan=scan).double()
    names = [name for name, _ in ssm.named_parameters()]

    def run(u: Tensor, real: Tensor, imaginary: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        y, last = torch.func.functional_call(ssm, given, (u, torch.complex(real, imaginary)))
        return torch.cat([y.flatten(), last.real.flatten(), last.imag.flatten()])

    inputs = [randn(3, 1, 2, 2, 2), randn(1, 2, 2, 2, seed=1), randn(1, 2, 2, 2, seed=2), *ssm.parameters()]
    assert torch.autograd.gradcheck(run, [each.detach().requires_grad_() for each in inputs])


def test_phi_and_its_gradient_are_exact_near_zero() -> None:
    points = [0j, 1e-12 + 1e-9j, 1e-3 - 1e-3j, 0.0999 + 0j, 0.08j, -0.1001 + 0j, -3.0 + 2.0j]
    z = torch.tensor(points, dtype=torch.complex128, requires_grad=True)
    value = phi(z)
    (slope,) = torch.autograd.grad(value.real.sum(), z)
    for point, found, gradient in zip(points, value.tolist(), slope.tolist(), strict=True):
        series = sum(point**n / math.factorial(n + 1) for n in range(60))
        derivative = sum(n * point ** (n - 1) / math.factorial(n + 1) for n in range(1, 60))
        assert abs(found - series) < 1e-14
        assert abs(gradient - derivative.conjugate()) < 1e-12


def test_eigenvalues_at_zero_are_no_division_by_zero() -> None:
    ssm = small_ssm(clip_eigs=False)
    with torch.no_grad():
        ssm.lambda_re.zero_()
        ssm.lambda_im.zero_()
    u = randn(3, 1, 3, 2, 2).requires_grad_()
    y, last = ssm(u)
    driven = F.conv2d(u.sum(0), ssm.B[0] * ssm.log_step.exp()[:, None, None, None], padding=1)
    torch.testing.assert_close(last.real, driven)  # a plain sum: B = D B~
    y.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in ssm.parameters())


def test_hippo_legs_is_diagonalised() -> None:
    size = 6
    hippo = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            hippo[i, j] = -math.sqrt((1 + 2 * i) * (1 + 2 * j)) if i > j else -(i + 1) if i == j else 0
    normal = hippo + np.outer(np.sqrt(np.arange(size) + 0.5), np.sqrt(np.arange(size) + 0.5))
    values, vectors = hippo_legs(size)
    assert np.allclose(values.real, -0.5)
    assert (values.imag < 0).all()
    assert np.allclose(normal @ vectors, vectors * values)
    assert np.allclose(vectors.conj().T @ vectors, np.eye(size // 2))
    both = np.concatenate([values, values.conj()])
    assert np.allclose(np.sort(np.linalg.eigvals(normal).imag), np.sort(both.imag))
    blocks = ConvSSM(2, 12, blocks=2)
    assert torch.allclose(blocks.lambda_im, torch.tensor(np.tile(values.imag, 2)).float())
    assert torch.all((blocks.log_step >= math.log(0.001)) & (blocks.log_step <= math.log(0.1)))


def test_half_of_the_state_and_its_conjugates_are_the_whole_real_system() -> None:
    """A real HiPPO system of the full size, in its own coordinates, gives the same frames."""
    size, width = 6, 2
    torch.manual_seed(3)
    ssm = ConvSSM(width, size, kernel_in=1, kernel_out=1).double()
    with torch.no_grad():
        ssm.log_step.fill_(math.log(0.05))
    values, vectors = (torch.tensor(each, dtype=torch.complex128) for each in hippo_legs(size))
    real_a = 2 * (vectors * values @ vectors.mH).real
    real_b = 2 * (vectors @ torch.complex(ssm.B[0], ssm.B[1])[:, :, 0, 0]).real
    real_c = 2 * (torch.complex(ssm.C[0], ssm.C[1])[:, :, 0, 0] @ vectors.mH).real
    transition = torch.linalg.matrix_exp(0.05 * real_a)
    drive = torch.linalg.solve(real_a, (transition - torch.eye(size)) @ real_b)
    u = randn(5, 1, width, 1, 1)
    y, _ = ssm(u)
    state = torch.zeros(size, dtype=torch.float64)
    for inputs, expected in zip(u.flatten(1), y.flatten(1), strict=True):
        state = transition @ state + drive @ inputs
        torch.testing.assert_close(real_c @ state, expected, atol=1e-6, rtol=1e-5)  # the start is made in float32


def test_clipped_eigenvalues_cannot_make_the_state_grow() -> None:
    for clip_eigs in (True, False):
        ssm = small_ssm(clip_eigs=clip_eigs)
        with torch.no_grad():
            ssm.lambda_re.fill_(0.3)
        assert bool((ssm.discretise().decay.abs() < 1).all()) is clip_eigs


def test_half_precision_keeps_a_wide_state() -> None:
    ssm = ConvSSM(3, 8)
    u = randn(4, 1, 3, 4, 4, dtype=torch.float32)
    exact, _ = ssm(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, state = ssm(u)
    assert state.dtype == torch.complex64
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)
    half, state = ssm.bfloat16()(u.bfloat16())
    assert (half.dtype, state.dtype) == (torch.bfloat16, torch.complex64)


def test_work_of_the_layer() -> None:
    ssm, u = ConvSSM(3, 8, kernel_in=3, kernel_out=1), torch.zeros(5, 2, 3, 4, 4)
    places = 5 * 2 * 4 * 4
    # B: 3 -> 8 real channels of 9 taps; C: 8 -> 3 of 1; 4 complex products of 4 each.
    assert ssm.mixing_macs(u) == places * (3 * 8 * 9 + 8 * 3 + 4 * 4)
    assert ConvLSTM(3, 2).mixing_macs(u) == places * (5 * 8 * 9 + 3 * 2)


def test_conv_lstm_is_its_equations() -> None:
    torch.manual_seed(0)
    lstm = ConvLSTM(3, 2).double()
    u = randn(4, 2, 3, 5, 4)
    cell, output = lstm.init_state(2, (5, 4))
    h, state = lstm(u)
    stepped = (cell, output)
    for frame, found in zip(u, h, strict=True):
        gates = F.conv2d(torch.cat([frame, output], dim=1), lstm.weight, padding=1)
        i, f, o, g = (gates[:, 2 * k : 2 * k + 2] for k in range(4))
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        output = torch.sigmoid(o) * torch.tanh(cell)
        torch.testing.assert_close(found, output, atol=1e-10, rtol=0)
        y, stepped = lstm.step(frame, stepped)
        torch.testing.assert_close(y, output, atol=1e-10, rtol=0)
    torch.testing.assert_close(state, (cell, output), atol=1e-10, rtol=0)
    second, _ = lstm(u[2:], lstm(u[:2])[1])
    torch.testing.assert_close(second, h[2:], atol=1e-10, rtol=0)


# --- The predictor ---


def tiny(core: str = "convs5", **options: Any) -> ConvS5:
    torch.manual_seed(0)
    size = dict(image_size=8, depths=(4, 6), d_model=6, ssm_size=6, layers=2, num_groups=2, core=core)
    return ConvS5(**size | options).eval()


def predictor_parameters(chans: int, depths: tuple[int, ...], width: int, state: int, layers: int, core: str) -> int:
    def block(inputs: int, outputs: int) -> int:
        convs = 9 * inputs * outputs + outputs + 9 * outputs * outputs + outputs
        return convs + 2 * (inputs + outputs) + (inputs * outputs if inputs != outputs else 0)

    encoder = 9 * chans * depths[0] + depths[0] + block(depths[0], depths[0])
    encoder += sum(block(a, b) for a, b in pairwise(depths))
    project = depths[-1] * width + width
    half = state // 2
    ssm = 3 * half + 2 * (half * width * 9) * 2
    head = 2 * (9 * width * width + width) + 4 * width
    each = ssm + head if core == "convs5" else 4 * state * (width + state) * 9
    back = [depths[0], *reversed(depths)]
    decoder = 9 * width * depths[0] + depths[0]
    decoder += sum(block(a, b) for a, b in pairwise(back))
    decoder += 2 * depths[0] + depths[0] * chans + chans
    return encoder + project + layers * (each + 2 * width) + decoder


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("convs5_moving_mnist_300", ((64, 128, 256), 256, 256, 8, "convs5")),
        ("convs5_moving_mnist_600", ((64, 128, 256), 128, 128, 8, "convs5")),
        ("convs5_nano", ((16, 16, 32), 32, 32, 2, "convs5")),
        ("conv_lstm_nano", ((16, 16, 32), 32, 32, 2, "conv_lstm")),
    ],
)
def test_sizes_of_the_configurations(name: str, rule: tuple[Any, ...]) -> None:
    with torch.device("meta"):
        encoder = ConvS5(**ConvS5.configs[name], in_chans=1).eval()
    assert count_parameters(encoder) == predictor_parameters(1, *rule)
    features = encoder(torch.empty(2, 3, 1, *encoder.image_size, device="meta"))
    side = encoder.image_size[0] // 4
    assert features.grid == (3, side, side)
    assert features.tokens.shape == (2, 3 * side * side, encoder.width)


@pytest.mark.parametrize("core", ["convs5", "conv_lstm"])
def test_a_prediction_reads_no_later_frame(core: str) -> None:
    model = tiny(core).double()
    clip = randn(2, 6, 3, 8, 12).tanh()
    other = clip.clone()
    other[:, 4:] = randn(2, 2, 3, 8, 12, seed=5).tanh()
    one, two = model.predict(clip), model.predict(other)
    assert one.shape == clip.shape
    assert one.abs().max() <= 1
    torch.testing.assert_close(one[:, :4], two[:, :4], atol=1e-10, rtol=0)
    assert (one[:, 4] - two[:, 4]).abs().max() > 1e-4
    torch.testing.assert_close(model.predict(clip[:, :1]), one[:, :1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("core", ["convs5", "conv_lstm"])
def test_a_rollout_is_prediction_over_and_over(core: str) -> None:
    model = tiny(core).double()
    clip = randn(2, 4, 3, 8, 8).tanh()
    read = clip
    for _ in range(5):
        read = torch.cat([read, model.predict(read)[:, -1:]], dim=1)
    made = model.rollout(clip, 5)
    torch.testing.assert_close(made, read[:, 4:].detach(), atol=1e-10, rtol=0)
    assert not made.requires_grad


def test_a_frame_of_a_rollout_costs_the_same_however_long_it_is() -> None:
    model = tiny()
    clip = torch.zeros(1, 3, 3, 8, 8)
    costs = []
    for frames in (1, 2, 10, 11):
        with MacCounter(model) as counter:
            model.rollout(clip, frames)
        costs.append(counter.macs)
    assert costs[1] - costs[0] == costs[3] - costs[2] > 0


def test_the_loss_is_summed_over_columns_and_channels() -> None:
    model = tiny(loss_weight=0.25).double()
    clip = randn(2, 3, 3, 8, 4).tanh()
    made = model.predict(clip)
    total = 0.0
    for b in range(2):
        for t in range(2):
            for row in range(8):
                error = (made[b, t, :, row] - clip[b, t + 1, :, row]).flatten().tolist()
                total += sum(0.25 * e * e + 0.75 * abs(e) for e in error)
    loss = model.loss(clip)
    assert loss.item() == pytest.approx(total / (2 * 2 * 8))
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_scans_give_the_same_features() -> None:
    clip = randn(1, 7, 3, 8, 8, dtype=torch.float32)
    one, two, three = (tiny(scan=scan)(clip).tokens for scan in ("loop", "doubling", "chunked"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)


def test_features_of_a_clip() -> None:
    model = tiny(num_classes=5)
    clip = randn(2, 3, 3, 8, 12, dtype=torch.float32)
    features = model(clip, hidden_states=True)
    assert (features.grid, features.tokens.shape, features.pooled.shape) == ((3, 4, 6), (2, 72, 6), (2, 6))
    torch.testing.assert_close(features.pooled, features.tokens[:, 48:].mean(dim=1))
    assert len(features.hidden_states) == 3
    torch.testing.assert_close(features.hidden_states[-1], features.tokens)
    assert model.logits(clip).shape == (2, 5)


def test_a_layer_is_its_norm_of_input_and_head() -> None:
    layer = tiny().layers[0]
    u = randn(1, 2, 6, 4, 4, dtype=torch.float32)
    y, _ = layer.core(u, None)
    y = y[0]
    head = layer.head

    def norm(x: Tensor, part: Any) -> Tensor:
        groups = x.unflatten(1, (2, 3)).flatten(2)
        centred = groups - groups.mean(dim=2, keepdim=True)
        scaled = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
        return scaled.view_as(x) * part.weight[:, None, None] + part.bias[:, None, None]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    r = head.conv2(gelu(norm(head.conv1(gelu(norm(y, head.norm1))), head.norm2)))
    expected = F.layer_norm((u[0] + gelu(y + r)).movedim(1, -1), (6,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(layer(u, None)[0][0], expected, atol=1e-5, rtol=1e-5)


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(core="lstm"), "unknown core of ConvS5 'lstm'.*conv_lstm"),
        (dict(core="conv_lstm", ssm_size=8), "ssm_size must be d_model, not 8"),
        (dict(ssm_size=7), "state_size must be a multiple of 2"),
        (dict(kernel_size=2), "odd sides"),
        (dict(scan="fast"), "unknown scan of a ConvSSM"),
        (dict(layers=0), "one layer"),
        (dict(image_size=9), "multiples of 2 pixels, not 9 x 9"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny(**options)


def test_wrong_inputs() -> None:
    model = tiny()
    with pytest.raises(InputError, match=r"takes clips \[B, T, C, H, W\]"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="one frame or more"):
        model(torch.zeros(1, 0, 3, 8, 8))
    with pytest.raises(InputError, match="clips of 2 frames or more"):
        model.loss(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(InputError, match="frames of 1 or more, not 0"):
        model.rollout(torch.zeros(1, 1, 3, 8, 8), 0)
    with pytest.raises(InputError, match="odd side"):
        ConvLSTM(3, kernel_size=2)
    with pytest.raises(InputError, match="dt_min and dt_max"):
        ConvSSM(3, 4, dt_min=0.0)
