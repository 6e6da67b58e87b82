# SPDX-License-Identifier: Apache-2.0
"""`extend` changes nothing where it fails, wherever it fails."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_transformers_restore import assert_same, fingerprint
from tiny import MAP, logits, text
from transformers import AttentionInterface, AttentionMaskInterface

import ropewalk
from ropewalk.integrations import transformers as integration
from ropewalk.testing import tiny_model

OURS = str(Path(integration.__file__).parent)
# What puts things back cannot be asked to survive its own failure.
UNDOING = {"Changes.undo", "_undo", "_put_back", "_probing"}


class Injected(Exception):
    """Not one that anything expects."""


def steps(action, fail_at=None):
    """Runs `action`; counts the calls of our functions and the lines of `extend` that run, each of them once, and
    raises at one of them."""
    seen, count = Counter(), 0

    def trace(frame, event, argument):
        nonlocal count
        code = frame.f_code
        if not code.co_filename.startswith(OURS) or code.co_qualname in UNDOING:
            return None
        in_extend = code.co_qualname in ("extend", "_switch")
        step = (code.co_qualname, frame.f_lineno) if in_extend else (code.co_qualname, id(frame.f_back.f_code))
        if (event == "call" or (event == "line" and in_extend)) and not seen[step]:
            seen[step] += 1
            count += 1
            if count == fail_at:
                raise Injected
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def state(model):
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    functions = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    return hooks, functions


def test_a_failure_at_every_step():
    options = {"sliding_window": "disable"}
    model, ids = tiny_model("gemma3"), text(40)
    next(model.children()).train()
    ropewalk.extend(tiny_model("llama"), MAP).restore()  # transformers knows our functions for good
    before, more, expected = fingerprint(model), state(model), logits(model, ids)
    handles = []
    count = steps(lambda: handles.append(ropewalk.extend(model, MAP, **options)))
    handles.pop().restore()
    assert count > 100
    for step in range(1, count + 1):
        # While the model runs, any failure is one of probing.
        with pytest.raises((Injected, ropewalk.UnsupportedModelError)) as failure:
            steps(lambda: ropewalk.extend(model, MAP, **options), step)
        assert Injected in (failure.type, type(failure.value.__cause__))
        assert_same(before, fingerprint(model))
        assert state(model) == more
    assert torch.equal(logits(model, ids), expected)
