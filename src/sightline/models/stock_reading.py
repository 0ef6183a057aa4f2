"""What the unchanged decoder makes of a prompt, or of a text, while methods are attached: they may ask it before they
act. Each costs a forward of its own, without a cache.

B rows of the batch, T columns of the prompt as the decoder reads it, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sightline.models.attending import Attended, Attending, AttentionSwitch, replace_attention
from sightline.models.rows import stack_masks, stack_views

if TYPE_CHECKING:
    from sightline.models.boundary import Boundary
    from sightline.models.call import Call
    from sightline.models.rows import View


def layer_outputs(call: Call) -> tuple[Tensor, Tensor]:
    """What every decoder layer gives at the prompt's last position, with the picture and without; for
    `Method.before_prompt`. One forward of 2 B rows.

    Returns:
        Two tensors [B, layers, D].
    """
    assert call.prompt is not None
    main, _ = call.prompt
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append(output[:, -1]))
        for layer in call.boundary.anatomy.layers
    ]
    try:
        _read(call, [main, main.without_picture(keep_positions=False)])
    finally:
        for handle in handles:
            handle.remove()
    outputs = torch.stack(seen, dim=1)
    return outputs[: call.rows], outputs[call.rows :]


def prompt_attention(call: Call, layers: Sequence[int]) -> Tensor:
    """The attention weights over the prompt, for `Method.streams` and `before_prompt`. One forward of B rows.

    Returns:
        float32 [B, layers, T, T], the mean over heads; columns as in the view `call.prompt[0]`.
    """
    assert call.prompt is not None
    seen: dict[int, Tensor] = {}

    def see(layer: int) -> Callable[[Attending], Attended]:
        def change(attending: Attending) -> Attended:
            seen[layer] = attending.weights().mean(dim=1)
            return attending.stock()

        return change

    anatomy = call.boundary.anatomy
    modules = [anatomy.attention(anatomy.layers[layer]) for layer in layers]
    switch = AttentionSwitch(modules[0].config)
    undo = [replace_attention(module, see(layer)) for module, layer in zip(modules, layers, strict=True)]
    try:
        _read(call, [call.prompt[0]])
    finally:
        for back in (*undo, switch.back):
            back()
    return torch.stack([seen[layer] for layer in layers], dim=1)


def _read(call: Call, views: Sequence[View]) -> None:
    """Reads views of the prompt with no method acting."""
    assert call.prompt is not None
    mask = stack_masks(call.prompt[1], [view.real for view in views], views[0].embeds.shape[1])
    with call.boundary.quiet():
        call.boundary.anatomy.language_model(**stack_views(views), attention_mask=mask, use_cache=False)


@torch.no_grad()
def read_alone(boundary: Boundary, texts: Sequence[Tensor]) -> Tensor:
    """What the unchanged decoder makes of texts, each read by itself.

    Args:
        boundary: of the model.
        texts: embeddings, each [L, D].

    Returns:
        [texts, D]: its last hidden state at the end of each text.
    """
    # One column of padding at least: a decoder made for prefixes (PaliGemma's) is causal only where it has a mask.
    longest = 1 + max(len(text) for text in texts)
    embeds = torch.stack([nn.functional.pad(text, (0, 0, longest - len(text), 0)) for text in texts])
    missing = torch.tensor([longest - len(text) for text in texts], device=embeds.device)
    places = torch.arange(longest, device=embeds.device) - missing[:, None]
    with boundary.quiet():
        output = boundary.anatomy.language_model(
            inputs_embeds=embeds, attention_mask=(places >= 0).long(), use_cache=False
        )
    hidden: Tensor = output.last_hidden_state[:, -1]
    return hidden
