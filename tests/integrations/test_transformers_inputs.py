# SPDX-License-Identifier: Apache-2.0
"""What a forward pass of an extended model is given: taken, or refused before anything is computed."""

import copy
import threading
import weakref

import pytest
import torch
from test_transformers_padding import counted, left_padded, rows
from tiny import CLOSE, MAP, extended, in_chunks, logits, shared, text
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    StaticCache,
)

import ropewalk
from ropewalk.integrations.transformers.inputs import Inputs
from ropewalk.testing import TINY_MODELS, tiny_model
from ropewalk.testing.models import ALIBI_MODELS
from ropewalk.testing.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:a text of")

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
MOE = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SEEN = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
QWEN_SEEN = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
MULTIMODAL = {
    "qwen2-vl": lambda: Qwen2VLForConditionalGeneration._from_config(
        Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=QWEN_SEEN)
    ),
    "qwen2.5-vl": lambda: Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=SEEN)
    ),
    "qwen3-vl": lambda: Qwen3VLForConditionalGeneration._from_config(
        Qwen3VLConfig(
            text_config={**TEXT, "rope_parameters": ROPE}, vision_config={**SEEN, "deepstack_visual_indexes": [0]}
        )
    ),
    "glm4v": lambda: Glm4vForConditionalGeneration._from_config(
        Glm4vConfig(text_config={**TEXT, "rope_parameters": PARTIAL_ROPE}, vision_config=SEEN)
    ),
    "glm4v-moe": lambda: Glm4vMoeForConditionalGeneration._from_config(
        Glm4vMoeConfig(text_config={**TEXT, **MOE, "rope_parameters": PARTIAL_ROPE}, vision_config=SEEN)
    ),
}

over_multimodal = pytest.mark.parametrize("name", MULTIMODAL)


@pytest.fixture(scope="module")
def multimodal():
    """Models that read images, made once."""
    made = {}

    def make(name):
        if name not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made[name] = MULTIMODAL[name]().eval()
            for parameter_name, parameter in made[name].named_parameters():
                if any(part in parameter_name for part in ("q_proj", "k_proj")):
                    parameter.mul_(20)
        return made[name]

    return make


def of_an_image(tokens, axes=3):
    """Positions of text, 16 patches of an image, and text again, as these models count them."""
    height, width = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    image = torch.stack((torch.zeros(16, dtype=torch.long), height, width)) + 5
    after = torch.arange(tokens - 21).expand(3, -1) + 9
    positions = torch.cat((torch.arange(5).expand(3, -1), image, after), dim=1)[:, None]
    return positions if axes == 3 else torch.cat((torch.arange(tokens).view(1, 1, -1), positions))


@over_multimodal
def test_text_alone(name, multimodal):
    model, ids = multimodal(name), text(60)
    plain = logits(model, ids)
    with ropewalk.extend(model, ropewalk.Identity()):
        assert_close(logits(model, ids), plain, **CLOSE)
    with ropewalk.extend(model, MAP):
        expected = logits(model, ids)
        assert (expected - plain).abs().max() > 1e-3
        assert_close(in_chunks(model, ids, (20, 1, 9)), expected, **CLOSE)
        # Three axes that agree are one.
        positions = torch.arange(60).expand(3, 1, -1)
        assert_close(logits(model, ids, position_ids=positions), expected, **CLOSE)
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens[0, 60], expected[0, -1].argmax())
        # Rows of their own lengths.
        batch, mask = left_padded(rows((60, 33)), 60)
        alone = logits(model, rows((60, 33))[1])
        positions = counted(mask).expand(3, -1, -1)
        assert_close(logits(model, batch, attention_mask=mask, position_ids=positions)[1, 27:], alone[0], **CLOSE)
    assert torch.equal(logits(model, ids), plain)


@over_multimodal
@pytest.mark.parametrize("axes", [3, 4])
def test_the_positions_of_an_image(name, axes, multimodal):
    """Read in one go and in parts, after a text and before one, alone and in a batch, the same; see also the matrix."""
    model, ids = multimodal(name), text(70)
    following = int(of_an_image(60).max()) + 1 + torch.arange(10).expand(axes, 1, -1)
    where = torch.cat((of_an_image(60, axes), following), dim=2)
    if axes == 4:
        where[0] = torch.arange(70)
    plain = logits(model, ids, position_ids=where)
    with ropewalk.extend(model, MAP):
        whole = logits(model, ids, position_ids=where)
        assert (whole - plain).abs().max() > 0.05
        for parts in ((30, 30, 10), (60, 1, 9), (65, 5)):
            cache, found = DynamicCache(config=model.config), []
            for part in torch.arange(70).split(parts):
                found.append(logits(model, ids[:, part], position_ids=where[..., part], past_key_values=cache))
            assert_close(torch.cat(found, dim=1), whole, **CLOSE)
        # A cache that the model makes, and one that is cropped.
        made = model(ids[:, :65], position_ids=where[..., :65]).past_key_values
        made.crop(-3)
        found = logits(model, ids[:, 62:], position_ids=where[..., 62:], past_key_values=made)
        assert_close(found, whole[:, 62:], **CLOSE)
        # Beside a text, and after one.
        text_alone = torch.arange(70).expand(axes, 1, -1)
        both = logits(model, ids.expand(2, -1), position_ids=torch.cat((text_alone, where), dim=1))
        assert_close(both[1], whole[0], **CLOSE)
        assert_close(both[0], logits(model, ids)[0], **CLOSE)
        shifted = torch.cat((torch.arange(20).expand(axes, 1, -1), 20 + where[..., :50]), dim=2)
        if axes == 4:
            shifted[0] = torch.arange(70)
        after = logits(model, ids, position_ids=shifted)
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        found = logits(model, ids[:, 20:], position_ids=shifted[..., 20:], past_key_values=cache)
        assert_close(found, after[:, 20:], **CLOSE)
    assert torch.equal(logits(model, ids, position_ids=where), plain)


def test_a_cache_of_an_image_that_lost_rows_or_positions(multimodal):
    model, ids = multimodal("qwen2-vl"), text(60)
    with ropewalk.extend(model, MAP):
        cache = DynamicCache(config=model.config)
        model(ids.expand(2, -1), position_ids=of_an_image(60).expand(-1, 2, -1), past_key_values=cache)
        following = of_an_image(60)[..., -1:] + 1
        with pytest.raises(ValueError, match="pass position_ids as well"):
            model.model.language_model(ids[:, :1].expand(2, -1), past_key_values=cache)
        thinner, others = copy.deepcopy(cache), copy.deepcopy(cache)
        pruned(thinner, slice(3, None))
        with pytest.raises(ValueError, match="holds 57 keys, and not the first 57 that it held"):
            model(ids[:, :1].expand(2, -1), position_ids=following.expand(-1, 2, -1), past_key_values=thinner)
        others.layers[0].keys = torch.randn_like(others.layers[0].keys)[:1]
        with pytest.raises(ValueError, match="positions are known of 60 of 2: it was changed since it was read"):
            model(ids[:, :1], position_ids=following, past_key_values=others)


def test_a_thinned_cache_whose_positions_are_told():
    """As keys that were evicted: what is left is where it was."""
    model, ids = shared("llama"), text(60)
    keep = torch.tensor([*range(4), *range(20, 45), *range(48, 50)])
    with extended("llama") as extension:
        # One layer's keys do not hang on those that others lost.
        cache = DynamicCache(config=model.config)
        model(ids[:, :50], past_key_values=cache)
        pruned(cache, keep)
        extension.keep_positions(cache, keep[None])
        positions = torch.arange(50, 60)[None]
        whole = logits(model, ids[:, 50:], position_ids=positions, past_key_values=cache)
        cache = DynamicCache(config=model.config)
        model(ids[:, :50], past_key_values=cache)
        pruned(cache, keep)
        extension.keep_positions(cache, keep[None])
        parts = [
            logits(model, ids[:, at : at + 1], position_ids=torch.tensor([[at]]), past_key_values=cache)
            for at in range(50, 60)
        ]
        assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
        # Where nothing was lost it is the cache as it was.
        cache = DynamicCache(config=model.config)
        model(ids[:, :50], past_key_values=cache)
        extension.keep_positions(cache, torch.arange(50)[None])
        found = logits(model, ids[:, 50:], position_ids=positions, past_key_values=cache)
        assert_close(found, logits(model, ids)[:, 50:], **CLOSE)
        three = torch.arange(60)[None, :, None].expand(-1, -1, 3)
        for wrong in (keep, keep[None], torch.arange(60)[None].float(), [[*range(60)]], None, three):
            with pytest.raises(ValueError, match=r"positions must be an int64 tensor, \(batch, 60\)"):
                extension.keep_positions(cache, wrong)
        with pytest.raises(ValueError, match="positions must be 0 or more, got -1"):
            extension.keep_positions(cache, torch.arange(60)[None] - 1)
        with pytest.raises(ValueError, match="cache must be one of transformers' caches, got NoneType"):
            extension.keep_positions(None, keep[None])
    with pytest.raises(ValueError, match="is not extended"):
        extension.keep_positions(cache, keep[None])
    extension = ropewalk.extend(ALIBI_MODELS["mpt"].build(64), MAP)
    with pytest.raises(ValueError, match="an ALiBi model takes no position_ids"):
        extension.keep_positions(cache, keep[None])


@over_multimodal
def test_what_comes_after_an_image_is_refused(name, multimodal):
    """A cache that was filled before the model was extended: the positions of the answer show what is in it."""
    model, ids = multimodal(name), text(60)
    cache = DynamicCache(config=model.config)
    model(ids, position_ids=of_an_image(60), past_key_values=cache)
    following = torch.tensor(int(of_an_image(60).max()) + 1).expand(3, 1, 1)
    with ropewalk.extend(model, MAP), pytest.raises(ValueError, match="go on at 48, and the cache holds 60 slots"):
        model(ids[:, :1], position_ids=following, past_key_values=cache)


def test_the_positions_of_an_image_are_refused_in_compiled_models(multimodal):
    torch._dynamo.reset()
    model, ids = multimodal("qwen2-vl"), text(60)
    language_model = model.model.language_model
    with ropewalk.extend(model, MAP):
        positions = torch.arange(60).expand(3, 1, -1)
        expected = language_model(ids, position_ids=positions, use_cache=False)[0]
        outer = torch.compile(lambda **given: language_model(**given)[0], backend="aot_eager")
        assert_close(outer(input_ids=ids, position_ids=positions, use_cache=False), expected, **CLOSE)
        with pytest.raises(ValueError, match=r"torch\.compile traces text alone: call the model without it"):
            outer(input_ids=ids, position_ids=of_an_image(60), use_cache=False)
    torch._dynamo.reset()


def pruned(cache, keep):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep].clone(), layer.values[:, :, keep].clone()
    return cache


KEPT = {
    "the middle is gone": [*range(4), *range(30, 50)],
    "the beginning is gone": [*range(10, 50)],
    "one key is gone": [*range(20), *range(21, 50)],
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_caches_whose_slots_are_not_positions_are_refused(kept, new, masked):
    model, ids = shared("llama"), text(50)
    slots = len(KEPT[kept])
    with extended("llama"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        pruned(cache, torch.tensor(KEPT[kept]))
        more = {"attention_mask": torch.ones(1, slots + new, dtype=torch.long)} if masked else {}
        positions = torch.arange(50, 50 + new)[None]
        with pytest.raises(ValueError, match=f"holds {slots} keys, and not the first {slots} that it held"):
            model(ids[:, :new], position_ids=positions, past_key_values=cache, **more)


CROPS = {
    "crop": lambda cache: cache.crop(-5),
    "a copy, crop": lambda cache: copy.deepcopy(cache).crop(-5),
    "reorder, crop": lambda cache: (cache.reorder_cache(torch.tensor([1, 0])), cache.crop(-5)),
    "select, crop": lambda cache: (cache.batch_select_indices(torch.tensor([1])), cache.crop(-5)),
    "repeat, crop": lambda cache: (cache.batch_repeat_interleave(2), cache.crop(-5)),
    "crop and copy": lambda cache: pruned(cache, slice(0, 55)),
    "reset": lambda cache: cache.crop(-60),
}


@pytest.mark.parametrize("change", CROPS)
def test_a_cache_that_lost_its_last_keys_goes_on(change):
    model, ids = shared("llama"), text(60, batch=2)
    with extended("llama"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        CROPS[change](cache)
        assert logits(model, text(4, batch=len(cache.layers[0].keys)), past_key_values=cache).isfinite().all()


def test_a_cache_that_holds_another_text_goes_on():
    """What was noted of it is of no use then: nothing is refused, and nothing old is kept."""
    model, ids, others = shared("llama"), text(50), text(40, seed=5)
    with extended("llama"):
        expected = logits(model, torch.cat((others, ids[:, :4]), dim=1))[:, 40:]
        cache, prefix = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model(others, past_key_values=prefix)
        for layer, its in zip(cache.layers, prefix.layers, strict=True):
            layer.keys, layer.values = its.keys.half().float(), its.values.half().float()
        assert_close(logits(model, ids[:, :4], past_key_values=cache), expected, rtol=0, atol=0.05)
        # Filled by compiled passes, which note nothing, or while the model was not extended.
        for fill in (torch.compile(model, backend="eager"), None):
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            cache.crop(-50)
            if fill is None:
                ropewalk.restore(model)
            (model if fill is None else fill)(others[:, :20], past_key_values=cache)
            if fill is None:
                extended("llama")
            assert logits(model, others[:, 20:], past_key_values=cache).isfinite().all()
        ropewalk.restore(model)
        keys = [weakref.ref(layer.keys) for layer in cache.layers]
        cache.crop(-100)
        for layer in cache.layers:
            layer.keys = layer.values = None
        assert all(key() is None for key in keys)
    torch._dynamo.reset()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["llama", "mpt", "falcon", "gptj"])
@pytest.mark.parametrize("kept", KEPT)
def test_pruned_caches_are_refused_where_no_positions_are_given(name, kept, own):
    """The model would go on from the number of slots; whoever made the cache."""
    model, ids = {**TINY_MODELS, **ALIBI_MODELS}[name].build(64), text(50)
    with ropewalk.extend(model, MAP, trained_window=64) as extension:
        made = None if own else DynamicCache(config=model.config)
        cache = model(ids, past_key_values=made, use_cache=True).past_key_values
        pruned(cache, torch.tensor(KEPT[kept]))
        for new in (1, 3):
            with pytest.raises(ValueError, match=f"holds {len(KEPT[kept])} keys, and not the first"):
                model(ids[:, :new], past_key_values=cache)
        if name != "mpt":
            extension.keep_positions(cache, torch.tensor(KEPT[kept])[None])
            model(ids[:, :3], position_ids=torch.arange(50, 53)[None], past_key_values=cache)
            pruned(cache, slice(2, None))
            with pytest.raises(ValueError, match="and not the first"):
                model(ids[:, :1], position_ids=torch.tensor([[53]]), past_key_values=cache)


def test_layers_that_slide_do_not_hide_what_others_lost():
    """They count the tokens that they have seen, in Gemma's order in the first layer."""
    model, ids = shared("gemma3"), text(60)
    assert model.config.layer_types[0] == "sliding_attention"
    following = {"position_ids": torch.arange(50, 60)[None]}

    def cut(keep):
        cache = DynamicCache(config=model.config)
        model(ids[:, :50], past_key_values=cache)
        layer = cache.layers[1]
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
        return cache

    with extended("gemma3") as extension:
        for given in ({}, following):
            with pytest.raises(ValueError, match="holds 24 keys, and not the first 24"):
                model(ids[:, 50:], past_key_values=cut(torch.tensor(KEPT["the middle is gone"])), **given)
        # All of them, in another order: whether a key is told its position is all that counts.
        order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
        extension.keep_positions(cache := cut(order), order[None])
        assert_close(
            logits(model, ids[:, 50:], past_key_values=cache, **following), logits(model, ids)[:, 50:], **CLOSE
        )


def as_on_a_device(model):
    """The hook of an extended model, which then takes tokens to lie where reading them would wait."""
    [hook] = [hook for hook in model.model._forward_pre_hooks.values() if isinstance(hook, Inputs)]
    hook.decodes_fused = True


@pytest.mark.parametrize("kept", KEPT)
def test_pruned_caches_are_refused_on_a_device(kept):
    """Where the positions of single tokens are read only when the cache is not as the last pass left it."""
    model, ids = shared("llama"), text(60)
    with extended("llama"):
        expected = logits(model, ids)
        as_on_a_device(model)
        cache = DynamicCache(config=model.config)
        parts = [logits(model, ids[:, :47], past_key_values=cache)]
        for step in (47, 48, 49):
            arguments = {"position_ids": torch.tensor([[step]]), "past_key_values": cache}
            parts.append(logits(model, ids[:, step : step + 1], **arguments))
        assert_close(torch.cat(parts, dim=1), expected[:, :50], **CLOSE)
        cache.crop(-3)  # positions are read, and are right
        position = torch.tensor([[47]])
        assert_close(logits(model, ids[:, 47:48], position_ids=position, past_key_values=cache), parts[1], **CLOSE)
        logits(model, ids[:, 48:50], past_key_values=cache)
        pruned(cache, torch.tensor(KEPT[kept]))
        with pytest.raises(ValueError, match=f"holds {len(KEPT[kept])} keys, and not the first"):
            model(ids[:, :1], position_ids=torch.tensor([[50]]), past_key_values=cache)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("on_a_device", [False, True])
def test_caches_that_are_compressed_as_they_are_read_are_refused(on_a_device, own):
    """As by hooks of the attention layers, before the pass is done: what it leaves is then no whole cache."""
    model, ids, keep = shared("llama"), text(60), torch.tensor(KEPT["the middle is gone"])
    with extended("llama") as extension:
        if on_a_device:
            as_on_a_device(model)
        expected = model(ids[:, :50], use_cache=True).past_key_values
        pruned(expected, keep)
        extension.keep_positions(expected, keep[None])

        def compress(layer, args, kwargs, output):
            kept = kwargs["past_key_values"].layers[layer.layer_idx]
            kept.keys, kept.values = kept.keys[:, :, keep], kept.values[:, :, keep]

        hooks = [layer.self_attn.register_forward_hook(compress, with_kwargs=True) for layer in model.model.layers]
        cache = None if own else DynamicCache(config=model.config)
        cache = model(ids[:, :50], past_key_values=cache, use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        for new in (1, 3):
            for given in ({}, {"position_ids": torch.arange(50, 50 + new)[None]}):
                with pytest.raises(ValueError, match=f"holds {len(keep)} keys of 50 tokens .*keep_positions"):
                    model(ids[:, 50 : 50 + new], past_key_values=cache, **given)
        extension.keep_positions(cache, keep[None])
        following = {"position_ids": torch.arange(50, 60)[None]}
        assert_close(
            logits(model, ids[:, 50:], past_key_values=cache, **following),
            logits(model, ids[:, 50:], past_key_values=expected, **following),
            **CLOSE,
        )
        cache.crop(-100)  # empty: another text
        assert logits(model, ids, past_key_values=cache).isfinite().all()


def test_positions_that_follow_the_cache():
    model, ids = shared("llama"), text(60)
    with extended("llama"):
        expected = logits(model, ids)
        for make in (DynamicCache, lambda config: StaticCache(config=config, max_cache_len=70)):
            cache, parts = make(config=model.config), []
            for begin, end in ((0, 30), (30, 31), (31, 60)):
                positions = torch.arange(begin, end)[None]
                parts.append(logits(model, ids[:, begin:end], position_ids=positions, past_key_values=cache))
            assert_close(torch.cat(parts, dim=1), expected, **CLOSE)


def test_positions_may_count_slots_or_tokens():
    model, texts = shared("llama"), rows()
    ids, mask = left_padded(texts, 50)
    with extended("llama"):
        expected = logits(model, ids, attention_mask=mask, position_ids=counted(mask))
        for positions in (counted(mask), torch.arange(50).expand(3, -1)):
            cache = DynamicCache(config=model.config)
            parts = [
                logits(
                    model,
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    past_key_values=cache,
                )
                for begin, end in ((0, 20), (20, 45), (45, 46), (46, 50))
            ]
            actual = torch.cat(parts, dim=1)
            for row in range(3):
                assert_close(actual[row, mask[row].bool()], expected[row, mask[row].bool()], **CLOSE)


@pytest.mark.parametrize("new", [1, 5])
def test_a_mask_of_the_new_tokens_alone_is_refused(new):
    """transformers takes it for the first tokens of the text, and hides all others without a word."""
    model, ids = shared("llama"), text(30)
    mask = torch.ones(1, new, dtype=torch.long)
    expected = logits(model, ids)
    cache = DynamicCache(config=model.config)
    model(ids[:, : 30 - new], past_key_values=cache)
    unmodified = logits(model, ids[:, 30 - new :], past_key_values=cache, attention_mask=mask)
    assert (unmodified - expected[:, 30 - new :]).abs().max() > 1
    with extended("llama"):
        cache = DynamicCache(config=model.config)
        model(ids[:, : 30 - new], past_key_values=cache)
        with pytest.raises(ValueError, match=f"attention_mask has {new} columns, and there are 30 tokens"):
            model(ids[:, 30 - new :], past_key_values=cache, attention_mask=mask)


def gaps(tokens=40):
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, 10:18] = 0
    return mask


@pytest.mark.parametrize("how", ["a forward pass", "generate", "a second part"])
def test_gaps_in_a_static_cache_are_refused_before_a_step(how, monkeypatch):
    """As on a CUDA device, where a decode step would find them out of the host's sight."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, ids, mask = shared("llama"), text(40, batch=2), gaps()
    cache = StaticCache(config=model.config, max_cache_len=60)
    arguments = {"attention_mask": mask, "position_ids": counted(mask), "past_key_values": cache}
    act = {
        "a forward pass": lambda: model(ids, **arguments),
        "generate": lambda: model.generate(ids, attention_mask=mask, cache_implementation="static", max_new_tokens=2),
        "a second part": lambda: model(ids[:, 9:], **{**arguments, "position_ids": counted(mask)[:, 9:]}),
    }[how]
    if how == "a second part":
        model(ids[:, :9], past_key_values=cache)
    with extended("llama", impl="fused"), pytest.raises(ValueError, match=r"attention_mask has gaps.* a dynamic cache"):
        act()


def test_gaps_in_a_static_cache_are_served_elsewhere():
    model, ids, mask = shared("llama"), text(40, batch=2), gaps()
    with extended("llama"):
        found = [
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation=kind)
            for kind in ("dynamic", "static")
        ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss", "qwen2-sliding"])
@pytest.mark.parametrize("parts", [(57, 13), (67, 1, 1, 1), (70,)], ids=str)
def test_gaps_in_a_cache_that_drops_keys_of_windows(name, parts):
    """A window counts tokens: where slots without one lie among them, only a cache with every key has what it needs."""
    model, alone = shared(name), text(60)
    mask = torch.ones(1, 70, dtype=torch.long)
    mask[0, 45:55] = 0
    ids = torch.zeros(1, 70, dtype=torch.long).masked_scatter(mask.bool(), alone)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def read(cache):
        found, begin = [], 0
        for size in parts:
            end = begin + size
            arguments = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            found.append(model(ids[:, begin:end], past_key_values=cache, **arguments).logits)
            begin = end
        return torch.cat(found, dim=1)[mask.bool()]

    with extended(name):
        assert_close(read(DynamicCache()), logits(model, alone)[0], **CLOSE)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=100)):
            with pytest.raises(
                ValueError, match=r"has gaps.* drops keys by their slots.* pass past_key_values=Dynamic"
            ):
                read(cache)


def test_a_mask_with_more_columns_than_tokens():
    model, ids = shared("llama"), text(50)
    with extended("llama"), pytest.raises(ValueError, match="attention_mask is for 60 tokens, and there are 50"):
        model(ids, attention_mask=torch.ones(1, 60, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "deepseek-v3"])
@pytest.mark.parametrize("cached", [False, True])
def test_autocast(name, cached):
    """Queries, keys and values come in different dtypes, and torch's own attention makes them one."""
    model, ids = shared(name), text(60)
    with extended(name, enforce_limit=False):
        expected = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            cache = DynamicCache(config=model.config) if cached else None
            found = model(ids, past_key_values=cache, use_cache=cached).logits
            parts = in_chunks(model, ids, (40, 1)) if cached else found
    spread = expected.std()
    assert (found.float() - expected).abs().mean() < 0.1 * spread
    assert (parts.float() - expected).abs().mean() < 0.1 * spread


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3", "qwen2-sliding"])
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_windows_that_are_disabled_is_refused(name, static):
    model, ids = shared(name), text(50)
    options = {"max_cache_len": 60} if static else {}
    kind = StaticCache if static else DynamicCache
    cache = kind(config=model.config, **options)
    with extended(name, sliding_window="disable"):
        with pytest.raises(ValueError, match=r"keeps 2\d tokens of a sliding window that is disabled"):
            model(ids, past_key_values=cache)
        model(ids, past_key_values=kind(config=model.config, **options))


def test_embeddings_instead_of_tokens():
    model, ids = tiny_model("llama"), text(50)
    with ropewalk.extend(model, MAP):
        expected = logits(model, ids)
        embedded = model.model.embed_tokens(ids)
        assert_close(model(inputs_embeds=embedded).logits, expected, **CLOSE)
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embedded[:, :30], past_key_values=cache)
        with pytest.raises(ValueError, match="go on at 7, and the cache holds 30 slots"):
            model(inputs_embeds=embedded[:, 30:], position_ids=torch.arange(7, 27)[None], past_key_values=cache)


def test_arguments_by_position():
    model, ids = tiny_model("llama"), text(50)
    with ropewalk.extend(model, MAP):
        cache = DynamicCache(config=model.config)
        model.model(ids, None, torch.arange(50)[None], cache)
        with pytest.raises(ValueError, match="go on at 60, and the cache holds 50 slots"):
            model.model(ids[:, :3], None, torch.arange(60, 63)[None], cache)


UNSEEN = {  # whose attention modules are not given the positions
    "falcon, rotary": "an adapter",
    "gptj": "an adapter, a table",
    "codegen": "an adapter, a table",
    "gpt_neox_japanese": "an adapter",
    "persimmon": "a part of each head",
    "llama4_text": "chunks in most layers",
    "qwen2_vl": "axes",
    "glm4v": "axes",
    "llama": "given them",
}


@pytest.mark.parametrize("name", UNSEEN)
def test_positions_that_do_not_count_tokens_are_refused_whoever_is_given_them(name):
    model, ids, count = ZOO[name].tiny.build(64), text(40) % 90, torch.arange(40)[None]
    mask = torch.ones_like(ids)
    mask[:, 10:16] = 0
    with ropewalk.extend(model, MAP, trained_window=64):
        expected = logits(model, ids)
        assert_close(logits(model, ids, position_ids=count), expected, **CLOSE)
        for wrong in (torch.where(count > 20, count + 5, count), 2 * count, torch.where(count > 20, count - 21, count)):
            with pytest.raises(ValueError, match="position_ids must count the tokens of each row one by one"):
                logits(model, ids, position_ids=wrong)
        with pytest.raises(
            ValueError, match=r"pass position_ids that count the tokens|must count the tokens of each row"
        ):
            logits(model.get_decoder(), ids, attention_mask=mask)
        if name != "llama4_text":  # whose chunks are transformers', which has them count slots
            counting = (mask.cumsum(1) - 1).clamp(min=0)
            found = logits(model, ids, attention_mask=mask, position_ids=counting)[:, mask[0].bool()]
            assert_close(found, logits(model, ids[:, mask[0].bool()]), **CLOSE)


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_a_text_past_a_table_is_told_by_its_length(name):
    with extended(name, ropewalk.SelfExtend(4, 8)), pytest.raises(ropewalk.LengthError, match="300 tokens is past"):
        shared(name)(text(300))
    with extended(name, ropewalk.SelfExtend(4, 8), enforce_limit=False):
        tables = [module.embed_positions for module in shared(name).modules() if hasattr(module, "embed_positions")]
        with pytest.raises(ValueError, match=f"past the table of rotations for {len(tables[0])} positions"):
            shared(name)(text(len(tables[0]) + 1))


@pytest.mark.parametrize("name", ["llama", "gptj", "codegen", "gpt-neox-japanese", "falcon", "bloom", "mpt"])
def test_attention_dropout_is_refused_in_every_model(name):
    names = ("attn_pdrop", "attention_dropout")
    tiny = {**TINY_MODELS, **ALIBI_MODELS}[name]
    config = tiny.build(64).config
    changes = {one: 0.5 for one in names if hasattr(config, one)} or {"attn_config": {"attn_pdrop": 1}}
    model = tiny.build(64, **changes)
    with ropewalk.extend(model, MAP, trained_window=64):
        model.train()
        with pytest.raises(ValueError, match=r"attention dropout of (0\.5|1\.0) is not supported"):
            model(text(20))


def image_cache(model, rows=1):
    cache = DynamicCache(config=model.config)
    ids = text(60, batch=rows)
    model(ids, position_ids=of_an_image(60).expand(-1, rows, -1), past_key_values=cache)
    return cache


FOLLOWING = torch.tensor(int(of_an_image(60).max()) + 1) + torch.arange(4).expand(3, 1, -1)


@over_multimodal
def test_positions_of_images_follow_the_rows_of_a_cache(name, multimodal):
    """Rows that were put in another order, chosen, or repeated, as by beam search."""
    model, new = multimodal(name), text(4, batch=2, seed=1)
    where = torch.cat((of_an_image(60), torch.arange(60).expand(3, 1, -1)), dim=1)
    following = torch.cat((FOLLOWING, 60 + torch.arange(4).expand(3, 1, -1)), dim=1)
    with ropewalk.extend(model, MAP):

        def read(change, rows):
            cache = DynamicCache(config=model.config)
            model(text(60, batch=2), position_ids=where, past_key_values=cache)
            change(cache)
            return logits(model, new[rows], position_ids=following[:, rows], past_key_values=cache)

        expected = read(lambda cache: None, [0, 1])
        assert_close(read(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]), expected[[1, 0]], **CLOSE)
        assert_close(read(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]), expected[[1]], **CLOSE)
        repeated = read(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
        assert_close(repeated, expected[[0, 0, 1, 1]], **CLOSE)


@over_multimodal
def test_positions_that_are_told_on_one_axis_are_those_of_all(name, multimodal):
    model, ids = multimodal(name), text(60)
    where = torch.cat((torch.arange(20).expand(3, 1, -1), 20 + of_an_image(40)), dim=2)
    with ropewalk.extend(model, MAP) as extension:
        expected = logits(model, ids, position_ids=where)[:, 20:]
        for told in (torch.arange(20)[None], torch.arange(20)[None, :, None].expand(-1, -1, 3)):
            cache = DynamicCache(config=model.config)
            model(ids[:, :20], past_key_values=cache)
            extension.keep_positions(cache, told)
            assert_close(
                logits(model, ids[:, 20:], position_ids=where[..., 20:], past_key_values=cache), expected, **CLOSE
            )
        with pytest.raises(ValueError, match="position_ids must be 0 or more, got -1"):
            model(ids, position_ids=where - 1)


def test_maps_that_leave_keys_out_take_no_images(multimodal):
    model, ids = multimodal("qwen2-vl"), text(60)
    for position_map in (ropewalk.StreamingLLM(4, 12), ropewalk.LMInfinite(4, 12)):
        with ropewalk.extend(model, position_map):
            model(ids)
            with pytest.raises(ValueError, match="leaves keys out, and a patch of an image"):
                model(ids, position_ids=of_an_image(60))
    with ropewalk.extend(model, ropewalk.SlidingWindow(12)):
        assert logits(model, ids, position_ids=of_an_image(60)).isfinite().all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_emptied_cache_of_an_image_takes_a_text(kind, multimodal):
    model, ids = multimodal("qwen2-vl"), text(50)
    text_config = model.config.get_text_config()
    cache = DynamicCache(config=text_config) if kind == "dynamic" else StaticCache(config=text_config, max_cache_len=90)
    with ropewalk.extend(model, MAP):
        model(text(60), position_ids=of_an_image(60), past_key_values=cache)
        cache.crop(-60) if kind == "dynamic" else cache.reset()
        found = logits(model, ids, position_ids=torch.arange(50).expand(3, 1, -1), past_key_values=cache)
        assert_close(found, logits(model, ids), **CLOSE)


@over_multimodal
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_images_under_checkpointing(name, reentrant, multimodal):
    """What is computed anew for its gradient is computed where it was, though another pass came between; in another
    thread too, as on a GPU."""
    model, ids = multimodal(name), text(60)
    other = torch.cat(
        (of_an_image(60)[..., 30:] - of_an_image(60)[..., 30:].min(), of_an_image(60)[..., :30] + 80), dim=2
    )
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight

    def gradient(checkpointing):
        model.zero_grad()
        model.train()
        weight.requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        try:
            with torch.enable_grad():
                one = model(ids, position_ids=of_an_image(60), use_cache=False).logits.square().mean()
                two = model(ids, position_ids=other, use_cache=False).logits.square().mean()
                thread = threading.Thread(target=(one + 2 * two).backward)
                thread.start()
                thread.join()
            return weight.grad.clone()
        finally:
            hook.remove()
            model.gradient_checkpointing_disable()
            model.eval()
            model.requires_grad_(False)

    with ropewalk.extend(model, MAP, enforce_limit=False):
        expected = gradient(False)
        assert expected.abs().max() > 0
        assert_close(gradient(True), expected, rtol=1e-4, atol=1e-6)


def test_compiled_passes_see_positions_that_are_no_slots(multimodal):
    """They are refused, whatever is read: by an image before, by keys that are gone, by a mask with gaps."""
    torch._dynamo.reset()
    model, ids = multimodal("qwen2-vl"), text(4, seed=1)
    compiled = torch.compile(model, backend="eager")
    with ropewalk.extend(model, MAP):
        for tokens in (1, 4):
            with pytest.raises(
                ValueError, match=r"positions are not their slots, and torch\.compile traces text alone"
            ):
                compiled(ids[:, :tokens], position_ids=FOLLOWING[..., :tokens], past_key_values=image_cache(model))
    torch._dynamo.reset()
    model, keep = shared("llama"), torch.tensor(KEPT["the middle is gone"])
    compiled = torch.compile(model, backend="eager")
    with extended("llama") as extension:
        for told in (False, True):
            for tokens in (1, 4):
                cache = DynamicCache(config=model.config)
                model(text(50), past_key_values=cache)
                pruned(cache, keep)
                if told:
                    extension.keep_positions(cache, keep[None])
                positions = torch.arange(50, 50 + tokens)[None]
                with pytest.raises(
                    ValueError, match="traces text alone" if told else "go on at 50, and the cache holds 24"
                ):
                    compiled(ids[:, :tokens], position_ids=positions, past_key_values=cache)
    torch._dynamo.reset()
    model = ZOO["falcon, rotary"].tiny.build(64)
    compiled = torch.compile(model, backend="eager")
    gaps = torch.ones(1, 40, dtype=torch.long)
    gaps[:, 10:16] = 0
    with ropewalk.extend(model, MAP, trained_window=64):
        assert_close(compiled(text(40) % 90).logits, logits(model, text(40) % 90), **CLOSE)
        with pytest.raises(ValueError, match="attention_mask has gaps"):
            compiled(text(40) % 90, attention_mask=gaps)
        with pytest.raises(ValueError, match="position_ids must count the tokens"):
            compiled(text(40) % 90, position_ids=2 * torch.arange(40)[None])
    torch._dynamo.reset()
