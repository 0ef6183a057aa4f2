"""Every picture encoder as a vision model of `transformers`, so that a stock Llava can be built on it.

    vision = sl.EncoderVisionConfig("vig_tiny", image_size=512)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=vision.num_tokens,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    ))

In: `pixel_values` [B, C, H, W]. Out, as from the towers of `transformers`: `last_hidden_state` [B, N, D] with the patch
tokens after the final norm, `pooler_output` [B, F], and `hidden_states`, whose last entry is `last_hidden_state` (and
not, as in CLIP, what enters the final norm) and whose entry -2 is the input of the last block. Extra tokens such as
[CLS] are left out everywhere, hence the strategy "full".

Importing this module registers the two classes; `sl.load` does so too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sightline.encoders.encoder import Encoder, create_encoder
from sightline.errors import InputError


class EncoderVisionConfig(PretrainedConfig):
    """Which encoder a vision tower is.

    Args:
        encoder: one of `list_encoders()` that takes pictures.
        image_size: side of its square input or (height, width), None for the published one.
        in_chans: channels of the input.
        overrides: other arguments of `create_encoder`.

    The rest is worked out from these: `hidden_size` (D), `num_channels`, `grid` and `num_tokens` (its product),
    `patch_size` (pixels a side of what a token stands for) and `num_hidden_layers`.

    Raises:
        InputError: as `create_encoder`; and for encoders of other inputs than pictures.
    """

    model_type = "sightline_encoder"

    def __init__(
        self,
        encoder: str = "vit_nano",
        image_size: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        overrides: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        overrides = dict(overrides or {})
        if isinstance(image_size, list):
            image_size = (image_size[0], image_size[1])
        with torch.device("meta"):
            probe = create_encoder(encoder, image_size=image_size, in_chans=in_chans, **overrides).eval()
        if probe.inputs != "pictures":
            raise InputError(f"{encoder} takes {probe.inputs}; a vision tower takes pictures")
        side = probe.image_size
        with torch.no_grad():
            features = probe(torch.empty(1, in_chans, *side, device="meta"), hidden_states=True)
        derived: dict[str, Any] = dict(
            hidden_size=features.tokens.shape[-1],
            num_channels=in_chans,
            grid=list(features.grid),
            num_tokens=features.tokens.shape[1],
            patch_size=side[0] // features.grid[0],
            num_hidden_layers=max(0, len(features.hidden_states) - 1),
        )
        super().__init__(**{**kwargs, **derived})
        self.encoder, self.in_chans, self.overrides = encoder, in_chans, overrides
        self.image_size = side[0] if side[0] == side[1] else list(side)

    @property
    def side(self) -> int | tuple[int, int]:
        """`image_size` as `create_encoder` takes it; JSON has no tuples."""
        return self.image_size if isinstance(self.image_size, int) else (self.image_size[0], self.image_size[1])


class EncoderVisionModel(PreTrainedModel):
    """A vision tower made of one of the encoders, without a head."""

    config_class = EncoderVisionConfig
    base_model_prefix = "encoder_model"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules: list[str] = []  # noqa: RUF012  (as the base class has it)
    _supports_sdpa = True

    def __init__(self, config: EncoderVisionConfig) -> None:
        super().__init__(config)
        self.encoder: Encoder = create_encoder(
            config.encoder, image_size=config.side, in_chans=config.in_chans, **config.overrides
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """The encoder has made its own start; buffers that are not saved are made anew where a loader left them out."""
        if module is not self:
            return
        config = self.config
        missing = [name for name, buffer in self.encoder.named_buffers() if not _is_saved(self.encoder, name)]
        if missing:
            with torch.device("cpu"):
                fresh = create_encoder(
                    config.encoder, image_size=config.side, in_chans=config.in_chans, **config.overrides
                )
            made = dict(fresh.named_buffers())
            for name in missing:
                owner, _, last = name.rpartition(".")
                old = self.encoder.get_buffer(name)
                setattr(self.encoder.get_submodule(owner), last, made[name].to(old.device))

    def get_input_embeddings(self) -> Any:
        return self.encoder

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encodes pictures.

        Args:
            pixel_values: [B, C, H, W].
            output_hidden_states: whether to give the hidden states; where `transformers` passes the entries that it
                wants, all of them are given.
            return_dict: False for a tuple.
        """
        wanted = output_hidden_states is not None and output_hidden_states is not False
        features = self.encoder(pixel_values.to(self.dtype), hidden_states=wanted)
        states = (*features.hidden_states[:-1], features.tokens) if wanted else None
        output = BaseModelOutputWithPooling(
            last_hidden_state=features.tokens, pooler_output=features.pooled, hidden_states=states
        )
        return output if return_dict is not False else output.to_tuple()


def _is_saved(encoder: Encoder, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last not in encoder.get_submodule(owner)._non_persistent_buffers_set


AutoConfig.register(EncoderVisionConfig.model_type, EncoderVisionConfig)
AutoModel.register(EncoderVisionConfig, EncoderVisionModel)
