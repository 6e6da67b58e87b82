# SPDX-License-Identifier: Apache-2.0
"""What `generate` and `chat` share: from their options to a text that a model has read, or kept in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from rich.console import Console

from ropewalk.cli import model_options
from ropewalk.cli.asking_options import Wanted
from ropewalk.cli.documents import check_question, read_files
from ropewalk.cli.errors import UserError
from ropewalk.cli.model_options import How
from ropewalk.cli.progress import reading as progress
from ropewalk.cli.progress import size
from ropewalk.files import shown
from ropewalk.integrations.transformers.memory import memory
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.maps import PositionMap, from_dict

if TYPE_CHECKING:
    from ropewalk import Extension
    from ropewalk.integrations.transformers.generation import Answer
    from ropewalk.integrations.transformers.kept import Kept
    from ropewalk.integrations.transformers.reading import Reading

# Tokens that a question may have which is not known yet.
_QUESTION = 512


@dataclass(frozen=True)
class Asking:
    """A text that was read, and how.

    Attributes:
        reading: to ask.
        extension: of the model, until the context ends.
        target_length: tokens that were to be reached.
        load_seconds: that the model took to load.
        unkept: why the text could not be kept; empty where it was, or was not to be.
    """

    loaded: LoadedModel
    reading: Reading
    extension: Extension
    target_length: int
    load_seconds: float
    unkept: str

    def ask(self, wanted: Wanted, question: str, stream: bool) -> Answer:
        """Asks one question; prints the answer as it comes if `stream`."""
        from ropewalk import LengthError
        from ropewalk.integrations.transformers.framing import ControlTokenError
        from ropewalk.integrations.transformers.kept import ReadingError

        def show(piece: str) -> None:
            bar.close()
            print(piece, end="", flush=True)

        with ExitStack() as bar:
            report = bar.enter_context(progress(_console()))

            def on_progress(done: int, total: int) -> None:
                if total - self.reading.tokens >= _QUESTION:  # others are read in a moment
                    report(done, total)

            try:
                answer = self.reading.ask(
                    question,
                    max_new_tokens=wanted.max_new_tokens,
                    temperature=wanted.temperature,
                    on_progress=on_progress,
                    on_text=show if stream else None,
                )
            except (ControlTokenError, LengthError, ReadingError) as error:
                raise UserError(_as_options(error)) from error
        if stream:
            print(flush=True)
        return answer


@contextmanager
def read(wanted: Wanted, questions: list[str] | None) -> Iterator[Asking]:
    """Reads the text that the options name, or finds it kept; then the model is as it was.

    Args:
        wanted: options, checked.
        questions: that will be asked; None where they are not known yet.

    Raises:
        UserError: something is wrong with the files, the model, or what is to be read.
    """
    for question in questions or []:
        check_question("--prompt", question)
    kept = _look_at(wanted.keep)
    text = "\n\n".join(read_files(wanted.file or [], wanted.encoding))
    if not text and kept is not None:
        text = kept.text
    asked = [question for question in questions or [] if question.strip()]
    if not text and 0 < len(asked) < len(questions or []):
        empty = next(question for question in questions or [] if not question.strip())
        raise UserError(f"--prompt {empty!r} asks nothing, and there is no text to go on with: leave it out")
    if not text and not asked:
        raise UserError(
            "there is nothing to read: pass --file, --prompt or both"
            if questions is not None
            else "there is nothing to read: pass --file, or --keep with a file that is there"
        )
    if kept is not None:
        _check_kept(wanted, kept, text)
    source = model_options.find_model(wanted.model)

    console = _console()
    with model_options.running(wanted.verbose), ExitStack() as stack:
        from ropewalk.integrations.transformers.framing import ControlTokenError, Document, Frame
        from ropewalk.integrations.transformers.kept import ReadingError
        from ropewalk.integrations.transformers.reading import Reading, read_document

        began = perf_counter()
        loaded = model_options.load_model(source, wanted.dtype, wanted.device, wanted.trust_remote_code, wanted.verbose)
        load_seconds = perf_counter() - began
        try:
            frame = Frame.of(loaded.tokenizer, wanted.chat) if kept is None else Frame(*kept.facts["frame"])
            document = Document(loaded.tokenizer, text, frame, wanted.allow_control_tokens)
            prompts = None if questions is None else [len(document.prompt(question)) for question in questions]
            read_once = len(document.token_ids)
        except ControlTokenError as error:
            raise UserError(_as_options(error)) from error
        except ValueError as error:
            raise UserError(f"{loaded.source.name}: {_as_options(error)}") from error
        longest = read_once + _QUESTION if prompts is None else max(prompts)
        needed = longest + wanted.max_new_tokens
        how = model_options.how(
            loaded, wanted.map_options, wanted.trained_window, wanted.sliding_window, wanted.query_scaling
        )
        position_map = _map(wanted, how, kept, needed)
        _check_reach(wanted, kept, position_map, how.trained_window, longest)
        target_length = max(needed, wanted.target_length or 0)
        extension = stack.enter_context(how.extended(loaded, position_map, target_length))
        if wanted.verbose:
            console.print(str(extension), soft_wrap=True)
        _announce(console, loaded, extension, prompts, read_once, wanted)
        unkept = ""
        try:
            if kept is not None:
                reading = Reading.load(kept.path, loaded.model, loaded.tokenizer, wanted.chunk)
                console.print(f"Read already: {read_once:,} tokens, from {str(kept.path)!r}", soft_wrap=True)
            else:
                with progress(console) as on_progress:
                    reading = read_document(loaded.model, document, target_length, wanted.chunk, on_progress)
        except ReadingError as error:
            raise UserError(_as_options(error)) from error
        if wanted.keep is not None and kept is None:
            try:
                reading.save(wanted.keep)
            except ReadingError as error:  # the text is read, and can be asked about all the same
                unkept = str(error)
        yield Asking(loaded, reading, extension, wanted.target_length or needed, load_seconds, unkept)
    if unkept:
        raise UserError(f"the text was read but not kept: {unkept}")


def number(value: int | float) -> str:
    """Of tokens, in words where there is no limit."""
    return "any number of" if value == math.inf else f"{value:,}"


def _look_at(keep: Path | None) -> Kept | None:
    """The file of `--keep`, if it is there; that there is a place for it if it is not."""
    if keep is None:
        return None
    from ropewalk.integrations.transformers.kept import Kept, ReadingError, check_place

    try:
        if keep.exists():
            return Kept.open(keep)
        check_place(keep, 1)
    except ReadingError as error:
        raise UserError(f"--keep: {error}") from error
    except OSError as error:
        raise UserError(f"--keep: cannot look at {str(keep)!r}: {error.strerror or error}") from error
    return None


def _check_kept(wanted: Wanted, kept: Kept, text: str) -> None:
    """Refuses a kept text that is not the one asked for, before a model is loaded."""
    try:
        chat = kept.facts["frame"][2]
        allowed = kept.facts["allow_control_tokens"]
        if text != kept.text:
            how = "holds another text than --file"
        elif wanted.chat is not None and wanted.chat != chat:
            how = f"was read {'with' if chat else 'without'} the chat template"
        elif wanted.allow_control_tokens != allowed:
            how = f"was read {'with' if allowed else 'without'} --allow-control-tokens"
        elif kept.facts["extension"] is None:
            how = "was read by a model that was not extended"
        elif (name := from_dict(kept.facts["extension"]["map"]).name) != (wanted.map_options.kind or name):
            how = f"was read with --map {name}"
        else:
            return
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"--keep: {str(kept.path)!r} is a broken kept reading ({error!r})") from error
    raise UserError(f"--keep: {str(kept.path)!r} {how}: name another file, or delete it to read the text anew")


def _map(wanted: Wanted, how: How, kept: Kept | None, needed: int) -> PositionMap:
    """The map that was asked for; where nothing but its name was, the one that a kept text was read with."""
    if kept is None or wanted.map_options.parameters or wanted.target_length is not None:
        return how.choose(wanted.target_length or needed)
    return from_dict(kept.facts["extension"]["map"])


def _check_reach(wanted: Wanted, kept: Kept | None, position_map: PositionMap, window: int, longest: int) -> None:
    needed, reached = longest + wanted.max_new_tokens, position_map.max_length(window)
    if needed <= reached:
        return
    if wanted.target_length:
        advice = f"raise --target-length to {needed}"
    elif kept is not None:
        advice = f"read the text anew, into another file than {str(kept.path)!r}"
    else:
        advice = "choose larger groups, or leave them out"
    raise UserError(
        f"the prompt has {longest} tokens and the answer may have {wanted.max_new_tokens}, {needed} in all, but "
        f"{position_map} reaches {reached} on a trained window of {window} (eq. 4): {advice}"
    )


def _announce(
    console: Console,
    loaded: LoadedModel,
    extension: Extension,
    prompts: list[int] | None,
    read_once: int,
    wanted: Wanted,
) -> None:
    """What will run, and the memory that it takes."""
    longest = read_once + _QUESTION if prompts is None else max(prompts)
    weights, cache = memory(loaded.model, longest + wanted.max_new_tokens)
    answer = f"and an answer of up to {wanted.max_new_tokens:,}"
    if prompts is not None and len(prompts) == 1:
        asked = f"prompt   {longest:,} tokens, {answer}"
    else:
        questions = "questions of your own" if prompts is None else f"{len(prompts)} questions"
        asked = f"text     {read_once:,} tokens, read once; {questions}, {answer} to each"
    name = shown(loaded.source.name)
    lines = [
        f"{name} ({loaded.dtype}, {loaded.device}), trained on {extension.trained_window:,} tokens",
        f"  {asked}",
        f"  map      {extension.position_map}: reaches {number(extension.max_length)} tokens, "
        f"recommended up to {number(extension.recommended_length)}",
        *([f"  preset   {extension.preset}"] if extension.preset is not None else []),
        f"  memory   about {size(weights)} for the weights and {size(cache)} for keys and values",
    ]
    if wanted.keep is not None and not wanted.keep.exists():
        from transformers import DynamicCache

        from ropewalk.integrations.transformers.kept import ReadingError, check_place
        from ropewalk.integrations.transformers.reading import check_keepable

        kept_bytes = memory(loaded.model, read_once)[1]
        try:
            check_keepable(DynamicCache(config=loaded.model.config))
            check_place(wanted.keep, kept_bytes)
        except ReadingError as error:
            raise UserError(f"--keep: {error}") from error
        lines.append(f"  keep     about {size(kept_bytes)} in {str(wanted.keep)!r}")
    for line in lines:
        console.print(line, soft_wrap=True)


def _as_options(error: Exception) -> str:
    """An error of Python's interface, in the words of the command line."""
    said = str(error)
    for python, option in (
        ("or pass chat=False", "or pass --no-chat"),
        ("pass chat=False", "pass --no-chat"),
        ("leave chat out", "leave --chat out"),
        ("or allow control tokens", "or pass --allow-control-tokens"),
    ):
        said = said.replace(python, option)
    return said


def _console() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)
