"""LACING: guidance against two separate forwards of the stock model, dual attention against a decoder written out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import families as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from slow_decoder import SlowDecoder
from specimens import Mirror
from tiny_checkpoint import save_tiny_checkpoint
from torch import Tensor

import sightline as sl
from sightline.errors import InputError
from sightline.grounding.contrastive_decoding import ContrastiveDecoding
from sightline.grounding.lacing import Lacing, dual_softmax, untrained
from sightline.methods import attach, check_composition, describe, parse_methods
from sightline.models.answering import prepare
from sightline.models.call import NO_PICTURE, Call, Stream
from sightline.models.loading import CHECKPOINTS
from sightline.picturebook.draw import draw
from sightline.picturebook.scene import sample_scene

WIDTH = 32
ROWS = 7  # fewer than an image has tokens, and no divisor of their number


@pytest.fixture(scope="module")
def soft() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def file(soft: Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("soft") / "learned.safetensors"
    save_file({"soft_image": soft}, path)
    return str(path)


# --- The two softmaxes ---


def slow_dual(
    logits: list[float], visual: list[bool], allowed: list[bool], own: int, full: bool
) -> tuple[list[float], float, float]:
    """One query at place `own`, key by key: its weights, and the plain sums of exponentials of both kinds."""
    weights = [0.0] * len(logits)
    sums = []
    for kind in (True, False):
        seen = []
        for key in range(len(logits)):
            if visual[key] != kind:
                continue
            if not kind:
                opened = allowed[key]
            elif full:
                opened = allowed[key] or key > own
            else:
                opened = allowed[key] and (key == own or not visual[own])
            if opened:
                seen.append(key)
        total = sum(math.exp(logits[key]) for key in seen)
        for key in seen:
            weights[key] = math.exp(logits[key]) / total
        sums.append(total)
    return weights, sums[0], sums[1]


def random_case(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, 3, q, 11], visual keys [2, 11] and a causal mask with padding [2, 1, q, 11]."""
    generator = torch.Generator().manual_seed(queries)
    logits = torch.randn(2, 3, queries, 11, generator=generator) * 2
    visual = torch.zeros(2, 11, dtype=torch.bool)
    visual[0, 3:7], visual[1, 4:6], visual[1, 8] = True, True, True
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :2] = False
    allowed = torch.ones(11, 11, dtype=torch.bool).tril() & real[:, None, None, :]
    return logits, visual, allowed[:, :, 11 - queries :]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("queries", [11, 4, 1])
def test_the_weights_are_those_of_two_softmaxes(queries: int, full: bool) -> None:
    logits, visual, allowed = random_case(queries)
    weights = dual_softmax(logits, visual, allowed, visual_full_available=full)
    assert weights.dtype == torch.float32
    for row in range(2):
        for head in range(3):
            for query in range(queries):
                expected, _, _ = slow_dual(
                    logits[row, head, query].tolist(),
                    visual[row].tolist(),
                    allowed[row, 0, query].tolist(),
                    11 - queries + query,
                    full,
                )
                torch.testing.assert_close(weights[row, head, query], torch.tensor(expected))


def test_every_query_gives_each_kind_a_mass_of_one() -> None:
    logits, visual, allowed = random_case(11)
    weights = dual_softmax(logits, visual, allowed)
    pictures = (weights * visual[:, None, None]).sum(-1)
    texts = (weights * ~visual[:, None, None]).sum(-1)
    torch.testing.assert_close(pictures, torch.ones_like(pictures))  # also the queries before the picture
    torch.testing.assert_close(texts[0], torch.ones_like(texts[0]))
    assert texts[1, :, :2].eq(0).all()  # padding that sees no text: nothing, not an average over what is forbidden
    torch.testing.assert_close(texts[1, :, 2:], torch.ones_like(texts[1, :, 2:]))


def test_weighed_by_their_ordinary_masses_the_two_are_ordinary_attention() -> None:
    """Where the causal mask holds for visual keys too, and the query is text (a visual one sees only itself)."""
    logits, visual, allowed = random_case(11)
    weights = dual_softmax(logits, visual, allowed, visual_full_available=False)
    ordinary = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    is_visual = visual[:, None, None]
    mass = (ordinary * is_visual).sum(-1, keepdim=True)
    mixed = weights * torch.where(is_visual, mass, 1 - mass)
    for row in range(2):
        asked = ~visual[row]
        asked[:2] &= row == 0  # padding
        torch.testing.assert_close(mixed[row][:, asked], ordinary[row][:, asked])


def test_where_all_keys_are_of_one_kind_it_is_ordinary_attention() -> None:
    logits, visual, allowed = random_case(11)
    allowed = allowed[:1].expand(2, -1, -1, -1)
    ordinary = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    for full in (True, False):
        weights = dual_softmax(logits, torch.zeros_like(visual), allowed, visual_full_available=full)
        torch.testing.assert_close(weights, ordinary)
    last = dual_softmax(logits[:, :, -1:], torch.ones_like(visual), allowed[:, :, -1:])
    torch.testing.assert_close(last, ordinary[:, :, -1:])


# --- In a model ---


class SlowDual(SlowDecoder):
    """The written-out decoder with dual attention."""

    def answer_logits(self, x: Tensor, visual: list[bool], full: bool) -> Tensor:
        """Next-token logits after the embeddings [T, D]."""
        for layer in range(self.depth):
            x = self.after_attention(layer, x, self.dual_heads(layer, x, visual, full))
            x = x + self.mlp(layer, x)
        return self.logits(x[-1])

    def dual_heads(self, layer: int, x: Tensor, visual: list[bool], full: bool) -> Tensor:
        attention = self.layers[layer].self_attn
        heads, groups, width = self.text.num_attention_heads, self.text.num_key_value_heads, attention.head_dim
        x = self.norm(self.layers[layer].input_layernorm.weight, x)
        places = list(range(len(x)))
        outputs = torch.zeros(len(x), heads, width)
        for head in range(heads):
            group = head // (heads // groups)
            rows, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
            query = self.rotated(x @ attention.q_proj.weight[rows].T, places)
            key = self.rotated(x @ attention.k_proj.weight[shared].T, places)
            value = x @ attention.v_proj.weight[shared].T
            logits = (query @ key.T / math.sqrt(width)).tolist()
            for now in places:
                weights, _, _ = slow_dual(logits[now], visual, [place <= now for place in places], now, full)
                outputs[now, head] = torch.tensor(weights) @ value
        return outputs


@torch.no_grad()
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_answer_is_that_of_a_decoder_written_out(full: bool, attention: str, soft: Tensor, file: str) -> None:
    """Dual attention in both rows, and the cache against reading everything anew."""
    model = tiny.tiny_model("llava")
    model.set_attn_implementation(attention)
    batch = tiny.single("llava", model, 1)
    slow = SlowDual(model)
    embeds, visual = slow.prompt(batch)
    other = embeds.clone()
    other[visual] = soft[torch.arange(16) % ROWS]
    steps, answer = [], []
    for _ in range(3):
        added = slow.embed(answer)
        kinds = [*visual.tolist(), *[False] * len(answer)]
        own, view = (slow.answer_logits(torch.cat([one, added]), kinds, full) for one in (embeds, other))
        steps.append(view + 2.5 * (own - view))
        answer.append(int(steps[-1].argmax()))
    method = Lacing(cfg_scale=2.5, soft_image=file, mda=True, visual_full_available=full)
    with attach(model, method):
        out = model.generate(
            **batch, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(torch.cat(out.logits), torch.stack(steps), atol=1e-3, rtol=1e-4)
    assert out.sequences[0, -3:].tolist() == answer


@torch.no_grad()
def test_half_of_all_attention_goes_to_the_picture_however_long_the_text() -> None:
    model = tiny.tiny_model("llava")
    model.set_attn_implementation("eager")
    shares = []
    for length in (3, 300):
        question = list(range(3, 3 + 40)) * 8
        batch = tiny.inputs("llava", model, [question[:length]] * 3, images_per_row=[1, 0, 2])
        visual = (batch["input_ids"] == tiny.IMAGE)[:, None, None]
        shares.append([(one[:, :, -1:] * visual).sum(-1).mean().item() for one in attentions_of(model, batch)])
        with attach(model, Lacing(mda=True, soft_image="untrained")):
            attentions = attentions_of(model, batch)
        for layer in attentions:
            mass = (layer * visual).sum(-1)
            for row, expected in ((0, 1.0), (1, 0.0), (2, 1.0)):
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(mass[row][:, real], torch.full_like(mass[row][:, real], expected))
                text = (layer[row] * ~visual[row]).sum(-1)[:, real]
                torch.testing.assert_close(text, torch.ones_like(text))
    assert all(long < short / 2 for short, long in zip(*shares, strict=True))  # and in the stock model it does not


def attentions_of(model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = model(**batch, output_attentions=True).attentions
    return found


@torch.no_grad()
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava_next", dict(text_config=dict(sliding_window=8))),
        ("gemma3", dict(text_config=dict(sliding_window=9))),
        ("paligemma", {}),
        ("qwen3_vl", {}),
    ],
)
def test_dual_attention_with_a_cache_is_that_of_reading_anew(
    family: str, options: dict[str, Any], full: bool, file: str
) -> None:
    """Sliding windows, prefixes that see each other, several axes of positions; padding and a row without a picture."""
    model = tiny.tiny_model(family, **options)
    batch = tiny.inputs(family, model, images_per_row=[2, 0, 1])
    settings: dict[str, Any] = dict(
        max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, num_beams=1
    )
    with attach(model, Lacing(cfg_scale=2.0, soft_image=file, mda=True, visual_full_available=full)):
        cached, anew = model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False)
        one = tiny.single(family, model, 0, images_per_row=[2, 0, 1])
        alone = model.generate(**one, **settings)
    stock = model.generate(**batch, **settings)
    assert torch.equal(cached.sequences, anew.sequences)
    for step, (first, second, single) in enumerate(zip(cached.logits, anew.logits, alone.logits, strict=True)):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
        torch.testing.assert_close(first[0], single[0], atol=1e-4, rtol=0)
        assert (first[0] - stock.logits[step][0]).abs().max() > 1e-2
        torch.testing.assert_close(first[1], stock.logits[step][1], atol=1e-4, rtol=0)


# --- Guidance ---


@contextmanager
def seeing(model: Any, soft: Tensor) -> Iterator[None]:
    """The stock model, whose encoder gives the soft image in the place of every image's features."""
    base = model.model
    encode = base.get_image_features

    def encoded(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)

        def instead(features: Tensor) -> Tensor:
            return torch.stack([soft[index % len(soft)] for index in range(len(features))])

        pooled = output.pooler_output
        if isinstance(pooled, Tensor):
            output.pooler_output = torch.stack([instead(one) for one in pooled])
        else:
            output.pooler_output = type(pooled)(instead(one) for one in pooled)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [
                tuple(torch.zeros_like(image) for image in layer) for layer in output.deepstack_features
            ]
        return output

    base.get_image_features = encoded
    try:
        yield
    finally:
        del base.get_image_features


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "gemma3"])
def test_an_answer_is_that_of_two_models_that_read_everything_anew(
    family: str, beta: float, soft: Tensor, file: str
) -> None:
    model = tiny.tiny_model(family)
    batch = tiny.inputs(family, model, images_per_row=[1, 2, 1])
    scale, tokens = 1.75, 3
    steps, answers = [], []
    for row in range(3):
        one = tiny.single(family, model, row, images_per_row=[1, 2, 1])
        ids, logits = one["input_ids"], []
        for _ in range(tokens):
            read = grown(one, ids)
            own = model(**read).logits[0, -1]
            with seeing(model, soft):
                view = model(**read).logits[0, -1]
            guided = [
                u + scale * (c - u) if c >= own.max().item() + (math.log(beta) if beta else -math.inf) else -math.inf
                for c, u in zip(own.tolist(), view.tolist(), strict=True)
            ]
            logits.append(guided)
            ids = torch.cat([ids, torch.tensor([[max(range(len(guided)), key=guided.__getitem__)]])], dim=1)
        steps.append(logits)
        answers.append(ids[0, -tokens:].tolist())
    with attach(model, Lacing(cfg_scale=scale, beta=beta, soft_image=file)):
        out = model.generate(
            **batch, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(torch.stack(out.logits, dim=1), torch.tensor(steps), atol=2e-4, rtol=0)
    assert out.sequences[:, -tokens:].tolist() == answers
    assert (torch.tensor(steps) == -math.inf).any() == (beta > 0)
    if not beta:
        assert model.generate(**batch, max_new_tokens=tokens, do_sample=False)[:, -tokens:].tolist() != answers


def grown(batch: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """A prompt of one row with the answer so far behind it."""
    new = ids.shape[1] - batch["input_ids"].shape[1]
    more = {
        name: torch.nn.functional.pad(batch[name], (0, new), value=value)
        for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0))
        if name in batch
    }
    return {**batch, **more, "input_ids": ids}


def test_guidance_worked_by_hand() -> None:
    """What the picture says nothing about stays; what it speaks for rises by (s - 1) times how much."""
    own, view = torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([[1.0, 2.0, 5.0]])
    logits = torch.tensor([[9.0, 4.0, 2.0]])  # another method was here before
    assert Lacing(cfg_scale=1.5).combine(own, own, [view]).tolist() == [[1.0, 5.0, 0.5]]
    assert Lacing(cfg_scale=3.0).combine(logits, own, [view]).tolist() == [[9.0, 8.0, -4.0]]
    # e^-2 = 0.135: only what is less than 0.1 times as probable goes.
    assert Lacing(cfg_scale=1.5, beta=0.1).combine(own, own, [view]).tolist() == [[-math.inf, 5.0, 0.5]]


@torch.no_grad()
def test_either_part_alone_and_neither() -> None:
    assert Lacing(cfg_scale=1.0, beta=0.5).is_identity
    assert not Lacing(cfg_scale=1.0, mda=True).is_identity
    assert not Lacing().is_identity
    assert Lacing(mda=True).identity().is_identity
    model = tiny.tiny_model("llava")
    batch = tiny.inputs("llava", model)
    stock = model(**batch).logits
    with attach(model, Lacing(cfg_scale=1.0)):  # needs no soft image
        assert torch.equal(model(**batch).logits, stock)
    with attach(model, Lacing(cfg_scale=1.0, mda=True)):
        rows = []
        handle = model.model.language_model.register_forward_hook(lambda m, a, out: rows.append(len(out[0])))
        dual = model(**batch).logits
        handle.remove()
    assert rows == [3]  # no second branch
    assert (dual - stock).abs().max() > 1e-2


@dataclass(frozen=True)
class Blind(ContrastiveDecoding):
    """Answers by the prompt without its picture alone."""

    paper: ClassVar[str] = "blind"

    def identity(self) -> Self:
        return self

    def branches(self, call: Call) -> Sequence[Stream]:
        return (NO_PICTURE,)

    def combine(self, logits: Tensor, own: Tensor, branches: Sequence[Tensor]) -> Tensor:
        return branches[0]


@torch.no_grad()
def test_the_branches_of_other_methods_attend_in_the_same_way() -> None:
    model = tiny.tiny_model("llava")
    batch = tiny.single("llava", model, 0)
    dual = Lacing(cfg_scale=1.0, mda=True)
    with attach(model, dual):
        flipped = model(**{**batch, "pixel_values": batch["pixel_values"].flip(-1)}).logits[:, -1]
    with attach(model, Mirror(), dual):
        torch.testing.assert_close(model(**batch).logits[:, -1], flipped, atol=1e-4, rtol=0)
    # Where the picture is hidden all keys are text, which is ordinary attention.
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    text = batch["input_ids"][batch["input_ids"] != tiny.IMAGE][None]
    stock = model.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)
    with attach(model, dual, Blind()):
        blind = model.generate(**batch, **options)
    torch.testing.assert_close(torch.stack(blind.logits), torch.stack(stock.logits), atol=1e-4, rtol=0)


def test_only_dual_attention_claims_the_attention_logits() -> None:
    assert Lacing().claims() == frozenset()
    assert Lacing(mda=True).claims() == {"the attention logits"}
    check_composition([Lacing(), sl.Ritual()])


# --- Where the soft image comes from ---


@torch.no_grad()
def test_the_file_beside_the_weights_is_found_by_itself(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "checkpoint")
    model, processor = sl.load(folder)
    with pytest.raises(InputError, match=r"learned for this model, and none lies beside.*sightline train soft-image"):
        attach(model, Lacing())
    save_file({"soft_image": untrained(100, 96, seed=4)}, folder / "soft_image.safetensors")
    shutil.copy(folder / "soft_image.safetensors", tmp_path / "elsewhere.safetensors")
    model, processor = sl.load(folder)  # the file is not taken for weights
    inputs = prepare(model, processor, [draw(sample_scene("test", 1))], ["Is there a boat in the image?"])
    logits = []
    for where in ("auto", str(tmp_path / "elsewhere.safetensors"), "untrained"):
        with attach(model, Lacing(soft_image=where)):
            logits.append(model(**inputs).logits[:, -1])
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    save_file({"soft_image": untrained(100, 96, seed=5)}, folder / "soft_image.safetensors")
    with attach(model, Lacing()):  # a file that has been trained anew is read anew
        assert not torch.equal(model(**inputs).logits[:, -1], logits[0])


def test_a_model_that_was_not_loaded_finds_no_file_where_the_program_runs(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(file, tmp_path / "soft_image.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="none lies beside"):
        attach(tiny.tiny_model("llava"), Lacing())


@torch.no_grad()
def test_the_built_in_soft_image_says_what_no_picture_says() -> None:
    """Its whole point. The next word after it is nearly that of the same prompt without a picture; after the picture,
    or after what training started from, it is not."""
    model, processor = sl.load("picturebook-nano", dtype="float32")
    soft = load_file(CHECKPOINTS / "picturebook-nano" / "soft_image.safetensors")["soft_image"]
    assert soft.shape == (100, 192)
    with attach(model, Lacing()):
        pass
    questions = ["What place is this?", "Is there a boat in the image?", "How many trees are there in the image?"]
    scenes = [sample_scene("test", index) for index in range(len(questions))]
    inputs = prepare(model, processor, [draw(scene) for scene in scenes], questions)
    real = model(**inputs).logits[:, -1].softmax(-1)
    nothing = []
    for row in range(len(questions)):
        kept = inputs["attention_mask"][row].bool() & (inputs["input_ids"][row] != model.config.image_token_id)
        nothing.append(model(input_ids=inputs["input_ids"][row][kept][None]).logits[0, -1].softmax(-1))
    blank = torch.stack(nothing)
    with seeing(model, soft):
        learned = model(**inputs).logits[:, -1].softmax(-1)
    with seeing(model, untrained(100, 192, seed=0)):
        start = model(**inputs).logits[:, -1].softmax(-1)
    apart = [(one - blank).abs().sum(-1).mean().item() / 2 for one in (learned, start, real)]
    assert apart[0] < apart[1] / 2
    assert apart[0] < apart[2] / 2


# --- Errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cfg_scale=0.5), r"cfg_scale of lacing must lie in \[1, 100\], not 0.5"),
        (dict(cfg_scale=float("nan")), "cfg_scale of lacing"),
        (dict(beta=1.5), r"beta of lacing must lie in \[0, 1\], not 1.5"),
        (dict(mda=1), "mda of lacing must be true or false, not 1"),
        (dict(visual_full_available="yes"), "visual_full_available of lacing must be true or false, not 'yes'"),
        (dict(soft_image=""), "soft_image of lacing must be 'auto', 'untrained' or the path of a file, not ''"),
    ],
)
def test_settings_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lacing(**options)


def test_soft_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny.tiny_model("llava")

    def refused(name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            attach(model, Lacing(soft_image=str(tmp_path / name)))

    refused("gone", "there is no file")
    (tmp_path / "text").write_text("soft")
    refused("text", "cannot read the soft image")
    save_file({"soft": torch.zeros(2, WIDTH)}, tmp_path / "other")
    refused("other", "it has no tensor 'soft_image'")
    save_file({"soft_image": torch.zeros(2, 2, WIDTH)}, tmp_path / "cube")
    refused("cube", r"must be numbers of shape \[n, D\], not \[2, 2, 32\]")
    save_file({"soft_image": torch.zeros(2, 31)}, tmp_path / "narrow")
    refused("narrow", "has width 31, but the decoder has width 32: it was learned for another model")


def test_dual_attention_needs_an_implementation_that_shows_its_logits() -> None:
    model = tiny.tiny_model("llava")
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="load the model with attn_implementation='sdpa' or 'eager'"):
        attach(model, Lacing(cfg_scale=1.0, mda=True))


def test_the_short_form_is_read_back() -> None:
    method = Lacing(cfg_scale=2.0, soft_image="runs/soft-image/soft_image.safetensors", mda=True)
    text = "lacing:cfg_scale=2.0,soft_image=runs/soft-image/soft_image.safetensors,mda=true"
    assert describe([method]) == text
    assert parse_methods(text) == (method,)
