# SPDX-License-Identifier: Apache-2.0
"""A decode step of a whole model on a CPU, extended beside unmodified, under each cache, and beside llama.cpp.

They take turns of some steps, the first not counted, so that a machine that other work slows down slows all of them.
The keys and values of the text are random: what they are changes no time. llama.cpp (the package llama-cpp-python), if
it is installed and the model is a GGUF file, reads as many random tokens first, which takes minutes. "core ms" is the
time that all threads computed; it does not count what other programs took.

    python benchmarks/model_cpu.py --model smollm2.gguf --output benchmarks/results/model_cpu.jsonl
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rows import commit, processor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

import ropewalk
from ropewalk.integrations.transformers.far_keys import new_cache
from ropewalk.integrations.transformers.roomy import roomy_cache

# Of a turn: the first brings into the processor's cache what others drove out.
_STEPS = 5
Step = Callable[[], object]


def filled(cache: DynamicCache, model: PreTrainedModel, tokens: int) -> DynamicCache:
    """A cache of so many tokens, whose keys and values are random."""
    config = model.config.get_text_config()
    shape = 1, config.num_key_value_heads, tokens, getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, generator=generator).to(model.dtype) for _ in "kv"), layer)
    return cache


def step_of(model: PreTrainedModel, cache: DynamicCache) -> Step:
    token = torch.ones(1, 1, dtype=torch.long)
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True)


def llama_cpp(model: Path, tokens: int, longest: int, threads: int) -> Step:
    """Of llama.cpp, which has read as many tokens, and whose cache is float16."""
    from llama_cpp import Llama

    llama = Llama(str(model), n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False)
    llama.eval([1 + i % 1000 for i in range(tokens)])
    return lambda: llama.eval([1])


def main(
    model: Annotated[Path, typer.Option(help="A GGUF file, or a folder of a model.")],
    tokens: Annotated[int, typer.Option(help="Of the text before the step.")] = 12_000,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rounds: int = 8,
    output: Annotated[Path | None, typer.Option(help="JSON lines, to which the rows are added.")] = None,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, file = (model.parent, model.name) if model.is_file() else (model, None)

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype)).eval()

    plain, extended = load(), load()
    longest = tokens + rounds * _STEPS
    handle = ropewalk.extend(extended, target_length=longest)
    steps: dict[str, Step] = {
        "unmodified, transformers' cache": step_of(plain, filled(DynamicCache(config=plain.config), plain, tokens)),
        "unmodified, cache with room": step_of(plain, filled(roomy_cache(plain), plain, tokens)),
        f"{handle.position_map}, transformers' cache": step_of(
            extended, filled(DynamicCache(config=extended.config), extended, tokens)
        ),
        f"{handle.position_map}, as `generate` has it": step_of(
            extended, filled(new_cache(extended), extended, tokens)
        ),
    }
    if file and importlib.util.find_spec("llama_cpp"):
        steps["llama.cpp"] = llama_cpp(model, tokens, longest, torch.get_num_threads())
    wall: dict[str, list[float]] = {name: [] for name in steps}
    core: dict[str, list[float]] = {name: [] for name in steps}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, step in steps.items():
                step()
                for _ in range(_STEPS - 1):
                    began, computed = time.perf_counter(), time.process_time()
                    step()
                    wall[name].append(1e3 * (time.perf_counter() - began))
                    core[name].append(1e3 * (time.process_time() - computed))
    facts = {
        "model": model.name, "tokens": tokens, "dtype": dtype, "rounds": rounds, "device": processor(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": version("transformers"),
        "llama_cpp": version("llama-cpp-python") if "llama.cpp" in steps else "", "ropewalk": ropewalk.__version__,
        "commit": commit(), "command": " ".join(["python", *(Path(word).name for word in sys.argv)]),
    }  # fmt: skip
    table = Table(
        "step", "ms p50", "p20-p80", "core ms p50", "to the first", title=f"{model.name}, {tokens} tokens, {dtype}"
    )
    first = next(iter(steps))
    for name, its in wall.items():
        spread = quantiles(its, n=5)
        ratio = median(one / other for one, other in zip(its, wall[first], strict=True))
        row = {"step": name, "ms_p20": spread[0], "ms_p50": median(its), "ms_p80": spread[-1],
               "core_ms_p50": median(core[name]), "ratio": ratio}  # fmt: skip
        table.add_row(
            name, f"{median(its):.1f}", f"{spread[0]:.1f}-{spread[-1]:.1f}", f"{median(core[name]):.1f}", f"{ratio:.2f}"
        )
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as rows:
                rows.write(f"{json.dumps(row | facts)}\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
