# SPDX-License-Identifier: Apache-2.0
"""Whatever `extend` does to a model is undone, whichever way it ends."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from tiny import MAP, extended, logits, options, shared, text

import ropewalk
from ropewalk.testing import TINY_MODELS, tiny_model

over_models = pytest.mark.parametrize("name", TINY_MODELS)


def fingerprint(model):
    """What a model is: attributes and their identity, buffers' contents, training flags, configurations, weights."""
    modules = {
        name: {key: id(value) for key, value in vars(module).items() if key != "training"}
        for name, module in model.named_modules()
    }
    configurations = [model.config.to_dict(), dict(vars(model.config))]
    if model.can_generate():
        configurations.append(model.generation_config.to_dict())
    tensors = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    tensors |= {name: (id(tensor), tensor.clone()) for name, tensor in model.named_buffers()}
    training = {name: module.training for name, module in model.named_modules()}
    return modules, configurations, tensors, training, model.config._attn_implementation


def assert_same(one, other):
    for part, again in zip((*one[:2], *one[3:]), (*other[:2], *other[3:]), strict=True):
        assert part == again
    assert one[2].keys() == other[2].keys()
    for name, (identity, content) in one[2].items():
        assert other[2][name][0] == identity
        assert torch.equal(other[2][name][1], content)


@over_models
@pytest.mark.parametrize("sliding_window", ["keep", "disable"])
def test_restore_leaves_the_model_as_it_was(name, sliding_window):
    model, ids = tiny_model(name), text(50)
    next(model.children()).train()  # flags differ within the model
    # In this order: some models note in a forward pass how far they have been.
    expected, before = logits(model, ids), fingerprint(model)
    random_state = torch.get_rng_state()
    if options(name) and sliding_window == "keep":
        with pytest.raises(ropewalk.UnsupportedModelError):
            ropewalk.extend(model, MAP)
    else:
        extension = ropewalk.extend(model, MAP, sliding_window=sliding_window)
        logits(model, ids)
        assert extension.active
        ropewalk.restore(model)
        assert not extension.active
    assert_same(before, fingerprint(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(logits(model, ids), expected)


@over_models
def test_extending_changes_no_weight_flag_or_buffer(name):
    model = tiny_model(name)
    model.train()
    before = fingerprint(model)
    with ropewalk.extend(model, MAP, **options(name)):
        within = fingerprint(model)
    assert within[3] == before[3]
    for key, (identity, content) in before[2].items():
        # In the place of tables of rotations and of frequencies that change with the length there are others.
        if key.endswith("embed_positions") or name in ("llama-dynamic", "phi3-longrope"):
            continue
        assert within[2][key][0] == identity
        assert torch.equal(within[2][key][1], content)


def test_an_exception_restores():
    model = shared("llama")
    before = fingerprint(model)
    with pytest.raises(KeyError), extended("llama"):
        raise KeyError
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_the_attention_that_was_set_comes_back(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    with ropewalk.extend(model, MAP):
        assert model.config._attn_implementation == "ropewalk"
    assert model.config._attn_implementation == implementation


def test_extending_twice_is_an_error():
    with extended("llama") as extension:
        with pytest.raises(ValueError, match=r"already extended; call ropewalk.restore\(model\) first"):
            extended("llama")
        assert extension.active


def test_restoring_what_is_not_extended_is_an_error():
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not extended"):
        ropewalk.restore(shared("llama"))
    extension = extended("llama")
    extension.restore()
    extension.restore()  # a handle may be closed twice
    with pytest.raises(ValueError, match="not extended"):
        ropewalk.restore(shared("llama"))


def test_an_old_handle_does_not_restore_a_new_extension():
    old = extended("llama")
    old.restore()
    with extended("llama") as new:
        old.restore()
        assert new.active


def test_extending_again_after_restoring():
    ids, model = text(), shared("llama")
    with extended("llama"):
        first = logits(model, ids)
    with extended("llama", ropewalk.ReRoPE(16)):
        logits(model, ids)
    with extended("llama"):
        assert torch.equal(logits(model, ids), first)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_copy_is_extended_by_itself(duplicate, name):
    ids, model = text(), tiny_model(name)
    unmodified = logits(model, ids)
    with ropewalk.extend(model, MAP, sliding_window="disable"):
        expected = logits(model, ids)
        twin = duplicate(model)
    assert torch.equal(logits(model, ids), unmodified)
    assert torch.equal(logits(twin, ids), expected)
    assert torch.equal(torch.compile(twin, backend="eager")(ids).logits, expected)
    ropewalk.restore(twin)
    assert torch.equal(logits(twin, ids), unmodified)
    assert twin.config.to_dict() == model.config.to_dict()


def test_a_saved_model_is_not_extended(tmp_path):
    ids, model = text(), tiny_model("qwen2-sliding")
    unmodified = logits(model, ids)
    with ropewalk.extend(model, MAP):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), unmodified)
    assert loaded.config._attn_implementation == "sdpa"


def test_a_module_added_after_extending_is_named():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP):
        model.model.layers[1] = copy.deepcopy(tiny_model("llama").model.layers[1])
        model.model.layers[1].self_attn.config = model.config
        with pytest.raises(RuntimeError, match=r"model.layers.1 was replaced since this LlamaForCausalLM was extended"):
            model(text(10))


def test_importing_changes_nothing():
    code = (
        "import sys, ropewalk\n"
        "from ropewalk.testing import example_maps\n"
        "assert 'transformers' not in sys.modules\n"
        "import transformers\n"
        "ropewalk.extend\n"
        "names = transformers.AttentionInterface().valid_keys()\n"
        "assert not [name for name in names if 'ropewalk' in name], names"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
