"""What attaching costs: the time per token with no method and with methods at their identity setting, which are not
installed at all, against the stock model; and the time that attaching and detaching take.

Targets: at most 1 % over the stock model per token with no method; at most 50 ms to attach and detach.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from shared.subjects import nano, prompt
from shared.timing import Row, arguments, in_turns, now, ratio, seconds_per_token, show

from sightline.methods import Method, attach, methods

TOKENS = 48
MOST_OVERHEAD = 1.01
MOST_MILLISECONDS = 50.0


def seconds_to_attach(model: Any, method: Method) -> float:
    start = now(model.device)
    with attach(model, method):
        pass
    return now(model.device) - start


def main() -> None:
    options = arguments(__doc__, rounds=40)
    model, name = nano(options.device)
    inputs = prompt(model, rows=1, text_tokens=20)
    known = {name: kind for name, kind in methods().items() if kind.attaches}

    per_token = partial(seconds_per_token, model, inputs, tokens=TOKENS)
    cases: dict[str, Callable[[], float]] = {
        "stock": partial(per_token, None),
        "stock once more": partial(per_token, None),
        "no method": partial(per_token, ()),
    }
    cases |= {f"{slug} at identity": partial(per_token, (method().identity(),)) for slug, method in known.items()}
    times = in_turns(cases, options.rounds)
    rows = []
    for case, taken in times.items():
        over = ratio(taken, times["stock"])
        target = f"<= {MOST_OVERHEAD:g}" if case == "no method" else ""
        values = {"ms per token": 1e3 * statistics.median(taken), "ratio to stock": over}
        rows.append(Row(case, values, target, over <= MOST_OVERHEAD if target else None))
    note = f"{name}, batch 1, {TOKENS} tokens a generation; the second stock row shows how exact the ratios are"
    show("Time per token with nothing to do", note, rows, options)

    times = in_turns(
        {slug: partial(seconds_to_attach, model, method()) for slug, method in known.items()}, options.rounds
    )
    rows = []
    for slug, taken in times.items():
        milliseconds = 1e3 * statistics.median(taken)
        target = f"<= {MOST_MILLISECONDS:g}"
        rows.append(Row(slug, {"ms": milliseconds}, target, milliseconds <= MOST_MILLISECONDS))
    show("Attaching and detaching", f"{name}, each method with its defaults", rows, options)


if __name__ == "__main__":
    main()
