"""Conversations: asking a model several times to reach one answer, many items at a time.

A `Strategy` is the kind of method that answers by several calls of a model instead of changing one. Its file writes
`steps`, a generator that yields the `Request`s it has now and is sent the `Response`s to them; what it returns is the
answer. The driver, `converse`, moves the generators of many items forward together and puts the requests that are
pending to the model in batches. What an item is answered does not depend on the batch: a row that samples draws from a
noise of its own, seeded by its request.

Shapes: V is the size of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

from sightline.errors import InputError
from sightline.methods import Method, attach, check_composition
from sightline.models import answering
from sightline.models.answering import UNLIMITED, Budget, Reply, Shown, Stopped, end_tokens, pictures_of, prepare, reply

if TYPE_CHECKING:
    from PIL.Image import Image

    from sightline.models.anatomy import Anatomy

Rescore = Callable[[Tensor], Tensor]
"""Changes the next-token logits [V] of a row."""


@dataclass(frozen=True)
class Request:
    """One thing to ask the model.

    Attributes:
        picture: what is shown, or None.
        text: what is asked.
        max_new_tokens: the longest answer, forced first tokens counted.
        temperature: 0 takes the likeliest token; else tokens are drawn from softmax(logits / temperature).
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from this many of the likeliest tokens; 0: from all.
        seed: of this row's own noise; the same request gives the same answer, whatever is in the batch beside it.
        begin: tokens that the answer must begin with; they are part of the response.
        methods: attached for this request, after those that are on the model already.
        wants_logits: whether the response gives the next-token logits of every step.
        rescore: changes a step's logits [V], float32, before the temperature; forced tokens do not ask it.
    """

    picture: Image | None
    text: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    begin: tuple[int, ...] = ()
    methods: tuple[Method, ...] = ()
    wants_logits: bool = False
    rescore: Rescore | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < max(1, len(self.begin)):
            least = "1" if len(self.begin) < 2 else f"{len(self.begin)}, the number of forced tokens"
            raise InputError(f"max_new_tokens of a request must be {least} or more, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature of a request must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p of a request must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"top_k of a request must be 0 (all tokens) or more, not {self.top_k}")


@dataclass(frozen=True, eq=False)
class Response:
    """What the model answered to a request.

    Attributes:
        text: the answer without special tokens, white space around it removed.
        tokens: its tokens, forced ones included, the end token left out.
        cut_off: whether a limit stopped it and not the end token.
        logits: float32 [steps, V] where they were asked for: what the token of each step was chosen by, after all
            methods and whatever the checkpoint sets (a repetition penalty), before `rescore` and the temperature. The
            step that gave the end token is one of the steps, a step whose token was forced too.
        reply: the same answer as a `Reply`.
    """

    text: str
    tokens: tuple[int, ...]
    cut_off: bool
    logits: Tensor | None
    reply: Reply


Steps = Generator[Sequence[Request], Sequence[Response], "Response | str"]


@dataclass(frozen=True)
class Talk:
    """What a strategy's steps may use of the model besides asking it."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def special_tokens(self) -> frozenset[int]:
        """Tokens that are no text: ends, padding, what stands for a picture."""
        config = self.model.config
        images = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        special = set(getattr(self.tokenizer, "all_special_ids", ())) | end_tokens(self.model)
        return frozenset(special | {image for image in images if image is not None})

    def prompt_ids(self, picture: Image | None, text: str) -> Tensor:
        """The ids [S] of the prompt that shows this picture and asks this text."""
        ids: Tensor = prepare(self.model, self.processor, [picture], [text])["input_ids"][0]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, special tokens left out, white space around it kept."""
        return str(self.processor.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class Strategy(Method):
    """A method that reaches one answer through several calls of the model; a paper's file writes `steps`.

    It works on top of methods that change the model itself: "vista+mvp_reasoning" asks a model that has Vista on it.
    At its identity setting it is one plain greedy call.
    """

    attaches: ClassVar[bool] = False
    changes: ClassVar[frozenset[str]] = frozenset({"the course of the conversation"})

    @abstractmethod
    def steps(self, picture: Image | None, question: str, max_new_tokens: int, talk: Talk) -> Steps:
        """Yields what to ask, gets the responses in the same order, and returns the answer."""

    def check(self, anatomy: Anatomy) -> None:
        raise InputError(
            f"{self.paper} asks the model several times, so it cannot be attached to it; use it in `sightline ask` or "
            f"`sightline bench`, or call {type(self).__name__}().answer(model, processor, picture, question)"
        )

    def answer(
        self,
        model: Any,
        processor: Any,
        picture: Shown | None,
        question: str,
        max_new_tokens: int = 64,
        methods: Sequence[Method] = (),
        *,
        budget: Budget = UNLIMITED,
    ) -> Reply:
        """The answer to one question, with `methods` on the model meanwhile."""
        return converse(self, model, processor, [(picture, question)], max_new_tokens, methods, budget=budget)[0]


def strategy_of(chosen: Sequence[Method]) -> tuple[Strategy | None, tuple[Method, ...]]:
    """The strategy among methods, if there is one, and the methods that attach to the model.

    Raises:
        InputError: when they do not compose; at most one of them may be a strategy.
    """
    check_composition(chosen)
    strategy = next((method for method in chosen if isinstance(method, Strategy)), None)
    return strategy, tuple(method for method in chosen if method is not strategy)


def answer(
    model: Any,
    processor: Any,
    picture: Shown | None,
    question: str,
    chosen: Sequence[Method] = (),
    max_new_tokens: int = 64,
    *,
    budget: Budget = UNLIMITED,
) -> Reply:
    """The answer to one question with whatever methods are chosen, a strategy or none among them.

    Without a picture the methods have nothing to act on, and the unmodified model answers.
    """
    strategy, methods = strategy_of(chosen)
    if picture is None:
        strategy, methods = None, ()
    if strategy is not None:
        return strategy.answer(model, processor, picture, question, max_new_tokens, methods, budget=budget)
    inputs = prepare(model, processor, [picture], [question])
    with attach(model, *methods, processor=processor):
        return reply(model, processor, inputs, max_new_tokens, budget=budget)[0]


# --- Many items at a time ---


def converse(
    strategy: Strategy,
    model: Any,
    processor: Any,
    items: Sequence[tuple[Shown | None, str]],
    max_new_tokens: int,
    methods: Sequence[Method] = (),
    *,
    batch_size: int = 16,
    margin: bool = False,
    budget: Budget = UNLIMITED,
) -> list[Reply]:
    """A strategy's answers to many items, whose conversations go forward together.

    Args:
        strategy: how an answer is reached.
        model: the model.
        processor: its processor.
        items: (picture or None, question) of each.
        max_new_tokens: the longest answer.
        methods: on the model meanwhile; requests without a picture are answered without them.
        batch_size: how many requests are put to the model at once.
        margin: whether replies tell the margin of yes, where the answer is one of the model's own responses.
        budget: what each item's calls may use together. Requests that one item makes at the same time share what is
            left evenly. An item ends at the call that the budget cuts off, and has an empty text where its strategy
            had no answer by then.

    Raises:
        InputError: if an item shows several pictures: a strategy looks at one.
    """
    check_composition([*methods, strategy])
    talk = Talk(model, processor)
    steps = _one_plain_call if strategy.is_identity else strategy.steps
    talks = [
        _Conversation(steps(_only(strategy, shown), question, max_new_tokens, talk), budget)
        for shown, question in items
    ]
    while any(one.pending for one in talks):
        asked = [(one, request) for one in talks for request in one.pending]
        responses = iter(
            _ask(
                model,
                processor,
                [request for _, request in asked],
                methods,
                batch_size,
                margin,
                [one.share() for one, _ in asked],
                [one for one, _ in asked],
            )
        )
        for one in talks:
            if one.pending:
                one.hear([next(responses) for _ in one.pending])
    return [one.reply(talk) for one in talks]


def ask(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    methods: Sequence[Method] = (),
    *,
    batch_size: int = 16,
    margin: bool = False,
) -> list[Response]:
    """The model's responses to requests, in their order. Equal requests are asked once."""
    return _ask(model, processor, requests, methods, batch_size, margin, [UNLIMITED] * len(requests), None)


class _Conversation:
    """One item's conversation: what it asks now, what it has used, and how it ended."""

    def __init__(self, steps: Steps, budget: Budget) -> None:
        self.steps, self.budget = steps, budget
        self.calls = self.generated = 0
        self.seconds = 0.0
        self.cut: Stopped | None = None
        self.result: Response | str = ""
        self.pending: Sequence[Request] = ()
        self._send(None)

    def share(self) -> Budget:
        """What each of the pending requests may use."""
        tokens, seconds = self.budget.tokens, self.budget.seconds
        return Budget(
            None if tokens is None else (tokens - self.generated) // len(self.pending),
            None if seconds is None else seconds - self.seconds,
        )

    def hear(self, responses: Sequence[Response]) -> None:
        """Takes the responses to what is pending."""
        tokens = self.budget.tokens
        limit = None if tokens is None else (tokens - self.generated) // len(self.pending)
        for request, response in zip(self.pending, responses, strict=True):
            by_budget = limit is not None and limit < request.max_new_tokens
            if response.reply.stopped == "seconds" or (response.reply.stopped == "tokens" and by_budget):
                self.cut = response.reply.stopped
        self.calls += len(responses)
        self.generated += sum(response.reply.generated for response in responses)
        self._send(responses)

    def _send(self, responses: Sequence[Response] | None) -> None:
        try:
            while True:
                asked = next(self.steps) if responses is None else self.steps.send(responses)
                if asked:
                    break
                responses = ()
        except StopIteration as end:
            self.pending, self.result = (), end.value
            return
        tokens, seconds = self.budget.tokens, self.budget.seconds
        if self.cut is None and tokens is not None and tokens - self.generated < len(asked):
            self.cut = "tokens"
        if self.cut is None and seconds is not None and seconds <= self.seconds:
            self.cut = "seconds"
        self.pending = asked if self.cut is None else ()
        if self.cut is not None:
            self.steps.close()

    def reply(self, talk: Talk) -> Reply:
        """What came out."""
        if isinstance(self.result, Response):
            return replace(self.result.reply, calls=self.calls, generated=self.generated)
        tokens = tuple(talk.tokenizer(self.result, add_special_tokens=False)["input_ids"]) if self.result else ()
        text = self.result.strip()
        return Reply(text, len(tokens), None, self.cut or "end", tokens, self.calls, self.generated)


def _only(strategy: Strategy, shown: Shown | None) -> Image | None:
    pictures = pictures_of(shown)
    if len(pictures) > 1:
        raise InputError(f"{strategy.paper} looks at one picture a question, not at {len(pictures)}")
    return pictures[0] if pictures else None


def _one_plain_call(picture: Image | None, question: str, max_new_tokens: int, talk: Talk) -> Steps:
    (response,) = yield [Request(picture, question, max_new_tokens)]
    return response


def _ask(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    methods: Sequence[Method],
    batch_size: int,
    margin: bool,
    budgets: Sequence[Budget],
    askers: Sequence[_Conversation] | None,
) -> list[Response]:
    """The responses; the askers are charged with the seconds of the batches that they take part in."""
    pictures: dict[int, Hashable] = {}
    places: dict[Hashable, list[int]] = {}
    for place, (request, budget) in enumerate(zip(requests, budgets, strict=True)):
        places.setdefault((_key(request, pictures), budget), []).append(place)
    groups: dict[Hashable, list[list[int]]] = {}
    for equal in places.values():
        request = requests[equal[0]]
        group = request.methods, request.max_new_tokens, request.picture is None
        groups.setdefault(group, []).append(equal)
    responses: list[Any] = [None] * len(requests)
    for alike in groups.values():
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            firsts = [equal[0] for equal in batch]
            before = answering.clock()
            heard = _put(model, processor, [requests[i] for i in firsts], methods, margin, [budgets[i] for i in firsts])
            taken = answering.clock() - before
            for equal, response in zip(batch, heard, strict=True):
                for place in equal:
                    responses[place] = response
            if askers is not None:
                for asker in {id(askers[place]): askers[place] for equal in batch for place in equal}.values():
                    asker.seconds += taken
    return responses


def _key(request: Request, pictures: dict[int, Hashable]) -> Hashable:
    """Equal for requests that have the same answer."""
    picture = request.picture
    if picture is not None and id(picture) not in pictures:
        pictures[id(picture)] = (picture.size, picture.mode, hashlib.sha256(picture.tobytes()).digest())
    sampled = (request.temperature, request.top_p, request.top_k, request.seed) if request.temperature else ()
    shown = None if picture is None else pictures[id(picture)]
    text = request.text, request.max_new_tokens, request.begin
    return shown, text, sampled, request.methods, request.wants_logits, request.rescore


def _put(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    methods: Sequence[Method],
    margin: bool,
    budgets: Sequence[Budget],
) -> list[Response]:
    """One batch: requests of the same methods and length, all with a picture or all without."""
    first = requests[0]
    inputs = prepare(model, processor, [one.picture for one in requests], [one.text for one in requests])
    choosing = _Choosing(requests, inputs["input_ids"].shape[1], end_tokens(model))
    acting = (*(methods if first.picture is not None else ()), *first.methods)
    with attach(model, *acting, processor=processor):
        replies = reply(
            model, processor, inputs, first.max_new_tokens, margin=margin, budget=budgets, choosing=choosing
        )
    responses = []
    for own, heard in zip(replies, choosing.heard, strict=True):
        logits = torch.stack(heard[: own.n_tokens + (not own.cut_off)]) if heard else None
        responses.append(Response(own.text, own.tokens, own.cut_off, logits, own))
    return responses


class _Choosing(LogitsProcessor):
    """Turns each row's logits into scores whose largest is the token that its request wants."""

    def __init__(self, requests: Sequence[Request], prompt_length: int, ends: frozenset[int]) -> None:
        self.requests, self.prompt_length, self.ends = requests, prompt_length, ends
        self.heard: list[list[Tensor]] = [[] for _ in requests]
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        self.noise = [torch.Generator().manual_seed(request.seed) for request in requests]
        self.done: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        if step:
            self.done |= {row for row, token in enumerate(input_ids[:, -1].tolist()) if token in self.ends}
        chosen = scores.clone()
        for row, request in enumerate(self.requests):
            if row in self.done:
                continue
            logits = scores[row]
            if request.wants_logits:
                self.heard[row].append(logits.float().clone())
            if step < len(request.begin):
                chosen[row] = -math.inf
                chosen[row, request.begin[step]] = 0.0
                continue
            if request.rescore is not None:
                logits = request.rescore(logits)
            if request.temperature > 0:
                logits = _noisy(logits.float(), request, self.noise[row])
            chosen[row] = logits
        return chosen


def _noisy(logits: Tensor, request: Request, generator: torch.Generator) -> Tensor:
    """Scores [V] whose largest is a draw from the softmax of the tempered and filtered logits [V].

    With independent noise from Gumbel's distribution, which is minus the log of an exponential one, the largest of
    logit + noise falls on each token with its softmax probability.
    """
    logits = logits / request.temperature
    if 0 < request.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(request.top_k).values[-1], -math.inf)
    if request.top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(dim=0)
        before = shares.cumsum(dim=0) - shares
        logits = logits.index_fill(0, order[before >= request.top_p], -math.inf)
    waiting = torch.empty(len(logits)).exponential_(generator=generator).clamp_(min=1e-30)
    return logits - waiting.log().to(logits.device)
