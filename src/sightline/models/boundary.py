"""The boundary of the language model: where a prompt's rows are changed before the decoder reads them.

Every family in `transformers` merges image features into the embeddings and then calls its language model with
`inputs_embeds`, a mask, positions and a cache. Hooks on both sides of that call are enough to

- *drop or merge visual tokens*: the survivors are gathered, and the mask, which keeps growing from the unpruned length,
  is cut at every later step;
- *rewrite rows*: a method may give the prompt's rows other positions, or put columns in;
- *add rows*: another view of the same prompt (a transformed picture, no picture) rides as extra rows of the batch in
  the same forward and the same cache. A *transient* stream leaves the cache after the prompt has been read; the others
  go on with the main rows, fed the same tokens, and follow them when beam search reorders the cache.

Shapes as in `sightline.models.rows`; N is the number of visual tokens of the encoded batch.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sightline.errors import InputError
from sightline.models.attending import Attended, Attending, AttentionSwitch, replace_attention
from sightline.models.call import Call, Encoded, Stream, check_room
from sightline.models.rows import View, gather_mask, stack_masks, stack_views

if TYPE_CHECKING:
    from sightline.methods import Method
    from sightline.models.anatomy import Anatomy, TowerReading


class Boundary:
    """The hooks on one model that carry out what its methods ask for."""

    def __init__(self, anatomy: Anatomy, methods: Sequence[Method]) -> None:
        self.anatomy, self.methods = anatomy, list(methods)
        self._speakers = [method for method in self.methods if method.changes_logits]
        self._rewriters = [method for method in self.methods if method.rewrites]
        self.last_call: Call | None = None
        self.prompt_length: int | None = None
        """Where answers begin in rows that hold them (in training); None: the rows are prompts."""
        self._undo: list[Callable[[], None]] = []
        # The call of each cache that was filled here; None for a prompt without pictures.
        self._calls: weakref.WeakKeyDictionary[Any, Call | None] = weakref.WeakKeyDictionary()
        self._encoded: Encoded | None = None
        self._read: dict[str, list[Tensor]] = {}
        self.as_stock: Callable[[Any, Any], tuple[Any, Any]] = lambda args, kwargs: (args, kwargs)
        """What a module of the tower would be given if all its patches were there, from the arguments it is given."""
        self._attention: AttentionSwitch | None = None
        self._begins: Callable[[], Call] | None = None
        self._call: Call | None = None  # set from the inputs of `base` to the output of the language model
        self._spoken: Call | None = None  # set from there to the output of the model
        self._quiet = False
        self._encode: Callable[..., Any] = anatomy.base.get_image_features

    # --- Putting on and taking off ---

    def install(self) -> None:
        """Puts the hooks on; with no methods there are none."""
        if not self.methods:
            return
        anatomy, base = self.anatomy, self.anatomy.base
        replaced = vars(base).get("get_image_features")
        self._encode = base.get_image_features

        @functools.wraps(self._encode)
        def encode_and_remember(*args: Any, **kwargs: Any) -> Any:
            self._encoded, output = self._encode_pictures(*args, **kwargs)
            return output

        base.get_image_features = encode_and_remember
        self._undo.append(lambda: _restore(base, "get_image_features", replaced))
        self.hook(base, self._before_base, before=True)
        self.hook(anatomy.language_model, self._before_language_model, before=True)
        self.hook(anatomy.language_model, self._after_language_model)
        self.hook(anatomy.model, self._after_model)
        readings = {name: one for method in self.methods for name, one in method.readings(anatomy).items()}
        for name, reading in readings.items():
            self.hook(reading.module, self._note(name, reading), before=True)
        for method in self.methods:
            method.install(self)

    def remove(self) -> None:
        """Takes everything off; the model is as it was."""
        while self._undo:
            self._undo.pop()()
        self._calls.clear()
        self._call = self._spoken = self._begins = self._encoded = None

    @property
    def acting(self) -> Call | None:
        """The call whose rows the decoder runs at this moment, if methods are to act on them."""
        return None if self._quiet else self._call

    def hook(self, module: nn.Module, hook: Callable[..., Any], *, before: bool = False, prepend: bool = False) -> None:
        """Puts a forward hook, or pre-hook, with keyword arguments on a module, until methods are taken off; with
        `prepend`, ahead of those that it has."""
        put = module.register_forward_pre_hook if before else module.register_forward_hook
        self._undo.append(put(hook, with_kwargs=True, prepend=prepend).remove)

    def before(self, module: nn.Module, hook: Callable[[Call, Tensor], Tensor | None]) -> None:
        """Lets `hook(call, first argument)` see, and replace, what goes into a part of the decoder."""

        def guarded(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._call is None or self._quiet:
                return None
            changed = hook(self._call, args[0])
            return None if changed is None else (changed, *args[1:])

        self._undo.append(module.register_forward_pre_hook(guarded).remove)

    def after(self, module: nn.Module, hook: Callable[[Call, Tensor], Tensor | None]) -> None:
        """Lets `hook(call, output)` see, and replace, what comes out of a part of the decoder."""

        def guarded(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return None if self._call is None or self._quiet else hook(self._call, output)

        self._undo.append(module.register_forward_hook(guarded).remove)

    def attend(self, layer: nn.Module, change: Callable[[Call, Attending], Attended]) -> None:
        """Lets `change(call, attending)` compute the attention of a decoder layer in place of the model's own function.

        Raises:
            InputError: if the model's attention implementation hides its logits.
        """
        attention = self.anatomy.attention(layer)
        if self._attention is None:
            self._attention = AttentionSwitch(attention.config)
            self._undo.append(self._attention.back)

        def guarded(attending: Attending) -> Attended:
            return attending.stock() if self._call is None or self._quiet else change(self._call, attending)

        self._undo.append(replace_attention(attention, guarded))

    # --- Encoding ---

    def _note(self, name: str, reading: TowerReading) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.add_reading(name, reading.read(*self.as_stock(args, kwargs)))

        return note

    def add_reading(self, name: str, value: Tensor) -> None:
        """Adds to the readings of the pictures that are being encoded: [pictures, patches, ...]."""
        self._read.setdefault(name, []).append(value)

    def _encode_pictures(self, *args: Any, **kwargs: Any) -> tuple[Encoded, Any]:
        self._read.clear()
        output = self._encode(*args, **kwargs)
        inputs = dict(inspect.signature(self._encode).bind(*args, **kwargs).arguments)
        inputs |= inputs.pop("kwargs", {})
        deepstack = getattr(output, "deepstack_features", None) or []
        read = {name: torch.cat(parts) for name, parts in self._read.items()}
        pooled = output.pooler_output
        return Encoded(inputs, _flat(pooled), [_flat(one) for one in deepstack], read, pooled), output

    def encode_changed(self, call: Call, change: Callable[[Tensor, int], Tensor], *, normalised: bool) -> Encoded:
        """The call's pictures after `change(picture, index of the image)`, encoded again (see
        `Anatomy.map_pictures`)."""
        changed = self.anatomy.map_pictures(call.inputs, change, normalised=normalised)
        return self._encode_pictures(**{name: changed[name] for name in call.encoded.inputs})[0]

    # --- Before a forward: whose is it? ---

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids: Tensor | None = args[0] if args else kwargs.get("input_ids")
        cache = kwargs.get("past_key_values")
        self._call = self._spoken = self._begins = None
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None:
            raise InputError("with methods attached a prompt may hold pictures, but no videos")
        if cache is not None and (read := cache.get_seq_length()) > 0:
            return self._go_on(cache, read, ids, args, kwargs)
        if ids is None:
            raise InputError(
                "with methods attached the model needs input_ids: inputs_embeds do not show what is visual"
            )
        host_ids = ids.cpu()
        if bool(self.anatomy.visual_positions(host_ids).any()):
            mask = kwargs.get("attention_mask")
            flat = _checked_mask(mask, cache, packed=kwargs.get("use_cache") is False)
            given = encoded.get("image")
            if given is None:
                self._encoded = None  # the pictures are encoded inside this forward
            self._begins = functools.partial(self._begin, ids, host_ids, flat, given, uncached=cache is None)
            return None
        for method in self.methods:
            if method.needs_picture:
                raise InputError(
                    f"{method.paper} keeps answers true to a picture, but no prompt of this batch has one; detach it "
                    "to ask without a picture"
                )
        self.last_call = None
        return None

    def _go_on(self, cache: Any, read: int, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A later step of a call that has a cache, or of a prompt without pictures."""
        try:
            call = self._call = self._calls[cache]
        except KeyError:
            raise InputError(
                "with methods attached a prompt is read from its start, but this cache was filled outside the context"
            ) from None
        if kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
            raise InputError(
                "with methods attached no picture can join a prompt whose cache is kept; start a new prompt, and read "
                "it in one piece (without prefill_chunk_size)"
            )
        if call is None:
            return None
        call.seen = read + call.dropped
        call.base_counts = kwargs.get("position_ids") is None
        # Before `base`, as some families make a square mask there; those that make positions there need the whole one.
        if call.changed and ids is not None and not self.anatomy.mrope:
            mask = _cut_mask(call, kwargs.get("attention_mask"), ids.shape[1])
            return None if mask is None else (args, {**kwargs, "attention_mask": mask})
        return None

    def _begin(
        self, ids: Tensor, host_ids: Tensor, masks: tuple[Tensor, Tensor] | None, given: Any, *, uncached: bool
    ) -> Call:
        if self._encoded is None:
            raise InputError("with methods attached, encode the pictures inside the same context: give pixel_values")
        mask, host_mask = masks or (None, None)
        length = self.prompt_length or ids.shape[1]
        call = Call(self, ids, host_ids, mask, host_mask, self._encoded, prompt_length=length)
        check_room(self.anatomy.model.config, call.host_visual, host_mask)
        features = call.spread(self._encoded.features) if len(self._encoded.features) else self._encoded.features
        if call.visual_count != len(features):
            raise InputError(
                f"the prompt has {call.visual_count} visual tokens, but the pictures encoded in this context have "
                f"{len(self._encoded.features)}; encode the pictures and generate inside the same context, and read "
                "the prompt in one piece (without prefill_chunk_size)"
            )
        if not (given is None or given.pooler_output is self._encoded.output) and not torch.equal(
            _flat(given.pooler_output), features
        ):
            raise InputError(
                "the encoded pictures are not those that were encoded last in this context: encode them again"
            )
        before = self.last_call
        if uncached and before is not None and before.encoded is self._encoded and _goes_on(before, host_ids):
            call.memory, call.prompt_length = before.memory, before.prompt_length
        return call

    # --- The language model's inputs and outputs ---

    def _before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._quiet:
            return None
        if self._begins is not None:
            self._call = self.last_call = self._begins()
            self._begins = None
        call = self._call
        if call is None:
            return None
        if self._attention is not None:
            self._attention.check()
        changed = dict(kwargs)
        if call.reading_prompt:
            self._read_prompt(call, changed)
        else:
            self._read_more(call, changed)
        return args, changed

    def _read_prompt(self, call: Call, kwargs: dict[str, Any]) -> None:
        embeds: Tensor = kwargs["inputs_embeds"]
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        positions = positions.expand(*positions.shape[:-2], call.rows, -1)
        real = torch.ones_like(call.visual) if call.mask is None else call.mask.bool()
        deepstack = tuple(call.spread(layer) for layer in call.encoded.deepstack)
        columns = torch.arange(embeds.shape[1], device=embeds.device).expand(call.rows, -1)
        main = View(embeds, positions, call.visual, real, deepstack, columns)
        mask = kwargs.get("attention_mask")

        call.prompt, call.positions = (main, mask), positions
        asked: dict[Hashable, Stream] = {}
        for stream in (stream for method in self.methods for stream in method.streams(call)):
            if stream.name not in asked or asked[stream.name].transient:  # one that lasts serves both
                asked[stream.name] = stream
        call.streams = sorted(asked.values(), key=lambda stream: stream.transient)
        views = [main]
        for stream in call.streams:
            other = stream.encoded
            views.append(
                main
                if other is None
                else main.with_features(call.spread(other.features), [call.spread(layer) for layer in other.deepstack])
            )

        reduced = call.reduced(call.encoded)
        keeps: list[Tensor] = []
        if reduced is not None:
            others = [None, *(stream.encoded for stream in call.streams)]
            for index, (view, other) in enumerate(zip(list(views), others, strict=True)):
                one = reduced
                if other is not None and other.readings is not call.encoded.readings:
                    one = call.reduced(other) or reduced
                keeps.append(call.spread(one.keep))
                # Features that stand for no picture of their own (a soft image) are left as they are.
                if one.features is not None and (other is None or one is not reduced):
                    views[index] = view.with_features(call.spread(one.dense()), view.deepstack)
            compact = all(getattr(method, "positions", "compact") == "compact" for method in self.methods)
            both = list(zip(views, keeps, strict=True))
            shortened = [view.keeping(keep, compact=compact) for view, keep in both]
            lengths = [columns.shape[1] for _, columns in shortened]
            if min(lengths) < max(lengths):  # a method may leave more of one view's pictures than of another's
                shortened = [view.keeping(keep, compact=compact, length=max(lengths)) for view, keep in both]
            views = [view for view, _ in shortened]
            square = isinstance(mask, dict) or (mask is not None and mask.ndim == 4)
            # What only some views have is hidden from the others when the masks are stacked.
            anywhere = torch.stack([view.real for view in views]).any(dim=0) if square else views[0].real
            window = getattr(self.anatomy.text_config, "sliding_window", None)
            mask = gather_mask(mask, shortened[0][1], anywhere, window)
            call.keep = keeps[0]
        call.prompt = (views[0], mask)
        for index, stream in enumerate(call.streams, start=1):
            if stream.without_picture:
                views[index] = views[index].without_picture(keep_positions=stream.keep_positions)
            elif stream.visible is not None:
                visible = call.spread(stream.visible)
                visible = visible[keeps[index]] if keeps else visible
                views[index] = views[index].showing(visible, keep_positions=stream.keep_positions)
        for method in self._rewriters:
            rewritten = [method.rewrite(call, view, mask) for view in views]
            views, mask = [view for view, _ in rewritten], rewritten[0][1]
            call.prompt, call.rewritten = (views[0], mask), True

        if len(views) > 1 or call.changed:
            kwargs |= stack_views(views)
            kwargs["attention_mask"] = stack_masks(mask, [view.real for view in views], views[0].embeds.shape[1])
        call.dropped = embeds.shape[1] - views[0].embeds.shape[1]
        call.columns = views[0].columns
        call.last_position = positions[..., -1:]
        call.shown = [view.visual for view in views]
        lasting = 1 + sum(not stream.transient for stream in call.streams)
        call.real = [view.real for view in views[:lasting]]
        call.rows_real = torch.cat([view.real for view in views])
        whole = torch.stack([view.real.all() for view in views]).tolist()
        call.padded, call.rows_padded = not all(whole[:lasting]), not all(whole)
        call.shift = torch.cat([call.last_position - view.positions[..., -1:] for view in views[:lasting]], dim=-2)
        for method in self.methods:
            method.before_prompt(call)

    def _read_more(self, call: Call, kwargs: dict[str, Any]) -> None:
        embeds: Tensor = kwargs["inputs_embeds"]
        lasting = len(call.real)
        if lasting == 1 and not call.changed:
            return
        assert call.shift is not None
        assert call.last_position is not None
        if call.changed and self.anatomy.mrope:
            kwargs["attention_mask"] = _cut_mask(call, kwargs.get("attention_mask"), embeds.shape[1])
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = call.seen + torch.arange(embeds.shape[1], device=embeds.device)[None]
        elif call.base_counts:
            positions = positions + call.dropped
        elif call.changed:
            steps = positions[..., -1:] - call.last_position
            if steps.ndim == 3:  # the text's axis comes first, or (Qwen, on a kept cache) is left out
                steps = steps[0] if len(positions) > 1 else steps[1:].amin(dim=0)
            if bool((steps != call.seen - call.prompt_length + embeds.shape[1]).any()):
                raise _given_again()
        positions = positions.expand(*positions.shape[:-2], call.rows, -1)
        kwargs["position_ids"] = torch.cat([positions] * lasting, dim=-2) - call.shift
        if lasting > 1:
            kwargs["inputs_embeds"] = torch.cat([embeds] * lasting)
            mask = kwargs.get("attention_mask")
            if mask is None and not call.padded:
                return
            since = call.seen - call.prompt_length + embeds.shape[1]
            new = call.real[0].new_ones(call.rows, since)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                new = mask[:, -since:].bool()
            real = [torch.cat([one, new], dim=1) for one in call.real]
            kwargs["attention_mask"] = stack_masks(mask, real, embeds.shape[1])

    def _after_language_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._quiet:
            return None
        self._spoken, self._call = self._call, None
        call, cache = self._spoken, output.past_key_values
        if call is None:
            if cache is not None:
                self._calls[cache] = None
            return None
        hidden: Tensor = output.last_hidden_state
        rows, lasting = call.rows, len(call.real)
        if len(hidden) == rows and not call.reading_prompt:
            return None
        call.heard([hidden[i * rows : (i + 1) * rows, -1] for i in range(1, len(hidden) // rows)])
        if len(hidden) > rows:
            output.last_hidden_state = hidden[:rows]
            for name in ("hidden_states", "attentions"):
                if output.get(name) is not None:
                    output[name] = tuple(one if one is None else one[:rows] for one in output[name])
        if call.reading_prompt and cache is not None:
            if len(hidden) > lasting * rows:
                cache.batch_select_indices(torch.arange(lasting * rows, device=hidden.device))
            if lasting > 1:
                _reorder_together(cache, lasting, rows)
            self._calls[cache] = call
            for method in self._rewriters:
                method.after_prompt(call, cache)
        call.reading_prompt, call.prompt = False, None
        return output

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call, self._spoken = self._spoken, None
        if call is None:
            return None
        if isinstance(output, tuple):
            raise InputError("with methods attached the model must return a dict: leave return_dict as it is")
        wanted = kwargs.get("logits_to_keep", 0)
        if isinstance(wanted, int) and wanted > 1 and kwargs.get("past_key_values") is not None:
            raise InputError(
                "with methods attached tokens are generated one at a time: no assisted decoding and no prompt lookup"
            )
        if not self._speakers:
            return None
        last = before = call.own_logits = output.logits[:, -1]
        for method in self._speakers:
            last = method.logits(call, last)
        if last is not before:
            if call.bare is not None:
                last = torch.where(call.bare[:, None], before, last)
            last = last[:, None].to(before.dtype)
            single = output.logits.shape[1] == 1
            output.logits = last if single else torch.cat([output.logits[:, :-1], last], dim=1)
        return output

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, no method acts: the decoder is the stock model's."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is None:
        vars(owner).pop(name)
    else:
        setattr(owner, name, value)


def _given_again() -> InputError:
    return InputError(
        "with methods attached tokens that are in the cache cannot be given again: give the new tokens only, with the "
        "attention mask of the whole conversation"
    )


def _checked_mask(mask: Any, cache: Any, *, packed: bool) -> tuple[Tensor, Tensor] | None:
    """The prompt's 2-D mask, and the same on the CPU; None where there is none."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise InputError(
            "with methods attached generation needs the dynamic cache, not a static one: leave cache_implementation out"
        )
    if packed and isinstance(mask, Tensor) and mask.ndim == 4:
        return None  # without a cache, as in training, rows may hold several questions
    if mask is None:
        return None
    if not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise InputError("with methods attached, give the ordinary attention_mask of shape [rows, length]")
    host = mask.cpu()
    if bool(((host[:, -1] == 0) & (host != 0).any(dim=1)).any()):
        raise InputError(
            "pad the prompts on the left (tokenizer.padding_side = 'left'): the next token follows the last column"
        )
    return mask, host


def _cut_mask(call: Call, mask: Tensor | None, new: int) -> Tensor | None:
    """The 2-D mask of the columns in the cache and the `new` ones, from the caller's, which has all columns."""
    if mask is not None and mask.shape[1] != call.seen + new:
        raise _given_again()
    if mask is None and not call.padded:
        return None
    real = call.real[0].long()
    since = call.seen - call.prompt_length + new
    later = real.new_ones(call.rows, since) if mask is None else mask[:, -since:].long()
    return torch.cat([real, later], dim=1)


def _goes_on(before: Call, host_ids: Tensor) -> bool:
    """Whether these ids are those of the earlier call with something added (a step of a generation without a cache)."""
    length = before.prompt_length
    return (
        host_ids.shape[1] > before.host_ids.shape[1]
        and len(host_ids) == before.rows
        and torch.equal(host_ids[:, :length], before.host_ids[:, :length])
    )


def _flat(features: Any) -> Tensor:
    """[N, D] from a list with one tensor [n, D] an image or row, or from a tensor [pictures, n, D]."""
    return torch.cat(list(features)) if isinstance(features, (list, tuple)) else features.flatten(0, -2)


def _reorder_together(cache: Any, lasting: int, rows: int) -> None:
    """Makes this one cache reorder the rows of all streams when beam search reorders those of the batch."""
    of_class = type(cache).reorder_cache
    this = weakref.ref(cache)  # a cycle would keep the cache's memory until the garbage collector comes by

    def reorder_streams(beam_idx: Tensor) -> None:
        of_class(this(), torch.cat([beam_idx + stream * rows for stream in range(lasting)]))

    cache.reorder_cache = reorder_streams
