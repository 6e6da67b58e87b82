# SPDX-License-Identifier: Apache-2.0
"""Whatever is done to an extended model: it keeps right, or the next call is an error, and the handle tells which."""

import copy

import pytest
import torch
from tiny import CLOSE, MAP, logits, options, text
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig

import ropewalk
from ropewalk.integrations.transformers.watch import ModelChangedError
from ropewalk.testing import TINY_MODELS, tiny_model

IDS = text(60)

# What each does, and what the error and the handle say of it.
CHANGES = {
    "bfloat16": (lambda model: model.to(torch.bfloat16), r"frequencies in model.rotary_emb.inv_freq .*torch.bfloat16"),
    "half": (lambda model: model.half(), r"frequencies in model.rotary_emb.inv_freq changed \(cast to torch.float16\)"),
    "rotary cast": (lambda model: model.model.rotary_emb.bfloat16(), r"cast to torch.bfloat16"),
    "scaled in place": (lambda model: model.model.rotary_emb.inv_freq.mul_(0.5), r"rotary_emb.inv_freq changed"),
    "another buffer": (
        lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq / 2),
        r"rotary_emb.inv_freq changed",
    ),
    "rotary replaced": (
        lambda model: setattr(model.model, "rotary_emb", copy.deepcopy(model.model.rotary_emb)),
        r"model.rotary_emb was replaced",
    ),
    "rope type": (lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"), r"set to 'dynamic'"),
    "implementation set": (lambda model: model.set_attn_implementation("sdpa"), r"implementation was set to 'sdpa'"),
    "implementation of the base model": (
        lambda model: model.model.set_attn_implementation("eager"),
        r"implementation was set to 'eager'",
    ),
    "implementation in the configuration": (
        lambda model: setattr(model.config, "_attn_implementation", "sdpa"),
        r"implementation was set to 'sdpa'",
    ),
    "configuration": (lambda model: setattr(model, "config", LlamaConfig()), r"config was replaced"),
    "configuration of the base model": (
        lambda model: setattr(model.model, "config", copy.deepcopy(model.config)),
        r"model.config was replaced",
    ),
    "configuration of one layer": (
        lambda model: setattr(model.model.layers[1].self_attn, "config", LlamaConfig(attn_implementation="sdpa")),
        r"model.layers.1.self_attn.config was replaced",
    ),
    "attention replaced": (
        lambda model: setattr(
            model.model.layers[0], "self_attn", copy.deepcopy(tiny_model("llama").model.layers[0].self_attn)
        ),
        r"model.layers.0.self_attn was replaced",
    ),
    "layer replaced": (
        lambda model: model.model.layers.__setitem__(1, copy.deepcopy(tiny_model("llama").model.layers[1])),
        r"model.layers.1 was replaced",
    ),
    "layers replaced": (
        lambda model: setattr(model.model, "layers", nn.ModuleList(tiny_model("llama").model.layers)),
        r"model.layers was replaced",
    ),
    "base model replaced": (lambda model: setattr(model, "model", tiny_model("llama").model), r"model was replaced"),
    "layer removed": (lambda model: model.model.layers.__delitem__(1), r"model.layers.1 was replaced"),
}

HARMLESS = {
    "nothing": lambda model: None,
    "same dtype": lambda model: model.to(torch.float32),
    "moved": lambda model: model.to("cpu"),
    "an equal buffer": lambda model: setattr(
        model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.clone()
    ),
    "written with the same": lambda model: model.model.rotary_emb.inv_freq.mul_(1),
    "trained": lambda model: model.train(),
    "weights loaded": lambda model: model.load_state_dict(tiny_model("llama").state_dict()),
    "weights assigned": lambda model: model.load_state_dict(tiny_model("llama").state_dict(), assign=True),
    "a hook": lambda model: model.model.layers[0].register_forward_hook(lambda module, inputs, output: None),
    "ropewalk again": lambda model: model.set_attn_implementation("".join(("rope", "walk"))),
    "rope parameters of the configuration": lambda model: model.config.rope_parameters.update(rope_theta=5.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after one"])
def test_what_would_be_wrong_is_an_error(change, called):
    model = tiny_model("llama")
    act, message = CHANGES[change]
    extension = ropewalk.extend(model, MAP)
    if called:
        model(IDS)
    assert extension.active
    act(model)
    assert not extension.active
    with pytest.raises(ModelChangedError, match=f"{message}.* since this LlamaForCausalLM was extended"):
        model(IDS)
    with pytest.raises(ModelChangedError):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    first, *_ = str(extension).splitlines()
    assert first.startswith(f"LlamaForCausalLM under {MAP} (no longer: ")
    extension.restore()
    assert not any("ropewalk" in name for module in model.modules() for name in vars(module))
    if "replaced" not in change and "configuration" not in change:
        model(IDS)


@pytest.mark.parametrize("change", HARMLESS)
def test_what_makes_no_difference(change):
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP) as extension:
        expected = logits(model, IDS)
        HARMLESS[change](model)
        assert_close(logits(model, IDS), expected, **CLOSE)
        assert extension.active
        assert "no longer" not in str(extension)


def test_weights_that_change_are_used():
    """An adapter that is merged, or a projection that is replaced, changes what is rotated and not how."""
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP) as extension:
        before = logits(model, IDS)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight += 0.1 * torch.randn_like(layer.self_attn.q_proj.weight)
            merged = nn.Linear(64, 32, bias=False)
            merged.weight = nn.Parameter(layer.self_attn.k_proj.weight * 0.9)
            layer.self_attn.k_proj = merged
        changed = logits(model, IDS)
        assert extension.active
        assert (changed - before).abs().max() > 0.1
    with ropewalk.extend(model, MAP):
        assert torch.equal(logits(model, IDS), changed)


# The others have tables of rotations, which are cast with what they turn.
@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in ("gptj", "codegen")])
def test_every_model_that_is_cast(name):
    """Where the frequencies can be told from those in bfloat16, which is everywhere."""
    model = tiny_model(name)
    with ropewalk.extend(model, MAP, **options(name)) as extension:
        model(IDS)
        model.to(torch.bfloat16)
        with pytest.raises(ModelChangedError, match=r"cast to torch\.bfloat16"):
            model(IDS)
        assert not extension.active
    model(IDS)
    with ropewalk.extend(model, MAP, **options(name)) as extension:
        model(IDS)
        assert extension.active


def test_a_base_model_called_by_itself():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP):
        model.model.rotary_emb.half()
        with pytest.raises(ModelChangedError):
            model.model(IDS)


def test_a_cache_is_not_added_to():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP):
        cache = DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
        model.half()
        with pytest.raises(ModelChangedError):
            model(IDS[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("change", ["bfloat16", "implementation set", "layer replaced"])
def test_compiled(change):
    torch._dynamo.reset()
    model = tiny_model("llama")
    compiled = torch.compile(model.forward, backend="eager")
    with ropewalk.extend(model, MAP):
        expected = logits(model, IDS)
        assert_close(compiled(IDS).logits, expected, **CLOSE)
        CHANGES[change][0](model)
        with pytest.raises(Exception, match=CHANGES[change][1]):
            compiled(IDS)
    torch._dynamo.reset()


def test_a_copy_is_watched_by_itself():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP) as extension:
        model(IDS)
        twin = copy.deepcopy(model)
        twin.half()
        with pytest.raises(ModelChangedError):
            twin(IDS)
        model(IDS)
        assert extension.active
        assert not twin.ropewalk_extension.active


def test_a_handle_after_restoring():
    model = tiny_model("llama")
    extension = ropewalk.extend(model, MAP)
    extension.restore()
    assert not extension.active
    assert "(no longer: restored)" in str(extension)
