# SPDX-License-Identifier: Apache-2.0
"""A whole model on a GPU, extended beside unmodified: reading a prompt, then writing tokens greedily.

The models have random weights, which changes no time, and the shapes of models in use. The unmodified model runs with
every attention that transformers can be given here; "ratio" is the fastest one's time over the extended model's, for
the same cache and the same part of the work, so a total of at most 1.05 times plain is a ratio of at least 0.952.

Caches are transformers': "dynamic" grows with the text, "static" has its full size from the beginning, and "compiled"
is a static one whose steps torch.compile makes into CUDA graphs.

    python benchmarks/model_gpu.py --output benchmarks/results/model_gpu.jsonl
    python benchmarks/model_gpu.py --shapes llama-8b --caches dynamic --plain sdpa-cudnn --prompt 131072 --new 8
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import rows
import timing
import torch
import typer
from peers import TRUE_POSITIONS
from rich.console import Console
from rows import Kind, Row, Samples
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import ropewalk

TRAINED_WINDOW = 8192
# Short texts lie inside the neighbor window, where an extended model must say what the unmodified one says: as nearly
# as the unmodified one does under another attention, times this. Roundings add up over the layers, and how much
# depends on the shape and the dtype.
_CHECKED_TOKENS, _CHECK_FACTOR = 512, 2.0

_SHARED = {"vocab_size": 4096, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": TRAINED_WINDOW}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
PARTS = ("prefill", "decode", "total")
Step = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """What a model has to do: read `prompt` tokens, `chunk` at a time, then write `new` ones."""

    shape: str
    prompt: int
    new: int
    chunk: int

    @property
    def name(self) -> str:
        chunks = "" if self.chunk >= self.prompt else f"-by-{self.chunk}"
        return f"model-{self.shape}-{self.prompt}{chunks}-and-{self.new}"


@dataclass
class Variant:
    """A way to run the model, and the milliseconds of each part, by round."""

    impl: str
    kind: Kind
    map: str
    enter: Callable[[PreTrainedModel], AbstractContextManager[object]]
    cache: str
    relative_error: float | None = None
    peak_bytes: int | None = None
    error: str = ""
    kept: Cache | None = None
    rounds: dict[str, list[tuple[float, ...]]] = field(default_factory=lambda: {part: [] for part in PARTS})


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = LlamaConfig(
        **_SHARED, **SHAPES[shape], rope_parameters={"rope_type": "default", "rope_theta": 5e5}, dtype=dtype
    )
    # Made where it will be, in its own dtype: float32 weights on the host would take long and fill the memory.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def unmodified(attention: str, *backends: SDPBackend) -> Callable[[PreTrainedModel], AbstractContextManager[object]]:
    """Enters the model with one of transformers' attentions."""

    def enter(model: PreTrainedModel) -> AbstractContextManager[object]:
        stack = ExitStack()
        previous = model.config._attn_implementation
        model.set_attn_implementation(attention)
        stack.callback(model.set_attn_implementation, previous)
        if backends:
            # Math as well, last: transformers may bring a mask that the wanted kernel does not take.
            stack.enter_context(sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True))
        return stack

    return enter


_OTHERS = SDPBackend.EFFICIENT_ATTENTION
# Names of `--plain` that are not transformers' own.
_SDPA = {
    "sdpa-cudnn": unmodified("sdpa", SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, _OTHERS),
    "sdpa-flash": unmodified("sdpa", SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, _OTHERS),
}
_SDPA_TITLES = {"sdpa-cudnn": "sdpa, cuDNN first", "sdpa-flash": "sdpa, FlashAttention first"}


def variants(
    cache: str, position_map: ropewalk.PositionMap, impls: Sequence[str], plain: Sequence[str]
) -> list[Variant]:
    return [
        *(
            Variant(_SDPA_TITLES.get(name, name), "plain", TRUE_POSITIONS, _SDPA.get(name) or unmodified(name), cache)
            for name in plain
        ),
        *(
            Variant(
                impl,
                "ropewalk",
                str(position_map),
                lambda model, i=impl: ropewalk.extend(model, position_map, impl=i),
                cache,
            )
            for impl in impls
        ),
    ]


def empty_cache(one: Variant, model: PreTrainedModel, tokens: int) -> Cache:
    """An empty cache. A compiled step is bound to the memory of its cache: that one is kept and emptied."""
    if one.cache == "dynamic":
        return DynamicCache(config=model.config)
    if one.cache == "static":
        return StaticCache(config=model.config, max_cache_len=tokens)
    if one.kept is None:
        one.kept = StaticCache(config=model.config, max_cache_len=tokens)
    one.kept.reset()
    return one.kept


def run(model: PreTrainedModel, step: Step, prompt: Tensor, work: Work, cache: Cache) -> tuple[float, float]:
    """Seconds to read the prompt and write a token, and to write the others. Nothing waits for the device between."""
    _wait(prompt.device)
    began = time.perf_counter()
    logits: Tensor | None = None
    for begin in range(0, work.prompt, work.chunk):
        part = prompt[:, begin : begin + work.chunk]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert logits is not None
    token = logits[:, -1].argmax(dim=-1, keepdim=True)
    _wait(prompt.device)
    read = time.perf_counter()
    for _ in range(work.new - 1):
        torch.compiler.cudagraph_mark_step_begin()
        logits = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(dim=-1, keepdim=True)
    _wait(prompt.device)
    return read - began, time.perf_counter() - read


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: PreTrainedModel, work: Work, contenders: Sequence[Variant], rounds: int, log: Callable[[str], None]
) -> list[Row]:
    """Rows of one model, one kind of cache and one work."""
    generator = torch.Generator(model.device).manual_seed(0)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (1, work.prompt), generator=generator, device=model.device)
    checked = prompt[:, :_CHECKED_TOKENS]
    expected = model(input_ids=checked, logits_to_keep=1).logits.float()
    with unmodified("eager")(model):
        bound = _CHECK_FACTOR * _error(model(input_ids=checked, logits_to_keep=1).logits, expected)
    compiled = any(one.cache == "compiled" for one in contenders)
    step: Step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if compiled else model
    # The first round warms up and is not counted.
    if compiled:
        # An extended model is compiled anew each time it is extended: all rounds of a contender are one turn.
        turns = [(one, range(rounds + 1)) for one in contenders]
    else:
        turns = [
            (one, range(i, i + 1)) for i in range(rounds + 1) for one in (contenders if i % 2 else contenders[::-1])
        ]
    for one, its_rounds in turns:
        if one.error:
            continue
        try:
            with one.enter(model):
                for i in its_rounds:
                    log(f"{work.name}, {one.cache} cache: {one.impl}, {f'round {i}' if i else 'warm-up'}")
                    if i == 0:
                        one.relative_error = _error(model(input_ids=checked, logits_to_keep=1).logits, expected)
                        _check(one.relative_error, bound)
                    seconds = _one_run(model, step, prompt, work, one, measure_memory=i == 0)
                    timing.free_memory(model.device)
                    if i:
                        for part, value in zip(PARTS, (*seconds, sum(seconds)), strict=True):
                            one.rounds[part].append((1e3 * value,))
        except Exception as error:
            one.error = timing.described(error)
            timing.check_alive(model.device)
        finally:
            if compiled:
                one.kept = None
            timing.free_memory(model.device)
    return [row for part in PARTS for row in _rows(model, work, contenders, part)]


def _one_run(
    model: PreTrainedModel, step: Step, prompt: Tensor, work: Work, one: Variant, measure_memory: bool
) -> tuple[float, float]:
    before = timing.allocated(model.device)
    if measure_memory and model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = run(model, step, prompt, work, empty_cache(one, model, work.prompt + work.new))
    if measure_memory and model.device.type == "cuda":
        one.peak_bytes = torch.cuda.max_memory_allocated(model.device) - before
    return seconds


def _error(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float() - expected).norm() / expected.norm())


def _check(error: float, bound: float) -> None:
    if not error <= bound:  # also NaN
        raise RuntimeError(
            f"a short text's logits differ from the unmodified model's by {error:.2g}, where the unmodified "
            f"one's under two attentions differ by {bound / _CHECK_FACTOR:.2g}"
        )


def _rows(model: PreTrainedModel, work: Work, contenders: Sequence[Variant], part: str) -> list[Row]:
    timed, failed = [], []
    for one in contenders:
        row = Row(
            case=f"{work.name}, {part}",
            work=f"model {part}",
            batch=1,
            heads=model.config.num_attention_heads,
            key_heads=model.config.num_key_value_heads,
            head_dim=model.config.head_dim,
            queries=min(work.chunk, work.prompt) if part != "decode" else 1,
            keys=work.prompt + (0 if part == "prefill" else work.new),
            dtype=str(model.dtype).removeprefix("torch."),
            map=one.map,
            impl=one.impl,
            kind=one.kind,
            ships_with_torch=one.impl.startswith("sdpa"),
            timing=f"{one.cache} cache",
            peak_bytes=one.peak_bytes,
            relative_error=one.relative_error,
            error=one.error,
        )
        if one.error or not one.rounds[part]:
            failed.append(replace(row, peak_bytes=None, relative_error=None))
            continue
        samples = Samples(tuple(one.rounds[part]))
        timed.append((rows.with_times(row, samples, 0.0, ""), samples))
    return rows.with_ratios(timed) + failed


def main(
    shapes: Annotated[str, typer.Option(help="Models, comma-separated.")] = "smollm2-135m,llama-8b",
    prompt: Annotated[int, typer.Option(min=1)] = 32768,
    new: Annotated[int, typer.Option(min=2, help="Tokens to write.")] = 128,
    chunks: Annotated[str, typer.Option(help="Tokens read at a time, comma-separated; 0 for all at once.")] = "0",
    caches: Annotated[str, typer.Option(help="Of dynamic, static, compiled.")] = "dynamic,compiled",
    impl: Annotated[str, typer.Option(help="Our implementations, comma-separated.")] = "auto",
    plain: Annotated[
        str, typer.Option(help="transformers' attentions to compare with; sdpa-cudnn is sdpa with that kernel first.")
    ] = "sdpa,sdpa-cudnn,sdpa-flash,flash_attention_2,flash_attention_4",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    device: Annotated[str, typer.Option()] = "cuda",
    output: Annotated[Path | None, typer.Option(help="Rows are added to this file, as JSON lines.")] = None,
    commit: Annotated[str, typer.Option(help="Of the rows; else ROPEWALK_COMMIT, else the checkout's.")] = "",
) -> None:
    """Times a whole model, extended and unmodified."""
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device; --device cpu --shapes tiny --prompt 600 tries the command out")
    facts = rows.facts(place, commit)
    position_map = ropewalk.SelfExtend.for_length(prompt + new, TRAINED_WINDOW)
    measured: list[Row] = []
    # What transformers has to say about each attention would bury the progress.
    warnings.simplefilter("ignore")
    try:
        for shape in _listed(shapes):
            with torch.inference_mode():
                model = random_model(shape, place, getattr(torch, dtype))
                for chunk in map(int, _listed(chunks)):
                    for cache in _listed(caches):
                        work = Work(shape, prompt, new, min(chunk or prompt, prompt))
                        contenders = variants(cache, position_map, _listed(impl), _listed(plain))
                        found = measure(model, work, contenders, rounds, _log)
                        found = [replace(row, facts=facts) for row in found]
                        rows.append(found, output)
                        measured += found
                        for row in found:
                            _log("  " + rows.line(row))
                del model
            timing.free_memory(place)
    except timing.DeadDeviceError as error:
        _log(f"the device failed, and nothing after this can be measured: {error}")
        raise typer.Exit(1) from error
    finally:
        Console(width=220).print(rows.table(measured, f"{facts.device}, torch {facts.torch}, {facts.commit}"))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
