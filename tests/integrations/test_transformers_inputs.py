# SPDX-License-Identifier: Apache-2.0
"""What a forward pass of an extended model is given: taken, or refused before anything is computed."""

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
from ropewalk.testing import tiny_model

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
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="positions are known of 60 of 2: it was changed since it was read"):
            model(ids[:, :1], position_ids=following, past_key_values=cache)


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
        for wrong in (keep, keep[None], torch.arange(60)[None].float()):
            with pytest.raises(ValueError, match=r"positions must be int64, \(batch, 60\)"):
                extension.keep_positions(cache, wrong)


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
        with pytest.raises(ValueError, match=f"go on at 50, and the cache holds {slots} slots before them"):
            model(ids[:, :new], position_ids=positions, past_key_values=cache, **more)


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
        with pytest.raises(ValueError, match=f"go on at 50, and the cache holds {len(KEPT[kept])} slots"):
            model(ids[:, :1], position_ids=torch.tensor([[50]]), past_key_values=cache)


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
