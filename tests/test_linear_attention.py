"""Linear attention with decay: all forms against a loop over numbers, and what follows from the definition exactly."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightline.errors import InputError
from sightline.mixers import linear_attention as module
from sightline.mixers.linear_attention import linear_attention

KINDS = ["none", "head", "token", "channel"]
FORMS: list[dict[str, Any]] = [
    dict(mode="recurrent"),
    dict(mode="parallel"),
    {},
    *(dict(chunk=chunk) for chunk in (1, 2, 5, 8, 37, 100)),
]


def slow(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition for decays [B, H, L, K], one sequence, head and channel at a time, in float64."""
    batch, heads, length, width = query.shape
    out = torch.zeros(value.shape, dtype=torch.float64)
    state = state.double().clone()
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                for d in range(width):
                    state[b, h, d] = math.exp(decay[b, h, t, d]) * state[b, h, d]
                    state[b, h, d] += float(key[b, h, t, d]) * value[b, h, t].double()
                    out[b, h, t] += float(query[b, h, t, d]) * state[b, h, d]
    return out, state


def some(
    kind: str, length: int = 37, strength: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Queries, keys and values of 2 sequences, 3 heads, 4 key and 5 value channels; log decays; a first state."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [draw(2, 3, length, 4), draw(2, 3, length, 4), draw(2, 3, length, 5)]
    shapes = {"head": (3,), "token": (2, 3, length), "channel": (2, 3, length, 4)}
    decay = None if kind == "none" else F.logsigmoid(draw(*shapes[kind])) * strength
    return inputs, decay, draw(2, 3, 4, 5)


def by_channel(decay: Tensor | None, length: int) -> Tensor:
    if decay is None:
        return torch.zeros(2, 3, length, 4)
    while decay.ndim < 4:
        decay = decay[None, :, None] if decay.ndim == 1 else decay[..., None]
    return decay.expand(2, 3, length, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.3, 60.0])
def test_every_form_is_the_definition(kind: str, strength: float) -> None:
    """At the larger strength a chunk fades by far more than e^-40, so that it is halved."""
    inputs, decay, state = some(kind, strength=strength)
    out, last = slow(*inputs, by_channel(decay, 37), state)
    for form in FORMS:
        ours, ours_last = linear_attention(*inputs, decay, state=state, **form)
        torch.testing.assert_close(ours, out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours_last, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.1, 2.0, 60.0])
def test_in_single_precision_too(kind: str, strength: float) -> None:
    """Against the same numbers in double precision, with chunks on both sides of the limit."""
    inputs, decay, state = some(kind, length=150, strength=strength, dtype=torch.float32)
    wide = [x.double() for x in inputs]
    out, last = linear_attention(
        *wide, None if decay is None else decay.double(), state=state.double(), mode="recurrent"
    )
    for form in (dict(mode="parallel"), {}, dict(chunk=32), dict(chunk=9)):
        ours, ours_last = linear_attention(*inputs, decay, state=state, **form)
        scale = float(out.abs().max())
        assert float((ours - out).abs().max()) < 1e-5 * scale
        assert float((ours_last - last).abs().max()) < 1e-5 * float(last.abs().max())


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a_decay_of_zero_forgets_all_and_spoils_nothing(kind: str) -> None:
    inputs, decay, state = some(kind)
    assert decay is not None
    decay[:, :, 20] = -torch.inf
    decay[:, :, 9] = -1e4
    out, last = linear_attention(*inputs, decay, state=state, mode="recurrent")
    anew, _ = linear_attention(*(x[:, :, 20:] for x in inputs), decay[:, :, 20:])
    torch.testing.assert_close(out[:, :, 20:], anew)
    for form in (dict(mode="parallel"), {}, dict(chunk=8)):
        ours, ours_last = linear_attention(*inputs, decay, state=state, **form)
        torch.testing.assert_close(ours, out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours_last, last, rtol=1e-10, atol=1e-10)


def test_a_reset_costs_later_tokens_no_digits() -> None:
    """In float32 the running sum after -1e4 is rounded to 1e-3; it must not be what the weights are made of."""
    inputs, decay, _ = some("token", length=64, strength=0.3, dtype=torch.float32)
    assert decay is not None
    decay[:, :, 3] = -1e4
    exact, _ = linear_attention(*(x.double() for x in inputs), decay.double(), mode="recurrent")
    ours, _ = linear_attention(*inputs, decay)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [dict(mode="parallel"), dict(chunk=3)])
@pytest.mark.parametrize("strength", [0.5, 100.0])
def test_gradients(kind: str, form: dict[str, Any], strength: float) -> None:
    """Also where chunks are halved. Small: 5 tokens."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    shapes = {"head": (2,), "token": (1, 2, 5), "channel": (1, 2, 5, 2)}
    gates = [leaf(*shapes[kind])] if kind != "none" else []

    def run(query: Tensor, key: Tensor, value: Tensor, state: Tensor, *gate: Tensor) -> tuple[Tensor, Tensor]:
        decay = F.logsigmoid(gate[0]) * strength if gate else None
        return linear_attention(query, key, value, decay, state=state, **form)

    inputs = (leaf(1, 2, 5, 2), leaf(1, 2, 5, 2), leaf(1, 2, 5, 3), leaf(1, 2, 2, 3), *gates)
    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_of_the_forms_agree_and_are_finite_in_single_precision() -> None:
    found: list[list[Tensor]] = []
    for form in (dict(mode="recurrent"), {}, dict(chunk=20), dict(mode="parallel")):
        inputs, decay, _ = some("channel", length=130, strength=0.5, dtype=torch.float32)
        assert decay is not None
        leaves = [x.requires_grad_() for x in (*inputs, decay)]
        out, last = linear_attention(*inputs, decay, **form)
        (out.sin().sum() + last.sum()).backward()
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_can_be_cut_anywhere(kind: str) -> None:
    inputs, decay, state = some(kind)
    whole, last = linear_attention(*inputs, decay, state=state, chunk=8)
    parts = []
    for start, stop in ((0, 1), (1, 14), (14, 37)):
        cut = decay if decay is None or decay.ndim == 1 else decay[:, :, start:stop]
        out, state = linear_attention(*(x[:, :, start:stop] for x in inputs), cut, state=state, chunk=8)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("form", [dict(mode="parallel"), dict(chunk=8)])
def test_later_tokens_change_nothing(form: dict[str, Any]) -> None:
    inputs, decay, _ = some("channel")
    assert decay is not None
    before, _ = linear_attention(*inputs, decay, **form)
    for x in (*inputs, decay):
        x[:, :, 21] = -3.0
    after, _ = linear_attention(*inputs, decay, **form)
    assert torch.equal(before[:, :, :21], after[:, :, :21])
    assert not torch.equal(before[:, :, 21:], after[:, :, 21:])


def test_without_decay_it_is_causal_linear_attention_and_without_memory_a_token_alone() -> None:
    (query, key, value), _, _ = some("none")
    out, state = linear_attention(query, key, value)
    torch.testing.assert_close(out, (query @ key.mT).tril() @ value)
    torch.testing.assert_close(state, key.mT @ value)
    ones, _ = linear_attention(query, key, value, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(ones, out)
    alone, _ = linear_attention(query, key, value, torch.full((3,), -torch.inf, dtype=torch.float64))
    torch.testing.assert_close(alone, (query * key).sum(-1, keepdim=True) * value)


def test_many_chunks_in_groups_are_one_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, decay, state = some("channel", length=150)
    whole, last = linear_attention(*inputs, decay, state=state, chunk=4)
    for together in (1, 6, 13, 10**6):
        monkeypatch.setattr(module, "TOGETHER", together)
        ours, ours_last = linear_attention(*inputs, decay, state=state, chunk=4)
        torch.testing.assert_close(ours, whole)
        torch.testing.assert_close(ours_last, last)


def test_half_precision_is_computed_in_single() -> None:
    inputs, decay, _ = some("channel", length=100, strength=0.05)
    assert decay is not None
    inputs = [x.bfloat16() for x in inputs]
    exact, _ = linear_attention(*(x.float() for x in inputs), decay.float())
    out, state = linear_attention(*inputs, decay.float())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, _ = linear_attention(*(x.float() for x in inputs), decay.float())
    torch.testing.assert_close(mixed, exact, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_numbers(kind: str) -> None:
    inputs, decay, state = some(kind)
    meta = [x.to("meta") for x in inputs]
    for form in FORMS:
        out, last = linear_attention(*meta, None if decay is None else decay.to("meta"), **form)
        assert out.is_meta
        assert (out.shape, last.shape) == (inputs[2].shape, state.shape)


# --- flash-linear-attention ---


class Fake:
    """Stands for the package: two kernels that compute by our own code, and note what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def modules(self) -> dict[str, ModuleType]:
        names = ["fla", "fla.ops", "fla.ops.gla", "fla.ops.simple_gla"]
        modules = {name: ModuleType(name) for name in names}
        modules["fla.ops.gla"].chunk_gla = self.kernel("gla")  # type: ignore[attr-defined]
        modules["fla.ops.simple_gla"].chunk_simple_gla = self.kernel("simple_gla")  # type: ignore[attr-defined]
        return modules

    def kernel(self, name: str) -> Any:
        def run(
            q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float, initial_state: Any, **rest: Any
        ) -> tuple[Tensor, Tensor]:
            assert rest == {"output_final_state": True}
            self.calls.append((name, dict(shape=list(q.shape), g=None if g is None else list(g.shape))))
            state = initial_state
            heads_first = [x.transpose(1, 2) for x in (q * scale, k, v)]
            decay = None if g is None else g.transpose(1, 2)
            out, state = linear_attention(*heads_first, decay, state=state, backend="torch")
            return out.transpose(1, 2), state

        return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    package = Fake()
    for name, fake_module in package.modules().items():
        monkeypatch.setitem(sys.modules, name, fake_module)
    module._fla.cache_clear()
    yield package
    module._fla.cache_clear()


@pytest.mark.parametrize(
    ("kind", "kernel", "gates"),
    [
        ("none", "simple_gla", None),
        ("head", "simple_gla", [2, 37, 3]),
        ("token", "simple_gla", [2, 37, 3]),
        ("channel", "gla", [2, 37, 3, 4]),
    ],
)
def test_fla_gets_its_layout_and_its_kernel(fake: Fake, kind: str, kernel: str, gates: list[int] | None) -> None:
    inputs, decay, state = some(kind, dtype=torch.float32)
    expected, last = linear_attention(*inputs, decay, state=state)
    assert not fake.calls  # not for tensors on a CPU, unless asked
    out, ours_last = linear_attention(*inputs, decay, state=state, backend="fla")
    assert fake.calls == [(kernel, dict(shape=[2, 37, 3, 4], g=gates))]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_last, last, rtol=1e-5, atol=1e-5)


def test_fla_is_taken_by_itself_on_cuda_only(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        is_cuda, dtype = True, torch.float32

    assert module._suits_fla(Elsewhere(), "chunked")  # type: ignore[arg-type]
    assert not module._suits_fla(Elsewhere(), "recurrent")  # type: ignore[arg-type]
    monkeypatch.setattr(Elsewhere, "dtype", torch.float64)
    assert not module._suits_fla(Elsewhere(), "chunked")  # type: ignore[arg-type]
    inputs, decay, _ = some("head", dtype=torch.float32)
    monkeypatch.setattr(module, "_suits_fla", lambda query, mode: True)
    linear_attention(*inputs, decay)
    assert len(fake.calls) == 1
    linear_attention(*inputs, decay, backend="torch")
    assert len(fake.calls) == 1


def test_without_fla_the_torch_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    module._fla.cache_clear()
    inputs, decay, _ = some("head")
    with pytest.raises(InputError, match="backend 'fla' needs the package flash-linear-attention"):
        linear_attention(*inputs, decay, backend="fla")
    monkeypatch.setattr(module, "_suits_fla", lambda query, mode: True)
    expected, _ = linear_attention(*inputs, decay, backend="torch")
    assert torch.equal(linear_attention(*inputs, decay)[0], expected)
    module._fla.cache_clear()


# --- Errors ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mode="chunkwise"), "unknown mode of linear attention 'chunkwise' .did you mean 'chunked'"),
        (dict(backend="triton"), "unknown backend of linear attention 'triton'"),
        (dict(chunk=0), "chunk must be a number of tokens from 1, or None for 64, not 0"),
        (
            dict(log_decay=torch.zeros(2)),
            r"log_decay must be of shape \[3\], \[2, 3, 37\] or \[2, 3, 37, 4\], not \[2\]",
        ),
        (dict(log_decay=torch.zeros(2, 3, 36)), r"log_decay must be of shape .* not \[2, 3, 36\]"),
        (dict(state=torch.zeros(2, 3, 5, 4)), r"state must be of shape \[2, 3, 4, 5\], not \[2, 3, 5, 4\]"),
        (dict(key_BHLK=torch.zeros(2, 3, 37, 5)), r"queries and keys must be \[B, H, L, K\]"),
        (dict(value_BHLV=torch.zeros(2, 3, 36, 5)), r"values \[B, H, L, V\], not"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    (query, key, value), _, _ = some("none")
    with pytest.raises(InputError, match=message):
        linear_attention(**dict(query_BHLK=query, key_BHLK=key, value_BHLV=value) | change)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="at least one token"):
        linear_attention(*(torch.zeros(1, 1, 0, 2) for _ in range(3)))
