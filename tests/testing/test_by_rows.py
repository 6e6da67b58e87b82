# SPDX-License-Identifier: Apache-2.0
"""What the matrix is held to is the model itself: unmodified where a map changes nothing, otherwise as it would be."""

import pytest
import torch
from torch.testing import assert_close

from ropewalk import SELF, DualChunk, Identity, SelfExtend, StreamingLLM
from ropewalk.testing.by_rows import NotComputableError, logits_by_rows, output_of
from ropewalk.testing.zoo import ZOO

TOKENS = 60
# Rotary half-split and interleaved, of a part, latent, from a table; a softcap and sinks; windows, chunks; ALiBi.
MODELS = [
    "llama",
    "cohere",
    "phi",
    "deepseek_v3",
    "gptj",
    "gemma2",
    "gpt_oss",
    "llama4_text",
    "bloom",
    "mpt",
    "falcon, ALiBi",
    "falcon, rotary",
]
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def model(name, **changes):
    return ZOO[name].tiny.build(128, dtype=torch.float64, **changes)


def text(tokens=TOKENS):
    return torch.randint(1, 88, (1, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_map_that_changes_nothing(name):
    expected = output_of(model(name)(text()))
    for position_map in (Identity(), SelfExtend(4, TOKENS), DualChunk(TOKENS, 8)):
        assert_close(logits_by_rows(model(name), text(), position_map), expected, **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_a_map_that_changes_something(name):
    # Up to the window all is as it was, and what comes after it is not.
    plain, window = output_of(model(name)(text())), 16
    for position_map in (SelfExtend(4, window), SelfExtend(3, window)):
        mapped = logits_by_rows(model(name), text(), position_map)
        assert_close(mapped[:, :window], plain[:, :window], **EXACT)
        assert (mapped - plain)[:, window:].abs().max() > 0.1
        plain = mapped  # nor is one group size the other


def test_a_text_at_the_positions_of_a_band():
    # With one token as neighbor and groups of two, the last token sees all others as in a text of half the positions.
    ids = text(TOKENS + 1)
    positions = torch.arange(TOKENS + 1) // 2
    positions[-1] += 1  # the neighbor window, 1, less 1 // 2
    one_layer = model("llama", num_hidden_layers=1)
    expected = one_layer(ids, position_ids=positions[None], attention_mask=torch.ones_like(ids)).logits
    actual = logits_by_rows(model("llama", num_hidden_layers=1), ids, SelfExtend(2, 1))
    assert_close(actual[:, -1], expected[:, -1], rtol=0, atol=1e-5)


def test_windows_that_are_turned_off():
    without = output_of(model("gemma2", layer_types=["full_attention"] * 2)(text()))
    within = output_of(model("gemma2")(text()))
    assert (without - within).abs().max() > 0.1
    assert_close(logits_by_rows(model("gemma2"), text(), Identity(), everywhere=True), without, **EXACT)


def test_positions_with_axes():
    # Where all axes agree, so do the numbers; a picture's do not.
    axes = torch.arange(TOKENS).expand(3, -1)
    for position_map in (SelfExtend(4, 16), SELF(6, 0.7, 8, "distance")):
        expected = logits_by_rows(model("qwen2_vl"), text(), position_map)
        assert_close(logits_by_rows(model("qwen2_vl"), text(), position_map, positions=axes), expected, **EXACT)
    picture = torch.stack((axes[0], axes[0], axes[0] // 2))
    mapped = logits_by_rows(model("qwen2_vl"), text(), SelfExtend(4, 16), positions=picture)
    plain = model("qwen2_vl")(text(), position_ids=picture[:, None]).logits
    assert_close(mapped[:, :16], plain[:, :16], **EXACT)
    assert (mapped - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpt2", "positions matter elsewhere"), ("mamba", "does not multiply queries and keys")],
)
def test_models_that_cannot_be_computed_so(name, message):
    with pytest.raises(NotComputableError, match=message):
        logits_by_rows(model(name), text(), SelfExtend(4, 16))


@pytest.mark.parametrize("position_map", [StreamingLLM(4, 16), SelfExtend(4, 16, start=3)], ids=str)
def test_maps_that_cannot_be_computed_so(position_map):
    with pytest.raises(ValueError, match="hides keys, starts late or goes by pair"):
        logits_by_rows(model("llama"), text(), position_map)
