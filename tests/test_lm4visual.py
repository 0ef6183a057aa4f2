"""LM4Visual: the frozen layer against LLaMA's layer written out, over several families, and information filtering."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from sightline.encoders.encoder import count_parameters, create_encoder
from sightline.encoders.lm4visual import (
    LLAMA_7B,
    LanguageBlock,
    LM4Visual,
    best_threshold,
    decoder_layer,
    frequency_scores,
    magnitude_scores,
    mask_iou,
    pseudo_masks,
)
from sightline.errors import InputError
from sightline.models.loading import load

SIZES: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "opt": dict(hidden_size=32, ffn_dim=40, num_attention_heads=4, word_embed_proj_dim=32, dropout=0.5),
    "gpt_neox": dict(hidden_size=32, intermediate_size=40, num_attention_heads=4),
    "gpt2": dict(n_embd=32, n_head=4),
    "gptj": dict(n_embd=32, n_head=4, rotary_dim=8),
}


def nano(**settings: Any) -> LM4Visual:
    torch.manual_seed(0)
    given = {"width": 16, "num_heads": 2, "depth": 1, "num_classes": 5, "language_model": SIZES, **settings}
    encoder = create_encoder("lm4visual_nano", **given)
    assert isinstance(encoder, LM4Visual)
    return encoder.eval()


def pixels(batch: int = 2, height: int = 20, width: int = 28) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def language_model(family: str = "llama", **more: Any) -> Any:
    """A tiny causal language model of three layers whose weights are large enough for its attention to matter."""
    from transformers import AutoConfig

    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | {"num_hidden_layers": 3, "vocab_size": 11} | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize(("name", "millions"), [("tiny", 209.68), ("small", 227.58), ("base", 295.25)])
def test_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = create_encoder(f"lm4visual_{name}", num_classes=1000)
        plain = create_encoder(f"vit_{name}", num_classes=1000)
    assert count_parameters(encoder.language_block) / 1e6 == pytest.approx(202.4, rel=0.001)
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    assert trained == count_parameters(plain) + 2 * encoder.width * 4096
    assert count_parameters(encoder) / 1e6 == pytest.approx(millions, rel=0.005)


def slow_llama(layer: Any, u: Tensor, heads: int = 4, key_heads: int = 2) -> Tensor:
    """LLaMA's layer on tokens [L, D], without mask and rotary positions, in plain sums."""

    def rms(x: Tensor, norm: Any) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight

    r = rms(u, layer.input_layernorm)
    attention = layer.self_attn
    q, k, v = (
        (r @ part.weight.T).reshape(len(u), count, -1)
        for part, count in ((attention.q_proj, heads), (attention.k_proj, key_heads), (attention.v_proj, key_heads))
    )
    mixed = []
    for head in range(heads):
        own = head * key_heads // heads
        weights = (q[:, head] @ k[:, own].T / math.sqrt(q.shape[-1])).softmax(-1)
        mixed.append(weights @ v[:, own])
    a = u + torch.cat(mixed, dim=-1) @ attention.o_proj.weight.T
    r = rms(a, layer.post_attention_layernorm)
    mlp = layer.mlp
    return a + (F.silu(r @ mlp.gate_proj.weight.T) * (r @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def test_equals_llama_written_out() -> None:
    # To single precision: the norms of transformers compute in it whatever they are given.
    model = language_model()
    encoder = nano(language_model=model, layer=1).double()
    given = pixels().double()
    x, grid = encoder.embed(given)
    x = encoder.blocks[0](x, grid)
    layer = copy.deepcopy(model.model.layers[1]).double()
    for row in range(2):
        u = slow_llama(layer, x[row] @ encoder.f1.weight.T)
        u = u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        tokens = encoder.norm(u @ encoder.f2.weight.T)
        torch.testing.assert_close(encoder(given).tokens[row], tokens[1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(encoder.logits(given)[row], encoder.head(tokens[0]), rtol=0, atol=1e-5)
        stages = encoder.stages(given)
        torch.testing.assert_close(stages["encoder"][row], x[row, 1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(stages["f1"][row], x[row, 1:] @ encoder.f1.weight.T, rtol=0, atol=1e-5)
        torch.testing.assert_close(stages["block"][row], u[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_takes_tokens_as_a_set_and_leaves_padding_out(family: str) -> None:
    layer, width, norm = decoder_layer(language_model(family), 1)
    assert width == 32
    assert norm is not None
    block = LanguageBlock(layer.double(), width, frozen=True)
    u = torch.randn(2, 7, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    out = block(u)
    torch.testing.assert_close(block(u[:, order]), out[:, order], rtol=0, atol=1e-6)
    assert not torch.allclose(
        block(torch.cat([u[:, :6], u[:, :1]], dim=1))[:, 0], out[:, 0]
    )  # the first reads the last
    padding = torch.tensor([[False] * 7 + [True] * 2, [False] * 5 + [True] * 4])
    padded = block(torch.cat([u, 9 * torch.ones(2, 2, 32)], dim=1).double(), padding)
    torch.testing.assert_close(padded[0, :7], out[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[1, :5], block(u[1:, :5])[0], rtol=0, atol=1e-6)


def test_the_layer_stays_and_gradients_go_through_it() -> None:
    model = language_model("opt")  # its layers have dropout
    before = copy.deepcopy(model.state_dict())
    encoder = nano(language_model=model).train()
    assert not any(part.training for part in encoder.language_block.modules())
    frozen = copy.deepcopy(encoder.language_block.state_dict())
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.5)
    F.cross_entropy(encoder.logits(pixels()), torch.tensor([0, 1])).backward()
    for parameter in (encoder.f1.weight, encoder.f2.weight, encoder.patch_embed.proj.weight):
        assert float(parameter.grad.abs().max()) > 0
    optimiser.step()
    after = encoder.language_block.state_dict()
    assert all(torch.equal(after[key], frozen[key]) for key in frozen)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_through_the_layer_are_those_of_the_written_out_one() -> None:
    layer, width, _ = decoder_layer(language_model(), 0)
    block = LanguageBlock(layer.double(), width, frozen=True)
    u = torch.randn(1, 5, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(5, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((block(u)[0] * weights).sum(), u)
    (want,) = torch.autograd.grad((slow_llama(layer, u[0]) * weights).sum(), u)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_controls() -> None:
    model = language_model()
    frozen, unfrozen, random = (nano(language_model=model, control=name) for name in ("frozen", "unfrozen", "random"))
    assert all(parameter.requires_grad for parameter in unfrozen.language_block.parameters())
    assert unfrozen.train().language_block.layer.training
    assert not any(parameter.requires_grad for parameter in random.language_block.parameters())
    projection = "layer.self_attn.q_proj.weight"
    drawn = random.language_block.get_parameter(projection)
    assert not torch.equal(drawn, frozen.language_block.get_parameter(projection))
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(random.language_block.layer.input_layernorm.weight, torch.ones(32))
    mlp = nano(language_model=model, control="mlp")
    given = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    hidden = F.layer_norm(F.gelu(given @ mlp.f1.weight.T), (32,), eps=1e-6)
    torch.testing.assert_close(mlp.insert(given), hidden @ mlp.f2.weight.T)


def test_final_norm_of_the_model() -> None:
    model = language_model()
    encoder = nano(language_model=model, final_norm="model")
    assert torch.equal(encoder.language_norm.weight, model.model.norm.weight)
    assert not encoder.language_norm.weight.requires_grad
    assert torch.equal(nano(language_model=model).language_norm.weight, torch.ones(32))
    with pytest.raises(InputError, match="final_norm='model' needs a language model with a final norm"):
        nano(language_model=model.model.layers[0], final_norm="model")


def test_where_the_layer_can_come_from(tmp_path: Path) -> None:
    model = language_model()
    model.save_pretrained(tmp_path / "saved")
    given = pixels()
    want = nano(language_model=model).logits(given)
    assert torch.equal(nano(language_model=model.model.layers[-1]).logits(given), want)
    assert torch.equal(nano(language_model=tmp_path / "saved").logits(given), want)
    assert torch.equal(nano(language_model=str(tmp_path / "saved"), layer=2).logits(given), want)
    assert not torch.equal(nano(language_model=str(tmp_path / "saved"), layer=0).logits(given), want)
    made = nano(language_model=LlamaConfig(**SIZES, num_hidden_layers=30))
    assert count_parameters(made.language_block) == count_parameters(model.model.layers[0])


def test_nano_takes_the_last_layer_of_the_built_in_model() -> None:
    encoder = create_encoder("lm4visual_nano")
    stock, _ = load("picturebook-nano")
    want = stock.get_decoder().layers[-1].state_dict()
    got = encoder.language_block.layer.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    with torch.device("meta"):
        assert create_encoder("lm4visual_nano", layer=1)(torch.empty(1, 3, 64, 32)).tokens.shape == (1, 128, 64)


def test_a_layer_in_half_precision() -> None:
    model = language_model()
    want = nano(language_model=model).logits(pixels())
    got = nano(language_model=model.bfloat16())
    assert got.language_block.layer.mlp.gate_proj.weight.dtype == torch.bfloat16
    assert got.f2.weight.dtype == torch.float32
    torch.testing.assert_close(got.logits(pixels()), want, rtol=0.1, atol=0.1)


class WithPositions(nn.Module):
    """A layer that takes a mask and adds positions of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.config = LlamaConfig(**SIZES)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return hidden_states + self.linear(hidden_states) * torch.arange(hidden_states.shape[1])[:, None]


class WithoutMask(WithPositions):
    """A layer whose attention cannot be opened."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return hidden_states


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control": "lora"}, "unknown control 'lora'"),
        ({"final_norm": "two"}, "unknown final_norm 'two'"),
        ({"language_model": 7}, "language_model must be a model, its name, a layer or sizes, not int"),
        ({"language_model": nn.Linear(32, 32)}, "the width of a layer Linear is not known"),
        ({"language_model": WithPositions()}, "WithPositions cannot .* its output depends on the order"),
        ({"language_model": dict(model_type="bloom", hidden_size=32, n_head=4)}, "BloomBlock cannot .* it needs alibi"),
        ({"language_model": WithoutMask()}, "WithoutMask cannot .* it takes no attention_mask"),
        ({"language_model": dict(model_type="lama")}, "no language model can be made of the sizes"),
        ({"language_model": "no/where/at/all"}, "cannot load the language model"),
        ({"layer": 1}, "layer must be from -1 to 0, not 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nano(**settings)


def test_official_checkpoint(tmp_path: Path) -> None:
    encoder = nano(language_model={**SIZES, "num_key_value_heads": 4})
    generator = torch.Generator().manual_seed(5)
    state = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in encoder.state_dict().items()
        if not key.startswith(("language_", "f1", "f2"))
    }
    shapes = {
        "llama_dim_mapper1.weight": (32, 16),
        "llama_dim_mapper2.weight": (16, 32),
        "llama.norm.weight": (32,),
        **{f"llama.layers.0.attention.w{name}.weight": (32, 32) for name in "qkvo"},
        "llama.layers.0.feed_forward.w1.weight": (40, 32),
        "llama.layers.0.feed_forward.w2.weight": (32, 40),
        "llama.layers.0.feed_forward.w3.weight": (40, 32),
        "llama.layers.0.attention_norm.weight": (32,),
        "llama.layers.0.ffn_norm.weight": (32,),
    }
    state |= {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(state, tmp_path / "vit_llama.safetensors")
    encoder.load_official(tmp_path / "vit_llama.safetensors")
    layer = encoder.language_block.layer
    assert torch.equal(layer.self_attn.o_proj.weight, state["llama.layers.0.attention.wo.weight"])
    assert torch.equal(layer.mlp.gate_proj.weight, state["llama.layers.0.feed_forward.w1.weight"])
    assert torch.equal(layer.mlp.down_proj.weight, state["llama.layers.0.feed_forward.w2.weight"])
    assert torch.equal(layer.mlp.up_proj.weight, state["llama.layers.0.feed_forward.w3.weight"])
    assert torch.equal(layer.post_attention_layernorm.weight, state["llama.layers.0.ffn_norm.weight"])
    assert torch.equal(encoder.f2.weight, state["llama_dim_mapper2.weight"])
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert LLAMA_7B["hidden_size"] == 4096


def test_scores() -> None:
    features = torch.tensor([[[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, -1.0, 3.0], [2.0, 1.0, 1.0]]])
    centred = [[-1, 1, -1], [1, 1, -1], [0, -2, 2], [0, 0, 0]]
    magnitudes = [math.sqrt(sum(value**2 for value in token)) for token in centred]
    torch.testing.assert_close(magnitude_scores(features), torch.tensor([magnitudes]))
    turn = [complex(math.cos(2 * math.pi * n / 3), -math.sin(2 * math.pi * n / 3)) for n in range(3)]
    expected = []
    for token in centred[:3]:
        spectrum = [sum(value * turn[n * k % 3] for n, value in enumerate(token)) for k in range(3)]
        phases = [math.atan2(z.imag, z.real) if abs(z) > 1e-6 else 0.0 for z in spectrum]
        expected.append(math.sqrt(sum(phase**2 for phase in phases)))
    torch.testing.assert_close(frequency_scores(features)[:, :3], torch.tensor([expected]), rtol=0, atol=1e-5)


def test_masks() -> None:
    scores = torch.tensor([[1.0, 3.0, 5.0, 2.0], [0.0, 10.0, 4.0, 9.0]])
    masks = pseudo_masks(scores, 0.45)
    assert masks.tolist() == [[False, True, True, False], [False, True, False, True]]
    truth = torch.tensor([[False, False, True, False], [True, True, False, True]])
    torch.testing.assert_close(mask_iou(masks, truth), torch.tensor([1 / 2, 2 / 3]))
    assert mask_iou(masks & False, truth & False).tolist() == [1.0, 1.0]
    # Above 0.5 the first is right, up to 0.9 the second keeps two of three.
    assert best_threshold(scores, truth, steps=10) == pytest.approx(0.5)
