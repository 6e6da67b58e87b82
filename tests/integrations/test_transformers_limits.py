# SPDX-License-Identifier: Apache-2.0
"""Lengths that a map reaches (eq. 4 and 5 of SelfExtend), query scaling, and what a handle says."""

import math
import re
import warnings

import pytest
import torch
from naive import naive_attention
from tiny import CLOSE, MAP, extended, logits, shared, text
from torch.testing import assert_close
from transformers import DynamicCache

import ropewalk
from ropewalk import SELF, LengthError, SelfExtend
from ropewalk.testing import tiny_model

# On a trained window of 64: relative positions reach 63 at 120 tokens.
SHORT = SelfExtend(group_size=2, window=8)
LONGEST = SHORT.max_length(64)
RECOMMENDED = SHORT.recommended_length(64)


def test_the_lengths_of_these_tests():
    assert LONGEST == (64 - 8) * 2 + 8
    assert RECOMMENDED < LONGEST


@pytest.mark.parametrize("target", [LONGEST + 1, 2 * LONGEST])
def test_a_target_past_eq_4_is_an_error(target):
    with pytest.raises(LengthError) as error:
        ropewalk.extend(shared("llama"), SHORT, target_length=target)
    message = str(error.value)
    assert f"a text of {target} tokens is past what SelfExtend(group_size=2, window=8)" in message
    assert f"on a trained window of 64: {LONGEST} tokens (eq. 4)" in message
    suggested = SelfExtend.for_length(target, 64)
    assert f"{suggested} would do." in message
    assert suggested.meets_rule(target, 64)
    with pytest.raises(ValueError, match="not extended"):
        ropewalk.restore(shared("llama"))


def test_a_target_that_nothing_reaches():
    with pytest.raises(LengthError, match="SelfExtend cannot reach a target length of 100000 tokens"):
        ropewalk.extend(shared("llama"), target_length=100_000)
    with pytest.raises(LengthError, match=r"None keeps it inside half the trained window \(eq. 5\)"):
        ropewalk.extend(shared("llama"), SHORT, target_length=100_000)


class Careless(SelfExtend):
    """A map of somebody else's that does not keep to eq. 5."""

    @classmethod
    def for_length(cls, target_length, trained_window):
        return cls(2, 8)


def test_what_is_in_use_is_not_suggested():
    with (
        extended("llama", Careless.for_length(70, 64)) as extension,
        pytest.warns(UserWarning, match=re.escape(f"{Careless(2, 8)} is recommended up to {RECOMMENDED}")) as caught,
    ):
        shared("llama")(text(70))
    assert extension.recommended_length == RECOMMENDED
    assert str(caught[0].message).endswith(f"(eq. 5). {SelfExtend.for_length(70, 64)} would do.")


@pytest.mark.filterwarnings("ignore:a text of")
def test_a_prompt_past_eq_4_is_an_error():
    model = shared("llama")
    with extended("llama", SHORT):
        model(text(LONGEST))
        with pytest.raises(LengthError, match=rf"a text of {LONGEST + 1} tokens .* {LONGEST} tokens \(eq. 4\)"):
            model(text(LONGEST + 1))
        with pytest.raises(LengthError, match=r"\(eq. 4\)"):
            model.generate(text(LONGEST + 1), attention_mask=torch.ones(1, LONGEST + 1), max_new_tokens=1)
        # Padding is not text.
        ids, mask = text(LONGEST + 9), torch.ones(1, LONGEST + 9, dtype=torch.long)
        mask[:, :9] = 0
        model(ids, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:a text of")
def test_decoding_past_eq_4_is_an_error():
    model, ids = shared("llama"), text(LONGEST)
    with extended("llama", SHORT):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        with pytest.raises(LengthError, match=f"a text of {LONGEST + 1} tokens"):
            model(ids[:, :1], past_key_values=cache)


def test_the_limit_can_be_lifted():
    model, ids = shared("llama"), text(LONGEST + 20)
    with naive_attention(model, "llama", SHORT):
        expected = logits(model, ids)
    with extended("llama", SHORT, enforce_limit=False), pytest.warns(UserWarning, match="eq. 5"):
        assert_close(logits(model, ids), expected, rtol=0, atol=1e-3)


def test_past_eq_5_is_one_warning_at_the_users_line():
    model = shared("llama")
    with extended("llama", SHORT):
        model(text(RECOMMENDED))
        with pytest.warns(UserWarning, match="a text of") as caught:
            model(text(RECOMMENDED + 1))
        (warning,) = caught
        assert f"{SHORT} is recommended up to {RECOMMENDED} tokens (eq. 5)" in str(warning.message)
        assert f"{SelfExtend.for_length(RECOMMENDED + 1, 64)} would do." in str(warning.message)
        assert warning.filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(text(RECOMMENDED + 2))
    with pytest.warns(UserWarning, match="eq. 5") as caught:
        ropewalk.extend(model, SHORT, target_length=RECOMMENDED + 1).restore()
    assert caught[0].filename == __file__
    arguments = {"attention_mask": torch.ones(1, RECOMMENDED), "max_new_tokens": 3, "do_sample": False}
    with extended("llama", SHORT), pytest.warns(UserWarning, match="eq. 5") as caught:
        model.generate(text(RECOMMENDED), **arguments)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("kind", [None, SelfExtend, SELF])
@pytest.mark.parametrize("target", [100, 200])
def test_a_target_chooses_the_parameters(kind, target):
    model = tiny_model("llama", trained_window=256)
    with ropewalk.extend(model, kind, target_length=target) as extension:
        assert extension.position_map == (kind or SelfExtend).for_length(target, 256)
        assert extension.recommended_length >= target
        model(text(target))  # without a warning, which would be an error here


def test_the_trained_window_can_be_given():
    with ropewalk.extend(shared("llama"), target_length=60, trained_window=32) as extension:
        assert extension.position_map == SelfExtend.for_length(60, 32)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("log-n", lambda m: max(1.0, math.log(m + 1) / math.log(64))),
        ("yarn", lambda m: (0.1 * math.log(m / 64) + 1) ** 2 if m > 64 else 1.0),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3"])
def test_query_scaling(name, kind, factor):
    model, ids = shared(name), text(78)
    factors = torch.tensor([factor(m) for m in range(78)]).double()
    with naive_attention(model, name, MAP, query_factors=factors):
        expected = logits(model, ids)
    with extended(name):
        without = logits(model, ids)
    with extended(name, query_scaling=kind) as extension:
        actual = logits(model, ids)
        assert f"query scaling    {kind}" in str(extension)
    assert_close(actual, expected, rtol=0, atol=1e-3)
    assert torch.equal(actual[:, :64], without[:, :64])
    assert (actual[:, 70:] - without[:, 70:]).abs().max() > 1e-3


def test_query_scaling_while_decoding():
    model, ids = shared("llama"), text(78)
    with extended("llama", query_scaling="log-n"):
        cache = DynamicCache(config=model.config)
        parts = [logits(model, part, past_key_values=cache) for part in ids.split([60, 3, 11, 1, 1, 1, 1], dim=1)]
        assert_close(torch.cat(parts, dim=1), logits(model, ids), **CLOSE)


def test_the_handle_says_what_was_done():
    with extended("gemma3") as extension:
        facts = str(extension)
        assert [layer.extended for layer in extension.layers] == [False, True]
        assert [layer.name for layer in extension.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert facts.splitlines() == [
        "Gemma3ForCausalLM under SelfExtend(group_size=3, window=8)",
        "  trained window   64 tokens",
        f"  reaches          {MAP.max_length(64)} tokens (eq. 4), recommended {MAP.recommended_length(64)} (eq. 5)",
        "  layers           1 of 2 extended",
        "                   1 left alone: sliding window of 24 tokens",
        "  rotary           half-split, 16 dimensions, periods from 6.28 to 1.99e+04; "
        "half-split, 16 dimensions, periods from 6.28 to 1.12e+06",
        "  implementation   auto",
    ]


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("gpt-neox", "half-split, 4 of 16 dimensions"),
        ("glm", "interleaved, 8 of 16 dimensions"),
        ("smollm3", "1 left alone: no rotary embedding"),
        ("llama", "2 of 2 extended"),
    ],
)
def test_facts_of_models(name, fact):
    with extended(name) as extension:
        assert fact in str(extension)


def test_the_handle_is_a_record():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP, impl="blocks") as extension:
        assert extension.model is model
        assert extension.position_map == MAP
        assert (extension.trained_window, extension.impl) == (64, "blocks")
        assert extension.max_length == MAP.max_length(64)
        assert "implementation   blocks" in str(extension)
        assert len(repr(extension)) < 1000
