"""`ropewalk generate`: an answer to a prompt that may be far longer than the model's training window."""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ropewalk.cli import model_options
from ropewalk.cli.errors import UserError
from ropewalk.cli.map_options import MapOptions, check_tokens, with_map_options
from ropewalk.cli.model_options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QueryScalingOption,
    SlidingWindowOption,
    TrainedWindowOption,
    TrustRemoteCodeOption,
    VerboseOption,
)
from ropewalk.cli.progress import reading, size
from ropewalk.integrations.transformers.memory import memory, peak_memory
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.versions import versions

if TYPE_CHECKING:
    from ropewalk import Extension
    from ropewalk.integrations.transformers.generation import Answer

# Any length and window for which every map exists: a mistyped map is found before the model is loaded.
_ANY_LENGTH, _ANY_WINDOW = 1, 8192


@dataclass(frozen=True)
class _Job:
    """What one run does."""

    loaded: LoadedModel
    load_seconds: float
    token_ids: list[int]
    extension: Extension
    target_length: int


@with_map_options()
def command(
    map_options: MapOptions,
    model: ModelOption = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", help="Text to read before the prompt; - is standard input. May be given several times."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask; goes after the text of the files.")] = "",
    target_length: Annotated[
        int | None,
        typer.Option(help="Tokens that the model should reach. \\[default: the prompt's and the answer's]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    chunk: Annotated[int, typer.Option(help="Tokens read in one pass: fewer need less memory.")] = 2048,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 always takes the likeliest token.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Apply the model's chat template. \\[default: if it has one]", show_default=False
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    trained_window: TrainedWindowOption = None,
    sliding_window: SlidingWindowOption = "keep",
    query_scaling: QueryScalingOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer a prompt about a long text. The text is read chunk by chunk, the answer printed as it comes."""
    model_options.check(dtype, device, sliding_window, query_scaling)
    check_tokens("--max-new-tokens", max_new_tokens)
    check_tokens("--chunk", chunk)
    for option, value in (("--target-length", target_length), ("--trained-window", trained_window)):
        if value is not None:
            check_tokens(option, value)
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be 0 or more, got {temperature}")
    map_options.choose(_ANY_LENGTH, _ANY_WINDOW)
    text = "\n\n".join(part for part in (*read_files(file or []), prompt) if part.strip())
    if not text:
        raise UserError("there is nothing to read: pass --file, --prompt or both")
    source = model_options.find_model(model)

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with model_options.running(verbose), ExitStack() as stack:
        began = perf_counter()
        loaded = model_options.load_model(source, dtype, device, trust_remote_code, verbose)
        load_seconds = perf_counter() - began
        token_ids = tokens(loaded, text, chat)
        window = model_options.window_of(loaded, trained_window)
        needed = len(token_ids) + max_new_tokens
        position_map = map_options.choose(target_length or needed, window)
        reached = position_map.max_length(window)
        if needed > reached:
            raise UserError(
                f"the prompt has {len(token_ids)} tokens and the answer may have {max_new_tokens}, {needed} in all, "
                f"but {position_map} reaches {reached} on a trained window of {window} (eq. 4): "
                + (f"raise --target-length to {needed}" if target_length else "choose larger groups, or leave them out")
            )
        extension = stack.enter_context(
            model_options.extended(
                loaded, position_map, max(needed, target_length or 0), window, sliding_window, query_scaling
            )
        )
        job = _Job(loaded, load_seconds, token_ids, extension, target_length or needed)
        if verbose:
            console.print(str(extension), soft_wrap=True)
        _announce(console, job, max_new_tokens)
        answer = _answer(console, job, max_new_tokens, chunk, temperature, stream=not as_json)
        if as_json:
            print(json.dumps(_report(job, answer, max_new_tokens), indent=2))


def read_files(names: list[str]) -> list[str]:
    """The texts of files in UTF-8; `-` is standard input.

    Raises:
        UserError: one is missing, empty, or no text.
    """
    if names.count("-") > 1:
        raise UserError("--file - reads standard input, which can be read only once")
    return [_read(name) for name in names]


def tokens(loaded: LoadedModel, text: str, chat: bool | None) -> list[int]:
    """A text as the model takes it, under its chat template if it has one or `chat` is True.

    Raises:
        UserError: `chat` is True and there is no template.
    """
    tokenizer = loaded.tokenizer
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UserError(f"{loaded.source.name} has no chat template: leave --chat out")
    if chat is False or not has_template:
        return list(tokenizer(text)["input_ids"])
    turn = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _read(name: str) -> str:
    shown = "standard input" if name == "-" else f"the file {name!r}"
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    except FileNotFoundError:
        raise UserError(f"{shown} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{name!r} is a folder: --file takes a text file") from None
    except OSError as error:
        raise UserError(f"cannot read {shown}: {error.strerror or error}") from error
    if b"\0" in data:
        raise UserError(f"{shown} is binary (it holds NUL bytes): --file takes a text file in UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown} is not UTF-8 text (byte {error.start} does not fit): convert it first") from None
    if not text.strip():
        raise UserError(f"{shown} is empty")
    return text


def _announce(console: Console, job: _Job, max_new_tokens: int) -> None:
    """What will run, and the memory that it takes."""
    extension, loaded = job.extension, job.loaded
    weights, cache = memory(loaded.model, len(job.token_ids) + max_new_tokens)
    recommended = _number(extension.recommended_length)
    for line in (
        f"{loaded.source.name} ({loaded.dtype}, {loaded.device}), trained on {extension.trained_window:,} tokens",
        f"  prompt   {len(job.token_ids):,} tokens, and an answer of up to {max_new_tokens:,}",
        f"  map      {extension.position_map}: reaches {_number(extension.max_length)} tokens, "
        f"recommended up to {recommended}",
        f"  memory   about {size(weights)} for the weights and {size(cache)} for keys and values",
    ):
        console.print(line, soft_wrap=True)


def _answer(console: Console, job: _Job, max_new_tokens: int, chunk: int, temperature: float, stream: bool) -> Answer:
    from ropewalk.integrations.transformers.generation import generate

    def show(piece: str) -> None:
        bar.close()
        print(piece, end="", flush=True)

    with ExitStack() as bar:
        answer = generate(
            job.loaded.model,
            job.loaded.tokenizer,
            job.token_ids,
            max_new_tokens=max_new_tokens,
            chunk=chunk,
            temperature=temperature,
            on_progress=bar.enter_context(reading(console)),
            on_text=show if stream else None,
        )
    if stream:
        print()
    return answer


def _report(job: _Job, answer: Answer, max_new_tokens: int) -> dict[str, Any]:
    extension = job.extension
    weights, cache = memory(job.loaded.model, len(job.token_ids) + max_new_tokens)
    return {
        "model": job.loaded.source.name,
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "target_length": job.target_length,
        "map": extension.position_map.to_dict(),
        "trained_window": extension.trained_window,
        "max_length": _json_number(extension.max_length),
        "recommended_length": _json_number(extension.recommended_length),
        "layers_extended": sum(layer.extended for layer in extension.layers),
        "layers": len(extension.layers),
        "query_scaling": extension.query_scaling.kind if extension.query_scaling else None,
        "implementation": extension.impl,
        "seconds": {
            "load": round(job.load_seconds, 3),
            "prefill": round(answer.prefill_seconds, 3),
            "decode": round(answer.decode_seconds, 3),
        },
        "memory_bytes": {"weights": weights, "cache": cache, "peak": peak_memory(job.loaded.model.device)},
        "device": job.loaded.device,
        "dtype": job.loaded.dtype,
        "versions": versions(),
    }


def _number(value: int | float) -> str:
    return "any number of" if value == math.inf else f"{value:,}"


def _json_number(value: int | float) -> int | float | None:
    """JSON has no infinity: null stands for no limit."""
    return None if value == math.inf else value
