"""Recurrent mixers and encoders: cells against formulas written out token by token, and what defines each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sightline.encoders.encoder import MacCounter, count_parameters
from sightline.encoders.recurrent_review import RecurrentVisionEncoder
from sightline.errors import InputError
from sightline.mixers.recurrent import (
    CELLS,
    Jordan,
    PatchRNN,
    PeepholeLSTM,
    Recurrent,
    ReNet,
    TorchRecurrent,
    memory_reach,
    recurrent,
    truncated_bptt,
)
from sightline.mixers.scan_orders import inverse_order, scan_order

D, E, L = 3, 4, 7


def randomised(module: Any, seed: int = 0) -> Any:
    """Every parameter drawn anew, so that nothing is zero; in double precision."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def tokens(length: int = L, width: int = D, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


# --- Formulas, token by token ---


def slow_elman(rnn: nn.RNN, x: Tensor) -> Tensor:
    h, outputs = x.new_zeros(len(x), E), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
        outputs.append(h)
    return torch.stack(outputs, dim=1)


def slow_gru(rnn: nn.GRU, x: Tensor) -> Tensor:
    h, outputs = x.new_zeros(len(x), E), []
    for t in range(x.shape[1]):
        xr, xu, xc = (x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0).chunk(3, dim=1)
        hr, hu, hc = (h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0).chunk(3, dim=1)
        candidate = torch.tanh(xc + torch.sigmoid(xr + hr) * hc)
        keep = torch.sigmoid(xu + hu)
        h = (1 - keep) * candidate + keep * h
        outputs.append(h)
    return torch.stack(outputs, dim=1)


def slow_lstm(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """`weights`: W, U, b of the gates i, f, g, o (no f: it is 1), and p of those that peep."""
    h = s = x.new_zeros(len(x), E)
    outputs = []
    for t in range(x.shape[1]):

        def gate(name: str, peeped: Tensor | None, t: int = t, h: Tensor = h) -> Tensor:
            total = x[:, t] @ weights["W" + name].T + h @ weights["U" + name].T + weights["b" + name]
            return total if peeped is None else total + weights.get("p" + name, torch.zeros(E)) * peeped

        i = torch.sigmoid(gate("i", s))
        f = torch.sigmoid(gate("f", s)) if "Wf" in weights else 1.0
        s_new = i * torch.tanh(gate("g", None)) + f * s
        h = torch.tanh(s_new) * torch.sigmoid(gate("o", s_new))
        s = s_new
        outputs.append(h)
    return torch.stack(outputs, dim=1)


def lstm_weights(layer: PeepholeLSTM) -> dict[str, Tensor]:
    names = {"input": "i", "forget": "f", "cell": "g", "output": "o"}
    weights = {}
    for index, gate in enumerate(layer.gates):
        part = slice(index * E, (index + 1) * E)
        weights["W" + names[gate]] = layer.weight_ih[part]
        weights["U" + names[gate]] = layer.weight_hh[part]
        weights["b" + names[gate]] = layer.bias[part]
        if gate in layer.peepholes:
            weights["p" + names[gate]] = layer.peepholes[gate]
    return weights


def test_elman_and_gru_are_their_formulas() -> None:
    elman, gru = randomised(TorchRecurrent(D, E, cell="elman")), randomised(TorchRecurrent(D, E, cell="gru"))
    torch.testing.assert_close(elman(tokens()), slow_elman(elman.rnn, tokens()))
    torch.testing.assert_close(gru(tokens()), slow_gru(gru.rnn, tokens()))


@pytest.mark.parametrize("forget", [True, False])
@pytest.mark.parametrize("peephole", [True, False])
def test_the_written_out_lstm_is_its_formula(peephole: bool, forget: bool) -> None:
    layer = randomised(PeepholeLSTM(D, E, peephole=peephole, forget=forget))
    assert len(layer.peepholes) == (2 + forget if peephole else 0)
    torch.testing.assert_close(layer(tokens()), slow_lstm(lstm_weights(layer), tokens()), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_without_peepholes_it_is_torch_s_lstm_in_values_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    oracle = randomised(nn.LSTM(D, E, batch_first=True)).to(dtype)
    layer = PeepholeLSTM(D, E, peephole=False).to(dtype)
    with torch.no_grad():
        layer.weight_ih.copy_(oracle.weight_ih_l0)
        layer.weight_hh.copy_(oracle.weight_hh_l0)
        layer.bias.copy_(oracle.bias_ih_l0 + oracle.bias_hh_l0)
    x = tokens().to(dtype)
    torch.testing.assert_close(layer(x), oracle(x)[0], atol=tolerance, rtol=tolerance)
    layer(x).square().sum().backward()
    oracle(x)[0].square().sum().backward()
    torch.testing.assert_close(layer.weight_hh.grad, oracle.weight_hh_l0.grad, atol=10 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_jordan_feeds_its_outputs_back(mu: float) -> None:
    layer = randomised(Jordan(D, E, mu=mu, output=torch.sigmoid))
    x, fed, expected = tokens(), torch.zeros(2, D, dtype=torch.float64), []
    for t in range(L):
        h = torch.tanh(x[:, t] @ layer.weight_ih.T + fed @ layer.weight_yh.T + layer.bias_h)
        expected.append(torch.sigmoid(h @ layer.weight_ho.T + layer.bias_o))
        fed = mu * fed + expected[-1]
    torch.testing.assert_close(layer(x), torch.stack(expected, dim=1))


@pytest.mark.parametrize("layer", [PeepholeLSTM(2, 2), PeepholeLSTM(2, 2, forget=False), Jordan(2, 3, mu=0.3)])
def test_gradients_of_the_written_out_cells(layer: Recurrent) -> None:
    layer = randomised(layer)
    assert torch.autograd.gradcheck(layer, (tokens(3, 2).requires_grad_(),))


# --- Properties ---


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_at_a_time_and_in_pieces_is_the_whole_pass(cell: str) -> None:
    layer = randomised(recurrent(cell, D, None if cell == "jordan" else E))
    x = tokens()
    whole = layer(x, (1, L))
    state, steps = layer.init_state(2), []
    for t in range(L):
        output, state = layer.step(x[:, t], state)
        steps.append(output)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-12, rtol=1e-12)
    first, state = layer.run(x[:, :3])
    second, _ = layer.run(x[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layers_are_causal(cell: str) -> None:
    layer = randomised(recurrent(cell, D))
    x = tokens()
    changed = x.clone()
    changed[:, 4] += 1
    same = (layer(x) == layer(changed)).all(dim=-1).all(dim=0)
    assert same.tolist() == [True] * 4 + [False] * 3


def test_with_open_gates_the_lstm_of_1997_adds_up() -> None:
    layer = randomised(PeepholeLSTM(D, E, peephole=False, forget=False))
    with torch.no_grad():
        layer.weight_hh.zero_()
        for gate in (0, 2):  # input and output: always open
            layer.weight_ih[gate * E : (gate + 1) * E] = 0
            layer.bias[gate * E : (gate + 1) * E] = 60
    g = torch.tanh(tokens() @ layer.weight_ih[E : 2 * E].T + layer.bias[E : 2 * E])
    torch.testing.assert_close(layer(tokens()), torch.tanh(g.cumsum(dim=1)))


def test_elman_without_recurrence_maps_each_token_alone() -> None:
    layer = randomised(TorchRecurrent(D, E, cell="elman"))
    with torch.no_grad():
        layer.rnn.weight_hh_l0.zero_()
    alone = torch.tanh(tokens() @ layer.rnn.weight_ih_l0.T + layer.rnn.bias_ih_l0 + layer.rnn.bias_hh_l0)
    torch.testing.assert_close(layer(tokens()), alone)


def test_parameters_at_width_64() -> None:
    counts = {cell: count_parameters(recurrent(cell, 64)) for cell in ("elman", "gru", "lstm", "peephole_lstm")}
    assert counts == {"elman": 8320, "gru": 24960, "lstm": 33280, "peephole_lstm": 33280 - 256 + 192}
    assert count_parameters(recurrent("lstm_1997", 64)) == 3 * (2 * 64 * 64 + 64)


def test_the_forget_bias_is_set_once_and_recurrent_matrices_are_orthogonal() -> None:
    torch.manual_seed(0)
    rnn = TorchRecurrent(8, cell="lstm", forget_bias=3.0).rnn
    biases = rnn.bias_ih_l0 + rnn.bias_hh_l0
    assert biases.tolist() == [0.0] * 8 + [3.0] * 8 + [0.0] * 16
    for part in rnn.weight_hh_l0.chunk(4):
        torch.testing.assert_close(part @ part.T, torch.eye(8), atol=1e-5, rtol=0)
    written = PeepholeLSTM(8, forget_bias=2.0)
    assert written.bias.tolist() == [0.0] * 8 + [2.0] * 8 + [0.0] * 16
    gru = TorchRecurrent(8, cell="gru", forget_bias=3.0).rnn
    assert not (gru.bias_ih_l0 + gru.bias_hh_l0).any()
    both = ReNet(8, forget_bias=4.0).rows
    assert (both.bias_ih_l0_reverse + both.bias_hh_l0_reverse).tolist() == [0.0] * 4 + [4.0] * 4 + [0.0] * 8


def test_the_reach_of_a_nearly_linear_network_halves_with_each_step() -> None:
    layer = TorchRecurrent(4, cell="elman").double()
    with torch.no_grad():
        layer.rnn.weight_ih_l0.copy_(torch.eye(4))
        layer.rnn.weight_hh_l0.copy_(torch.eye(4) / 2)
    reach = memory_reach(layer, tokens(6, 4) * 1e-6)
    torch.testing.assert_close(reach, 0.5 ** torch.arange(5, -1, -1, dtype=torch.float64))


def test_a_higher_forget_bias_reaches_further() -> None:
    reach = {}
    for bias in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        reach[bias] = float(memory_reach(TorchRecurrent(16, forget_bias=bias).double(), tokens(100, 16))[0])
    assert reach[0.0] < 1e-12
    assert reach[0.0] < reach[1.0] < 1e-3 < reach[3.0]


def test_the_state_stays_in_single_precision_under_autocast() -> None:
    layer, renet = TorchRecurrent(4), ReNet(4)
    x = tokens(6, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, (h, s) = layer.run(x.bfloat16())
        assert renet(x, (2, 3)).shape == x.shape
    assert outputs.dtype == h.dtype == s.dtype == torch.float32


# --- Truncated backpropagation through time ---


def gradients(layer: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("cell", ["lstm", "peephole_lstm", "gru"])
def test_one_segment_is_backpropagation_through_time(cell: str) -> None:
    layer, x = randomised(recurrent(cell, D, E)), tokens()
    layer(x).square().sum().backward()
    expected = gradients(layer)
    total, _ = truncated_bptt(layer.run, x, lambda outputs, places: outputs.square().sum(), length=L)
    torch.testing.assert_close(gradients(layer), expected)
    torch.testing.assert_close(total, layer(x).square().sum().detach())


def test_segments_carry_values_and_no_gradients() -> None:
    layer, x = randomised(recurrent("lstm", D, E)), tokens()
    target = tokens(L, E)
    seen: list[tuple[int, int]] = []

    def loss(outputs: Tensor, places: slice) -> Tensor:
        seen.append((places.start, places.stop))
        return (outputs - target[:, places]).square().sum()

    ends = []
    total, state = truncated_bptt(layer.run, x, loss, length=3, after_segment=lambda: ends.append(len(seen)))
    cut = gradients(layer)
    assert seen == [(0, 3), (3, 6), (6, 7)]
    assert ends == [1, 2, 3]
    torch.testing.assert_close(total, (layer(x) - target).square().sum().detach())
    assert not state[0].requires_grad
    torch.testing.assert_close(state, tuple(part.detach() for part in layer.run(x)[1]))
    # The same by hand: states computed beforehand without gradients.
    with torch.no_grad():
        states = [None, layer.run(x[:, :3])[1], layer.run(x[:, :6])[1]]
    for start, before in zip((0, 3, 6), states, strict=True):
        outputs, _ = layer.run(x[:, start : start + 3], before)
        (outputs - target[:, start : start + 3]).square().sum().backward()
    torch.testing.assert_close(cut, gradients(layer))
    (layer(x) - target).square().sum().backward()
    assert not torch.allclose(cut[1], gradients(layer)[1])
    with pytest.raises(InputError, match="length of a segment must be 1 or more, not 0"):
        truncated_bptt(layer.run, x, loss, length=0)


# --- Over patches ---


def test_patches_along_several_orders_have_a_layer_each() -> None:
    grid, orders = (3, 5), ("raster", "snake_columns", "raster_reversed")
    mixer = randomised(PatchRNN(6, orders=orders))
    x = tokens(15, 6)
    parts = []
    for layer, kind in zip(mixer.routes.mixers, orders, strict=True):
        walked = layer.rnn(x[:, scan_order(grid, kind)])[0]
        parts.append(walked[:, inverse_order(grid, kind)])
    assert [part.shape[-1] for part in parts] == [2, 2, 2]
    joined = torch.cat(parts, dim=-1) @ mixer.routes.proj.weight.T + mixer.routes.proj.bias
    torch.testing.assert_close(mixer(x, grid), joined)


def test_two_directions_are_torch_s_bidirectional_layer() -> None:
    mixer = randomised(PatchRNN(6, orders=("raster", "raster_reversed")))
    oracle = nn.LSTM(6, 3, batch_first=True, bidirectional=True).double()
    forwards, backwards = (layer.rnn for layer in mixer.routes.mixers)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(oracle, name).copy_(getattr(forwards, name))
            getattr(oracle, name + "_reverse").copy_(getattr(backwards, name))
    x = tokens(10, 6)
    torch.testing.assert_close(mixer(x, (2, 5)), mixer.routes.proj(oracle(x)[0]))
    assert count_parameters(oracle) == count_parameters(forwards) + count_parameters(backwards)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_renet_reads_every_row_and_then_every_column(cell: str) -> None:
    rows, columns = 3, 5
    mixer = randomised(ReNet(4, cell=cell))
    x = tokens(rows * columns, 4)
    after_rows = torch.zeros_like(x)
    for row in range(rows):
        part = slice(row * columns, (row + 1) * columns)
        after_rows[:, part] = mixer.rows(x[:, part])[0]
    after_columns = torch.zeros_like(x)
    for column in range(columns):
        part = slice(column, None, columns)
        after_columns[:, part] = mixer.columns(after_rows[:, part])[0]
    torch.testing.assert_close(mixer(x, (rows, columns)), mixer.proj(after_columns))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recurrent("rnn", 4), "unknown recurrent cell 'rnn'"),
        (lambda: TorchRecurrent(4, cell="gru2"), r"unknown torch cell 'gru2' \(did you mean 'gru'\?\)"),
        (lambda: TorchRecurrent(4, 0), "width and hidden must be 1 or more, not 4 and 0"),
        (lambda: recurrent("jordan", 4, 2), "outputs of its input's width"),
        (lambda: Jordan(4, mu=1.0), r"mu of a Jordan network must lie in \[0, 1\), not 1.0"),
        (lambda: PatchRNN(6, orders=("raster",) * 4), "a width of 6 cannot be shared by 4 orders"),
        (lambda: PatchRNN(6, orders=()), "a width of 6 cannot be shared by 0 orders"),
        (lambda: PatchRNN(6, orders=("spiral",)), "unknown scan order 'spiral'"),
        (lambda: ReNet(5), "a width of 5 cannot be shared by two directions"),
        (lambda: ReNet(4, cell="jordan"), "unknown torch cell 'jordan'"),
        (lambda: RecurrentVisionEncoder(mixer="columns"), "unknown mixer of a recurrent encoder 'columns'"),
        (lambda: ReNet(4)(torch.zeros(1, 7, 4), (2, 3)), r"7 tokens are not those of a grid \(2, 3\)"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# --- Encoders ---


def encoder(name: str, **settings: Any) -> RecurrentVisionEncoder:
    torch.manual_seed(0)
    values = {**RecurrentVisionEncoder.configs[name], "width": 16, "depth": 2, **settings}
    return RecurrentVisionEncoder(**values).eval()


@pytest.mark.parametrize(
    ("name", "order"),
    [("patch_lstm_nano", "raster"), ("patch_lstm_nano", "snake_columns"), ("patch_rnn_nano", "raster")],
)
def test_along_one_order_a_token_depends_on_what_comes_before_it_only(name: str, order: str) -> None:
    model = encoder(name, orders=(order,))
    pixels = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    changed = pixels.clone()
    changed[..., 4:8, 12:16] += 1  # row 1, column 3 of 4 x 8 patches
    place = inverse_order((4, 8), order)[11]
    same = (model(pixels).tokens == model(changed).tokens).all(dim=-1)[0]
    assert same[scan_order((4, 8), order)].tolist() == [True] * int(place) + [False] * (32 - int(place))


@pytest.mark.parametrize("name", ["patch_blstm_nano", "patch_lstm_four_nano", "renet_nano"])
def test_along_several_orders_every_token_depends_on_every_patch(name: str) -> None:
    model = encoder(name)
    pixels = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    changed = pixels.clone()
    changed[..., 4:8, 12:16] += 1
    features, others = model(pixels), model(changed)
    assert features.grid == (4, 8)
    assert not (features.tokens == others.tokens).all(dim=-1).any()
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))


@pytest.mark.parametrize("name", sorted(RecurrentVisionEncoder.configs))
def test_parameters_and_work_by_hand(name: str) -> None:
    values: Any = RecurrentVisionEncoder.configs[name]
    width, depth, patch = values["width"], values["depth"], values["patch_size"]
    count = (values["image_size"] // patch) ** 2
    gates = {"elman": 1, "gru": 3}.get(values.get("cell", "lstm"), 4)
    ways = len(values.get("orders", ("raster",)))
    layers = [(width, width // ways)] * ways if "mixer" not in values else [(width, width // 2)] * 4
    weights = sum(gates * out * (into + out) for into, out in layers)
    biases = sum(2 * gates * out for _, out in layers)
    mlp = 8 * width * width
    block = weights + biases + width * width + width + mlp + 5 * width + 4 * width
    embedding = width * (3 * patch * patch + 1) + count * width
    with torch.device("meta"):
        model = RecurrentVisionEncoder(**values, num_classes=1000).eval()
    assert count_parameters(model) == embedding + depth * block + 2 * width + 1000 * (width + 1)
    with MacCounter(model) as counter, torch.no_grad():
        model.logits(torch.empty(1, 3, *model.image_size, device="meta"))
    per_token = 3 * patch * patch * width + depth * (weights + width * width + mlp)
    assert counter.macs == count * per_token + 1000 * width


def test_larger_and_oblong_pictures() -> None:
    model = encoder("renet_nano", image_size=224, patch_size=16)
    for size, grid in (((384, 384), (24, 24)), ((224, 96), (14, 6))):
        features = model(torch.zeros(1, 3, *size))
        assert features.grid == grid
        assert features.tokens.shape == (1, grid[0] * grid[1], 16)
    with pytest.raises(InputError, match="multiples of 16 pixels"):
        model(torch.zeros(1, 3, 224, 100))
