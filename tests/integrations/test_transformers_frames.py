# SPDX-License-Identifier: Apache-2.0
"""How many of our own frames lie between transformers and a kernel, and how long their functions are.

A person who follows a call from a model to the device reads these functions, and no others.
"""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from tiny import extended, shared, text
from transformers import DynamicCache, StaticCache

import ropewalk
from ropewalk.integrations.transformers.functions import attention_forward

pytest.importorskip("triton.language")

from ropewalk.ops import Rotary, attention
from ropewalk.ops.triton.launch import Launch

SOURCE = Path(ropewalk.__file__).parent
MOST_FRAMES = 4
MOST_LINES = 60

MAPS = {
    "one pass": ropewalk.SelfExtend(3, 8),
    "late start": ropewalk.SelfExtend(3, 8, start=20),
    "narrow bands": ropewalk.SELF(5, 0.3, 6, "distance"),
    "a pass a band": ropewalk.DualChunk(6, 4),
}


@pytest.fixture
def stacks(monkeypatch):
    """Of every launch of a kernel, by its name: our own frames from the attention function on. Nothing is computed."""
    found = []

    def launched(launch, grid):
        def launch_nothing(*arguments):
            frames, frame = [], sys._getframe(1)
            while frame is not None:
                if SOURCE in Path(frame.f_code.co_filename).parents:
                    frames.append(frame.f_code)
                frame = frame.f_back
            first = {attention_forward.__code__, attention.__code__}
            end = next(i for i, code in enumerate(frames) if code in first)
            found.append((launch._kernel.__name__, frames[: end + 1]))

        return launch_nothing

    monkeypatch.setattr(Launch, "__getitem__", launched)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return found


def lines(code):
    """Of a function, all included; but what `attention` tells its users is no part of the way."""
    told = attention.__doc__.count("\n") + 1 if code is attention.__code__ else 0
    return len(inspect.getsourcelines(code)[0]) - told


def check(stacks, kernels):
    assert {name for name, _ in stacks} == kernels
    for kernel, frames in stacks:
        path = " <- ".join([kernel, *(code.co_qualname for code in frames)])
        assert len(frames) <= MOST_FRAMES, path
        assert {code.co_qualname: lines(code) for code in frames if lines(code) > MOST_LINES} == {}


def caches(model):
    return {
        "none": None,
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=64),
    }


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("case", MAPS)
def test_prefill(case, cache, stacks):
    model = shared("llama")
    with extended("llama", MAPS[case], impl="fused"):
        model(text(40), past_key_values=caches(model)[cache])
    narrow = {"_views_kernel", "_narrow_kernel"} if case == "narrow bands" else set()
    check(stacks, {"_rerotate", "_banded"} | narrow)


def test_prefill_of_padded_rows(stacks):
    model, ids = shared("llama"), text(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with extended("llama", impl="fused", query_scaling="log-n", trained_window=64):
        model(ids, attention_mask=mask)
    check(stacks, {"_rerotate", "_banded"})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", MAPS)
def test_decode(case, cache, stacks):
    model, ids = shared("llama"), text(41)
    used = caches(model)[cache]
    with extended("llama", MAPS[case], impl="fused"):
        model(ids[:, :40], past_key_values=used)
        for _ in range(2):  # of which the first makes tables
            stacks.clear()
            model(ids[:, 40:], past_key_values=used)
            check(stacks, {"_partials_kernel", "_merge_kernel"})


def test_the_operator_alone(stacks):
    """`ropewalk.ops.attention` stands where the attention function stood."""
    q, k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    for queries, kernels in ((9, {"_rerotate", "_banded"}), (1, {"_partials_kernel", "_merge_kernel"})):
        stacks.clear()
        attention(q[:, :, :queries], k, v, MAPS["one pass"], Rotary(torch.rand(8)), impl="fused")
        check(stacks, kernels)
