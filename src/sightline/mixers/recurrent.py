"""Recurrent networks as sequence mixers, after A Critical Review of Recurrent Neural Networks for Sequence Learning
(Lipton, Berkowitz and Elkan 2015, arXiv:1506.00019).

In: tokens [B, L, D], on a grid where the order matters. Out: [B, L, E]. h, s start at zero.

    Elman    h_t = tanh(W x_t + U h_{t-1} + b)
    LSTM     g = tanh(.), i, f, o = sigmoid(.) of W x_t + U h_{t-1} + b;  s_t = g i + s_{t-1} f;  h_t = tanh(s_t) o
    LSTM of 1997            the same with f = 1
    peephole LSTM           i and f also read p s_{t-1}, o reads p s_t, p a weight a channel
    GRU      r, u gates;  h_t = (1 - u) c + u h_{t-1},  c = tanh(W x_t + b + r (U h_{t-1} + b'))
    Jordan   h_t = tanh(W x_t + U r_t + b);  y_t = V h_t + c;  r_t = mu r_{t-1} + y_{t-1}   (outputs fed back)

Elman, LSTM and GRU are torch's layers (so the reset gate acts after the recurrent product, and u keeps the old state);
the others are written out here. Input weights start from Glorot's uniform distribution, recurrent ones orthogonal,
biases at zero but for the forget gate's: at 1 an LSTM forgets its first token within some thirty steps, at 3 to 5 it
keeps it over hundreds, so a comparison over patches has to say which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sightline.errors import InputError, unknown
from sightline.mixers.mixer import CausalMixer, Mixer
from sightline.mixers.scan_orders import Routes, check_grid


class Recurrent(CausalMixer):
    """Base of the recurrent layers: [B, L, D] -> [B, L, E], with a state that can be carried from call to call.

    Args:
        width: D.
        hidden: E, None for D.
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        self.width, self.hidden = width, width if hidden is None else hidden
        if width < 1 or self.hidden < 1:
            raise InputError(f"width and hidden must be 1 or more, not {width} and {self.hidden}")

    def run(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Tokens [B, L, D] and the state before them -> outputs [B, L, E] and the state after them."""
        state = self.init_state(len(x)) if state is None else state
        outputs = []
        if x.is_meta:
            output, state = self.step(x[:, 0], state)
            return output[:, None].expand(-1, x.shape[1], -1), state
        for token in x.unbind(1):
            output, state = self.step(token, state)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        return self.run(x)[0]

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        return x.shape[0] * x.shape[1] * sum(weight.numel() for weight in self.parameters() if weight.ndim == 2)


class TorchRecurrent(Recurrent):
    """torch's Elman network, LSTM or GRU, one layer.

    Args:
        width: D.
        hidden: E, None for D.
        cell: `elman`, `lstm` or `gru`.
        forget_bias: start of the forget gate's bias of an LSTM. torch adds two biases; the other one is 0.
    """

    layers: ClassVar[dict[str, type[nn.RNN | nn.LSTM | nn.GRU]]] = {"elman": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}

    def __init__(self, width: int, hidden: int | None = None, *, cell: str = "lstm", forget_bias: float = 1.0) -> None:
        super().__init__(width, hidden)
        if cell not in self.layers:
            raise unknown("torch cell", cell, self.layers)
        self.cell = cell
        self.rnn = self.layers[cell](width, self.hidden, batch_first=True)
        start_weights(self.rnn, forget_bias)

    def run(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return _unreduced(self.rnn, x, state)

    def init_state(self, batch: int) -> Any:
        h = next(self.rnn.parameters()).new_zeros(1, batch, self.hidden)
        return (h, h.clone()) if self.cell == "lstm" else h

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = self.run(x[:, None], state)
        return output[:, 0], state


def _unreduced(rnn: nn.RNNBase, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """The layer in the precision of its weights: under autocast a state in half precision loses what is far away."""
    if x.is_meta:  # torch's own way unrolls every step, in vain where only shapes are asked for
        ways = 2 if rnn.bidirectional else 1
        h = x.new_empty(ways, len(x), rnn.hidden_size)
        return x.new_empty(*x.shape[:2], ways * rnn.hidden_size), (h, h) if rnn.mode == "LSTM" else h
    with torch.autocast(x.device.type, enabled=False):
        return rnn(x.to(next(rnn.parameters()).dtype), state)


def start_weights(rnn: nn.RNNBase, forget_bias: float) -> None:
    """Starts a torch layer as the module's docstring says, each gate's matrix on its own."""
    gates = {"LSTM": 4, "GRU": 3}.get(rnn.mode, 1)
    for name, weight in rnn.named_parameters():
        if "weight_ih" in name:
            for part in weight.data.chunk(gates):
                nn.init.xavier_uniform_(part)
        elif "weight_hh" in name:
            for part in weight.data.chunk(gates):
                nn.init.orthogonal_(part)
        else:
            nn.init.zeros_(weight)
            if "bias_ih" in name and rnn.mode == "LSTM":
                weight.data.chunk(4)[1].fill_(forget_bias)


class PeepholeLSTM(Recurrent):
    """An LSTM written out, so that it can have what torch's has not: peepholes, or no forget gate.

    Args:
        width: D.
        hidden: E, None for D.
        peephole: whether the gates read the cell state.
        forget: whether there is a forget gate; without one it is the LSTM of 1997.
        forget_bias: start of its bias.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        peephole: bool = True,
        forget: bool = True,
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__(width, hidden)
        self.gates = ("input", "forget", "cell", "output") if forget else ("input", "cell", "output")
        rows = len(self.gates) * self.hidden
        self.weight_ih = nn.Parameter(torch.empty(rows, width))
        self.weight_hh = nn.Parameter(torch.empty(rows, self.hidden))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.peepholes = nn.ParameterDict(
            {gate: nn.Parameter(torch.zeros(self.hidden)) for gate in self.gates if peephole and gate != "cell"}
        )
        for index, gate in enumerate(self.gates):
            part = slice(index * self.hidden, (index + 1) * self.hidden)
            nn.init.xavier_uniform_(self.weight_ih.data[part])
            nn.init.orthogonal_(self.weight_hh.data[part])
            if gate == "forget":
                nn.init.constant_(self.bias.data[part], forget_bias)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        h = self.weight_hh.new_zeros(batch, self.hidden)
        return h, h.clone()

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, s = state
        sums = x @ self.weight_ih.mT + h @ self.weight_hh.mT + self.bias
        read = dict(zip(self.gates, sums.chunk(len(self.gates), dim=-1), strict=True))
        admitted = torch.sigmoid(self._peep("input", read["input"], s)) * torch.tanh(read["cell"])
        kept = s * torch.sigmoid(self._peep("forget", read["forget"], s)) if "forget" in read else s
        s = admitted + kept
        h = torch.tanh(s) * torch.sigmoid(self._peep("output", read["output"], s))
        return h, (h, s)

    def _peep(self, gate: str, read: Tensor, s: Tensor) -> Tensor:
        return read + self.peepholes[gate] * s if gate in self.peepholes else read


class Jordan(Recurrent):
    """Jordan's network of 1986, which feeds its outputs back; a historical baseline, [B, L, D] -> [B, L, D].

    Args:
        width: D, of inputs and outputs.
        hidden: E, None for D.
        mu: how much of the units that are fed back stays from step to step, in [0, 1).
        output: what is done to the outputs before they are given and fed back.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        mu: float = 0.0,
        output: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> None:
        super().__init__(width, hidden)
        if not 0 <= mu < 1:
            raise InputError(f"mu of a Jordan network must lie in [0, 1), not {mu}")
        self.mu, self.output = mu, output
        self.weight_ih = nn.Parameter(torch.empty(self.hidden, width))
        self.weight_yh = nn.Parameter(torch.empty(self.hidden, width))
        self.weight_ho = nn.Parameter(torch.empty(width, self.hidden))
        self.bias_h = nn.Parameter(torch.zeros(self.hidden))
        self.bias_o = nn.Parameter(torch.zeros(width))
        for weight in (self.weight_ih, self.weight_yh, self.weight_ho):
            nn.init.xavier_uniform_(weight)

    def init_state(self, batch: int) -> Tensor:
        return self.weight_ih.new_zeros(batch, self.width)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(x @ self.weight_ih.mT + state @ self.weight_yh.mT + self.bias_h)
        y = self.output(h @ self.weight_ho.mT + self.bias_o)
        return y, self.mu * state + y


CELLS = ("elman", "lstm", "gru", "lstm_1997", "peephole_lstm", "jordan")


def recurrent(cell: str, width: int, hidden: int | None = None, *, forget_bias: float = 1.0) -> Recurrent:
    """One recurrent layer by its name in `CELLS`; `forget_bias` where there is a forget gate.

    Raises:
        InputError: an unknown name, or a Jordan network of another output width than D.
    """
    if cell in TorchRecurrent.layers:
        return TorchRecurrent(width, hidden, cell=cell, forget_bias=forget_bias)
    if cell == "lstm_1997":
        return PeepholeLSTM(width, hidden, peephole=False, forget=False)
    if cell == "peephole_lstm":
        return PeepholeLSTM(width, hidden, forget_bias=forget_bias)
    if cell == "jordan":
        if hidden not in (None, width):
            raise InputError("a jordan network gives outputs of its input's width; use it along one order")
        return Jordan(width)
    raise unknown("recurrent cell", cell, CELLS)


class PatchRNN(Mixer):
    """Recurrent layers over the patches along one or several orders, then a linear map: drop-in for attention.

    Args:
        width: D.
        cell: one of `CELLS`.
        orders: kinds of `sightline.mixers.scan_orders.ORDERS`; each has a layer of its own, of width D / their number,
            and what they give is concatenated.
        forget_bias: start of the forget gates' biases.
    """

    def __init__(
        self, width: int, *, cell: str = "lstm", orders: Sequence[str] = ("raster",), forget_bias: float = 1.0
    ) -> None:
        super().__init__()
        if not orders or width % len(orders):
            raise InputError(
                f"a width of {width} cannot be shared by {len(orders)} orders; their number must divide it"
            )
        inner = width // len(orders)
        layers = [recurrent(cell, width, inner, forget_bias=forget_bias) for _ in orders]
        self.routes = Routes(layers, orders, combine="project", width=width, inner=inner)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.routes(x, grid)

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        return 0  # the layers count their own


class ReNet(Mixer):
    """A bidirectional layer over every row, then one over every column (Visin et al. 2015, arXiv:1505.00393), then a
    linear map: H + W steps one after the other instead of H W, and each token has seen all others.

    Args:
        width: D, even.
        cell: `elman`, `lstm` or `gru`.
        forget_bias: start of the forget gates' biases.
    """

    def __init__(self, width: int, *, cell: str = "lstm", forget_bias: float = 1.0) -> None:
        super().__init__()
        if width % 2:
            raise InputError(f"a width of {width} cannot be shared by two directions; it must be even")
        if cell not in TorchRecurrent.layers:
            raise unknown("torch cell", cell, TorchRecurrent.layers)
        layer = TorchRecurrent.layers[cell]
        self.rows = layer(width, width // 2, batch_first=True, bidirectional=True)
        self.columns = layer(width, width // 2, batch_first=True, bidirectional=True)
        self.proj = nn.Linear(width, width)
        start_weights(self.rows, forget_bias)
        start_weights(self.columns, forget_bias)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        check_grid(x, grid, axes=2)
        values = _unreduced(self.rows, x.unflatten(1, grid).flatten(0, 1))[0].unflatten(0, (len(x), grid[0]))
        values = _unreduced(self.columns, values.transpose(1, 2).flatten(0, 1))[0].unflatten(0, (len(x), grid[1]))
        return self.proj(values.transpose(1, 2).flatten(1, 2).to(x.dtype))

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...]) -> int:
        weights = [*self.rows.parameters(), *self.columns.parameters()]
        return x.shape[0] * x.shape[1] * sum(weight.numel() for weight in weights if weight.ndim == 2)


class SegmentLoss(Protocol):
    """The loss of one segment: its outputs [B, k, E], and the places that it covers."""

    def __call__(self, outputs: Tensor, places: slice) -> Tensor: ...


def truncated_bptt(
    run: Callable[[Tensor, Any], tuple[Tensor, Any]],
    x: Tensor,
    loss: SegmentLoss,
    *,
    length: int,
    state: Any = None,
    after_segment: Callable[[], object] | None = None,
) -> tuple[Tensor, Any]:
    """Backpropagation through time, cut every `length` steps: values are carried over, gradients are not.

    The gradients are added to those of the parameters; with `length` = L they are those of the whole sequence.

    Args:
        run: such as `Recurrent.run`: tokens and a state -> outputs and the next state.
        x: [B, L, D].
        loss: gives the loss of a segment; the losses of all of them add up.
        length: steps of a segment; the last one may be shorter.
        state: the state before the first token, None for zero.
        after_segment: called after each backward, for instance to clip and step an optimiser.

    Returns:
        The sum of the losses, and the state after the last token, both detached.
    """
    if length < 1:
        raise InputError(f"the length of a segment must be 1 or more, not {length}")
    total = x.new_zeros(())
    for start in range(0, x.shape[1], length):
        outputs, state = run(x[:, start : start + length], _detached(state))
        segment = loss(outputs, slice(start, start + outputs.shape[1]))
        segment.backward()
        total = total + segment.detach()
        if after_segment is not None:
            after_segment()
    return total, _detached(state)


def _detached(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple(_detached(part) for part in state)
    return state.detach() if isinstance(state, Tensor) else state


def memory_reach(mix: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """How much a sequence mixer's last output depends on each token: |d sum(y_L) / d x_t| over |d sum(y_L) / d x_L|.

    Args:
        mix: tokens [B, L, D] -> outputs [B, L, E].
        x: [B, L, D].

    Returns:
        [L], averaged over the batch; the last entry is 1. Values near 0 early on: the gradient has vanished.
    """
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(mix(x)[:, -1].sum(), x)
    norms = slope.norm(dim=-1)
    return (norms / norms[:, -1:]).mean(dim=0)
