# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` of an extended model's forward."""

import shutil

import pytest
import setuptools  # noqa: F401  # inductor does, which fails where another test had the standard library's distutils first
import torch
from tiny import CLOSE, MAP, logits, options, text
from torch.testing import assert_close
from transformers import CompileConfig, DynamicCache, StaticCache

import ropewalk
from ropewalk.testing import TINY_MODELS, tiny_model

BACKENDS = [
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param(
        "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    ),
]
SOME_MODELS = ["llama", "gemma3", "gpt-neox"]

# torch and transformers warn about themselves while they trace.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_full_graph(name):
    model, ids = tiny_model(name), text(50)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=type(model)._can_compile_fullgraph)
    with ropewalk.extend(model, MAP, **options(name)):
        expected = logits(model, ids)
        assert_close(compiled(ids, use_cache=False).logits, expected, **CLOSE)
        mask = torch.ones(1, 60, dtype=torch.long)
        mask[:, :10] = 0
        padded = torch.nn.functional.pad(ids, (10, 0))
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        actual = compiled(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert_close(actual[:, 10:], expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_decode(kind, backend):
    model, ids = tiny_model("gemma3"), text(40)
    compiled = torch.compile(model.forward, backend=backend)
    with ropewalk.extend(model, MAP):
        expected = logits(model, ids)
        cache = kind(config=model.config, **({"max_cache_len": 48} if kind is StaticCache else {}))
        parts = [logits(model, ids[:, :30], past_key_values=cache)]
        parts += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("name", [*SOME_MODELS, "mistral-sliding", "gemma2"])
def test_generate_compiles_the_forward_itself(name):
    model, ids = tiny_model(name), text(40)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with ropewalk.extend(model, MAP, **options(name)):
        expected = model.generate(ids, **arguments)
        actual = model.generate(ids, cache_implementation="static", compile_config=config, **arguments)
        assert torch.equal(actual, expected)


def test_decoding_with_a_static_cache_compiles_once():
    model, ids = tiny_model("llama"), text(40)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    with ropewalk.extend(model, MAP):
        cache = StaticCache(config=model.config, max_cache_len=48)
        model(ids[:, :30], past_key_values=cache)
        for i in range(30, 40):
            compiled(ids[:, i : i + 1], past_key_values=cache)
    assert len(graphs) == 1


def test_a_compiled_model_follows_extend_and_restore():
    model, ids = tiny_model("llama"), text(50)
    compiled = torch.compile(model.forward, backend="eager")
    unmodified = compiled(ids).logits
    for position_map in (MAP, ropewalk.ReRoPE(8)):
        with ropewalk.extend(model, position_map):
            expected = logits(model, ids)
            assert_close(compiled(ids).logits, expected, **CLOSE)
            assert (expected - unmodified).abs().max() > 0.5
        assert_close(compiled(ids).logits, unmodified, **CLOSE)


def test_limits_hold_in_a_compiled_model():
    model = tiny_model("llama")
    compiled = torch.compile(model.forward, backend="aot_eager")
    with ropewalk.extend(model, ropewalk.SelfExtend(2, 8)):
        cache = StaticCache(config=model.config, max_cache_len=200)  # longer than the map reaches, but not in use
        model(text(40), past_key_values=cache)
        with pytest.warns(UserWarning, match="a text of 60 tokens"):
            compiled(text(20), past_key_values=cache)
        with pytest.raises(ropewalk.LengthError, match="a text of 150 tokens"):
            compiled(text(90), past_key_values=cache)
        packed = torch.cat((torch.arange(12), torch.arange(8)))[None]
        with pytest.raises(ValueError, match="packed sequences"):
            compiled(text(20), position_ids=packed)
