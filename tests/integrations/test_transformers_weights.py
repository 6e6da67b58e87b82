# SPDX-License-Identifier: Apache-2.0
"""What chosen tokens attend to, held to transformers' own eager attention and to the definition."""

import pytest
import torch
from naive import naive_attention
from test_transformers_padding import counted, left_padded, rows
from tiny import CLOSE, MAP, extended, logits, shared, text
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import ropewalk
from ropewalk.maps import SELF, Identity
from ropewalk.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:a text of:UserWarning")
CHOSEN = [-1, 0, 20]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "qwen2-sliding", "phi", "gptj"])
def test_without_a_map_they_are_transformers_own(name):
    model, ids = tiny_model(name), text(50)
    model.set_attn_implementation("eager")
    own = model(ids, output_attentions=True).attentions
    with ropewalk.extend(model, Identity()) as extension:
        with extension.attention_weights(CHOSEN) as weights:
            logits(model, ids)
        assert list(weights) == [layer.name for layer in extension.layers]
        for found, expected in zip(weights.values(), own, strict=True):
            # Sinks take a part, and are no key.
            assert_close(found, expected[:, :, CHOSEN, :50], **CLOSE)


@pytest.mark.parametrize("position_map", [MAP, SELF(6, 0.7, 8, "distance")], ids=str)
def test_under_a_map_they_are_the_definitions(position_map):
    model, ids = shared("llama"), text(60)
    with extended("llama", position_map) as extension, extension.attention_weights(CHOSEN) as weights:
        logits(model, ids)
    seen = {}

    def keep(module, given):
        seen[module] = given

    with naive_attention(model, "llama", position_map, on_weights=keep):
        logits(model, ids)
    for name, found in weights.items():
        assert_close(found.double(), seen[model.get_submodule(name)][:, :, CHOSEN], rtol=0, atol=1e-5)
        assert_close(found.sum(-1), torch.ones(1, 4, 3))


def test_chunks_steps_and_padding():
    model, texts = shared("llama"), rows((50, 33))
    ids, mask = left_padded(texts, 50)
    with extended("llama") as extension:
        with extension.attention_weights([-1]) as alone:
            logits(model, texts[1])
        with extension.attention_weights([49]) as together:
            logits(model, ids, attention_mask=mask, position_ids=counted(mask))
        for name, found in together.items():
            assert_close(found[1:, :, :, 17:], alone[name], **CLOSE)
            assert not found[1, :, :, :17].any()
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=60)):
            model(texts[1][:, :-1], past_key_values=cache)
            with extension.attention_weights([0]) as step:
                model(texts[1][:, -1:], past_key_values=cache)
            for name, found in step.items():
                assert_close(found[..., :33], alone[name], **CLOSE)
                assert not found[..., 33:].any()


def test_what_cannot_be_had():
    model, ids = shared("llama"), text(20)
    with extended("llama") as extension:
        with pytest.raises(IndexError, match="there is no token 20 in a pass of 20"), extension.attention_weights([20]):
            model(ids)
        with pytest.raises(ValueError, match=r"queries must be a whole number, got 1\.5"):
            extension.attention_weights([1.5])
        with pytest.raises(ValueError, match=r"handle.attention_weights gives those of chosen tokens"):
            model(ids, output_attentions=True)
        for wrong in (3, "0", [], None):
            with pytest.raises(ValueError, match="queries must be a list of indices of tokens"):
                extension.attention_weights(wrong)
        with extension.attention_weights(torch.tensor([-1, 3])) as weights:
            model(ids)
        assert {found.shape[2] for found in weights.values()} == {2}
        # Nothing stays behind, and what was not noted is told.
        with (
            pytest.raises(RuntimeError, match="no attention weights were noted"),
            extension.attention_weights([0]) as weights,
        ):
            pass
        model(ids)
        assert weights == {}
        with pytest.raises(RuntimeError, match="no attention weights were noted"), extension.attention_weights([0]):
            shared("qwen2")(ids)
    with pytest.raises(ValueError, match="is not extended"):
        extension.attention_weights([0])
