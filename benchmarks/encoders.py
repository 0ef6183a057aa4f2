"""How fast encoders are against a plain ViT, whose attention is torch's scaled_dot_product_attention (SDPA).

    linear     encoders whose time grows with the number of tokens, at 1024 x 1024 pixels; target: twice as fast
    vim        the same for Vim, at 1248 x 1248
    hilo       one HiLo layer against window attention and spatial-reduction attention; target: 1.3 times as fast
    evit       EViT that keeps 0.7 of the patches against the ViT that it is one of; target: 1.4 times as fast
    fastvithd  FastViTHD against ViT-B/16 at growing resolutions: time, and tokens for the language model

Weights are random, pictures are noise: neither has a say in the time. One forward a round, or as many of a single layer
as take some hundredths of a second. The speed-up is the median over rounds of the ViT's time over the other's. The peak
is what a forward needs in memory beyond the weights, as far as the system tells (CUDA, and Linux for the processor).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shared.timing import Row, in_turns, now, ratio, show
from torch import Tensor, nn

from sightline.encoders.encoder import Encoder, create_encoder, list_encoders
from sightline.mixers.attention import Attention
from sightline.mixers.hilo import HiLo
from sightline.mixers.spatial_reduction import SpatialReductionAttention
from sightline.mixers.window_attention import WindowAttention

WIDTH, HEADS = 384, 12
"""Of the third stage of LITv2-S."""
LAYERS = [(14, 2), (28, 2), (28, 4), (56, 4)]
"""(tokens a side, tokens a side of HiLo's windows and of the other's reduction)."""


def made(name: str, device: str, **settings: Any) -> Encoder | None:
    """An encoder, or None while there is none of this name."""
    if name not in list_encoders():
        return None
    torch.manual_seed(0)
    return create_encoder(name, **settings).eval().to(device)


@torch.no_grad()
def seconds(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """The time of one call, the mean of several."""
    start = now(device)
    for _ in range(times):
        call()
    return (now(device) - start) / times


def status(key: str) -> int:
    """A line of /proc/self/status that is in kB, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


@torch.no_grad()
def peak_megabytes(call: Callable[[], object], device: torch.device) -> float | str:
    """What a call needs in memory beyond what is there before it; empty where it cannot be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark starts anew
        before = status("VmRSS")
    except OSError:
        return ""
    call()
    return (status("VmHWM") - before) / 1e6


def compare(
    title: str,
    encoders: Mapping[str, Encoder | None],
    pixels: Tensor,
    options: argparse.Namespace,
    target: float | None = None,
) -> None:
    """Times encoders on the same pictures; the first is what the others are compared with."""
    present = {name: encoder for name, encoder in encoders.items() if encoder is not None}
    calls = {name: partial(encoder, pixels) for name, encoder in present.items()}
    times = in_turns({name: partial(seconds, call, pixels.device) for name, call in calls.items()}, options.rounds)
    base, rows = next(iter(present)), []
    for name, call in calls.items():
        with torch.no_grad():
            tokens = call().tokens.shape[1]
        values: dict[str, float | int | str] = {
            "tokens": tokens,
            "M parameters": sum(parameter.numel() for parameter in present[name].parameters()) / 1e6,
            "s": statistics.median(times[name]),
            "peak MB": peak_megabytes(call, pixels.device),
        }
        if name == base:
            rows.append(Row(name, values))
            continue
        speed_up = ratio(times[base], times[name])
        values["speed-up"] = speed_up
        if target is None:
            rows.append(Row(name, values))
        else:
            rows.append(Row(name, values, f"speed-up >= {target:g}", speed_up >= target))
    absent = [name for name, encoder in encoders.items() if encoder is None]
    note = f"batch {len(pixels)}, {tuple(pixels.shape[-2:])} pixels, {pixels.dtype}"
    show(title, note + (f"; not there: {', '.join(absent)}" if absent else ""), rows, options)


def noise(options: argparse.Namespace, side: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(options.device)


def linear(options: argparse.Namespace) -> None:
    side = 1024
    make = partial(made, device=options.device, image_size=side)
    encoders = {
        "vit_tiny (SDPA)": make("vit_tiny"),
        "vir, vit_tiny's width, depth and heads": make("vir_small_patch16", width=192, depth=12, num_heads=3),
        "vig_tiny": make("vig_tiny"),
        "vil_tiny": make("vil_tiny"),
    }
    compare("Encoders of linear time", encoders, noise(options, side), options, target=2.0)


def vim(options: argparse.Namespace) -> None:
    side = 1248
    make = partial(made, device=options.device, image_size=side)
    encoders = {"vit_tiny (SDPA)": make("vit_tiny"), "vim_tiny": make("vim_tiny")}
    compare("Vim", encoders, noise(options, side), options)


def hilo(options: argparse.Namespace) -> None:
    device, rows = torch.device(options.device), []
    for side, window in LAYERS:
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "HiLo": HiLo(WIDTH, HEADS, alpha=0.9, window_size=window),
            "window, w = 7": WindowAttention(WIDTH, HEADS, window_size=7),
            f"reduction, R = {window}": SpatialReductionAttention(WIDTH, HEADS, reduction=window),
            "attention (SDPA)": Attention(WIDTH, HEADS),
        }
        x = torch.randn(1, side * side, WIDTH, device=device)
        calls = {name: partial(layer.to(device), x, (side, side)) for name, layer in layers.items()}
        repeats = max(1, 2000 // side**2)
        times = in_turns(
            {name: partial(seconds, call, device, repeats) for name, call in calls.items()}, options.rounds
        )
        for name in list(layers)[1:]:
            speed_up = ratio(times[name], times["HiLo"])
            values: dict[str, float | int | str] = {
                "ms": 1000 * statistics.median(times[name]),
                "HiLo ms": 1000 * statistics.median(times["HiLo"]),
                "peak MB": peak_megabytes(calls[name], device),
                "HiLo peak MB": peak_megabytes(calls["HiLo"], device),
                "speed-up": speed_up,
            }
            target = "" if name == "attention (SDPA)" else "speed-up >= 1.3"
            met = speed_up >= 1.3 if target else None
            rows.append(Row(f"{side} x {side}, s = {window}: {name}", values, target, met))
    show("A HiLo layer", f"batch 1, width {WIDTH}, {HEADS} heads, alpha 0.9", rows, options)


def evit(options: argparse.Namespace) -> None:
    encoders = {"vit_small (SDPA)": made("vit_small", options.device)}
    encoders["evit_small, keep 0.7"] = made("evit_small", options.device, keep=0.7)
    for batch in (1, 8):
        compare(f"EViT, batch {batch}", encoders, noise(options, 224, batch), options, target=1.4)


def fastvithd(options: argparse.Namespace) -> None:
    for side in (256, 512, 1024):
        encoders = {
            "vit_base (SDPA)": made("vit_base", options.device, image_size=side),
            "fastvithd, branches fused": made("fastvithd", options.device, image_size=side, fused=True),
        }
        compare(f"FastViTHD at {side} x {side}", encoders, noise(options, side), options)


SECTIONS = {"linear": linear, "vim": vim, "hilo": hilo, "evit": evit, "fastvithd": fastvithd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are counted (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to measure (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, instead of tables")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections (default: all)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    for name in options.only:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
