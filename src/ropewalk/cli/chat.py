# SPDX-License-Identifier: Apache-2.0
"""`ropewalk chat`: reads a long text once, and answers questions about it until there are no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress

import typer

from ropewalk.cli import asking
from ropewalk.cli.asking_options import (
    AllowControlTokensOption,
    ChatTemplateOption,
    ChunkOption,
    EncodingOption,
    FileOption,
    KeepOption,
    MaxNewTokensOption,
    TargetLengthOption,
    TemperatureOption,
    Wanted,
)
from ropewalk.cli.documents import check_question
from ropewalk.cli.errors import EXIT_CODE, UserError, show
from ropewalk.cli.map_options import MapOptions, with_map_options
from ropewalk.cli.model_options import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    QueryScalingOption,
    SlidingWindowOption,
    TrainedWindowOption,
    TrustRemoteCodeOption,
    VerboseOption,
)

_PROMPT = "> "


@with_map_options()
def command(
    map_options: MapOptions,
    model: ModelOption = None,
    file: FileOption = None,
    keep: KeepOption = None,
    encoding: EncodingOption = None,
    allow_control_tokens: AllowControlTokensOption = False,
    target_length: TargetLengthOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    chunk: ChunkOption = 2048,
    temperature: TemperatureOption = 0.0,
    chat: ChatTemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trained_window: TrainedWindowOption = None,
    sliding_window: SlidingWindowOption = None,
    query_scaling: QueryScalingOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Read a long text once, then answer questions about it, a line each. Ctrl-C ends an answer, Ctrl-D the chat.

    Each question is asked of the text alone: the model does not remember the one before. Questions also come through a
    pipe.
    """
    wanted = Wanted(
        map_options, model, file, encoding, keep, allow_control_tokens, target_length, max_new_tokens, chunk,
        temperature, chat, dtype, device, trained_window, sliding_window, query_scaling, trust_remote_code, verbose,
    )  # fmt: skip
    wanted.check()
    if sys.stdin is None:
        raise UserError(
            "standard input is closed, and questions come from it: ropewalk generate takes them as --prompt"
        )
    if "-" in (file or []):
        raise UserError("--file - would read standard input, where the questions come from: put the text into a file")
    at_terminal = sys.stdin.isatty()
    if (reconfigure := getattr(sys.stdin, "reconfigure", None)) is not None:
        reconfigure(errors="surrogateescape")  # a line that is no text is refused alone, and not with all behind it
    failed = False
    with asking.read(wanted, None) as text:
        if at_terminal:
            print("Ask about the text. Ctrl-C ends an answer, Ctrl-D the chat.", file=sys.stderr)
        for question in _questions(at_terminal):
            try:
                check_question("the question", question)
                text.ask(wanted, question, stream=True)
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                print(flush=True)
            except UserError as error:
                failed = True
                show(str(error), as_json=False)
    if failed and not at_terminal:
        raise typer.Exit(EXIT_CODE)


def _questions(at_terminal: bool) -> Iterator[str]:
    """A question a line, those without one left out; the prompt before it, or the question itself in a pipe."""
    edited = at_terminal and sys.stdout is not None and sys.stdout.isatty()
    if edited:
        with suppress(ImportError):  # Windows' terminal edits lines itself
            import readline  # noqa: F401
    first = True
    while True:
        try:
            line = input(_PROMPT) if edited else _line(at_terminal)
        except EOFError:
            if at_terminal:
                print(flush=True)
            return
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print(flush=True)
            continue
        question = line.removeprefix("\ufeff").strip()
        if question:
            if not edited:
                print(*([] if first else [""]), f"{_PROMPT}{question}", sep="\n", flush=True)
            first = False
            yield question


def _line(at_terminal: bool) -> str:
    if at_terminal:
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:  # where even bytes that are no text cannot be kept
        raise UserError(
            f"standard input is not {error.encoding.upper()} text: no question can be read from it"
        ) from None
    if not line:
        raise EOFError
    return line
