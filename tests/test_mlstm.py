"""The mLSTM: its three forms against the recurrence as written, gates that would overflow, states, and the layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline import machine_code
from sightline.errors import InputError
from sightline.mixers import mlstm as module
from sightline.mixers.mlstm import MLSTM, BlockLinear, MLSTMState, OffsetNorm, mlstm
from sightline.mixers.mlstm_loops import layer_in_loops

FORMS = [
    dict(mode="recurrent"),
    dict(mode="parallel"),
    dict(mode="chunked"),
    dict(mode="chunked", chunk=1),
    dict(mode="chunked", chunk=3),
    dict(mode="chunked", chunk=1000),
]
IDS = ["recurrent", "parallel", "chunked", "chunks of 1", "chunks of 3", "one chunk"]


def draw(length: int, dtype: torch.dtype, *, spread: float = 1.0, shift: float = 2.0, seed: int = 0) -> list[Tensor]:
    """Queries, keys [2, 3, L, 4], values [2, 3, L, 5] and gates."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 3, length, *shape, generator=generator, dtype=torch.float64)

    return [part.to(dtype) for part in (normal(4), normal(4), normal(5), normal() * spread, normal() * spread + shift)]


def as_written(query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """Number by number, with exp and sigmoid as they are, and a normaliser of 1 or more."""
    out = torch.zeros_like(value)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            memory, normaliser = torch.zeros(4, 5, dtype=value.dtype), torch.zeros(4, dtype=value.dtype)
            for t in range(query.shape[2]):
                forget, put = torch.sigmoid(forget_gate[b, h, t]), torch.exp(input_gate[b, h, t])
                memory = forget * memory + put * torch.outer(key[b, h, t], value[b, h, t])
                normaliser = forget * normaliser + put * key[b, h, t]
                q = query[b, h, t] / 2
                out[b, h, t] = memory.T @ q / max(abs(float(q @ normaliser)), 1.0)
    return out


def stabilised(query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    """The matrix of all pairs in float64, with the largest of each row taken out: for any gates."""
    query, key, value, i, f = (part.double() for part in (query, key, value, input_gate, forget_gate))
    length = query.shape[2]
    summed = F.logsigmoid(f).cumsum(-1)
    pairs = summed[..., :, None] - summed[..., None, :] + i[..., None, :]
    pairs = pairs.masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf)
    largest = pairs.amax(-1, keepdim=True)
    weights = query @ key.mT / math.sqrt(query.shape[-1]) * (pairs - largest).exp()
    return weights @ value / (torch.maximum(weights.sum(-1, keepdim=True).abs(), (-largest).exp()) + 1e-6)


# --- The forms ---


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_every_form_is_the_recurrence_as_written(form: dict[str, Any], length: int) -> None:
    given = draw(length, torch.float64)
    out, _ = mlstm(*given, eps=0.0, **form)
    torch.testing.assert_close(out, as_written(*given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize(("spread", "shift"), [(1.0, 3.0), (3.0, -2.0), (200.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_form_with_mild_and_with_absurd_gates(
    form: dict[str, Any], spread: float, shift: float, dtype: torch.dtype
) -> None:
    given = draw(77, dtype, spread=spread, shift=shift)
    out, state = mlstm(*given, **form)
    assert out.dtype == dtype
    assert all(part.isfinite().all() for part in state)
    bound = 1e-10 if dtype == torch.float64 else 1e-4 if spread > 100 else 1e-5
    torch.testing.assert_close(out.double(), stabilised(*given), rtol=bound, atol=bound)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("size", [200.0, 1000.0])
def test_gates_of_hundreds_give_finite_outputs_and_gradients(form: dict[str, Any], size: float) -> None:
    *heads, _, _ = draw(9, torch.float32)
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1, -1]).expand(2, 3, 9)
    given = [part.requires_grad_() for part in (*heads, signs * size, -signs.roll(2, -1) * size)]
    out, _ = mlstm(*given, **form)
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.square().sum(), given):
        assert gradient.isfinite().all()
    # Where every gate is shut there is nothing to see.
    shut = torch.full((2, 3, 9), -size, requires_grad=True)
    quiet, _ = mlstm(*heads, shut, torch.full((2, 3, 9), size), **form)
    assert quiet.abs().max() < 1e-20
    assert torch.autograd.grad(quiet.sum(), shut)[0].isfinite().all()


def test_long_memory_keeps_its_digits_in_float32() -> None:
    # Tokens that forget everything, then slow ones: sums over the whole sequence in float32 would lose the slow steps.
    given = draw(700, torch.float32, spread=0.1, shift=6.0)
    given[4][:, :, :300] = -100.0
    out, _ = mlstm(*given)
    torch.testing.assert_close(out.double(), stabilised(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_both_ways_to_weigh_pairs_agree(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shift: float) -> None:
    given = [part.requires_grad_() for part in draw(50, dtype, shift=shift)]
    results = []
    for growth in (module.STEEPEST, 1e9, -1.0):
        monkeypatch.setattr(module, "STEEPEST", growth)
        out, _ = mlstm(*given, chunk=8)
        results.append((out, *torch.autograd.grad(out.square().mean(), given)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            bound = 1e-5 if dtype == torch.float32 else 1e-10
            torch.testing.assert_close(one, two, rtol=bound, atol=bound)


@pytest.mark.parametrize("form", FORMS[:3] + FORMS[4:5], ids=IDS[:3] + IDS[4:5])
@pytest.mark.parametrize("shift", [2.0, -60.0])
def test_gradients(form: dict[str, Any], shift: float) -> None:
    given = [part[:1, :2].clone().requires_grad_() for part in draw(5, torch.float64, shift=shift)]
    before = mlstm(*(part[:1, :2] for part in draw(3, torch.float64, seed=1)))[1]
    memory, normaliser = (part.clone().requires_grad_() for part in before[:2])

    def run(memory: Tensor, normaliser: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        out, after = mlstm(*given, state=MLSTMState(memory, normaliser, before.maximum), **form)
        return out, after.memory, after.normaliser

    assert torch.autograd.gradcheck(run, (memory, normaliser, *given))


@pytest.mark.parametrize("first", FORMS[:4], ids=IDS[:4])
@pytest.mark.parametrize("second", FORMS[:4], ids=IDS[:4])
@pytest.mark.parametrize("cut", [1, 30])
def test_a_sequence_in_two_parts(first: dict[str, Any], second: dict[str, Any], cut: int) -> None:
    given = draw(41, torch.float64, spread=4.0)
    whole, end = mlstm(*given)
    before, state = mlstm(*(part[:, :, :cut] for part in given), **first)
    after, last = mlstm(*(part[:, :, cut:] for part in given), state=state, **second)
    torch.testing.assert_close(torch.cat([before, after], dim=2), whole, rtol=1e-10, atol=1e-10)
    for one, two in zip(last, end, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_open_gates_are_causal_linear_attention() -> None:
    query, key, value, gate, _ = draw(23, torch.float64)
    out, _ = mlstm(query, key, value, 0 * gate, 0 * gate + 60, eps=0.0)
    scores = (query @ key.mT / 2).tril()
    expected = scores @ value / scores.sum(-1, keepdim=True).abs().clamp(min=1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_half_precision_is_computed_in_float32() -> None:
    given = draw(40, torch.float32)
    half = [part.bfloat16() for part in given]
    out, state = mlstm(*half)
    assert out.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    assert torch.equal(out, mlstm(*(part.float() for part in half))[0].bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlstm(*given)[0], mlstm(*given)[0].float())
        inside, _ = mlstm(*given)
    assert torch.equal(inside, mlstm(*given)[0])


def test_meta_tensors_have_the_shapes() -> None:
    given = [part.to("meta") for part in draw(77, torch.float32)]
    out, state = mlstm(*given)
    assert out.is_meta
    assert out.shape == (2, 3, 77, 5)
    assert [tuple(part.shape) for part in state] == [(2, 3, 4, 5), (2, 3, 4), (2, 3)]


def test_what_cannot_be_computed() -> None:
    query, key, value, i, f = draw(6, torch.float32)
    with pytest.raises(InputError, match=r"unknown mode 'chunky' \(did you mean 'chunked'\?\)"):
        mlstm(query, key, value, i, f, mode="chunky")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk must be 1 token or more, not 0"):
        mlstm(query, key, value, i, f, chunk=0)
    for wrong in (
        [query, key[..., :3], value, i, f],
        [query, key, value[:, :, :5], i, f],
        [query, key, value, i[0], f],
    ):
        with pytest.raises(InputError, match=r"two gates \[B, H, L\] with one token or more, not \[2, 3, 6, 4\]"):
            mlstm(*wrong)
    with pytest.raises(InputError, match="one token or more"):
        mlstm(*(part[:, :, :0] for part in (query, key, value, i, f)))


# --- The layer ---


def layer(seed: int = 0, **settings: Any) -> MLSTM:
    """A layer of width 6 whose gates read something, in float64."""
    torch.manual_seed(seed)
    made = MLSTM(6, num_heads=2, block_size=2, **settings).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def slow_layer(made: MLSTM, x: Tensor) -> Tensor:
    """The causal layer of one sample [L, D], forwards."""
    length, inner = len(x), made.inner
    up = x @ made.proj_up.weight.T
    u, z = up[:, :inner], up[:, inner:]
    assert isinstance(made.conv, nn.Conv1d)
    assert made.conv.bias is not None
    c = torch.zeros_like(u)
    for t in range(length):
        for tap in range(4):
            if t - 3 + tap >= 0:
                c[t] += made.conv.weight[:, 0, tap] * u[t - 3 + tap]
    c = c + made.conv.bias
    c = c * torch.sigmoid(c)
    q, k, v = (
        part @ torch.block_diag(*maps.weight).T for part, maps in ((c, made.q_proj), (c, made.k_proj), (u, made.v_proj))
    )
    joined = torch.cat([q, k, v], dim=-1)
    gates = [joined @ gate.weight.T + gate.bias for gate in (made.igate, made.fgate)]
    heads = []
    for head in range(2):
        at = slice(head * inner // 2, (head + 1) * inner // 2)
        parts = [part[None, None] for part in (q[:, at], k[:, at], v[:, at], *(gate[:, head] for gate in gates))]
        mixed = stabilised(*parts)[0, 0]
        mixed = (mixed - mixed.mean(-1, keepdim=True)) / (mixed.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        heads.append(mixed * (1 + made.outnorm.weight[at]))
    out = (torch.cat(heads, dim=-1) + made.learnable_skip * c) * (z * torch.sigmoid(z))
    return out @ made.proj_down.weight.T


def test_the_layer_against_its_equations() -> None:
    made = layer()
    x = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack([slow_layer(made, sample) for sample in x])
    torch.testing.assert_close(made(x, (11,)), expected, rtol=1e-10, atol=1e-10)
    backwards = layer(reverse=True)
    torch.testing.assert_close(backwards(x), made(x.flip(1)).flip(1), rtol=1e-12, atol=1e-12)


def test_token_by_token_is_the_whole_pass() -> None:
    made = layer(bias=True, norm_bias=True)
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, state = made(x, (3, 3)), made.init_state(2)
    for t in range(9):
        out, state = made.step(x[:, t], state)
        torch.testing.assert_close(out, whole[:, t], rtol=1e-10, atol=1e-10)
    changed = x.clone()
    changed[:, 5] += 1
    other = made(changed, (3, 3))
    torch.testing.assert_close(other[:, :5], whole[:, :5], rtol=1e-12, atol=1e-12)
    assert ((other - whole)[:, 5:].abs().amax((0, 2)) > 1e-6).all()


def test_the_convolution_on_the_grid() -> None:
    made = layer(conv="grid", bias=True)
    assert isinstance(made.conv, nn.Conv2d)
    u = torch.randn(1, 15, made.inner, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = F.conv2d(u.mT.reshape(1, -1, 3, 5), made.conv.weight, made.conv.bias, padding=1, groups=made.inner)
    torch.testing.assert_close(made.convolve(u, (3, 5)), expected.flatten(2).mT, rtol=1e-10, atol=1e-10)
    # Reading backwards turns the picture by half a turn, the convolution with it.
    x = torch.randn(1, 15, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    backwards = layer(conv="grid", bias=True, reverse=True)
    torch.testing.assert_close(backwards(x, (3, 5)), made(x.flip(1), (3, 5)).flip(1), rtol=1e-12, atol=1e-12)


def test_blocks_and_norm_against_torch() -> None:
    torch.manual_seed(0)
    maps = BlockLinear(20, 2, bias=True)  # 10 blocks, which do not make whole groups of 8
    nn.init.normal_(maps.weight)
    assert maps.bias is not None
    nn.init.normal_(maps.bias)
    x = torch.randn(3, 7, 20)
    torch.testing.assert_close(maps(x), F.linear(x, torch.block_diag(*maps.weight), maps.bias))
    norm = OffsetNorm(20, heads=4, bias=True)
    assert norm.bias is not None
    assert torch.equal(norm.weight, torch.zeros(20))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = F.group_norm(x.flatten(0, 1), 4, 1 + norm.weight, norm.bias, eps=1e-5).view_as(x)
    torch.testing.assert_close(norm(x), expected)


def test_the_start_of_training() -> None:
    torch.manual_seed(0)
    made = MLSTM(192)
    assert torch.equal(made.fgate.bias, torch.linspace(3, 6, 4))
    assert not made.fgate.weight.any()
    assert not made.igate.weight.any()
    assert torch.equal(made.learnable_skip, torch.ones(384))
    small = math.sqrt(2 / (5 * 192))
    for part, std in ((made.proj_up, small), (made.q_proj, small), (made.proj_down, 2 / math.sqrt(192))):
        assert float(part.weight.detach().std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(("width", "size", "heads"), [(24, 4, 4), (32, 4, 4), (512, 4, 2), (20, 2, 5), (9, 3, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_maps_by_head_are_the_maps(width: int, size: int, heads: int, bias: bool) -> None:
    torch.manual_seed(0)
    maps = BlockLinear(width, size, bias=bias)
    for parameter in maps.parameters():
        torch.nn.init.normal_(parameter)
    x, after = torch.randn(2, 7, width), torch.randn(3, width)
    expected = torch.nn.functional.linear(x, torch.block_diag(*maps.weight), maps.bias)
    torch.testing.assert_close(maps.by_head(x, heads), expected.unflatten(-1, (heads, -1)).transpose(1, 2))
    weight, offset = maps.before(after)
    torch.testing.assert_close(x @ weight.T + offset, expected @ after.T, rtol=1e-4, atol=1e-4)


LAYERS = [
    dict(width=16),
    dict(width=16, reverse=True),
    dict(width=12, num_heads=2, block_size=3, bias=True, norm_bias=True, conv_size=2),
    dict(width=10, num_heads=5, block_size=10, expansion=1, bias=True, conv_size=1, reverse=True),
    dict(width=9, num_heads=3, block_size=6, conv_size=5),
]
LOOP_LENGTHS = [1, 2, 49, 52, 11 * 64]
"""Of one token up to more than the chunks that are worked on at once."""


def filled(layer: MLSTM, *, seed: int = 0) -> MLSTM:
    """The layer with all its weights drawn, gates and norms too, and a forget gate that mostly remembers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        layer.fgate.bias.add_(3)
    return layer.eval()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that was made in machine code came to an end, in the order of the calls."""
    came: list[bool] = []

    def spy(*args: Any) -> Tensor | None:
        done = layer_in_loops(*args)
        came.append(done is not None)
        return done

    monkeypatch.setattr(module, "layer_in_loops", spy)
    monkeypatch.setattr(module, "LOOP_NUMBERS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return came


@pytest.mark.parametrize("length", LOOP_LENGTHS)
@pytest.mark.parametrize("settings", LAYERS)
def test_the_layer_in_machine_code_is_the_layer(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], length: int
) -> None:
    layer = filled(MLSTM(**settings))
    norm = OffsetNorm(layer.width)
    x = torch.randn(2, length, layer.width, generator=torch.Generator().manual_seed(1))
    expected = layer.double()(x.double())  # in float64, where the loops are not taken
    plus = x.double() + layer(norm.double()(x.double()))
    layer, norm = layer.float(), norm.float()
    came = spied(monkeypatch)
    with torch.no_grad():
        for got, wanted in ((layer(x), expected), (layer.residual(x, norm), plus)):
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=3e-5 * float(wanted.abs().max()))
    assert came == [True, True]


def test_gates_too_steep_for_machine_code_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = filled(MLSTM(16)), torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.igate.weight.mul_(500)
        came = spied(monkeypatch)
        got = layer(x)
    assert came == [False]
    wanted = layer.double()(x.double()).detach()
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


class Doubled(nn.Linear):
    """Stands for an adapter: what it gives does not follow from its weights."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@torch.no_grad()
def test_hooks_and_adapters_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, norm, x = filled(MLSTM(16)), OffsetNorm(16), torch.randn(1, 64, 16)
    stock, came = layer.residual(x, norm), spied(monkeypatch)
    heard: list[str] = []
    for name, part in {"norm": norm, "layer": layer, **dict(layer.named_children())}.items():
        handle = part.register_forward_hook(lambda *args, name=name: heard.append(name))
        torch.testing.assert_close(layer.residual(x, norm), stock, rtol=0, atol=1e-5 * float(stock.abs().max()))
        handle.remove()
    # The gates' own modules are never called: their maps are joined with those of the projections before them.
    assert heard == ["norm", "layer", "proj_up", "conv", "outnorm", "proj_down"]
    came.clear()
    adapted = Doubled(16, 64, bias=False)
    adapted.weight = layer.proj_up.weight
    layer.proj_up = adapted
    assert not torch.allclose(layer.residual(x, norm), stock, rtol=0.01)
    assert not came


def test_an_adapter_on_a_gate_is_heard() -> None:
    layer, x = filled(MLSTM(16)), torch.randn(2, 40, 16)
    adapted = copy.deepcopy(layer)
    adapted.fgate = Doubled(*layer.fgate.weight.shape[::-1])
    adapted.fgate.load_state_dict(layer.fgate.state_dict())
    for parameter in layer.fgate.parameters():
        parameter.data *= 2
    wanted = layer(x).detach()
    torch.testing.assert_close(adapted(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_where_machine_code_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = filled(MLSTM(16)), torch.randn(1, 64, 16)
    grid, came = filled(MLSTM(16, conv="grid")), spied(monkeypatch)
    layer(x).sum().backward()
    with torch.no_grad():
        grid(x, (8, 8))
        layer(torch.randn(1, 97, 16))  # no number of tokens near a chunk's divides 97
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        layer.double()(x.double())
        layer.float().register_module("added", nn.Identity())
        layer(x)
        del layer.added
        monkeypatch.setattr(module, "LOOP_NUMBERS", 1 << 14)
        layer(x.expand(2, -1, -1))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        layer(x)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(machine_code, "has_numba", lambda: False)
        layer(x)
    assert not came


def test_the_work_of_the_layer() -> None:
    made = MLSTM(8)  # 16 inner channels, 4 heads of 4
    x = torch.empty(2, 196, 8)
    # Three maps of 4 x 4 blocks; two gates a head, read off both inputs of the maps; scores and sums over chunks of 49;
    # a state of 4 x 4 a head that is written and read.
    assert made.mixing_macs(x) == 2 * 196 * (3 * 16 * 4 + 2 * 2 * 4 * 16 + 2 * 49 * 16 + 2 * 4 * 16)


def test_what_a_layer_cannot_be() -> None:
    with pytest.raises(InputError, match="width 3 has 6 inner channels, which 4 heads and blocks of 4 cannot share"):
        MLSTM(3)
    with pytest.raises(InputError, match="unknown conv 'grids'"):
        MLSTM(8, conv="grids")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="conv_size must be 1 or more, and odd on the grid, not 4"):
        MLSTM(8, conv="grid", conv_size=4)
    for settings in (dict(conv="grid"), dict(reverse=True)):
        with pytest.raises(InputError, match="only an mLSTM layer that reads forwards, with a causal convolution"):
            MLSTM(8, **settings).init_state(1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"takes rows x columns tokens, not 6 of \(2, 4\)"):
        MLSTM(8, conv="grid")(torch.zeros(1, 6, 8), (2, 4))
