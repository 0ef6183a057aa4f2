"""ViViT with its spatial part frozen (Gowda, Arnab, Huang 2023, arXiv:2306.04822), on ViViT's factorised encoder
(Arnab et al., ICCV 2021, arXiv:2103.15691).

Clips [B, T, C, H, W] in, class logits [B, K] out, tubelets of t frames and p x p pixels, T' = T / t:

    f_j = SpatialTransformer([cls_s; tubelets of time j] + pos_s)[0]         a ViT, its last norm included
    a_j = adapter(f_j)
    g   = TemporalTransformer([cls_t; a_1 .. a_T'] + pos_t);     logits = W g[0] + b,  W = 0 at the start

Frozen, the spatial part keeps its pretrained weights, runs in eval mode and without gradients; adapter, temporal
transformer and head are trained. A step then costs F_s + 3 F_t instead of 3 (F_s + F_t). Where f is stored
(`FeatureCache`) it costs 3 F_t.

The paper's text settles neither the adapter's form nor the temporal transformer's start; what is offered here is a
residual bottleneck f + W_2 gelu(W_1 LN(f)) with W_2 = 0 at the start, a linear map that starts as the identity, and
attention of one learned query to all of a frame's tokens, with its output map at zero. A convolution over tubelets is
one over patches of t frames stacked as channels, so the spatial part is the plain ViT with t C of them. Inflated from
pictures by their central frame, it never reads the other t - 1 as long as it is frozen; `average` reads all.

`load_official` takes a checkpoint of google-research/scenic (its parameters' names joined by "/"). That code counts
GELU by tanh, the shared ViT by erf.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.encoders.encoder import Encoder, Features, register_encoder
from sightline.encoders.layers import init_weights, rates, resized_positions
from sightline.encoders.vit import Block, VisionTransformer
from sightline.errors import InputError, unknown
from sightline.mixers.attention import Attention

ADAPTERS = ("none", "bottleneck", "linear", "tokens")


class Bottleneck(nn.Module):
    """f + W_2 gelu(W_1 LN(f)); f itself at the start."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        init_weights(self)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.up(F.gelu(self.down(self.norm(tokens))))


class TokenReader(nn.Module):
    """A frame's class token plus what a learned query reads from all its tokens [..., 1 + h w, D]; f at the start."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.kv, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width)
        init_weights(self)
        nn.init.zeros_(self.proj.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        key, value = self.kv(self.norm(tokens)).unflatten(-1, (2, self.num_heads, -1)).transpose(-4, -2).unbind(-3)
        query = self.query.view(self.num_heads, 1, -1).expand(*key.shape[:-2], 1, -1)
        read = F.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2)
        return tokens[..., 0, :] + self.proj(read[..., 0, :])


def _adapter(kind: str, width: int, num_heads: int, hidden: int | None) -> nn.Module:
    if kind == "bottleneck":
        return Bottleneck(width, hidden or max(1, width // 4))
    if kind == "tokens":
        return TokenReader(width, num_heads)
    if kind == "none":
        return nn.Identity()
    linear = nn.Linear(width, width)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@register_encoder
class FrozenViViT(Encoder):
    """ViViT's factorised encoder, with a frozen spatial part or without.

    `tokens` are those of the tubelets' times [B, T', D] after the temporal transformer, grid (T',); `pooled` is its
    class token. Without temporal layers both are the spatial part's, and `pooled` is their mean over time.

    Args:
        width: D, of both parts.
        depth: blocks of the spatial part.
        num_heads: heads of both parts.
        patch_size: p.
        tubelet: t; clips have a multiple of t frames.
        num_frames: T, for which pos_t is made; it is resized for other clips.
        temporal_depth: blocks of the temporal part; 0 is the baseline that takes the mean.
        mlp_ratio: hidden width of the MLPs over D.
        frozen: freeze the spatial part.
        adapter: `none`, `bottleneck`, `linear` or `tokens`.
        adapter_width: of the bottleneck, None for D / 4.
        drop_path: rate of the last temporal block, to which those before rise.
    """

    paper: ClassVar[str] = "frozen_vivit"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vivit_fe_base": dict(width=768, depth=12, num_heads=12),
        "vivit_fe_large": dict(width=1024, depth=24, num_heads=16),
        "vivit_fe_nano": dict(
            image_size=32, width=64, depth=2, num_heads=4, patch_size=4, tubelet=1, num_frames=8, temporal_depth=2
        ),
    }
    inputs = "clips"
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"embedding/(weight|bias)", r"spatial.patch_embed.proj.\1"),
        (r"output_projection/(weight|bias)", r"head.\1"),
        (r"cls_SpatialTransformer", r"spatial.cls_token"),
        (r"SpatialTransformer/posembed_input/pos_embedding", r"spatial.pos_embed"),
        (r"SpatialTransformer/encoder_norm/(weight|bias)", r"spatial.norm.\1"),
        (r"SpatialTransformer/encoderblock_(\d+)/(.*)", r"spatial.blocks.\1.\2"),
        (r"cls_TemporalTransformer", r"cls_token"),
        (r"TemporalTransformer/posembed_input/pos_embedding", r"pos_embed"),
        (r"TemporalTransformer/encoder_norm/(weight|bias)", r"norm.\1"),
        (r"TemporalTransformer/encoderblock_(\d+)/(.*)", r"blocks.\1.\2"),
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
        tubelet: int = 2,
        num_frames: int = 32,
        temporal_depth: int = 4,
        mlp_ratio: float = 4.0,
        frozen: bool = True,
        adapter: str = "none",
        adapter_width: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(image_size=image_size, in_chans=in_chans, num_classes=num_classes, width=width)
        if adapter not in ADAPTERS:
            raise unknown("adapter of frozen_vivit", adapter, ADAPTERS)
        if tubelet < 1 or num_frames < tubelet or num_frames % tubelet:
            raise InputError(f"num_frames must be a multiple of tubelet, not {num_frames} with tubelet={tubelet}")
        self.tubelet, self.temporal_depth, self.frozen = tubelet, temporal_depth, frozen
        self.adapter_kind, self.mlp_ratio = adapter, mlp_ratio
        self.spatial = VisionTransformer(
            image_size=image_size, in_chans=tubelet * in_chans, width=width, depth=depth, num_heads=num_heads,
            patch_size=patch_size, mlp_ratio=mlp_ratio,
        )  # fmt: skip
        self.spatial.name = "the spatial part of ViViT"
        self.adapter = _adapter(adapter, width, num_heads, adapter_width)
        self.steps = num_frames // tubelet
        self.blocks = nn.ModuleList(
            Block(width, Attention(width, num_heads), mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in rates(drop_path, temporal_depth)
        )
        self.cls_token: nn.Parameter | None = None
        self.norm: nn.Module = nn.Identity()
        if temporal_depth:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.steps, width))
            self.norm = nn.LayerNorm(width, eps=1e-6)
            init_weights(self.blocks)
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        for weight in self.head.parameters():
            nn.init.zeros_(weight)
        self.freeze(frozen)

    @property
    def stride(self) -> int:
        return self.spatial.stride

    def freeze(self, frozen: bool = True) -> None:
        """Freezes the spatial part, or thaws it."""
        self.frozen = frozen
        self.spatial.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> FrozenViViT:
        super().train(mode)
        if self.frozen:
            self.spatial.eval()
        return self

    def check(self, pixels: Tensor) -> None:
        super().check(pixels)
        if pixels.shape[1] == 0 or pixels.shape[1] % self.tubelet:
            name = self.called
            raise InputError(f"{name} takes clips of a multiple of {self.tubelet} frames, not {pixels.shape[1]}")

    def frame_features(self, pixels: Tensor) -> Tensor:
        """f of clips: [B, T', D], or with the adapter `tokens` [B, T', 1 + h w, D]."""
        self.check(pixels)
        stacked = pixels.unflatten(1, (-1, self.tubelet)).flatten(2, 3)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.spatial(stacked.flatten(0, 1))
            assert features.pooled is not None
            found = features.pooled
            if self.adapter_kind == "tokens":
                found = torch.cat([found[:, None], features.tokens], dim=1)
        return found.unflatten(0, stacked.shape[:2])

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        return self.from_frames(self.frame_features(pixels), hidden_states=hidden_states)

    def from_frames(self, features: Tensor, *, hidden_states: bool = False) -> Features:
        """What `forward` gives, from `frame_features`: all that is trained while the spatial part is frozen."""
        x = self.adapter(features)
        steps = x.shape[1]
        if self.cls_token is None:
            return Features(x, (steps,), x.mean(dim=1), (), (x,) if hidden_states else ())
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + resized_positions(self.pos_embed, (self.steps, 1), (steps, 1), extra=1)
        states = [x[:, 1:]]
        for block in self.blocks:
            x = block(x, (steps,))
            states.append(x[:, 1:])
        x = self.norm(x)
        return Features(x[:, 1:], (steps,), x[:, 0], (), tuple(states) if hidden_states else ())

    def classify(self, features: Features) -> Tensor:
        return self.head(features.pooled)

    @torch.no_grad()
    def inflate(self, pretrained: VisionTransformer, how: str = "average") -> None:
        """Starts the spatial part from a ViT of pictures.

        Args:
            pretrained: of the same width and depth, with a class token; another size of picture is taken, too.
            how: its patch kernel goes to the `central` frame of each tubelet, or, divided by t, to all (`average`).
        """
        if how not in ("central", "average"):
            raise unknown("way to inflate a patch kernel", how, ["central", "average"])
        if pretrained.cls_token is None:
            raise InputError("the spatial part has a class token, and the ViT that it shall start from has none")
        state = dict(pretrained.state_dict())
        kernel = state["patch_embed.proj.weight"]
        frames = [kernel / self.tubelet] * self.tubelet
        if how == "central":
            frames = [kernel if index == self.tubelet // 2 else 0 * kernel for index in range(self.tubelet)]
        state["patch_embed.proj.weight"] = torch.cat(frames, dim=1)
        state["pos_embed"] = resized_positions(state["pos_embed"], pretrained.grid, self.spatial.grid, extra=1)
        _copy(self.spatial, {key: value for key, value in state.items() if not key.startswith("head.")})

    @torch.no_grad()
    def start_temporal(self, source: str, donor: FrozenViViT | VisionTransformer | None = None) -> None:
        """Starts the temporal transformer from pretrained blocks.

        Args:
            source: `image`: the last blocks and the last norm of a ViT of pictures, cls_t from its class token and
                pos_t zero; `video`: the temporal part of another ViViT; `random` leaves what there is.
            donor: for `image` a ViT, None for the own spatial part; for `video` a ViViT.
        """
        if source not in ("random", "image", "video"):
            raise unknown("source of the temporal transformer", source, ["random", "image", "video"])
        if source == "random":
            return
        if self.cls_token is None:
            raise InputError("without temporal layers there is nothing to start")
        if source == "image":
            vit = self.spatial if donor is None else donor
            if not isinstance(vit, VisionTransformer) or vit.cls_token is None or vit.depth < self.temporal_depth:
                raise InputError(
                    f"source='image' needs a ViT with a class token and {self.temporal_depth} blocks or more as donor"
                )
            first = vit.depth - self.temporal_depth
            for own, given in zip(self.blocks, vit.blocks[first:], strict=True):
                _copy(own, given.state_dict())
            _copy(self.norm, vit.norm.state_dict())
            self.cls_token.copy_(vit.cls_token)
            self.pos_embed.zero_()
            return
        if not isinstance(donor, FrozenViViT) or donor.cls_token is None:
            raise InputError("source='video' needs a ViViT with temporal layers as donor")
        _copy(self.blocks, donor.blocks.state_dict())
        _copy(self.norm, donor.norm.state_dict())
        self.cls_token.copy_(donor.cls_token)
        self.pos_embed.copy_(resized_positions(donor.pos_embed, (donor.steps, 1), (self.steps, 1), extra=1))

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        adapted = {f"adapter.{key}": value for key, value in self.adapter.state_dict().items()}
        for key, value in state.items():
            attention = re.fullmatch(r"(.*)/MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias)", key)
            name = key.replace("/kernel", "/weight").replace("/scale", "/weight")
            if attention and attention[2] == "query":
                # [D, heads, D / heads] for each of query, key and value; a missing one is left to be named as missing.
                parts = [state.get(key.replace("/query/", f"/{part}/")) for part in ("query", "key", "value")]
                found = [part for part in parts if part is not None]
                joined = torch.cat([part.flatten(-2) for part in found], dim=-1)
                kind = "weight" if attention[3] == "kernel" else "bias"
                adapted[f"{attention[1]}/attn.qkv.{kind}"] = joined.T.contiguous() if kind == "weight" else joined
            elif attention and attention[2] == "out":
                kernel = attention[3] == "kernel"
                value = value.flatten(0, 1).T.contiguous() if kernel else value
                adapted[f"{attention[1]}/attn.proj.{'weight' if kernel else 'bias'}"] = value
            elif not attention:
                for part, ours in (("LayerNorm_0/", "norm1."), ("LayerNorm_1/", "norm2."), ("MlpBlock_0/", "mlp.")):
                    name = name.replace(part, ours)
                name = name.replace("Dense_0/", "fc1.").replace("Dense_1/", "fc2.")
                if key == "embedding/kernel":  # [t, p, p, C, D]
                    value = value.permute(4, 0, 3, 1, 2).flatten(1, 2).contiguous()
                elif key.endswith("/kernel"):
                    value = value.T.contiguous()
                adapted[name] = value
        for key, (old, new) in self._tables(adapted).items():
            adapted[key] = resized_positions(adapted[key], old, new, extra=1)
        return adapted

    def _tables(self, state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
        """The grid of each position table of a checkpoint, those of space square, and the grid here."""
        tables = {}
        for part, new in (("Spatial", self.spatial.grid), ("Temporal", (self.steps, 1))):
            key = f"{part}Transformer/posembed_input/pos_embedding"
            if key in state:
                entries = state[key].shape[1] - 1
                side = round(entries**0.5)
                if part == "Temporal":
                    tables[key] = ((entries, 1), new)
                elif side * side == entries:
                    tables[key] = ((side, side), new)
        return tables


class FeatureCache:
    """Frame features of a frozen spatial part, computed once for each key and kept in memory.

    Args:
        encoder: its spatial part has to be frozen, and has to stay as it is.
    """

    def __init__(self, encoder: FrozenViViT) -> None:
        if not encoder.frozen:
            raise InputError("features are only worth keeping while the spatial part is frozen")
        self.encoder = encoder
        self._kept: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def features(self, keys: Sequence[Hashable], clips: Tensor) -> Tensor:
        """What `frame_features` gives for the clips, computed for those only whose key is new.

        Args:
            keys: one a clip; clips that differ, such as two views of one video, have different ones.
            clips: [B, T, C, H, W].
        """
        if len(keys) != len(clips):
            raise InputError(f"{len(clips)} clips need as many keys, not {len(keys)}")
        new = {key: index for index, key in enumerate(keys) if key not in self._kept}
        if new:
            self._kept |= zip(new, self.encoder.frame_features(clips[list(new.values())]), strict=True)
        return torch.stack([self._kept[key] for key in keys])


def _copy(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a pretrained part, or says where it does not fit."""
    own = module.state_dict()
    wrong = sorted(key for key in own.keys() | state.keys() if key not in own or key not in state)
    wrong += [key for key in own if key in state and own[key].shape != state[key].shape]
    if wrong:
        raise InputError(f"the pretrained part is of another width, depth or kind: {', '.join(wrong)} do not fit")
    module.load_state_dict(dict(state))
