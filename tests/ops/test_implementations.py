# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs a call, and what is said about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensors import FAST, random_tensors
from torch.testing import assert_close

from ropewalk.maps import Identity, SelfExtend
from ropewalk.ops import Layout, attention, fused, implementations, windowed
from ropewalk.ops.call import Call
from ropewalk.ops.implementations import IMPLEMENTATIONS, choose, module, run, step_of
from ropewalk.ops.rotary import Rotary


def call(*shape, layout=None, device="cpu", **options):
    q, k, v = random_tensors(*(shape or (1, 2, 1, 3, 3, 8)), device=device)
    return Call(q, k, v, SelfExtend(2, 2), Rotary.none(), layout, 1.0, **options)


@pytest.fixture(autouse=True)
def _log_anew():
    implementations._log_slower.cache_clear()


def test_every_implementation_is_a_module_of_its_own_name():
    """A row of the table names a module that has what a row promises, and that imports no other implementation."""
    for name, entry in IMPLEMENTATIONS.items():
        found = module(name)
        assert found.__name__ == entry.module == f"ropewalk.ops.{name}"
        assert callable(found.lacks)
        assert callable(found.attend)
        assert hasattr(found, "attend_step") == entry.steps
        assert not {f"ropewalk.ops.{other}" for other in IMPLEMENTATIONS if other != name} & {
            getattr(value, "__name__", getattr(value, "__module__", "")) for value in vars(found).values()
        }


def test_choice_is_explained(caplog):
    with caplog.at_level("INFO", logger="ropewalk"):
        assert choose(call()) == "flash"
        assert caplog.messages == []
        assert choose(call(softcap=7.5)) == "blocks"
        assert choose(call(softcap=7.5)) == "blocks"
        assert choose(call(key_scale=torch.ones(1))) == "reference"
    assert caplog.messages == [
        "attention runs on impl='blocks', slower than 'flash', which does not take softcap",
        "attention runs on impl='reference', slower than 'flash', which does not take keys and values with scales",
    ]


@pytest.mark.parametrize(
    ("change", "impl"),
    [
        ({"softcap": 2.0}, "blocks"),
        ({"slopes": torch.ones(2)}, "blocks"),
        ({"key_scale": torch.ones(1)}, "reference"),
    ],
    ids=str,
)
def test_what_a_named_one_lacks_is_an_error_that_says_what_would_do(change, impl):
    options = {"rotary": None, "impl": "flash", **change}
    with pytest.raises(ValueError, match=rf"attention: impl='flash' does not take .*; .*'{impl}'.* would"):
        attention(*random_tensors(1, 2, 1, 3, 3, 8), SelfExtend(2, 2), **options)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_interpreter_is_never_chosen(monkeypatch, softcap):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(call(softcap=softcap)) == ("flash" if softcap is None else "blocks")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="impl='fused' does not take device cpu"):
        choose(call(), "fused")


def test_choice_on_a_gpu(caplog, monkeypatch):
    """With tensors that only say where they are."""

    def tensor():
        return SimpleNamespace(device=SimpleNamespace(type="cuda"), requires_grad=False, shape=(1, 1, 3, 8))

    def on_gpu(**options):
        return Call(tensor(), tensor(), tensor(), Identity(), Rotary.none(), None, 1.0, **options)

    monkeypatch.setattr(fused, "lacks", lambda call: None)
    assert choose(on_gpu(softcap=2.0)) == "fused"
    monkeypatch.setattr(fused, "lacks", lambda call: "this installation, which has no Triton")
    monkeypatch.setattr(windowed, "unsupported", lambda *tensors: None)
    assert choose(on_gpu()) == "flash"
    assert choose(on_gpu(softcap=2.0)) == "blocks"
    assert choose(on_gpu()) == "flash"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            f"attention runs on impl={impl!r}, slower than 'fused', which does not take this installation, which has "
            "no Triton",
        )
        for impl in ("flash", "blocks")
    ]


def test_a_new_implementation_is_a_module_and_a_row(monkeypatch):
    """Which `auto` thinks of in the order of the table, with the devices that the row names."""
    calls = []
    one = SimpleNamespace(lacks=lambda call: None if call.softcap is None else "softcap", attend=None)
    one.attend = lambda call: calls.append(call) or torch.zeros_like(call.query)
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "flash", implementations.Entry("one", None))
    monkeypatch.setattr(
        implementations, "module", {**{name: module(name) for name in IMPLEMENTATIONS}, "flash": one}.__getitem__
    )
    tensors = random_tensors(2, 2, 1, 3, 5, 8)
    assert (attention(*tensors, SelfExtend(2, 2), None) == 0).all()
    assert attention(*tensors, SelfExtend(2, 2), None, softcap=2.0).any()
    # Rows that hold the same slots come together, without what the layout says.
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    attention(*tensors, SelfExtend(2, 2), None, layout=Layout(3, 5, key_mask=mask))
    assert [(x.query.shape[0], x.key.shape[2], x.layout) for x in calls] == [(2, 5, None), (1, 5, None), (1, 4, None)]


@pytest.mark.skipif("fused" not in FAST, reason="needs Triton")
def test_what_is_a_step():
    """One query a row, for an implementation that takes steps."""
    assert step_of(call(2, 2, 1, 1, 5, 8), "fused") is not None
    assert step_of(call(2, 2, 1, 1, 5, 8), "flash") is None
    assert step_of(call(2, 2, 1, 2, 5, 8), "fused") is None
    assert step_of(call(0, 2, 1, 1, 5, 8), "fused") is None
    gap, left = torch.tensor([[1, 0, 1]]).bool(), torch.tensor([[0, 1, 1]]).bool()
    assert step_of(call(1, 2, 1, 1, 3, 8, layout=Layout(1, 3, key_mask=gap)), "fused") is None
    assert step_of(call(1, 2, 1, 1, 3, 8, layout=Layout(1, 3, key_mask=left)), "fused").first_slots.tolist() == [1]


def test_calls_without_layout_run():
    """As an integration makes them."""
    one = call(2, 2, 1, 3, 5, 8)
    expected = attention(one.query, one.key, one.value, SelfExtend(2, 2), None, scale=1.0, impl="reference")
    for name in ("reference", "blocks", "flash"):
        assert_close(run(one, name), expected, rtol=0, atol=5e-6)
