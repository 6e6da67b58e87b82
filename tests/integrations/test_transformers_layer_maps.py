# SPDX-License-Identifier: Apache-2.0
"""A map for each layer."""

import pytest
import torch
from naive import naive_attention
from test_transformers_restore import assert_same, fingerprint
from tiny import CLOSE, in_chunks, logits, text
from torch.testing import assert_close

import ropewalk
from ropewalk.integrations.transformers.fingerprint import of_extension
from ropewalk.maps import SELF, DualChunk, Identity, LengthError, SelfExtend
from ropewalk.testing import tiny_model

MAPS = (SelfExtend(3, 8), SELF(6, 0.7, 8, "distance"))

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")


def test_each_layer_has_its_own():
    """Of two models, each with a map for all layers, one layer's output is as the other's."""
    model, ids = tiny_model("llama"), text(70)
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    first, second = (layer.self_attn for layer in model.model.layers)
    with ropewalk.extend(model, MAPS, enforce_limit=False) as extension:
        assert [layer.position_map for layer in extension.layers] == list(MAPS)
        hooks = [first.register_forward_hook(keep("first"))]
        mixed = logits(model, ids)
        hooks[0].remove()
        assert_close(in_chunks(model, ids, (40, 1, 29)), mixed, **CLOSE)
    mixed_first = outputs["first"]
    with ropewalk.extend(model, MAPS[0], enforce_limit=False):
        hook = first.register_forward_hook(keep("alone"))
        alone = logits(model, ids)
        hook.remove()
    assert_close(mixed_first, outputs["alone"], **CLOSE)
    assert (mixed - alone).abs().max() > 0.1
    # The second layer by the definition, under the first's map in the first.
    with naive_attention(model, "llama", None, by_layer=dict(zip((first, second), MAPS, strict=True))):
        assert_close(logits(model, ids), mixed, rtol=0, atol=1e-3)


def test_limits_are_the_tightest():
    model = tiny_model("llama")
    near, far = SelfExtend(2, 8), SelfExtend(8, 4)
    with ropewalk.extend(model, [far, near]) as extension:
        assert extension.position_map == near
        assert extension.max_length == near.max_length(64) < far.max_length(64)
        assert extension.recommended_length == min(one.recommended_length(64) for one in (near, far))
        assert (
            "SelfExtend(group_size=8, window=4) (1 of 2 layers), SelfExtend(group_size=2, window=8) (1 of 2 layers)"
            in str(extension)
        )
        with pytest.raises(LengthError):
            logits(model, text(near.max_length(64) + 1))


def test_layers_that_are_left_alone_set_no_limit():
    model = tiny_model("gemma3")  # the first layer has a window
    with ropewalk.extend(model, [Identity(), SelfExtend(8, 4)]) as extension:
        assert extension.max_length == SelfExtend(8, 4).max_length(64)
        assert [layer.position_map for layer in extension.layers] == [None, SelfExtend(8, 4)]
    with ropewalk.extend(model, [Identity(), SelfExtend(8, 4)], target_length=200) as extension:
        assert extension.max_length > 200
    with pytest.raises(LengthError, match="a text of 5000 tokens is past"):
        ropewalk.extend(model, [Identity(), SelfExtend(8, 4)], target_length=5000)


@pytest.mark.parametrize("maps", [[MAPS[0]], [MAPS[0]] * 3, (MAPS[0],) * 5])
def test_as_many_as_layers(maps):
    model = tiny_model("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"has 2 attention layers, and there are {len(maps)} maps"):
        ropewalk.extend(model, maps)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("maps", [[MAPS[0], None], [SelfExtend, SelfExtend], ["selfextend"], []])
def test_nothing_but_maps(maps):
    with pytest.raises(TypeError, match="position_map must be a position map"):
        ropewalk.extend(tiny_model("llama"), maps)


def test_what_was_read_says_all_maps():
    """So that an answer is not asked of another extension."""
    model, found = tiny_model("llama"), []
    for maps in (MAPS, MAPS[::-1], MAPS[0], (MAPS[0], DualChunk(8, 4))):
        with ropewalk.extend(model, maps, enforce_limit=False):
            found.append(str(of_extension(model)))
    assert len(set(found)) == 4
    assert torch.is_tensor(logits(model, text(10)))
