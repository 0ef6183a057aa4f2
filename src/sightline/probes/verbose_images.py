"""Verbose Images: a picture changed within a small bound so that a model writes on and on (Gao et al., ICLR 2024,
arXiv:2401.11170). A probe of what an answer can be made to cost; nothing is attached to the model.

In: a model whose pixels can be differentiated, a picture, a question. Out: the picture with a perturbation |delta| <=
epsilon in every channel of every pixel, inside [0, 1]. The attack is on what the tower sees: the picture after the
processor has resized it. So the attacked picture has the tower's size, and goes through the processor again as it is.

With y the answer to x + delta that the model itself gave last, teacher-forced, p_t the next-token distribution at
position t of T, V tokens, and H the hidden states of all layers at these positions, [layers + 1, T, width]:

    L_eos = 1/T sum_t p_t[end tokens]                                     the end is put off
    L_unc = sum_t KL(uniform || p_t) = sum_t sum_v 1/V (log 1/V - log p_t,v)    each token is uncertain
    L_div = - || |H| as a matrix [(layers + 1) T, width] ||_nuclear       the tokens differ
    L     = L_unc + lambda_1 L_eos + lambda_2 L_div
    T_i(t)   = a_i ln(t + 1) + b_i          (a, b) = (10, -20) for the end, (0.5, 1) for diversity; t = 0, 1, ...
    lambda_i <- m lambda_i + (1 - m) | L_unc / (L_i T_i(t)) |             without the first term at t = 0
    delta    <- clip(delta - step_size sign(dL / d delta))                to the epsilon ball, then to [0, 1]

After a step answers to the new picture are sampled; the longest is the next y, and the delta whose answers are longest
on average is what comes out.

Where the official code (KuofengGao/Verbose_Images) and the paper differ:

- *Positions.* The paper sums over the N tokens of the answer; the code takes every position of the decoder, which with
  its BLIP-2 are 32 query tokens and the caption, the end token that it appends included. The default is the paper's
  (`positions="answer"`), as a chat prompt would drown the answer; "all" is the code's.
- *Space.* epsilon and step_size are of pixels in [0, 1] in the paper; the code applies the same numbers to normalised
  pixels, a ball that is about four times smaller. The default is the paper's; `official_space=True` is the code's.
- *Start.* The code starts at noise from N(0, 1), far outside the ball, and clips it after the first step; here delta
  starts uniformly inside the ball.
- |H| is the code's elementwise absolute value, which the paper lacks; it is the default, `absolute=False` is the paper.
- *Length* counts tokens here, words in the code.

|T_i| is held above 0.5. With the schedules of the paper no iteration comes nearer to 0 (T_1 changes sign between the
seventh and the eighth); with others it keeps the weights finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sightline.errors import InputError, unknown
from sightline.methods import in_range
from sightline.models.anatomy import Anatomy
from sightline.models.answering import end_tokens, prepare

if TYPE_CHECKING:
    from PIL.Image import Image

LOSSES = ("eos", "uncertainty", "diversity")
LEAST_SCHEDULE = 0.5


def eos_loss(logits_TV: Tensor, ends: Sequence[int]) -> Tensor:
    """The mean probability of the end tokens, in [0, 1]."""
    return logits_TV.float().softmax(dim=-1)[:, list(ends)].sum(dim=-1).mean()


def uncertainty_loss(logits_TV: Tensor) -> Tensor:
    """The sum over positions of the divergence of the next token's distribution from the uniform one; 0 iff all are
    uniform."""
    log_shares = logits_TV.float().log_softmax(dim=-1)
    return (-math.log(log_shares.shape[-1]) - log_shares).mean(dim=-1).sum()


def diversity_loss(hidden_LTD: Tensor, *, absolute: bool = True) -> Tensor:
    """Minus the nuclear norm of the hidden states of all layers and positions as one matrix; at most 0."""
    matrix = hidden_LTD.float().flatten(end_dim=-2)
    return -torch.linalg.svdvals(matrix.abs() if absolute else matrix).sum()


@dataclass(frozen=True)
class Step:
    """One iteration: its losses at the picture before the step, the weights they got, and the mean length in tokens of
    answers sampled after the step (None where none were sampled)."""

    iteration: int
    eos: float
    uncertainty: float
    diversity: float
    lambda_eos: float
    lambda_diversity: float
    length: float | None


@dataclass(frozen=True, eq=False)
class Attacked:
    """What came out of an attack.

    Attributes:
        picture: the attacked picture in 8 bits a channel, at the size that the tower sees, with no pixel further from
            the clean one than before rounding, but for the clean pixel's own rounding; None where the tower sees
            several tiles of a picture, which no single picture could bring about.
        pixel_values: the pixels as the model takes them, before rounding.
        history: what each iteration did.
        best: the iteration whose step made the picture; None: it is the clean one.
        clean_length: mean tokens of answers sampled for the clean picture.
    """

    picture: Image | None
    pixel_values: Tensor
    history: tuple[Step, ...]
    best: int | None
    clean_length: float | None


@dataclass(frozen=True)
class VerboseImages:
    """The attack.

    Args:
        epsilon: how far any channel of a pixel may move, of its range [0, 1] (paper: 8/255); 0 changes nothing.
        step_size: of one iteration (paper: 1/255).
        iterations: how many (paper: 1000); 0 changes nothing.
        eos_schedule: (a, b) of the weight of L_eos.
        diversity_schedule: (a, b) of the weight of L_div.
        momentum: how much of the weights is kept from iteration to iteration.
        losses: which of "eos", "uncertainty", "diversity" add to the loss; the weights are those of all three.
        positions: "answer" (paper) or "all" (official code).
        absolute: take the absolute value of the hidden states (official code).
        official_space: epsilon and step_size are of normalised pixels (official code).
        top_p: answers are sampled from the likeliest tokens that together have this probability, at temperature 1.
        repeats: how many answers are sampled at a time.
        max_new_tokens: their longest length.
        sample_every: sample answers after every so many iterations (paper: 1); more is faster, and the answer that is
            teacher-forced grows stale.
        seed: of the start and of the sampling; the same seed gives the same picture on the same machine.
    """

    paper: ClassVar[str] = "verbose_images"

    epsilon: float = 8 / 255
    step_size: float = 1 / 255
    iterations: int = 1000
    eos_schedule: tuple[float, float] = (10.0, -20.0)
    diversity_schedule: tuple[float, float] = (0.5, 1.0)
    momentum: float = 0.9
    losses: tuple[str, ...] = LOSSES
    positions: str = "answer"
    absolute: bool = True
    official_space: bool = False
    top_p: float = 0.9
    repeats: int = 3
    max_new_tokens: int = 512
    sample_every: int = 1
    seed: int = 256

    def __post_init__(self) -> None:
        for name, low, high in (("epsilon", 0, 1), ("step_size", 0, 1), ("momentum", 0, 1), ("top_p", 0, 1)):
            in_range(self, name, low, high, low_open=name in ("step_size", "top_p"))
        for name, low, high in (
            ("iterations", 0, 1_000_000),
            ("repeats", 1, 1000),
            ("max_new_tokens", 1, 1_000_000),
            ("sample_every", 1, 1_000_000),
            ("seed", 0, 2**31 - 1),
        ):
            in_range(self, name, low, high, whole=True)
        for name in ("eos_schedule", "diversity_schedule"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in pair):
                raise InputError(f"{name} of {self.paper} must be two numbers a, b of a ln(t + 1) + b, not {pair!r}")
        for loss in self.losses:
            if loss not in LOSSES:
                raise unknown(f"loss of {self.paper}", loss, LOSSES)
        if not self.losses:
            raise InputError(f"losses of {self.paper} must name at least one of {', '.join(LOSSES)}")
        if self.positions not in ("answer", "all"):
            raise unknown(f"positions of {self.paper}", self.positions, ("answer", "all"))

    @property
    def is_identity(self) -> bool:
        """Whether these settings leave every picture as it is."""
        return self.iterations == 0 or self.epsilon == 0

    def weight(self, schedule: tuple[float, float], iteration: int, ratio: float, before: float | None) -> float:
        """The weight lambda of a loss.

        Args:
            schedule: its (a, b).
            iteration: t, from 0 on.
            ratio: L_unc / L_i.
            before: the weight of the iteration before; None at the first one.
        """
        a, b = schedule
        now = abs(ratio) / max(abs(a * math.log(iteration + 1) + b), LEAST_SCHEDULE)
        return now if before is None else self.momentum * before + (1 - self.momentum) * now

    def attack(
        self,
        model: Any,
        processor: Any,
        picture: Image,
        question: str,
        *,
        quiet: bool = False,
        told: Callable[[Step], None] | None = None,
    ) -> Attacked:
        """Attacks one picture. The model is to have no methods on it meanwhile; its parameters get no gradients.

        Args:
            model: the model, of a supported family.
            processor: its processor.
            picture: the picture, RGB.
            question: what the model is asked.
            quiet: draw no progress bar.
            told: is given each step; there is no bar then.

        Raises:
            InputError: for an empty question, a family that is not known, a model without an end token, and one
                through which no gradient reaches the pixels.
        """
        pixels = Pixels(model, processor, picture, question)
        if self.is_identity:
            return Attacked(pixels.picture(pixels.zero()), pixels.inputs["pixel_values"], (), None, None)
        if not end_tokens(model):
            raise InputError(f"{self.paper} puts off a model's end token, but this model has none")
        bar = progress_bar(quiet or told is not None)
        with bar, torch.enable_grad():
            task = bar.add_task("attacking", total=self.iterations)

            def tell(step: Step) -> None:
                bar.update(task, advance=1)
                if told is not None:
                    told(step)

            return self._descend(model, pixels, tell)

    def _descend(self, model: Any, pixels: Pixels, tell: Callable[[Step], None]) -> Attacked:
        answer, clean_length = self.sampled(model, pixels.inputs, 0)
        radius, step_size = self.bounds(pixels)
        delta = pixels.project(pixels.uniform(radius, self.seed), radius)
        best_length, best, best_at = -1.0, delta, 0
        history: list[Step] = []
        weights: tuple[float, float] | None = None
        for t in range(self.iterations):
            gradient, losses, weights = self._gradient(model, pixels, delta, answer, t, weights)
            moved = [d - s * g.sign() for d, s, g in zip(delta, step_size, gradient, strict=True)]
            delta = pixels.project(moved, radius)
            length = None
            if (t + 1) % self.sample_every == 0 or t + 1 == self.iterations:
                answer, length = self.sampled(model, pixels.changed(delta), t + 1)
                if length > best_length:
                    best_length, best, best_at = length, delta, t
            history.append(Step(t, *losses, *weights, length))
            tell(history[-1])
        values = pixels.changed(best)["pixel_values"]
        return Attacked(pixels.picture(best), values, tuple(history), best_at, clean_length)

    def bounds(self, pixels: Pixels) -> tuple[list[Tensor], list[Tensor]]:
        """The radius and the step of each tile's channels, [3, 1, 1], in pixels of [0, 1]."""
        scale = pixels.std if self.official_space else torch.ones_like(pixels.std)
        return [self.epsilon * scale] * len(pixels.clean), [self.step_size * scale] * len(pixels.clean)

    def _gradient(
        self,
        model: Any,
        pixels: Pixels,
        delta: list[Tensor],
        answer: Tensor,
        t: int,
        before: tuple[float, float] | None,
    ) -> tuple[list[Tensor], tuple[float, float, float], tuple[float, float]]:
        """dL/d delta, the losses L_eos, L_unc, L_div, and the weights of the first and the last."""
        leaves = [one.clone().requires_grad_() for one in delta]
        ends = sorted(end_tokens(model))
        logits, hidden = self.read(model, pixels.changed(leaves), answer)
        eos = eos_loss(logits, ends)
        uncertainty = uncertainty_loss(logits)
        diversity = diversity_loss(hidden, absolute=self.absolute)
        values = (float(eos.detach()), float(uncertainty.detach()), float(diversity.detach()))
        weights = (
            self.weight(self.eos_schedule, t, _ratio(values[1], values[0]), before and before[0]),
            self.weight(self.diversity_schedule, t, _ratio(values[1], values[2]), before and before[1]),
        )
        parts = {"eos": weights[0] * eos, "uncertainty": uncertainty, "diversity": weights[1] * diversity}
        total = torch.stack([parts[name] for name in self.losses]).sum()
        try:
            gradient = list(torch.autograd.grad(total, leaves))
        except RuntimeError as error:
            raise InputError(
                f"{self.paper} needs pixels that the model can be differentiated by, but no gradient reaches those of "
                f"{model.config.model_type}: {error}"
            ) from error
        return gradient, values, weights

    def read(self, model: Any, inputs: Mapping[str, Any], answer: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and hidden states [layers + 1, T, width] at the positions that count, the answer [N] being
        teacher-forced.

        The answer is read behind the prompt through a cache, as in generation: each family then masks and places it as
        it does there. "answer": the N + 1 positions that predict its tokens and its end; "all": every position, that of
        an end token appended to it included.
        """
        prompt = model(**inputs, use_cache=True, output_hidden_states=True)
        logits, hidden = prompt.logits[0], torch.stack(prompt.hidden_states)[:, 0]
        if self.positions == "answer":
            logits, hidden = logits[-1:], hidden[:, -1:]
        else:
            answer = torch.cat([answer, answer.new_tensor(sorted(end_tokens(model))[:1])])
        if len(answer) == 0:
            return logits, hidden
        # Without a mask, as one row has no padding: from a mask Qwen would take a position for each token of the whole.
        rest = model(
            input_ids=answer[None],
            past_key_values=prompt.past_key_values,
            use_cache=True,
            output_hidden_states=True,
        )
        return (
            torch.cat([logits, rest.logits[0]]),
            torch.cat([hidden, torch.stack(rest.hidden_states)[:, 0]], dim=1),
        )

    def sampled(self, model: Any, inputs: Mapping[str, Any], draw: int) -> tuple[Tensor, float]:
        """The longest of some sampled answers [N], its end left out, and the mean of their lengths; `draw` says which
        answers."""
        place = inputs["input_ids"].device
        ends = end_tokens(model)
        with torch.no_grad(), torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            torch.manual_seed(self.seed + draw)
            output = model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                num_beams=1,
                temperature=1.0,
                top_p=self.top_p,
                top_k=0,
                num_return_sequences=self.repeats,
            )
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        own = [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in rows]
        longest = max(own, key=len)
        return torch.tensor(longest, dtype=torch.long, device=place), sum(map(len, own)) / len(own)


class Pixels:
    """The pixels of a prompt's one picture: each tile that the tower sees, [3, H, W] in [0, 1], and the way back.

    Attributes:
        inputs: what the processor made of the clean picture and the question.
        clean: the tiles.
        std: what normalised pixels are divided by, [3, 1, 1].
    """

    def __init__(self, model: Any, processor: Any, picture: Image, question: str) -> None:
        self.anatomy = Anatomy.of(model, processor)
        self.inputs = prepare(model, processor, [picture], [question])
        place = self.inputs["pixel_values"].device
        self.mean = torch.tensor(self.anatomy.pixel_mean, device=place)[:, None, None]
        self.std = torch.tensor(self.anatomy.pixel_std, device=place)[:, None, None]
        tiles = [tile for image in self.anatomy.pictures(self.inputs, normalised=True) for tile in image]
        self.clean = [(tile.float() * self.std + self.mean).clamp(0, 1) for tile in tiles]

    def zero(self) -> list[Tensor]:
        """No perturbation."""
        return [torch.zeros_like(tile) for tile in self.clean]

    def uniform(self, radius: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Perturbations drawn uniformly from the ball."""
        draws = self._draws(seed)
        return [(2 * draw - 1) * r for draw, r in zip(draws, radius, strict=True)]

    def signs(self, radius: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Perturbations drawn from the corners of the ball: as far from the clean picture as any can be."""
        draws = self._draws(seed)
        return [torch.where(draw < 0.5, -r, r) for draw, r in zip(draws, radius, strict=True)]

    def _draws(self, seed: int) -> list[Tensor]:
        noise = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed means the same on every device
        return [torch.rand(tile.shape, generator=noise).to(tile.device) for tile in self.clean]

    def project(self, delta: Sequence[Tensor], radius: Sequence[Tensor]) -> list[Tensor]:
        """The nearest perturbations inside the ball that lead to pixels in [0, 1]."""
        return [
            (tile + d.detach().clamp(-r, r)).clamp(0, 1) - tile
            for tile, d, r in zip(self.clean, delta, radius, strict=True)
        ]

    def changed(self, delta: Sequence[Tensor]) -> dict[str, Any]:
        """The inputs of the perturbed picture; gradients reach `delta`."""
        rest = iter(delta)
        return self.anatomy.map_pictures(self.inputs, lambda tile, index: tile + next(rest) / self.std, normalised=True)

    def picture(self, delta: Sequence[Tensor]) -> Image | None:
        """The perturbed picture rounded to 8 bits a channel; None if the tower sees it in several tiles."""
        from PIL import Image

        if len(self.clean) != 1:
            return None
        levels = ((self.clean[0] + delta[0]).clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy()))


def _ratio(above: float, below: float) -> float:
    """A quotient of losses; nothing is gained from a loss that has come to 0."""
    return above / below if below else 0.0


def progress_bar(quiet: bool) -> Progress:
    """A bar on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )
