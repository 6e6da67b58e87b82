# SPDX-License-Identifier: Apache-2.0
"""One model of each kind of positions and attention, on a GPU: what it computes in float64 on the CPU, which
tests/testing/test_matrix.py compares with rows of the unmodified model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, PreTrainedModel

import ropewalk
from ropewalk.testing.by_rows import output_of
from ropewalk.testing.matrix import MAPS, TOKENS, WINDOW, around
from ropewalk.testing.zoo import ZOO

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:TensorFloat32 tensor cores", "ignore:a text of .* tokens uses relative positions"
    ),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu on one"),
]

FUSED = {
    "llama": "half-split, grouped queries",
    "cohere": "interleaved",
    "phi": "a part of each head",
    "gpt_neox": "a part of each head, in parallel with the feed-forward layer",
    "llama, yarn": "frequencies and a scale",
    "llama, one key head": "one key for all queries",
    "qwen3_moe": "normed queries and keys, experts",
    "deepseek_v3": "latent attention",
    "diffllama": "two attentions a module",
    "gemma2, a low softcap": "softcap, a window in every second layer",
    "gpt_oss": "sinks, a window in every second layer",
    "gemma3_text": "frequencies of their own in layers with a window",
    "smollm3, some turn": "layers without positions",
    "lfm2": "convolutions between",
    "llama4_text": "chunks in most layers",
    "ministral3": "a factor on queries that grows",
    "nanochat": "turned by minus the angle",
    "phi3, longrope": "frequencies that follow the length",
    "internlm3, dynamic": "the same by the base",
    "qwen2_vl": "positions with three axes, on text",
    "mllama": "layers that look at images alone",
    "falcon": "an adapter",
    "gptj": "an adapter, a part of each head",
    "mpt": "ALiBi",
    "bloom": "ALiBi, an adapter",
    "falcon, ALiBi": "ALiBi as Falcon has it",
}
# What the kernels leave to others, or are given only if asked for.
ANYHOW = {
    "gemma4_text": ("heads of 512 dimensions", "keep"),
    "qwen2_vl, an image": ("positions with three axes", "keep"),
    "mistral, sliding": ("windows in all layers, which are turned off", "disable"),
}


def text(name: str) -> dict[str, torch.Tensor]:
    """Token ids, and of a model whose positions have axes, those of a text with a picture in it."""
    ids = torch.randint(1, 80, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    grid = ZOO[name].grid
    return {"input_ids": ids} | ({} if grid is None else {"position_ids": around(grid)[:, None]})


def read(model: PreTrainedModel, given: dict[str, torch.Tensor], parts: tuple[int, ...]) -> torch.Tensor:
    """Logits of a text that is read in parts, into a cache."""
    cache, outputs, begin = DynamicCache(config=model.config), [], 0
    for size in parts:
        part = {name: tensor[..., begin : begin + size] for name, tensor in given.items()}
        result = model(**part, past_key_values=cache, use_cache=True)
        outputs.append(output_of(result))
        cache, begin = getattr(result, "past_key_values", cache), begin + size
    return torch.cat(outputs, dim=1).double().cpu()


def check(name: str, position_map: ropewalk.PositionMap, impl: str, window: str = "keep") -> None:
    if name not in ZOO:
        pytest.skip("this release of transformers has no such model")
    given, device = text(name), torch.device("cuda")
    with torch.no_grad():
        model = ZOO[name].tiny.build(WINDOW, dtype=torch.float64)
        with ropewalk.extend(model, position_map, trained_window=WINDOW, sliding_window=window):
            truth = read(model, given, (TOKENS,))
        model = ZOO[name].tiny.build(WINDOW).to(device)
        given = {name: tensor.to(device) for name, tensor in given.items()}
        with ropewalk.extend(model, position_map, trained_window=WINDOW, sliding_window=window, impl=impl):
            for parts in ((TOKENS,), (90, 20, *10 * (1,))):
                error = (read(model, given, parts) - truth).abs().max() / truth.std()
                # Rounding in float32, which two layers of sharp attention make larger; a key at a wrong position costs
                # a tenth and more.
                assert error < 3e-3, (parts, float(error))


@pytest.mark.parametrize("position_map", MAPS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("name", FUSED)
def test_through_the_kernels(name, position_map):
    check(name, position_map, "fused")


@pytest.mark.parametrize(("name", "window"), [(name, window) for name, (_, window) in ANYHOW.items()])
def test_whichever_takes_it(name, window):
    check(name, MAPS[0], "auto", window)
