"""LGViT: leave a ViT at the first of several exits that is sure (Xu et al., ACM Multimedia 2023, arXiv:2308.00255).

In: pictures [B, C, H, W]. Out: as a ViT, and from `answer` logits [B, classes] with the number of layers that each
picture went through. With h_i the tokens after layer i (from 1), P_i its patches, c_i its class token, an exit answers

    logits_i = W_i (mean over tokens of head_i(P_i) + c_i) + b_i

with a local perception head in the first exits, on the map of the patches,

    LPH(P) = P + BN(conv1x1(BN(GELU(depthwise3x3(BN(GELU(conv1x1(P))))))))           (without the depthwise step: k = 1)

and a global aggregation head in the last ones: every r-th row and column of patches, through self-attention of 8 heads
without residual or norm. A distilled DeiT has two class tokens and two classifiers an exit, whose logits are averaged.

Training. Stage one, all parameters: on even steps the loss of the last layer, on odd ones
(sum_i i CE_i + L CE_L) / (sum_i i + L). Stage two, heads only, with z_L, F_L of the frozen last layer:

    (1 - a) sum_i CE(z_i, y) + a sum_i KD(z_i, z_L) + b hete + b homo,     KD = T^2 sum p_L log(p_L / p_i) / (B classes)
    hete = sum over the first and last head of either kind of KL(softmax F_L || softmax F_e), over channels, per picture
    homo = sum over the other LPH of MSE(F_e, F_lastLPH) + over the other GAH of MSE(F_e' F_e, F_lastGAH' F_lastGAH)

Official code: falcon-xu/LGViT, `models/deit_highway`. It is followed in these reductions, in picking tokens (it pools
with a kernel of one), and in homo's teachers, which are not detached (`detach_teacher` does it). It differs here: the
class tokens are as many as there are (the code cuts two off the plain ViT too); the last layer's weight is the depth
and not always 12; the teacher's logits are the backbone's own, where the code leaves the final norm out
(`normed_teacher=False` does so too); the norms' epsilon is 1e-6, where the code has 1e-12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Features, register_encoder
from sightline.encoders.layers import resized_positions, to_map, to_tokens, with_positions
from sightline.encoders.vit import SIZES, VisionTransformer
from sightline.errors import InputError, unknown
from sightline.mixers.attention import Attention

HEADS = ("lph3", "lph1", "gah1", "gah2", "gah3")
"""Local perception with a depthwise kernel of 3 or none; global aggregation of every 1st, 2nd or 3rd token a side."""


def is_local(kind: str) -> bool:
    """Whether a head of `HEADS` is of local perception."""
    return kind.startswith("lph")


class LocalPerception(nn.Module):
    """LPH: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))
        self.depthwise = (
            nn.Sequential(
                nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width), nn.GELU(), nn.BatchNorm2d(width)
            )
            if kernel > 1
            else nn.Identity()
        )
        self.outward = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x + to_tokens(self.outward(self.depthwise(self.inward(to_map(x, grid)))))


class GlobalAggregation(Attention):
    """GAH: [B, N, D] -> [B, ceil(rows / r) ceil(columns / r), D]."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__(width, 8, qkv_bias=False)
        self.stride = stride

    def forward(self, x: Tensor, grid: tuple[int, ...] = ()) -> Tensor:
        return super().forward(picked(x, grid, self.stride))

    def mixing_macs(self, x: Tensor, grid: tuple[int, ...] = ()) -> int:
        return super().mixing_macs(picked(x, grid, self.stride))


def picked(tokens: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """The tokens of every `stride`-th row and column."""
    return tokens if stride == 1 else to_tokens(to_map(tokens, grid)[..., ::stride, ::stride])


class ExitHead(nn.Module):
    """A head and the classifiers of its exit, one for each class token."""

    def __init__(self, width: int, kind: str, num_classes: int, class_tokens: int) -> None:
        super().__init__()
        made = LocalPerception if is_local(kind) else GlobalAggregation
        self.body = made(width, int(kind[-1]))
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(class_tokens))

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Tokens [B, extra + N, D], class tokens first -> logits and the head's tokens."""
        extra = len(self.heads)
        features = self.body(x[:, extra:], grid)
        mean = features.mean(dim=1)
        answers = [head(mean + x[:, index]) for index, head in enumerate(self.heads)]
        return torch.stack(answers).mean(dim=0), features


@dataclass(frozen=True)
class ExitCriterion:
    """When a picture leaves: at an exit where its answers have passed `patience` times in a row.

    Args:
        kind: what passes. "confidence": the largest probability is above `threshold`. "entropy": the entropy (in nats)
            is below it. "patience": the class is that of the exit before; the first answer counts too.
            "patience_and_confidence": as "entropy", with patience.
        threshold: 0 or above. Not read by "patience".
        patience: in a row; 1 for "confidence" and "entropy".
    """

    kind: Literal["confidence", "entropy", "patience", "patience_and_confidence"] = "confidence"
    threshold: float = 0.865
    patience: int = 1

    def __post_init__(self) -> None:
        kinds = ("confidence", "entropy", "patience", "patience_and_confidence")
        if self.kind not in kinds:
            raise unknown("kind of exit criterion", self.kind, kinds)
        if not self.threshold >= 0:
            raise InputError(f"the threshold of an exit criterion must be 0 or above, not {self.threshold}")
        if self.patience < 1 or (self.patience > 1 and self.kind in ("confidence", "entropy")):
            raise InputError(
                f"patience must be 1 or more, and 1 for the kind {self.kind!r}, not {self.patience}"
                if self.kind in ("confidence", "entropy")
                else f"patience must be 1 or more, not {self.patience}"
            )

    def runs(self, logits: Tensor, runs: Tensor, before: Tensor) -> Tensor:
        """How many exits in a row each picture has passed, this one included.

        Args:
            logits: [B, classes] of this exit.
            runs: [B] at the exit before, 0 at the first.
            before: [B] the class at the exit before, -1 at the first.
        """
        log_p = logits.float().log_softmax(dim=-1)
        if self.kind == "patience":
            return torch.where(log_p.argmax(dim=-1) == before, runs + 1, 1)
        if self.kind == "confidence":
            passes = log_p.amax(dim=-1).exp() > self.threshold
        else:
            passes = -(log_p.exp() * log_p).sum(dim=-1) < self.threshold
        return torch.where(passes, runs + 1, 0)


@dataclass
class ExitOutputs:
    """What the exits and the last layer of a batch say; what the losses read."""

    logits: tuple[Tensor, ...]
    """[B, classes] of each exit."""
    features: tuple[Tensor, ...]
    """[B, N_i, D]: what each head gives."""
    final_logits: Tensor
    """[B, classes] of the last layer."""
    unnormed_logits: Tensor
    """As `final_logits`, from tokens without the final norm."""
    last_tokens: Tensor
    """[B, N, D]: patch tokens of the last layer, before the final norm."""
    grid: tuple[int, int]
    kinds: tuple[str, ...]
    """Of `HEADS`, of each exit."""


@register_encoder
class LGViT(VisionTransformer):
    """A ViT with exits. As an encoder it is its backbone; `answer` leaves early.

    Args:
        width: D.
        depth: blocks, L.
        num_heads: heads of each block.
        patch_size: pixels a side of a patch.
        mlp_ratio: hidden width of the MLP over D.
        drop_path: rate of the last block; those before rise to it linearly.
        layer_scale: start of LayerScale, None for none.
        distilled: whether a distillation token follows the class token (DeiT), with a classifier of its own; the pooled
            feature is then both of them, [B, 2 D].
        exits: the layers, from 1, after which there is an exit. There are none without classes.
        heads: one of `HEADS` for each exit.
    """

    paper: ClassVar[str] = "lgvit"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lgvit_base": dict(SIZES["base"]),
        "lgvit_deit_base": dict(SIZES["base"], distilled=True),
        "lgvit_nano": dict(
            width=48,
            depth=8,
            num_heads=4,
            patch_size=4,
            image_size=32,
            exits=(2, 3, 4, 5, 6, 7),
            heads=("lph3", "lph1", "gah2", "gah2", "gah3", "gah3"),
        ),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"deit\.embeddings\.cls_token", r"cls_token"),
        (r"deit\.embeddings\.distillation_token", r"dist_token"),
        (r"deit\.embeddings\.position_embeddings", r"pos_embed"),
        (r"deit\.embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        (r"deit\.encoder\.layer\.(\d+)\.attention\.attention\.qkv\.(.+)", r"blocks.\1.attn.qkv.\2"),
        (r"deit\.encoder\.layer\.(\d+)\.attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
        (r"deit\.encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"deit\.encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"deit\.encoder\.layer\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
        (r"deit\.encoder\.layer\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
        (r"deit\.encoder\.highway\.(\d+)\.mlp\.conv1\.(.+)", r"exit_heads.\1.body.inward.\2"),
        (r"deit\.encoder\.highway\.(\d+)\.mlp\.proj_bn\.(.+)", r"exit_heads.\1.body.depthwise.2.\2"),
        (r"deit\.encoder\.highway\.(\d+)\.mlp\.depthwise\.(.+)", r"exit_heads.\1.body.depthwise.0.\2"),
        (r"deit\.encoder\.highway\.(\d+)\.mlp\.conv2\.(.+)", r"exit_heads.\1.body.outward.\2"),
        (r"deit\.encoder\.highway\.(\d+)\.mlp\.(qkv|proj)\.(.+)", r"exit_heads.\1.body.\2.\3"),
        (r"deit\.encoder\.highway\.(\d+)\.(?:cls_)?classifier\.(.+)", r"exit_heads.\1.heads.0.\2"),
        (r"deit\.encoder\.highway\.(\d+)\.distillation_classifier\.(.+)", r"exit_heads.\1.heads.1.\2"),
        (r"deit\.layernorm\.(.+)", r"norm.\1"),
        (r"(?:cls_)?classifier\.(.+)", r"head.\1"),
        (r"distillation_classifier\.(.+)", r"head_dist.\1"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        distilled: bool = False,
        exits: Sequence[int] = (4, 5, 6, 7, 8, 9, 10, 11),
        heads: Sequence[str] = ("lph3", "lph3", "lph1", "lph1", "gah2", "gah2", "gah3", "gah3"),
    ) -> None:
        if list(exits) != sorted(set(exits)) or any(not 1 <= layer < depth for layer in exits):
            raise InputError(f"exits must be rising layers from 1 to {depth - 1}, not {list(exits)}")
        if len(heads) != len(exits):
            raise InputError(f"each of the {len(exits)} exits needs a head, but {len(heads)} heads are given")
        for kind in heads:
            if kind not in HEADS:
                raise unknown("head of an exit", kind, HEADS)
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        self.exits = tuple(exits) if num_classes else ()
        self.kinds = tuple(heads) if num_classes else ()
        self.dist_token: nn.Parameter | None = None
        self.head_dist: nn.Linear | None = None
        if distilled:
            self.extra = 2
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], width))
            nn.init.trunc_normal_(self.dist_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            if num_classes:
                self.head_dist = nn.Linear(width, num_classes)
                nn.init.trunc_normal_(self.head_dist.weight, std=0.02)
                nn.init.zeros_(self.head_dist.bias)
        self.exit_heads = nn.ModuleList(ExitHead(width, kind, num_classes, self.extra) for kind in self.kinds)
        for part in self.exit_heads.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def embed(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if self.dist_token is None or self.cls_token is None:
            return super().embed(pixels)
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        patches = self.patch_embed(pixels)
        first = [token.expand(len(patches), -1, -1) for token in (self.cls_token, self.dist_token)]
        return torch.cat([*first, patches], dim=1) + resized_positions(self.pos_embed, self.grid, grid, extra=2), grid

    def finish(self, x: Tensor, grid: tuple[int, int], states: list[Tensor]) -> Features:
        features = super().finish(x, grid, states)
        if self.dist_token is not None:
            features.pooled = self.norm(x[:, :2]).flatten(1)
        return features

    def classify(self, features: Features) -> Tensor:
        assert features.pooled is not None
        return self._classified(features.pooled)

    def _classified(self, pooled: Tensor) -> Tensor:
        if self.head_dist is None:
            return self.head(pooled)
        first, second = pooled.chunk(2, dim=1)
        return (self.head(first) + self.head_dist(second)) / 2

    def freeze_backbone(self) -> None:
        """Lets only the exits learn, as in stage two."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("exit_heads."))

    def exit_outputs(self, pixels: Tensor, *, train_backbone: bool = True) -> ExitOutputs:
        """All exits and the last layer of a batch, for the losses.

        Args:
            pixels: as in `forward`.
            train_backbone: False runs the backbone without gradients, as in stage two.
        """
        self._check_exits(pixels)
        with torch.set_grad_enabled(train_backbone and torch.is_grad_enabled()):
            x, grid = self.embed(pixels)
            states = []
            for layer, block in enumerate(self.blocks, start=1):
                x = block(x, grid)
                if layer in self.exits:
                    states.append(x)
            final = self.classify(self.finish(x, grid, []))
            unnormed = self._classified(x[:, : self.extra].flatten(1))
        answers = [head(state, grid) for head, state in zip(self.exit_heads, states, strict=True)]
        logits, features = zip(*answers, strict=True)
        return ExitOutputs(logits, features, final, unnormed, x[:, self.extra :], grid, self.kinds)

    @torch.no_grad()
    def answer(self, pixels: Tensor, criterion: ExitCriterion) -> tuple[Tensor, Tensor]:
        """Early exit: the batch shrinks at each exit by the pictures that leave.

        Args:
            pixels: as in `forward`.
            criterion: when a picture leaves; the last layer always answers.

        Returns:
            Logits [B, classes], and the layers [B] that each picture went through.

        Raises:
            InputError: as `forward`; without classes, and in training mode, in which a picture's answer would depend on
                the others of its batch.
        """
        self._check_exits(pixels)
        if self.training:
            raise InputError("early exit needs evaluation mode: call eval() first")
        x, grid = self.embed(pixels)
        logits = x.new_empty(len(x), self.num_classes)
        layers = torch.full((len(x),), self.depth, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        runs, before = torch.zeros_like(rows), torch.full_like(rows, -1)
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, grid)
            if layer not in self.exits:
                continue
            answers, _ = self.exit_heads[self.exits.index(layer)](x, grid)
            runs, before = criterion.runs(answers, runs, before), answers.argmax(dim=-1)
            leave = runs >= criterion.patience
            logits[rows[leave]], layers[rows[leave]] = answers[leave], layer
            if bool(leave.all()):
                return logits, layers
            x, rows, runs, before = x[~leave], rows[~leave], runs[~leave], before[~leave]
        logits[rows] = self.classify(self.finish(x, grid, []))
        return logits, layers

    def training_loss(self, pixels: Tensor, targets: Tensor, step: int, steps: int) -> Tensor:
        """Stage one in the first half of the steps, stage two in the second."""
        if not self.exits:
            return super().training_loss(pixels, targets, step, steps)
        if step < steps // 2:
            return stage_one_loss(self.exit_outputs(pixels), targets, step, exits=self.exits, depth=self.depth)
        return stage_two_loss(self.exit_outputs(pixels, train_backbone=False), targets)

    def speed_up(self, layers: Tensor) -> float:
        """How many times fewer layers were run than without exits, the heads not counted."""
        return self.depth / float(layers.float().mean())

    def _check_exits(self, pixels: Tensor) -> None:
        if not self.exits:
            raise InputError(f"{self.called} has no exits; create it with num_classes and exits")
        self.check(pixels)

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        adapted: dict[str, Tensor] = {}
        for key, value in state.items():
            if key.startswith("deit.pooler."):
                continue  # the official model builds it and no exit reads it
            match = re.fullmatch(r"(.+\.attention\.attention)\.(query|key|value)\.(.+)", key)
            parts = [f"{match[1]}.{part}.{match[3]}" for part in ("query", "key", "value")] if match else []
            if match is None or any(part not in state for part in parts):
                adapted[key] = value
            elif match[2] == "query":
                adapted[f"{match[1]}.qkv.{match[3]}"] = torch.cat([state[part] for part in parts])
        for index, kind in enumerate(self.kinds):
            if is_local(kind):  # "proj" is a convolution in one kind of head, and the attention's output in the other
                for name in ("weight", "bias"):
                    key = f"deit.encoder.highway.{index}.mlp.proj.{name}"
                    if key in adapted:
                        adapted[f"deit.encoder.highway.{index}.mlp.depthwise.{name}"] = adapted.pop(key)
        return with_positions(adapted, "deit.embeddings.position_embeddings", self.grid, extra=self.extra)


def stage_one_loss(outputs: ExitOutputs, target: Tensor, step: int, *, exits: Sequence[int], depth: int) -> Tensor:
    """The loss of all parameters in step number `step` (from 0): the last layer's, or a weighted mean of all.

    Args:
        outputs: of `LGViT.exit_outputs`.
        target: [B] classes.
        step: even steps train the last layer alone.
        exits: the layers of the exits, their weights.
        depth: the last layer, its weight.
    """
    final = F.cross_entropy(outputs.final_logits, target)
    if step % 2 == 0:
        return final
    losses = [layer * F.cross_entropy(logits, target) for layer, logits in zip(exits, outputs.logits, strict=True)]
    return (sum(losses, start=depth * final)) / (sum(exits) + depth)


def stage_two_loss(
    outputs: ExitOutputs,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.01,
    temperature: float = 2.0,
    normed_teacher: bool = True,
    detach_teacher: bool = False,
) -> Tensor:
    """The loss of the heads, taught by the frozen last layer and by the last head of either kind.

    Args:
        outputs: of `LGViT.exit_outputs(pixels, train_backbone=False)`.
        target: [B] classes.
        alpha: share of the distilled predictions.
        beta: weight of the feature losses.
        temperature: T.
        normed_teacher: whether the teacher's logits are read after the final norm.
        detach_teacher: whether the last head of a kind learns nothing from those that follow it.
    """
    teacher = (outputs.final_logits if normed_teacher else outputs.unnormed_logits).detach()
    last = outputs.last_tokens.detach()
    soft = (teacher / temperature).log_softmax(dim=-1)
    loss = target.new_zeros((), dtype=teacher.dtype)
    for logits in outputs.logits:
        student = (logits / temperature).log_softmax(dim=-1)
        distilled = F.kl_div(student, soft, reduction="sum", log_target=True) * temperature**2 / logits.numel()
        loss = loss + (1 - alpha) * F.cross_entropy(logits, target) + alpha * distilled
    for local in (True, False):
        family = [
            (features, 1 if local else int(kind[-1]))
            for features, kind in zip(outputs.features, outputs.kinds, strict=True)
            if is_local(kind) == local
        ]
        for features, stride in [family[0], family[-1]] if len(family) > 1 else family:
            goal = picked(last, outputs.grid, stride).log_softmax(dim=-1)
            loss = loss + beta * F.kl_div(features.log_softmax(dim=-1), goal, reduction="batchmean", log_target=True)
        for features, _ in family[:-1]:
            example = family[-1][0].detach() if detach_teacher else family[-1][0]
            pair = (features, example) if local else (features.mT @ features, example.mT @ example)
            loss = loss + beta * F.mse_loss(*pair)
    return loss
