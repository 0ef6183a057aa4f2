"""LM4Visual: one frozen layer of a language model on top of a vision encoder (Pang et al., ICLR 2024,
arXiv:2310.12973).

In: pictures [B, C, H, W]. Out: tokens [B, N, d] and class feature [B, d]. After the blocks of a ViT, before its final
norm, all tokens z [B, 1 + N, d] go through a language model of width D, without a residual around it:

    u = F1 z                                    d -> D, no bias
    u = layer(u)                                a decoder layer: no causal mask, no rotary positions
    y = F2 RMSNorm(u)                           D -> d, no bias; the norm's weight is 1
    logits = head(LN(y)[cls])

F1, F2 and the ViT are trained; the layer and the norm are frozen, with gradients through them. Controls of the paper:
`unfrozen` (the layer is trained), `random` (frozen, weights drawn anew), `mlp` (F2 LN GELU F1, without the layer).

Official code: ziqipang/LM4VisualEncoding, `image_classification/models`. It copies `layers.*` of LLaMA only, so its
trailing norm keeps the weight 1, as here; `final_norm="model"` takes the language model's own. Checkpoints in Meta's
names fit a Llama layer of `transformers` as they are: the two order the channels of a head differently only for the
rotary positions, which are not used.

Information filtering. Scores of tokens f [B, N, D], centred over the tokens of a picture: the magnitude |f|_2, or the
frequency score, the L2 norm of the phases of f's Fourier transform along its channels. A threshold makes a mask of
them, to be compared with the object's. Thresholds hold for scores brought to [0, 1] picture by picture, so that one
serves all pictures; the paper does not say how it does that.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sightline.encoders.encoder import Features, register_encoder
from sightline.encoders.layers import with_positions
from sightline.encoders.vit import SIZES, VisionTransformer
from sightline.errors import InputError, unknown

CONTROLS = ("frozen", "unfrozen", "random", "mlp")
FINAL_NORMS = ("ones", "model")
LLAMA_7B: Mapping[str, Any] = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11008, num_attention_heads=32, rms_norm_eps=1e-6
)
"""Sizes of a layer of LLaMA 7B; its weights are random until a checkpoint is loaded."""


class LanguageBlock(nn.Module):
    """A decoder layer of a language model that takes tokens as a set: [B, L, D] -> [B, L, D].

    Args:
        layer: called with the tokens and `attention_mask`; with `position_embeddings` or `position_ids` where it takes
            them. Its attention has to follow the mask that it is given.
        width: D.
        frozen: no parameter is trained, and it stays in evaluation mode.

    Raises:
        InputError: a layer that cannot be called so, or whose output depends on the order of the tokens.
    """

    def __init__(self, layer: nn.Module, width: int, *, frozen: bool) -> None:
        super().__init__()
        self.layer, self.width, self.frozen = layer, width, frozen
        layer.requires_grad_(not frozen)
        for part in layer.modules():
            config: Any = getattr(part, "config", None)
            if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", "eager"):
                config._attn_implementation = "sdpa"  # the other kernels do not take a mask [B, 1, L, L]
        self.takes = self._checked_arguments()
        self.train(self.training)
        if not next(layer.parameters()).is_meta:
            self._check_order()

    def _checked_arguments(self) -> set[str]:
        name = type(self.layer).__name__
        arguments = list(inspect.signature(self.layer.forward).parameters.values())[1:]
        known = {"attention_mask", "position_embeddings", "position_ids"}
        needed = [
            argument.name
            for argument in arguments
            if argument.default is argument.empty
            and argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
            and argument.name not in known
        ]
        if needed or "attention_mask" not in {argument.name for argument in arguments}:
            what = f"it needs {', '.join(needed)}" if needed else "it takes no attention_mask"
            raise InputError(f"a layer {name} cannot be put into an encoder: {what}")
        return known & {argument.name for argument in arguments}

    @torch.no_grad()
    def _check_order(self) -> None:
        name = type(self.layer).__name__
        weight = next(self.layer.parameters())
        trial = torch.randn(1, 3, self.width, generator=torch.Generator().manual_seed(0)).to(weight)
        training = self.training
        self.eval()
        try:
            out, turned = self(trial), self(trial.flip(1)).flip(1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"a layer {name} cannot be put into an encoder: {error}") from error
        finally:
            self.train(training)
        allowed = {torch.float32: 1e-4, torch.float64: 1e-9}.get(weight.dtype, 0.05)
        if float((out - turned).abs().max()) > allowed * float((out - trial).abs().max()):
            raise InputError(
                f"a layer {name} cannot be put into an encoder: its output depends on the order of the tokens even "
                "with an open mask and without rotary positions"
            )

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Tokens [B, L, D]; `padding` [B, L] is true where there is none, which no token then reads."""
        batch, length, _ = tokens.shape
        mask = tokens.new_zeros(batch, 1, length, length)
        if padding is not None:
            mask = mask.masked_fill(padding[:, None, None], torch.finfo(tokens.dtype).min)
        arguments: dict[str, Any] = {"attention_mask": mask}
        if "position_embeddings" in self.takes:
            # cos = 1 and sin = 0 turn nothing; one number does for all channels of a head.
            arguments["position_embeddings"] = (tokens.new_ones(1, 1, 1), tokens.new_zeros(1, 1, 1))
        elif "position_ids" in self.takes:
            # A layer that makes the rotation itself turns nothing at position 0.
            arguments["position_ids"] = torch.zeros(batch, length, dtype=torch.long, device=tokens.device)
        out = self.layer(tokens, **arguments)
        return out[0] if isinstance(out, tuple) else out

    def train(self, mode: bool = True) -> LanguageBlock:
        """A frozen layer stays in evaluation mode: no dropout."""
        return super().train(mode and not self.frozen)

    def mixing_macs(self, tokens: Tensor, padding: Tensor | None = None) -> int:
        batch, length, _ = tokens.shape
        config = _config(self.layer)
        heads = getattr(config, "num_attention_heads", None)
        head_dim = getattr(config, "head_dim", None)
        return 2 * batch * length * length * (heads * head_dim if heads and head_dim else self.width)


@register_encoder
class LM4Visual(VisionTransformer):
    """A ViT with one layer of a language model after its blocks.

    Args:
        width: d.
        depth: blocks.
        num_heads: heads of each block.
        patch_size: pixels a side of a patch.
        mlp_ratio: hidden width of the MLP over d.
        class_token: put a class token first, and pool by it.
        drop_path: rate of the last block; those before rise to it linearly.
        layer_scale: start of LayerScale, None for none.
        language_model: whose layer it is. The name or folder of a model ("picturebook-nano"; one that takes no pictures
            may be a folder or hub id of a causal language model with its weights in safetensors), a loaded model, a
            decoder layer, or, for random weights, a config or a mapping of its sizes with `model_type`. What is given
            is copied.
        layer: which layer of a loaded model, negative from the end.
        control: "frozen" is the method; "unfrozen", "random" and "mlp" are what the paper compares it with.
        final_norm: "ones" for a trailing RMSNorm of weight 1, "model" for the language model's own final norm.
    """

    paper: ClassVar[str] = "lm4visual"
    configs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lm4visual_tiny": dict(SIZES["tiny"], language_model=LLAMA_7B),
        "lm4visual_small": dict(SIZES["small"], language_model=LLAMA_7B),
        "lm4visual_base": dict(SIZES["base"], language_model=LLAMA_7B),
        "lm4visual_nano": dict(SIZES["nano"], language_model="picturebook-nano"),
    }
    official_keys: ClassVar[Sequence[tuple[str, str]]] = (
        (r"llama\.layers\.0\.attention\.w([qkvo])\.weight", r"language_block.layer.self_attn.\1_proj.weight"),
        (r"llama\.layers\.0\.feed_forward\.w1\.weight", r"language_block.layer.mlp.gate_proj.weight"),
        (r"llama\.layers\.0\.feed_forward\.w2\.weight", r"language_block.layer.mlp.down_proj.weight"),
        (r"llama\.layers\.0\.feed_forward\.w3\.weight", r"language_block.layer.mlp.up_proj.weight"),
        (r"llama\.layers\.0\.attention_norm\.weight", r"language_block.layer.input_layernorm.weight"),
        (r"llama\.layers\.0\.ffn_norm\.weight", r"language_block.layer.post_attention_layernorm.weight"),
        (r"llama\.norm\.weight", r"language_norm.weight"),
        (r"llama_dim_mapper([12])\.weight", r"f\1.weight"),
    )

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 0,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        language_model: Any = LLAMA_7B,
        layer: int = -1,
        control: Literal["frozen", "unfrozen", "random", "mlp"] = "frozen",
        final_norm: Literal["ones", "model"] = "ones",
    ) -> None:
        if control not in CONTROLS:
            raise unknown("control", control, CONTROLS)
        if final_norm not in FINAL_NORMS:
            raise unknown("final_norm", final_norm, FINAL_NORMS)
        super().__init__(
            image_size=image_size,
            in_chans=in_chans,
            num_classes=num_classes,
            width=width,
            depth=depth,
            num_heads=num_heads,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            drop_path=drop_path,
            layer_scale=layer_scale,
        )
        found, inner, norm = decoder_layer(language_model, layer)
        self.control = control
        self.f1 = nn.Linear(width, inner, bias=False)
        self.f2 = nn.Linear(inner, width, bias=False)
        nn.init.trunc_normal_(self.f1.weight, std=0.02)
        nn.init.trunc_normal_(self.f2.weight, std=0.02)
        self.language_block: nn.Module
        self.language_norm: nn.Module
        if control == "mlp":
            self.language_block, self.language_norm = nn.GELU(), nn.LayerNorm(inner, eps=1e-6)
            return
        if control == "random":
            _draw(found)
        self.language_block = LanguageBlock(found, inner, frozen=control != "unfrozen")
        if final_norm == "model":
            if norm is None:
                raise InputError("final_norm='model' needs a language model with a final norm, not a layer alone")
            self.language_norm = norm.to(self.f2.weight.dtype)
        else:
            self.language_norm = nn.RMSNorm(inner, eps=1e-6)
        self.language_norm.requires_grad_(False)

    def insert(self, tokens: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]: F1, the language model's layer and norm, F2."""
        return self.f2(self._read(self.f1(tokens)))

    def _read(self, tokens: Tensor) -> Tensor:
        weight = next(self.language_block.parameters(), self.f1.weight)
        return self.language_norm(self.language_block(tokens.to(weight.dtype)).to(self.f2.weight.dtype))

    def encode(self, pixels: Tensor, hidden_states: bool) -> Features:
        """`hidden_states` are the ViT's, before the language model's layer."""
        x, grid = self.embed(pixels)
        states = [x[:, self.extra :]] if hidden_states else []
        for block in self.blocks:
            x = block(x, grid)
            if hidden_states:
                states.append(x[:, self.extra :])
        return self.finish(self.insert(x), grid, states)

    def stages(self, pixels: Tensor) -> dict[str, Tensor]:
        """Patch tokens [B, N, width of the stage] along the way, for `magnitude_scores` and `frequency_scores`:
        "encoder" (after the ViT's blocks), "f1", and "block" (after the language model's layer and norm)."""
        self.check(pixels)
        x, grid = self.embed(pixels)
        for block in self.blocks:
            x = block(x, grid)
        inward = self.f1(x)
        values = {"encoder": x, "f1": inward, "block": self._read(inward)}
        return {name: value[:, self.extra :] for name, value in values.items()}

    def adapt_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_positions(state, "pos_embed", self.grid, extra=self.extra)


def decoder_layer(source: Any, index: int = -1) -> tuple[nn.Module, int, nn.Module | None]:
    """A copy of a decoder layer of a language model, its width, and a copy of the model's final norm where there is one
    to be found.

    Args:
        source: see `LM4Visual.language_model`.
        index: which layer, negative from the end.

    Raises:
        InputError: a model that cannot be loaded, that has no such layer, or whose layers are not found; a layer whose
            width is not known.
    """
    if isinstance(source, Mapping):
        source = _made(dict(source))
    elif isinstance(source, str | os.PathLike):
        source = _loaded(os.fspath(source))
    elif hasattr(source, "to_dict") and not isinstance(source, nn.Module):
        source = _made(source.get_text_config().to_dict())
    if not isinstance(source, nn.Module):
        raise InputError(f"language_model must be a model, its name, a layer or sizes, not {type(source).__name__}")
    place = torch.get_default_device()
    find: Any = getattr(source, "get_decoder", None)
    if find is None:
        width = getattr(_config(source), "hidden_size", None)
        if not isinstance(width, int):
            raise InputError(
                f"the width of a layer {type(source).__name__} is not known, as none of its parts has a config: give "
                "its model as language_model"
            )
        return copy.deepcopy(source).to(place), width, None
    decoder = find()
    stacks = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) > 0]
    if len(stacks) != 1:
        raise InputError(f"the layers of {type(source).__name__} were not found: give one of them as language_model")
    if not -len(stacks[0]) <= index < len(stacks[0]):
        raise InputError(f"layer must be from {-len(stacks[0])} to {len(stacks[0]) - 1}, not {index}")
    norms = [getattr(decoder, name, None) for name in ("norm", "final_layer_norm", "ln_f", "norm_f")]
    norm = next((found for found in norms if isinstance(found, nn.Module)), None)
    norm = None if norm is None else copy.deepcopy(norm).to(place)
    return copy.deepcopy(stacks[0][index]).to(place), int(decoder.config.hidden_size), norm


def _made(sizes: dict[str, Any]) -> nn.Module:
    """A language model of one layer with random weights and next to no vocabulary."""
    from transformers import AutoConfig, AutoModel  # imported late: it takes seconds

    kept = {key: value for key, value in sizes.items() if key not in ("layer_types", "architectures")}
    small = dict(num_hidden_layers=1, vocab_size=8, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    try:
        return AutoModel.from_config(AutoConfig.for_model(kept.pop("model_type", "llama"), **kept | small))
    except Exception as error:  # each config checks its sizes in its own way
        raise InputError(f"no language model can be made of the sizes {sizes}: {error}") from error


def _loaded(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # imported late: it takes seconds

    from sightline.models.loading import CHECKPOINTS, built_in_models, load

    built_in = name in built_in_models()
    try:
        config = AutoConfig.from_pretrained(CHECKPOINTS / name if built_in else name)
        if torch.get_default_device().type == "meta":  # no weights are wanted, and none could be read
            return AutoModel.from_config(config.get_text_config())
        if built_in or hasattr(config, "vision_config"):
            return load(name)[0]
        return AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load the language model {name!r}: {reason}") from error


def _config(layer: nn.Module) -> Any:
    """The config of the language model, as a part of the layer holds it; None where none does."""
    configs = (getattr(part, "config", None) for part in layer.modules())
    return next((config for config in configs if config is not None), None)


def _draw(layer: nn.Module) -> None:
    """Weights as they are before a language model is trained."""
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    for part in layer.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim == 1:
                nn.init.constant_(parameter, float(name == "weight"))


def magnitude_scores(features: Tensor) -> Tensor:
    """[B, N, D] -> [B, N]: how far each token is from the mean of its picture."""
    return (features - features.mean(dim=1, keepdim=True)).norm(dim=-1)


def frequency_scores(features: Tensor) -> Tensor:
    """[B, N, D] -> [B, N]: the norm of the phases of each token's Fourier transform along the channels."""
    centred = (features - features.mean(dim=1, keepdim=True)).float()
    return torch.fft.fft(centred, dim=-1).angle().norm(dim=-1)


def pseudo_masks(scores: Tensor, threshold: float) -> Tensor:
    """Scores [B, N] -> masks [B, N]: what is above a threshold, scores brought to [0, 1] picture by picture."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny) > threshold


def mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """Masks [B, N] of either -> [B]: shared over joint patches, 1 where both are empty."""
    joint = (masks | truth).sum(dim=1)
    return torch.where(joint > 0, (masks & truth).sum(dim=1) / joint.clamp_min(1), 1.0)


def best_threshold(scores: Tensor, truth: Tensor, steps: int = 100) -> float:
    """Of the thresholds 0, 1 / steps, ... the one whose masks have the best mean IoU: to be chosen on pictures that are
    not those it is then measured on."""
    candidates = [step / steps for step in range(steps)]
    means = [float(mask_iou(pseudo_masks(scores, threshold), truth).mean()) for threshold in candidates]
    return candidates[max(range(steps), key=means.__getitem__)]
