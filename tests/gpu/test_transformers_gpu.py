# SPDX-License-Identifier: Apache-2.0
"""Generation of an extended model on a CUDA device."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

import ropewalk
from ropewalk.testing import tiny_model

pytestmark = [
    # float32 is compared exactly, so TensorFloat32 stays off, and the compiler says what that costs.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    # What torch does to start its pool of graphs.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu on one"),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    return tiny_model("llama").to("cuda", request.param)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_cpu(model, cache):
    """The default static cache compiles its decoding step on a GPU."""
    ids = torch.arange(3, 90)[None] % model.config.vocab_size
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 8)):
        tokens = model.generate(ids.cuda(), **options)[0, ids.shape[1] :].cpu()
    if model.dtype == torch.float32:
        on_cpu = tiny_model("llama")
        with ropewalk.extend(on_cpu, ropewalk.SelfExtend(4, 8)):
            expected = on_cpu.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert tokens.tolist() == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_decoding_in_a_cuda_graph(model, masked):
    """torch.compile captures a step of a static cache; every later step replays it."""
    ids = torch.randint(3, 90, (2, 60), device="cuda")
    mask = torch.ones(2, 80, dtype=torch.long, device="cuda")
    if masked:
        mask[0, :25] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def step(forward, cache, i):
        arguments = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]} if masked else {}
        torch.compiler.cudagraph_mark_step_begin()
        return forward(ids[:, i : i + 1], past_key_values=cache, **arguments).logits.clone()

    def steps(model, forward):
        cache = StaticCache(config=model.config, max_cache_len=80)
        arguments = {"attention_mask": mask[:, :40], "position_ids": positions[:, :40]} if masked else {}
        model(ids[:, :40], past_key_values=cache, **arguments)
        return torch.cat([step(forward, cache, i) for i in range(40, 60)], dim=1).float()

    precise = copy.deepcopy(model).float()
    with torch.inference_mode():
        with ropewalk.extend(precise, ropewalk.SelfExtend(4, 8)):
            truth = steps(precise, precise.forward)
        with ropewalk.extend(model, ropewalk.SelfExtend(4, 8)):
            eager, captured = steps(model, model.forward), steps(model, compiled)
    # The compiler rounds in other places, so two results in bfloat16 differ by as much as each differs from the truth.
    assert (captured - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-4


@pytest.mark.parametrize("how", ["generate", "compiled"])
def test_rows_with_gaps_are_an_error_on_the_host(how):
    """A failed assertion of the device would leave this process without CUDA. A dynamic cache serves such rows."""
    model = tiny_model("llama").cuda()
    ids = torch.randint(3, 90, (1, 60), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 10:14] = mask[0, 30] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 8)), torch.inference_mode():
        expected = model.generate(ids, **options)
        if how == "generate":
            with pytest.raises(ValueError, match=r"attention_mask has gaps.* use a dynamic cache"):
                model.generate(ids, cache_implementation="static", **options)
        else:
            cache = DynamicCache(config=model.config)
            model(ids[:, :59], attention_mask=mask[:, :59], position_ids=positions[:, :59], past_key_values=cache)
            step = {"attention_mask": mask, "position_ids": positions[:, 59:], "past_key_values": cache}
            compiled = torch.compile(model.forward, mode="reduce-overhead")
            with pytest.raises(ValueError, match="padded on the left only, and key_mask has gaps"):
                compiled(ids[:, 59:], **step)
        torch.cuda.synchronize()
        assert torch.equal(model.generate(ids, **options), expected)


def test_moving_a_model_keeps_it_extended():
    """Frequencies are the same on another device; a cast changes them."""
    model, ids = tiny_model("llama"), torch.randint(3, 90, (1, 60))
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 8)) as extension, torch.inference_mode():
        expected = model(ids).logits
        model.cuda()
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, rtol=0, atol=1e-3)
        assert extension.active
        model.bfloat16()
        with pytest.raises(RuntimeError, match=r"cast to torch\.bfloat16"):
            model(ids.cuda())


def test_left_padded_batch_equals_its_rows_alone():
    model = tiny_model("llama").cuda()
    ids = torch.randint(3, 90, (2, 60), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 8)), torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        both = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(ids[:1, 25:]).logits
    torch.testing.assert_close(both[:1, 25:], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("position_map", [ropewalk.SelfExtend(4, 8), ropewalk.SELF(9, 0.3, 6, "distance")], ids=str)
def test_threads_share_a_model(model, position_map):
    """Each thread reads and decodes on a stream of its own; tables of a length that is new to all are made once."""
    texts = [torch.randint(3, 90, (1, 40 + 37 * i), device="cuda") for i in range(8)]

    def read(ids):
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            cache = DynamicCache(config=model.config)
            model(ids[:, :-2], past_key_values=cache)
            parts = [
                model(ids[:, -2:-1], past_key_values=cache).logits,
                model(ids[:, -1:], past_key_values=cache).logits,
            ]
            torch.cuda.current_stream().synchronize()
            return torch.cat(parts, dim=1)

    with ropewalk.extend(model, position_map, trained_window=2048), ThreadPoolExecutor(8) as pool:
        torch.cuda.synchronize()
        together = list(pool.map(read, texts * 12))
    with ropewalk.extend(model, position_map, trained_window=2048):
        alone = [read(ids) for ids in texts]
    for found, expected in zip(together, alone * 12, strict=True):
        assert torch.equal(found, expected)
