"""What several commands share: options, several values after one option, and what is set before the work begins."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

MODEL = "picturebook-nano"

ModelOption = Annotated[str, typer.Option(help="A built-in model, a folder, or a hub id such as owner/name.")]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Methods to run in turn, several after one --methods: none, vhr, fastervlm:keep=0.25, fastervlm+vista."
    ),
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; the checkpoint's own by default.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")]
AttentionOption = Annotated[str | None, typer.Option(help="eager, sdpa, flash_attention_2.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
SecondsOption = Annotated[
    float | None, typer.Option(help="The longest time of generating one answer, in seconds; no limit by default.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own choice by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]


class ManyMethods(TyperCommand):
    """Lets some options take several values: `--methods none vhr` means `--methods none --methods vhr`."""

    options = ("--methods", "--sweep", "--set")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option, following = "", 0
        for arg in args:
            if arg.startswith("-"):
                option, equals, _ = arg.partition("=")
                following = (2 if equals else 1) if option in self.options else 0
            elif following:
                spread += [option] * (following > 1)
                following = 2
            spread.append(arg)
        return super().parse_args(ctx, spread)


def prepare(threads: int | None) -> None:
    """Sets the threads, and silences what transformers says about loading."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
