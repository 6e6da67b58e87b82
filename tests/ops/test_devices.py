# SPDX-License-Identifier: Apache-2.0
"""Devices on which an answer would be wrong: refused, or computed by what is right there. The devices are named here,
not used: a machine that runs these tests need not have one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ropewalk import SelfExtend, UnsupportedModelError, extend
from ropewalk.integrations.transformers import probe
from ropewalk.ops import Rotary, attention
from ropewalk.ops.call import Call, device_lacks
from ropewalk.ops.implementations import choose
from ropewalk.testing import tiny_model


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a device of another kind."""

    there = torch.device("mps")

    @property
    def device(self):
        return self.there


def on(device):
    kind = type("There", (Elsewhere,), {"there": torch.device(device)})
    return [torch.randn(1, 2, 8, 16, dtype=torch.bfloat16).as_subclass(kind) for _ in range(3)]


@pytest.mark.parametrize("impl", ["auto", "reference", "blocks"])
def test_the_operator_refuses_a_device_without_float64(impl):
    with pytest.raises(ValueError, match=r"device mps has no float64.*move it to the CPU"):
        attention(*on("mps"), SelfExtend(2, 4), None, impl=impl)


def test_extend_refuses_a_device_without_float64(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(probe, "place", lambda model: torch.device("mps"))
    with pytest.raises(UnsupportedModelError, match=r"device mps has no float64.*move it to the CPU"):
        extend(model, SelfExtend(2, 4))


@pytest.mark.parametrize("has_fp64", [True, False])
def test_an_xpu_is_refused_only_without_float64(monkeypatch, has_fp64):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=has_fp64))
    assert (device_lacks(torch.device("xpu")) is None) == has_fp64


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_other_devices_lack_nothing(device):
    assert device_lacks(torch.device(device)) is None


def test_rocm_computes_with_plain_operations(monkeypatch):
    """torch's flash kernel for ROCm takes a window and does not read it: every key would be seen as near."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr("ropewalk.ops.fused._NO_KERNELS", "ROCm")
    call = Call(*on("cuda"), SelfExtend(2, 4), Rotary.none(), layout=None, scale=1.0)
    with torch.inference_mode():
        assert choose(call) == "blocks"
