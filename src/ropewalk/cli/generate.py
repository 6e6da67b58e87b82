# SPDX-License-Identifier: Apache-2.0
"""`ropewalk generate`: answers to prompts about a text that may be far longer than the model's training window."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropewalk.cli import asking
from ropewalk.cli.asking import Asking
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
from ropewalk.cli.map_options import MapOptions, with_map_options
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
from ropewalk.integrations.transformers.memory import memory, peak_memory
from ropewalk.integrations.transformers.versions import versions

if TYPE_CHECKING:
    from ropewalk.integrations.transformers.generation import Answer


@with_map_options()
def command(
    map_options: MapOptions,
    model: ModelOption = None,
    file: FileOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to ask; goes after the text. May be given several times: each is asked of the text alone."
        ),
    ] = None,
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
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer prompts about a long text. The text is read once, chunk by chunk, the answers are printed as they come."""
    prompts = prompt or [""]
    wanted = Wanted(
        map_options, model, file, encoding, keep, allow_control_tokens, target_length, max_new_tokens, chunk,
        temperature, chat, dtype, device, trained_window, sliding_window, query_scaling, trust_remote_code, verbose,
    )  # fmt: skip
    wanted.check()
    with asking.read(wanted, prompts) as text:
        answers = []
        for number, question in enumerate(prompts):
            if len(prompts) > 1 and not as_json:
                print(*([""] if number else []), f"> {' '.join(question.split())}", sep="\n", flush=True)
            answers.append(text.ask(wanted, question, stream=not as_json))
        if as_json:
            print(json.dumps(_report(text, prompts, answers, max_new_tokens), indent=2))


def _report(text: Asking, prompts: list[str], answers: list[Answer], max_new_tokens: int) -> dict[str, Any]:
    extension, loaded = text.extension, text.loaded
    longest = max(answer.prompt_tokens for answer in answers)
    weights, cache = memory(loaded.model, longest + max_new_tokens)
    return {
        "model": loaded.source.name,
        "tokens_read_once": text.reading.tokens,
        "answers": [
            {
                "prompt": prompt,
                "answer": answer.text,
                "prompt_tokens": answer.prompt_tokens,
                "new_tokens": len(answer.token_ids),
                "seconds": {"prefill": round(answer.prefill_seconds, 3), "decode": round(answer.decode_seconds, 3)},
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
        "target_length": text.target_length,
        "map": extension.position_map.to_dict(),
        "preset": None if extension.preset is None else str(extension.preset),
        "trained_window": extension.trained_window,
        "max_length": _json_number(extension.max_length),
        "recommended_length": _json_number(extension.recommended_length),
        "layers_extended": sum(layer.extended for layer in extension.layers),
        "layers": len(extension.layers),
        "query_scaling": extension.query_scaling.kind if extension.query_scaling else None,
        "implementation": extension.impl,
        "seconds": {"load": round(text.load_seconds, 3), "read": round(text.reading.seconds, 3)},
        "memory_bytes": {"weights": weights, "cache": cache, "peak": peak_memory(loaded.model.device)},
        "device": loaded.device,
        "dtype": loaded.dtype,
        "versions": versions(),
    }


def _json_number(value: int | float) -> int | float | None:
    """JSON has no infinity: null stands for no limit."""
    return None if value == math.inf else value
