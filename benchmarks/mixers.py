"""What the linear mixers of the encoders cost beside softmax attention, as pictures grow: time and memory of the mixing
alone, without projections, of one picture in patches of 16 pixels.

All have the width of ViT-Tiny, 192 channels in 3 heads, and read the tokens in both directions: a scan, and a scan of
the tokens in reverse order, averaged. The baseline is torch's `scaled_dot_product_attention` on queries, keys and
values of that width, which reads both ways at once. Retention and mLSTM have keys and values of 64 channels a head,
gated linear attention keys of 32, as ViG has; the selective scan has the 384 channels with 16 states that a Mamba block
of this width has inside. Forward only, random numbers.

Memory is the peak of what torch's allocator gave out during one call, the output included and the inputs not; on a CPU
it is summed from the allocator's events, which leaves out what MKL and numba keep for themselves. The slope is that of
log time over log tokens from 1024 tokens on, the median over rounds. Run it with OMP_NUM_THREADS=1 and 2.

Targets, for retention and gated linear attention in chunks: at least 5 times as fast as the baseline at 1024 x 1024, at
least 4 times at 1248 x 1248, and a slope of at most 1.1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from shared.timing import Row, arguments, in_turns, now, ratio, show
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sightline.mixers.linear_attention import linear_attention
from sightline.mixers.mlstm import mlstm
from sightline.mixers.retention import vision_decays
from sightline.mixers.selective_scan import Backend, selective_scan

SIDES, PATCH = (224, 512, 1024, 1248), 16
HEADS, HEAD, KEYS = 3, 64, 32
CHANNELS, STATES = 384, 16
BASELINE = "attention (SDPA)"
TARGETED = ("retention", "gated linear attention", "mLSTM")
LEAST = {1024: 5.0, 1248: 4.0}
MOST_SLOPE, SLOPE_FROM = 1.1, 1024

Mix = Callable[[], Tensor]


def both_ways(
    mix: Callable[..., tuple[Tensor, object]], along: int, shared: list[Tensor], gates: list[list[Tensor]]
) -> Tensor:
    """The mean of a scan and a scan of what is reversed along the tokens' axis; each with gates of its own."""
    forward = mix(*shared, *gates[0])[0]
    backward = mix(*(part.flip(along) for part in shared), *(gate.flip(along) for gate in gates[1]))[0]
    return (forward + backward.flip(along)) / 2


def cases(tokens: int, device: torch.device) -> dict[str, Mix]:
    """One call of each mixer on a picture of so many tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    qkv = [draw(1, HEADS, tokens, HEAD) for _ in range(3)]
    narrow = [draw(1, HEADS, tokens, KEYS), draw(1, HEADS, tokens, KEYS), qkv[2]]
    decays = torch.tensor([math.log(decay) for decay in vision_decays(HEADS)], device=device)
    slow_gates = [[F.logsigmoid(draw(1, HEADS, tokens, KEYS)) / 16] for _ in range(2)]
    memory_gates = [[draw(1, HEADS, tokens), draw(1, HEADS, tokens) + 3] for _ in range(2)]
    rates = -torch.arange(1, STATES + 1, device=device).float().repeat(CHANNELS, 1)
    scanned = draw(1, CHANNELS, tokens)
    steps = [[draw(1, CHANNELS, tokens) - 4, draw(1, STATES, tokens), draw(1, STATES, tokens)] for _ in range(2)]

    def selective(
        u: Tensor, delta: Tensor, into: Tensor, out_of: Tensor, *, backend: Backend = "auto"
    ) -> tuple[Tensor, Tensor]:
        return selective_scan(u, delta, rates, into, out_of, backend=backend)

    mixers: dict[str, Mix] = {
        BASELINE: lambda: F.scaled_dot_product_attention(*qkv),
        "retention": partial(both_ways, partial(linear_attention, log_decay=decays), 2, qkv, [[], []]),
        "gated linear attention": partial(both_ways, linear_attention, 2, narrow, slow_gates),
        "mLSTM": partial(both_ways, mlstm, 2, qkv, memory_gates),
        "selective scan": partial(both_ways, selective, 2, [scanned], steps),
    }
    if device.type == "cpu":  # elsewhere each of its steps waits for a kernel to start
        loop = partial(selective, backend="torch")
        mixers["selective scan, loop in torch"] = partial(both_ways, loop, 2, [scanned], steps)
    return mixers


def seconds(mix: Mix, device: torch.device) -> float:
    start = now(device)
    mix()
    return now(device) - start


def peak_bytes(mix: Mix, device: torch.device) -> int:
    """The most that the allocator had given out at once during a call, less what it had before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        mix()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        mix()
    result = profiler.profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def slope(times: Mapping[int, float]) -> float:
    """Least squares of log time over log tokens."""
    logs = [(math.log(tokens), math.log(time)) for tokens, time in times.items() if tokens >= SLOPE_FROM]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__, rounds=10)
    device = torch.device(options.device)
    tokens = {side: (side // PATCH) ** 2 for side in SIDES}
    mixers = {(side, name): mix for side in SIDES for name, mix in cases(tokens[side], device).items()}
    names = list(dict.fromkeys(name for _, name in mixers))
    turns = {f"{name} {side}": partial(seconds, mix, device) for (side, name), mix in mixers.items()}
    taken = in_turns(turns, options.rounds)
    rows = []
    for (side, name), mix in mixers.items():
        own = taken[f"{name} {side}"]
        faster = ratio(taken[f"{BASELINE} {side}"], own)
        least = LEAST.get(side) if name in TARGETED else None
        values = {
            "picture": f"{side} x {side}",
            "tokens": tokens[side],
            "ms": 1e3 * statistics.median(own),
            "times as fast": faster,
            "MiB": peak_bytes(mix, device) / 2**20,
        }
        rows.append(
            Row(name, values, "" if least is None else f">= {least:g}", None if least is None else faster >= least)
        )
    note = "Both directions, 192 channels, batch 1, forward; times as fast: median over rounds of the ratio to SDPA."
    show("Mixing the tokens of a picture", note, rows, options)

    rows = []
    for name in names:
        by_side = (taken[f"{name} {side}"] for side in SIDES)
        rounds = (dict(zip(tokens.values(), one, strict=True)) for one in zip(*by_side, strict=True))
        grows = statistics.median(slope(times) for times in rounds)
        target = f"<= {MOST_SLOPE:g}" if name in TARGETED else ""
        rows.append(Row(name, {"slope": grows}, target, grows <= MOST_SLOPE if target else None))
    show("How time grows with the tokens", f"From {SLOPE_FROM} tokens on; 1 is linear, 2 quadratic.", rows, options)


if __name__ == "__main__":
    main()
