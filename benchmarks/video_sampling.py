"""What sampling a long video costs with ConvS5, and with a causal transformer over the same latents.

One video of 600 frames by `convs5_nano` (8 x 8 latents) against a transformer of the same width and depth, in which the
tokens of a frame read those of this frame and all earlier ones; random weights, each next latent the output for the
last one. The layers alone are timed: frame encoder and decoder would be the same for both. Without a cache the
transformer reads all earlier frames anew for each; that is timed at a few lengths, and the times of the others are read
off the parabola through these, which is how the cost grows. Targets: ConvS5 at least 100 times as fast as the
transformer without a cache, and at least 5 times as fast as with one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from shared.timing import Row, arguments, in_turns, now, ratio, show
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.convs5 import ConvS5
from sightline.encoders.encoder import create_encoder
from sightline.encoders.layers import init_weights
from sightline.encoders.vit import Block
from sightline.mixers.attention import Attention

FRAMES = 600
LENGTHS = (1, 200, 400, 600)


class FrameTransformer(nn.Module):
    """Blocks whose attention is causal over frames of `places` tokens, with keys and values kept or not."""

    def __init__(self, width: int, depth: int, places: int) -> None:
        super().__init__()
        self.places = places
        self.blocks = nn.ModuleList(Block(width, Attention(width, num_heads=4)) for _ in range(depth))
        init_weights(self)

    def step(self, x: Tensor, past: list[tuple[Tensor, Tensor]], frame: int) -> Tensor:
        """One frame [B, N, D]; `past` holds room for all frames' keys and values, filled before `frame`."""
        start, end = frame * self.places, (frame + 1) * self.places
        for block, (keys, values) in zip(self.blocks, past, strict=True):
            query, keys[:, :, start:end], values[:, :, start:end] = block.attn.heads(block.norm1(x))
            mixed = F.scaled_dot_product_attention(query, keys[:, :, :end], values[:, :, :end])
            x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.feed(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """All frames [B, T N, D] at once; a frame at a time within attention, so that no mask is made or multiplied."""
        for block in self.blocks:
            query, key, value = block.attn.heads(block.norm1(x))
            ends = range(self.places, x.shape[1] + 1, self.places)
            rows = [
                F.scaled_dot_product_attention(query[:, :, end - self.places : end], key[:, :, :end], value[:, :, :end])
                for end in ends
            ]
            x = x + block.attn.proj(torch.cat(rows, dim=2).transpose(1, 2).flatten(2))
            x = x + block.feed(x)
        return x


def recurrent(model: ConvS5, first: Tensor) -> float:
    """Seconds for all frames by ConvS5."""
    start = now(first.device)
    constants = [layer.core.discretise() for layer in model.layers]
    states = [layer.core.init_state(1, first.shape[-2:]) for layer in model.layers]
    frame = first
    for _ in range(FRAMES):
        for index, layer in enumerate(model.layers):
            frame, states[index] = layer.step(frame, states[index], constants[index])
    return now(first.device) - start


def cached(model: FrameTransformer, first: Tensor) -> float:
    """Seconds for all frames by the transformer with a cache."""
    start = now(first.device)
    room = (1, 4, FRAMES * model.places, first.shape[-1] // 4)
    past = [(first.new_empty(room), first.new_empty(room)) for _ in model.blocks]
    frame = first
    for index in range(FRAMES):
        frame = model.step(frame, past, index)
    return now(first.device) - start


def uncached(model: FrameTransformer, first: Tensor) -> float:
    """Seconds for all frames by the transformer without a cache, from those of a few lengths."""
    taken = []
    for length in LENGTHS:
        clip = first.repeat(1, length, 1)
        start = now(first.device)
        model(clip)
        taken.append(now(first.device) - start)
    parabola = np.polynomial.Polynomial.fit(LENGTHS, taken, deg=2)
    return float(parabola(np.arange(1, FRAMES + 1)).sum())


def agree(model: FrameTransformer, first: Tensor) -> None:
    """Stops unless both forms of the transformer give the same."""
    clip = torch.randn(1, 5 * model.places, first.shape[-1], device=first.device)
    room = (1, 4, 5 * model.places, first.shape[-1] // 4)
    past = [(first.new_empty(room), first.new_empty(room)) for _ in model.blocks]
    steps = [model.step(frame, past, index) for index, frame in enumerate(clip.split(model.places, dim=1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(clip), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def main() -> None:
    options = arguments(__doc__, rounds=2)
    model = create_encoder("convs5_nano").eval().to(options.device)
    assert isinstance(model, ConvS5)
    side = model.image_size[0] // model.stride
    transformer = FrameTransformer(model.width, len(model.layers), side * side).eval().to(options.device)
    latent = torch.randn(1, model.width, side, side, device=options.device)
    tokens = latent.flatten(2).mT.contiguous()
    agree(transformer, tokens)
    cases: dict[str, Callable[[], float]] = {
        "ConvS5": partial(recurrent, model, latent),
        "transformer with cache": partial(cached, transformer, tokens),
        "transformer without cache (integrated)": partial(uncached, transformer, tokens),
    }
    times = in_turns(cases, options.rounds)
    targets = dict(zip(cases, (None, 5.0, 100.0), strict=True))
    rows = []
    for case, taken in times.items():
        times_convs5, least = ratio(taken, times["ConvS5"]), targets[case]
        values = {"s for all frames": statistics.median(taken), "times ConvS5": times_convs5}
        rows.append(
            Row(
                case, values, "" if least is None else f">= {least:g}", None if least is None else times_convs5 >= least
            )
        )
    note = (
        f"{FRAMES} frames, {side} x {side} latents, width {model.width}, {len(model.layers)} layers; without a cache "
        f"timed at {', '.join(map(str, LENGTHS))} frames and summed over all by the parabola through these"
    )
    show("Sampling a video", note, rows, options)


if __name__ == "__main__":
    main()
