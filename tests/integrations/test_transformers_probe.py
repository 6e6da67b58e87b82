# SPDX-License-Identifier: Apache-2.0
"""What is found out about a model before it is extended: how far it is measured, and why it is refused."""

import math

import pytest
import torch
import transformers
from test_transformers_restore import assert_same, fingerprint
from tiny import CLOSE, MAP, in_chunks, logits, text
from torch import nn
from torch.testing import assert_close

import ropewalk
from ropewalk import Identity, ReRoPE, SelfExtend, UnsupportedModelError
from ropewalk.integrations.transformers import probe
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.testing import tiny_model
from ropewalk.testing.models import TinyModel
from ropewalk.testing.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:a text of")

LOCAL = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 24}
MOE = {"num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1}
MOE |= {"moe_intermediate_size": 16}
# Only layers with a sliding window have a rotary embedding, or every layer has a window.
NOTHING_TO_EXTEND = {
    "afmoe": TinyModel("AfmoeConfig", {**LOCAL, **MOE, "num_dense_layers": 2}),
    "cohere2": TinyModel("Cohere2Config", LOCAL),
    "cohere2-moe": TinyModel("Cohere2MoeConfig", {**LOCAL, **MOE}),
    "exaone4": TinyModel("Exaone4Config", LOCAL),
    "exaone-moe": TinyModel("ExaoneMoeConfig", {**LOCAL, **MOE}),
    "flint": TinyModel("FlintConfig", LOCAL),
    "mistral": TinyModel("MistralConfig", LOCAL),
    "gemma3": TinyModel("Gemma3TextConfig", {**LOCAL, "layer_types": ["sliding_attention"] * 4}),
}


@pytest.mark.parametrize("name", NOTHING_TO_EXTEND)
def test_an_extension_of_no_layer_is_refused(name):
    model, ids = NOTHING_TO_EXTEND[name].build(64), text(60)
    before, plain = fingerprint(model), logits(model, ids)
    for more in ({"position_map": MAP}, {"target_length": 100}):
        with pytest.raises(UnsupportedModelError, match=r"of 24 tokens, so there .* sliding_window='disable' turns"):
            ropewalk.extend(model, **more)
        assert_same(before, fingerprint(model))
    # The advice is right.
    with ropewalk.extend(model, MAP, sliding_window="disable") as extension:
        assert any(layer.extended for layer in extension.layers)
        extended = logits(model, ids)
        assert_close(in_chunks(model, ids, (20, 1, 9)), extended, **CLOSE)
        assert (extended - plain).abs().max() > 1e-3
    assert_same(before, fingerprint(model))
    assert torch.equal(logits(model, ids), plain)


class _Changing(torch.nn.Module):
    """A rotary embedding whose frequencies change with a text longer than `original`, and that does not say so."""

    def __init__(self, own, original):
        super().__init__()
        self.own, self.original = own, original
        self.register_buffer("inv_freq", own.inv_freq)

    def forward(self, x, position_ids):
        return self.own(x, position_ids if position_ids.max() < self.original else position_ids * 0.9)


def changing(original):
    model = tiny_model("llama", original)
    model.model.rotary_emb = _Changing(model.model.rotary_emb, original)
    return model


@pytest.mark.parametrize("window", [8, 16])
@pytest.mark.parametrize("original", [64, 100, 1000, 5000])
def test_a_model_is_measured_as_far_as_the_map_reaches(window, original):
    """Four times the trained window is before `original`, and all of it is unless the map ends there."""
    model = changing(original)
    for group in (2, 16, 100, 1000):
        position_map = SelfExtend(group, window // 2)
        reach = position_map.max_length(window)
        before = fingerprint(model)
        if max(reach, 4 * window + 1) > original:
            with pytest.raises(UnsupportedModelError, match="cached keys cannot be re-rotated"):
                ropewalk.extend(model, position_map, trained_window=window)
        else:
            with ropewalk.extend(model, position_map, trained_window=window):
                ids = text(min(reach, 200))
                assert_close(in_chunks(model, ids, (40,)), logits(model, ids), **CLOSE)
        assert_same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("position_map", "more"),
    [
        (ReRoPE(4), {}),
        (SlidingWindow(4), {}),
        (SelfExtend(2, 4), {"enforce_limit": False}),
        (Identity(), {"enforce_limit": False}),
    ],
    ids=str,
)
def test_maps_without_an_end_are_measured_far(position_map, more):
    assert more or math.isinf(position_map.max_length(8))
    with pytest.raises(UnsupportedModelError, match="cached keys cannot be re-rotated"):
        ropewalk.extend(changing(100_000), position_map, trained_window=8, **more)
    with ropewalk.extend(tiny_model("llama"), position_map, trained_window=8, **more):
        pass


@pytest.mark.parametrize(("trained_window", "factor"), [(150, 1.0), (800, 4.0)])
def test_longrope_is_held_at_the_trained_window(trained_window, factor):
    """Whichever factors a text of the trained window has are those of every token."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 200}
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    options = {"max_position_embeddings": 800, "original_max_position_embeddings": 200, "rope_parameters": parameters}
    model, ids = TinyModel("Phi3Config", options).build(800), text(300)
    before = fingerprint(model)
    with ropewalk.extend(model, SelfExtend(3, 16), trained_window=trained_window) as extension:
        assert f"periods from {2 * math.pi * factor:.3g} to" in str(extension)
        whole = logits(model, ids)
        assert_close(in_chunks(model, ids, (150, 1, 49)), whole, **CLOSE)
        assert_close(logits(model, ids[:, :20]), whole[:, :20], **CLOSE)
    assert_same(before, fingerprint(model))


GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
AT_REST = {
    # Its proportional rope has frequencies that are 0.
    "gemma4": lambda: TinyModel("Gemma4TextConfig", {**GEMMA4, "num_kv_shared_layers": 0}).build(64),
    "gemma4, shared keys": lambda: TinyModel("Gemma4TextConfig", {**GEMMA4, "num_kv_shared_layers": 2}).build(64),
    # Frequencies that are too small for half precision.
    "a large base": lambda: tiny_model(
        "llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 1e9}
    ).half(),
    "zeros": lambda: _with_zeros(tiny_model("llama")),
}


def _with_zeros(model):
    model.model.rotary_emb.inv_freq[3:] = 0
    return model


@pytest.mark.parametrize("name", AT_REST)
def test_frequencies_of_zero(name):
    model, ids = AT_REST[name](), text(60)
    before, plain = fingerprint(model), logits(model, ids)
    close = {"rtol": 0, "atol": 0.02} if model.dtype == torch.float16 else CLOSE
    with ropewalk.extend(model, Identity()) as extension:
        assert "of them at rest" in str(extension)
        assert_close(logits(model, ids), plain, **close)
    with ropewalk.extend(model, MAP):
        extended = logits(model, ids)
        assert (extended - plain).abs().max() > 1e-3
        assert_close(in_chunks(model, ids, (20, 1, 9)), extended, **close)
        cache = transformers.DynamicCache(config=model.config)
        last = model(ids, past_key_values=cache, logits_to_keep=1).logits
        assert_close(last, extended[:, -1:], **close)
    assert_same(before, fingerprint(model))
    assert torch.equal(logits(model, ids), plain)


def test_layers_that_share_keys_drop_tokens():
    """Gemma 4 computes its last layers for the tokens alone whose scores are asked for."""
    model, ids = AT_REST["gemma4, shared keys"](), text(50, batch=2)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :11] = 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    more = {"attention_mask": mask, "position_ids": positions}
    with ropewalk.extend(model, MAP):
        whole = model(ids, output_hidden_states=True, **more).logits
        for kept in (1, 7, 39):
            assert_close(model(ids, logits_to_keep=kept, **more).logits, whole[:, -kept:], **CLOSE)
            cache = transformers.StaticCache(config=model.config, max_cache_len=64)
            static = model(ids, logits_to_keep=kept, past_key_values=cache, **more).logits
            assert_close(static, whole[:, -kept:], **CLOSE)
        greedy = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        dynamic = model.generate(ids, **greedy)
        assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), dynamic)


INDEXER = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
INDEXER |= {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "first_k_dense_replace": 2, "n_group": 1}
INDEXER |= {**MOE, "topk_group": 1, "num_key_value_heads": 4}
REFUSALS = {
    "masks made of values": (TinyModel("DogeConfig"), "DogeAttention makes an attention mask of its own"),
    "attention of its own": (
        TinyModel("RoFormerConfig", {"is_decoder": True}),
        "RoFormerSelfAttention of RoFormerForCausalLM computes with its attention mask itself",
    ),
    "attention of its own, learned positions": (
        TinyModel("GPTNeoConfig", {"attention_types": [[["global", "local"], 1]]}),
        "its position embeddings are learned or added to the tokens",
    ),
    "a bias by distance and content": (
        ZOO["inkling_text"].tiny,
        r"InklingAttention adds a bias of its own to its scores \(position_bias\), which follows distances",
    ),
    "layers that begin anew at position 0": (
        ZOO["recurrent_gemma"].tiny,
        "what model.layers.1.temporal_block of RecurrentGemmaForCausalLM is given for the same token changes with the",
    ),
    "prompts that are seen both ways": (ZOO["paligemma"].tiny, "GemmaAttention is not causal: its tokens, or those of"),
    "sparse indexer": (TinyModel("DeepseekV32Config", INDEXER), "has sparse attention: its indexers"),
    "no positions": (
        TinyModel(
            "GraniteMoeHybridConfig",
            {
                **MOE,
                "position_embedding_type": "nope",
                "layer_types": ["attention"] * 2,
                "shared_intermediate_size": 32,
            },
        ),
        "attention without positions: its keys are the same wherever they are, so there is nothing to extend",
    ),
    "learned positions": (TinyModel("GPT2Config"), "its position embeddings are learned or added to the tokens"),
    "no attention": (TinyModel("MambaConfig", {"state_size": 8}), "has no attention layer that could be extended"),
    "no attention, whatever it is called": (ZOO["rwkv"].tiny, "has no attention layer that could be extended"),
}


def test_a_tensor_that_attention_is_given_and_that_would_be_ignored():
    """What the interface is given beside queries, keys and masks may be part of the scores."""

    class More(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, *arguments, **options):
            return self.attention(*arguments, more=torch.zeros(1), **options)

    model = tiny_model("llama")
    model.model.layers[1].self_attn = More(model.model.layers[1].self_attn)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"a tensor that Ropewalk's attention would ignore \(more\)"):
        ropewalk.extend(model, MAP)
    assert_same(before, fingerprint(model))


@torch.no_grad()
def test_masks_that_a_model_makes_for_the_one_within_it():
    """Molmo2, with a cache and without one."""
    model, ids = ZOO["molmo2"].tiny.build(64), text(50)
    with ropewalk.extend(model, MAP):
        whole = model(ids, use_cache=False).logits
        assert_close(in_chunks(model, ids, (20, 1, 29)), whole, **CLOSE)
        image = torch.zeros(1, 50, dtype=torch.long)
        image[:, 5:15] = 1
        with pytest.raises(UnsupportedModelError, match="this mask shows tokens what comes after them, as those of"):
            model(ids, mm_token_type_ids=image)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_it_is(name):
    made, message = REFUSALS[name]
    model = made.build(64)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=message):
        ropewalk.extend(model, MAP, trained_window=64)
    assert_same(before, fingerprint(model))


def test_a_model_that_does_not_use_its_frequencies():
    """Positions that nothing rotates by: neither ALiBi nor anything else is blamed."""
    model = TinyModel("SmolLM3Config", {"no_rope_layers": [0, 0]}).build(64)
    with pytest.raises(UnsupportedModelError, match="has attention without positions: its keys are the same"):
        ropewalk.extend(model, MAP)


class Misbehaving(nn.Module):
    """A layer that fails on the tokens of a probe."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, *arguments, **options):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError, IndexError, KeyError, NotImplementedError, ZeroDivisionError])
def test_whatever_a_model_does_while_it_is_measured(error):
    model = tiny_model("llama")
    model.model.layers[1].mlp = Misbehaving(error("of its own"))
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=f"could not be probed .* {error.__name__}: .*of its own") as found:
        ropewalk.extend(model, MAP)
    assert isinstance(found.value.__cause__, error)
    assert_same(before, fingerprint(model))


def test_memory_that_is_out_is_no_fault_of_the_model():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Misbehaving(torch.OutOfMemoryError("of its own"))
    before = fingerprint(model)
    with pytest.raises(torch.OutOfMemoryError):
        ropewalk.extend(model, MAP)
    assert_same(before, fingerprint(model))


def test_what_a_model_writes_on_itself_goes():
    """Attributes, buffers and configurations that a forward pass changes are what they were."""

    class Writing(nn.Module):
        def __init__(self, inner, config):
            super().__init__()
            self.inner, self.config, self.seen = inner, config, 0

        def forward(self, x):
            self.seen += 1
            self.extra = x
            self.register_buffer("more", x)
            return self.inner(x)

    model = tiny_model("llama")
    model.model.layers[0].mlp = Writing(model.model.layers[0].mlp, model.config)
    before = fingerprint(model)
    assert probe.probe(model, 64)
    assert_same(before, fingerprint(model))
