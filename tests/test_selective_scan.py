"""The selective scan: both backends against a loop over single numbers, their gradients, state, gaps, steps, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.errors import InputError
from sightline.mixers import selective_scan as module
from sightline.mixers.selective_scan import selective_scan, selective_scan_step

BACKENDS = ("torch", "chunked", "numba")
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias", "state", "gap")


def drawn(
    batch: int = 2,
    channels: int = 6,
    states: int = 3,
    length: int = 11,
    groups: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    group = () if groups is None else (groups,)
    return dict(
        u=draw(batch, channels, length),
        delta=draw(batch, channels, length),
        A=-draw(channels, states).abs() * 3,
        B=draw(batch, *group, states, length),
        C=draw(batch, *group, states, length),
        D=draw(channels),
        delta_bias=draw(channels),
        state=draw(batch, channels, states),
        gap=draw(batch, channels, length).abs(),
    )


def slow(values: dict[str, Any], softplus: bool = True) -> tuple[Tensor, Tensor]:
    """The equations, number by number."""
    given = {name: value.tolist() for name, value in values.items()}
    batch, channels, length = values["u"].shape
    groups = values["B"].shape[1] if values["B"].ndim == 4 else 0
    y, last = torch.zeros_like(values["u"]), torch.zeros_like(values["state"])
    for b in range(batch):
        for e in range(channels):
            B, C = given["B"][b], given["C"][b]
            if groups:
                B, C = B[e * groups // channels], C[e * groups // channels]
            h = list(given["state"][b][e])
            for t in range(length):
                step = given["delta"][b][e][t] + given["delta_bias"][e]
                step = math.log1p(math.exp(step)) if softplus else step
                total = given["D"][e] * given["u"][b][e][t]
                for n in range(len(h)):
                    decay = math.exp((step + given["gap"][b][e][t]) * given["A"][e][n])
                    h[n] = decay * h[n] + step * B[n][t] * given["u"][b][e][t]
                    total += C[n][t] * h[n]
                y[b, e, t] = total
            last[b, e] = torch.tensor(h, dtype=last.dtype)
    return y, last


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize(("states", "length", "softplus"), [(3, 11, True), (1, 5, True), (4, 1, False)])
def test_it_is_its_equations(backend: Any, groups: int | None, states: int, length: int, softplus: bool) -> None:
    values = drawn(states=states, length=length, groups=groups)
    expected = slow(values, softplus)
    y, last = selective_scan(**values, softplus=softplus, backend=backend)
    torch.testing.assert_close(y, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("length", "groups"), [(1, None), (31, None), (32, 2), (33, None), (77, 3)], ids=lambda value: str(value)
)
def test_backends_agree_in_values_and_gradients(dtype: torch.dtype, length: int, groups: int, threads: int) -> None:
    """Lengths around that of a chunk; channels that threads share."""
    values = drawn(channels=66, states=5, length=length, groups=groups, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    results = {}
    for backend in BACKENDS:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        outputs = selective_scan(**leaves, backend=backend)
        weights = [torch.randn(output.shape, generator=generator.manual_seed(1), dtype=dtype) for output in outputs]
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(total, list(leaves.values()))
        results[backend] = dict(zip(("y", "last", *leaves), (*outputs, *gradients), strict=True))
    bound = 2e-6 if dtype == torch.float32 else 1e-12
    for name, expected in results["torch"].items():
        scale = float(expected.detach().abs().max())
        for backend in ("chunked", "numba"):
            torch.testing.assert_close(results[backend][name], expected, rtol=0, atol=bound * max(scale, 1), msg=name)


def test_blocks_cover_every_channel_of_every_group_once(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(module, "WIDEST", 7)
    monkeypatch.setattr(module, "NARROWEST", 2)
    blocks = module._blocks(2, 3, 51)
    covered = [(row, channel) for row, group, first, end in blocks for channel in range(first, end)]
    assert covered == [(row, channel) for row in range(2) for channel in range(51)]
    assert all(group == first // 17 == (end - 1) // 17 and end - first <= 7 for _, group, first, end in blocks)
    assert len(module._blocks(1, 1, 8)) == 2
    values = drawn(channels=51, groups=3)
    plain, blocked = (selective_scan(**values, backend=backend)[0] for backend in ("torch", "numba"))
    torch.testing.assert_close(blocked, plain)


@pytest.mark.parametrize("groups", [None, 2])
def test_gradients_are_those_of_finite_differences(groups: int | None) -> None:
    values = drawn(batch=1, channels=2, states=2, length=35, groups=groups)
    leaves = [value.requires_grad_() for value in values.values()]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(NAMES, given, strict=True)), backend="numba")

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_goes_on_where_it_was_left(backend: Any) -> None:
    values = drawn(length=13)
    y, last = selective_scan(**values, backend=backend)
    along = ("u", "delta", "B", "C", "gap")
    first = {name: value[..., :5] if name in along else value for name, value in values.items()}
    second = {name: value[..., 5:] if name in along else value for name, value in values.items()}
    start, state = selective_scan(**first, backend=backend)
    end, state = selective_scan(**second | {"state": state}, backend=backend)
    torch.testing.assert_close(torch.cat([start, end], dim=-1), y)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("groups", [None, 3])
def test_steps_are_the_whole_pass(groups: int | None) -> None:
    values = drawn(groups=groups)
    del values["gap"]
    y, last = selective_scan(**values)
    state = values["state"]
    for t in range(11):
        now = {name: value[..., t] if name in ("u", "delta", "B", "C") else value for name, value in values.items()}
        token, state = selective_scan_step(**now | {"state": state})
        torch.testing.assert_close(token, y[..., t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gap_is_the_time_of_tokens_without_input(backend: Any) -> None:
    """Tokens 2, 3 and 7 of 9 bring nothing; without them, their steps are the gaps before tokens 4 and 8."""
    values = drawn(length=9)
    del values["gap"]
    steps = torch.nn.functional.softplus(values.pop("delta") + values.pop("delta_bias")[:, None])
    silent, stay = [2, 3, 7], [0, 1, 4, 5, 6, 8]
    masked = values["u"].clone()
    masked[..., silent] = 0
    y, last = selective_scan(**values | {"u": masked}, delta=steps, softplus=False, backend=backend)
    gap = torch.zeros(2, 6, 6, dtype=torch.float64)
    gap[..., 2], gap[..., 5] = steps[..., 2] + steps[..., 3], steps[..., 7]
    kept = {name: value[..., stay] if name in ("u", "B", "C") else value for name, value in values.items()}
    kept_y, kept_last = selective_scan(**kept, delta=steps[..., stay], gap=gap, softplus=False, backend=backend)
    torch.testing.assert_close(kept_y, y[..., stay], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept_last, last, rtol=1e-12, atol=1e-12)
    without, _ = selective_scan(**kept, delta=steps[..., stay], softplus=False, backend=backend)
    assert (without - kept_y).abs().max() > 0.01


def decayed(exponents: Tensor, backend: Any) -> Tensor:
    """exp(exponents) as a scan has it: a state of 1, one token without input, A = 1."""
    one = torch.ones(len(exponents), 1, dtype=exponents.dtype)
    zero = torch.zeros(1, 1, 1, dtype=exponents.dtype)
    times = exponents[None, :, None]
    return selective_scan(
        torch.zeros_like(times), times, one, zero, zero, softplus=False, state=one[None], backend=backend
    )[1].flatten()


def test_decays_in_float32_are_accurate() -> None:
    exponents = torch.cat([torch.linspace(-87, 88, 300_001), torch.linspace(-1, 1, 100_001), torch.zeros(1)])
    found = decayed(exponents, "numba").double()
    error = (found / exponents.double().exp() - 1).abs() / (1 + exponents.abs())
    assert error.max() < 1.2e-7
    assert found[-1] == 1
    assert decayed(torch.tensor([-1e3, -1e30, 1e3]), "numba").tolist() == [0, 0, math.inf]
    assert decayed(torch.tensor([math.nan]), "numba").isnan().all()
    exact = torch.linspace(-700, 700, 1001, dtype=torch.float64)
    torch.testing.assert_close(decayed(exact, "numba"), exact.exp(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_memories_and_fast_decays_stay_finite(backend: Any) -> None:
    """A of -16 and -0.1 over 2000 tokens of step 0.5: the products of the decays underflow, and nothing else does."""
    values = drawn(batch=1, channels=4, states=2, length=2000, dtype=torch.float32)
    values["A"] = torch.tensor([[-16.0, -0.1]] * 4)
    values["delta"][:] = 0.5
    del values["gap"], values["delta_bias"]
    y, last = selective_scan(**values, softplus=False, backend=backend)
    exact, exact_last = selective_scan(
        **{name: value.double() for name, value in values.items()}, softplus=False, backend=backend
    )
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(last.double(), exact_last, rtol=1e-5, atol=1e-4)


def test_the_gradient_keeps_memory_linear_in_tokens() -> None:
    """The plain loop keeps all L E N numbers of state, the compiled one no more than some L E."""
    values = drawn(batch=1, channels=32, states=16, length=128, dtype=torch.float32)
    kept = {}
    for backend in BACKENDS:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            selective_scan(**leaves, backend=backend)
        kept[backend] = sum(sizes.values())
    assert kept["torch"] > 128 * 32 * 16
    assert kept["numba"] < 10 * 128 * 32


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend: Any) -> None:
    values = {name: value.bfloat16() for name, value in drawn().items()}
    y, last = selective_scan(**values, backend=backend)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    exact = selective_scan(**{name: value.float() for name, value in values.items()}, backend=backend)
    torch.testing.assert_close(y.float(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(last, exact[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: Any) -> None:
    values = drawn()
    turned = {name: value.mT.contiguous().mT if value.ndim > 1 else value for name, value in values.items()}
    torch.testing.assert_close(selective_scan(**turned, backend=backend), selective_scan(**values, backend=backend))


def test_shapes_without_computing() -> None:
    values = {name: value.to("meta") for name, value in drawn(groups=2).items()}
    y, last = selective_scan(**values)
    assert y.is_meta
    assert (y.shape, last.shape) == ((2, 6, 11), (2, 6, 3))


def test_without_numba_auto_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_numba", lambda: False)
    values = drawn()
    y, _ = selective_scan(**values)
    assert torch.equal(y, selective_scan(**values, backend="torch")[0])
    with pytest.raises(InputError, match=r"needs numba: pip install 'sightline\[cpu\]'"):
        selective_scan(**values, backend="numba")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(u=torch.zeros(2, 6)), r"u of selective_scan must be \[B, E, L\] with a token at least, not of shape"),
        (dict(u=torch.zeros(2, 6, 0)), r"u of selective_scan must be .*\[2, 6, 0\]"),
        (dict(delta=torch.zeros(2, 6, 1)), r"delta of selective_scan must be \[2, 6, 11\] like u, not of .*1\]"),
        (dict(A=torch.zeros(5, 3)), r"A of selective_scan must be \[6, N\], not of shape \[5, 3\]"),
        (dict(B=torch.zeros(2, 4, 11), C=torch.zeros(2, 4, 11)), r"B of selective_scan must be \[2, 3, 11\], or"),
        (dict(C=torch.zeros(2, 3, 10)), r"C of selective_scan must be \[2, 3, 11\]"),
        (dict(B=torch.zeros(2, 4, 3, 11), C=torch.zeros(2, 4, 3, 11)), "with G a divisor of 6"),
        (dict(state=torch.zeros(2, 6, 4)), r"state of selective_scan must be \[2, 6, 3\], not of shape \[2, 6, 4\]"),
        (dict(backend="nunba"), r"unknown backend of selective_scan 'nunba' \(did you mean 'numba'\?\)"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        selective_scan(**{**drawn(), **changes})


def test_the_compiled_loops_are_for_the_cpu() -> None:
    values = {name: value.to("meta") for name, value in drawn().items()}
    with pytest.raises(InputError, match="for tensors on the CPU, not on meta"):
        module._use_kernels("numba", values["u"])
    assert not module._use_kernels("auto", values["u"])
