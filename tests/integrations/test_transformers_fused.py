# SPDX-License-Identifier: Apache-2.0
"""impl="fused" in an extended model. The kernels have tests of their own; here the specification stands in for them."""

from dataclasses import replace

import pytest
import torch
from test_transformers_padding import counted, left_padded, rows
from tiny import CLOSE, MAP, extended, logits, shared, text
from torch import Tensor
from torch.testing import assert_close
from transformers import CompileConfig, DynamicCache, StaticCache

import ropewalk
from ropewalk.integrations.transformers import compiled as operators
from ropewalk.integrations.transformers.functions import layout_mask
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import fused, reference
from ropewalk.testing import tiny_model

MODELS = ["llama", "gemma2", "gemma3", "gpt-neox", "gpt-oss"]
over_models = pytest.mark.parametrize("name", MODELS)

# torch and transformers warn about themselves while they trace.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:a text of .* uses relative positions past half"
)


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Stands in for the kernels; a list of the steps that were taken."""
    taken = []

    def attend_step(call, step):
        # As kernels read them.
        assert call.query.stride(-1) == call.key.stride(-1) == call.value.stride(-1) == 1
        assert call.sinks is None or call.sinks.stride(0) == 1
        taken.append(step)
        output = torch.zeros_like(call.query)
        for row in range(len(output)):
            one = slice(row, row + 1)
            first = 0 if step.first_slots is None else step.first_slots.tolist()[row]
            end = call.key.shape[2] if step.lengths is None else step.lengths.tolist()[row]
            if first < end:
                key, value = call.key[one, :, first:end], call.value[one, :, first:end]
                [(_, part)] = replace(call, query=call.query[one], key=key, value=value, layout=None).parts()
                output[one] = reference.attend(part)
        return output

    monkeypatch.setattr(fused, "attend", reference.attend)
    monkeypatch.setattr(fused, "attend_step", attend_step)
    monkeypatch.setattr(fused, "_NO_KERNELS", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch._dynamo.reset()
    yield taken
    torch._dynamo.reset()


def caches(model, tokens):
    return DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=tokens)


@over_models
def test_decode(name, steps):
    model, ids = shared(name), text(45)
    with extended(name):
        expected = logits(model, ids)
    with extended(name, impl="fused"):
        for cache in caches(model, 60):
            parts = [logits(model, ids[:, :30], past_key_values=cache)]
            parts += [logits(model, ids[:, i : i + 1], past_key_values=cache) for i in range(30, 45)]
            assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    assert len(steps) == 2 * 15 * model.config.num_hidden_layers


# Compiled are those with softcap and with sinks, which reach the kernels as arguments of a compiled operator.
@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in MODELS), ("gemma2", True), ("gpt-oss", True)]
)
def test_left_padded_rows(name, compiled, steps):
    model, texts, following = shared(name), rows(), rows((4, 4, 4), seed=10)
    ids, mask = left_padded(texts, 50)
    forward = torch.compile(model.forward, backend="eager") if compiled else model.forward
    with extended(name, query_scaling="log-n", trained_window=16, enforce_limit=False, impl="fused"):
        # Compiled, a cache that grows is `test_compiled_decode`'s.
        for cache in caches(model, 70)[compiled:]:
            model(ids, attention_mask=mask, position_ids=counted(mask), past_key_values=cache)
            grown, parts = mask, []
            for i in range(4):
                grown = torch.nn.functional.pad(grown, (0, 1), value=1)
                token = torch.cat([tokens[:, i : i + 1] for tokens in following])
                arguments = {"attention_mask": grown, "position_ids": counted(grown)[:, -1:], "past_key_values": cache}
                parts.append(forward(token, **arguments).logits)
            actual = torch.cat(parts, dim=1)
            for row in range(len(texts)):
                alone = logits(model, torch.cat((texts[row], following[row]), dim=1))
                assert_close(actual[row], alone[0, -4:], **CLOSE)
    assert len(steps) == (1 if compiled else 2) * 4 * model.config.num_hidden_layers


def test_rows_with_gaps_take_the_long_way(steps):
    model, ids = shared("llama"), text(40)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, 10:18] = 0
    arguments = {"attention_mask": mask, "position_ids": counted(mask)}
    with extended("llama", impl="fused"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :39], attention_mask=mask[:, :39], position_ids=counted(mask)[:, :39], past_key_values=cache)
        step = {"attention_mask": mask, "position_ids": counted(mask)[:, 39:], "past_key_values": cache}
        assert_close(logits(model, ids[:, 39:], **step), logits(model, ids, **arguments)[:, 39:], **CLOSE)
        assert steps == []
        # A compiled step has no other way, and says so.
        compiled = torch.compile(model.forward, backend="aot_eager")
        cache.crop(-1)
        with pytest.raises(ValueError, match="padded on the left only, and key_mask has gaps: pad on the left"):
            compiled(ids[:, 39:], **step)


@pytest.mark.parametrize(("name", "backend"), [("gemma3", "eager"), ("llama", "aot_eager")])
def test_compiled_decode(name, backend, steps):
    model, ids = tiny_model(name), text(40)
    compiled = torch.compile(model.forward, backend=backend)
    with ropewalk.extend(model, MAP):
        expected = logits(model, ids)
    with ropewalk.extend(model, MAP, impl="fused"):
        for cache in caches(model, 48):
            parts = [logits(model, ids[:, :30], past_key_values=cache)]
            parts += [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
            assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    assert len(steps) == 2 * 10 * model.config.num_hidden_layers


def test_a_compiled_step_can_be_held_by_a_cuda_graph():
    model, ids, graphs = tiny_model("llama"), text(40), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    with ropewalk.extend(model, MAP, impl="fused"):
        arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        expected = model.generate(ids, **arguments)
        actual = model.generate(ids, cache_implementation="static", compile_config=config, **arguments)
    assert torch.equal(actual, expected)
    assert len(graphs) == 1
    used = [node.target for node in graphs[0].graph.nodes if "ropewalk" in str(node.target)]
    assert len(used) == 1 + model.config.num_hidden_layers  # the slots are found once
    for operator in used:
        overload = getattr(operator, "default", operator)
        assert torch.Tag.cudagraph_unsafe not in overload.tags


def test_masks_of_static_caches_keep_their_shape():
    shapes = set()
    for tokens in (20, 21, 22):
        mask = torch.ones(2, tokens, dtype=torch.bool)
        layout = layout_mask(2, 1, 40, torch.tensor(tokens - 1), 0, attention_mask=mask)
        shapes.add(layout.key_mask.shape)
        assert layout.key_mask.sum(dim=1).tolist() == [tokens] * 2
    assert shapes == {(2, 40)}


def test_operators_are_what_they_say():
    mask = torch.arange(12) >= torch.tensor([0, 5])[:, None]
    for start, key_mask in ((torch.tensor(8), None), (None, mask), (torch.tensor([8]), mask)):
        torch.library.opcheck(operators.step_slots, (start, key_mask, 2, 12))
    model = shared("llama")
    with extended("llama", impl="fused"):
        plan = model.model.layers[0].self_attn.ropewalk_plan
        q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 12, 16)
        for lengths in (None, torch.tensor([9, 12])):
            torch.library.opcheck(operators.extended_step, (q, k, k, lengths, None, None, None, None, plan.handle))
            # What a compiled graph lays out in another way is the same.
            sinks, options = torch.randn(4, 2)[:, 0], (None, None, plan.handle)
            expected = operators.extended_step(q, k, k, lengths, None, sinks.contiguous(), *options)
            other = [x.mT.contiguous().mT for x in (q, k, k)]
            assert torch.equal(operators.extended_step(*other, lengths, None, sinks, *options), expected)


def test_limits():
    model, position_map = tiny_model("llama"), ropewalk.SelfExtend(2, 8)
    with ropewalk.extend(model, position_map, impl="fused") as extension:
        reach = extension.max_length
        tokens = text(reach + 1)
        growing, static = caches(model, reach + 9)
        for cache, error, start in ((growing, ropewalk.LengthError, "a text of"), (static, RuntimeError, "a text is")):
            model(tokens[:, : reach - 1], past_key_values=cache)
            model(tokens[:, reach - 1 : reach], past_key_values=cache)
            with pytest.raises(error, match=f"{start}.* past what .*{reach} tokens"):
                model(tokens[:, reach:], past_key_values=cache)
    with ropewalk.extend(model, position_map, impl="fused", enforce_limit=False):
        for cache in caches(model, reach + 9):
            model(tokens[:, :reach], past_key_values=cache)
            model(tokens[:, reach:], past_key_values=cache)


@pytest.mark.parametrize("query_scaling", [None, "yarn"])
def test_a_step_reads_nothing_on_the_host(query_scaling, steps, monkeypatch):
    model, ids = shared("llama"), text(40)
    with extended("llama", impl="fused", query_scaling=query_scaling, trained_window=64):
        cache = StaticCache(config=model.config, max_cache_len=300)
        model(ids, past_key_values=cache)

        def refuse(self, *arguments, **options):
            raise AssertionError("a tensor was read on the host")

        monkeypatch.setattr(fused, "attend_step", lambda call, step: call.query.clone())
        monkeypatch.setattr(torch, "_assert_async", lambda condition, message: None)  # reads, but on the device
        for name in ("item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__float__", "__index__"):
            monkeypatch.setattr(Tensor, name, refuse)
        model(ids[:, :1], past_key_values=cache)


def test_query_scaling_is_the_same_compiled():
    scaling = QueryScaling("log-n", 16)
    model, ids = tiny_model("llama"), text(40)
    compiled = torch.compile(model.forward, backend="eager")
    with ropewalk.extend(model, MAP, impl="fused", query_scaling="log-n", trained_window=16, enforce_limit=False):
        assert model.model.layers[0].self_attn.ropewalk_plan.query_scaling == scaling
        expected = logits(model, ids)
        for cache in caches(model, 48):
            model(ids[:, :39], past_key_values=cache)
            assert_close(compiled(ids[:, 39:], past_key_values=cache).logits, expected[:, 39:], **CLOSE)
