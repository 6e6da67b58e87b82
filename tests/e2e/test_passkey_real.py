# SPDX-License-Identifier: Apache-2.0
"""Pass keys in 16k tokens on the real model: SmolLM2-135M-Instruct, trained on 8192.

Thirty prompts take about an hour on two CPU cores; `ROPEWALK_PASSKEY_PROMPTS=2` asks each variant fewer.
"""

import os
from contextlib import nullcontext

import pytest

import ropewalk
from ropewalk.eval.haystack import passkey
from ropewalk.integrations.transformers.generation import generate
from ropewalk.integrations.transformers.models import load
from ropewalk.integrations.transformers.sources import find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TOKENS, NEW_TOKENS, WINDOW = 16_000, 12, 8192
PROMPTS = int(os.environ.get("ROPEWALK_PASSKEY_PROMPTS", "10"))
DEPTHS = [(i + 0.5) / PROMPTS for i in range(PROMPTS)]


@pytest.fixture(scope="module")
def loaded():
    return load(find(None))


def right_answers(loaded, kind):
    """How many of the prompts are answered right under a kind of map, or by the unmodified model."""

    def count(text):
        return len(loaded.tokenizer(text)["input_ids"])

    right = []
    extension = nullcontext() if kind is None else ropewalk.extend(loaded.model, kind, target_length=TOKENS)
    with extension:
        for seed, depth in enumerate(DEPTHS):
            hidden = passkey(TOKENS - NEW_TOKENS, depth, count, seed)
            ids = loaded.tokenizer(hidden.prompt)["input_ids"]
            reply = generate(loaded.model, loaded.tokenizer, ids, max_new_tokens=NEW_TOKENS, stop="\n").text
            right.append(hidden.is_right(reply))
            name = "unmodified" if kind is None else kind.__name__
            print(f"{name}, {depth:.0%} deep: {hidden.answer}, answered {reply!r}", flush=True)
    return sum(right)


def test_trained_window(loaded):
    assert loaded.trained_window == WINDOW < TOKENS


@pytest.mark.parametrize("kind", [ropewalk.SelfExtend, ropewalk.SELF])
def test_extended(loaded, kind):
    assert right_answers(loaded, kind) >= 0.9 * PROMPTS


def test_unmodified(loaded):
    assert right_answers(loaded, None) <= 0.1 * PROMPTS
