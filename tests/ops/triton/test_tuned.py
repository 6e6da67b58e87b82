# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from importlib import resources
from types import SimpleNamespace

import pytest
import torch

from ropewalk.ops.triton import tuned as data
from ropewalk.ops.triton.decode import Config
from ropewalk.ops.triton.narrow import NarrowConfig
from ropewalk.ops.triton.prefill import PrefillConfig
from ropewalk.ops.triton.tuned import tuned

KINDS = {"prefill": PrefillConfig, "decode": Config, "narrow": NarrowConfig}


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device by name and shared memory, whatever this machine has."""

    def install(name, shared_memory):
        properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        tuned.cache_clear()
        return torch.device("cuda")

    yield install
    tuned.cache_clear()


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize(("name", "shared_memory"), [("NVIDIA H100 80GB HBM3", 232448), ("Tesla T4", 65536)])
def test_every_call_is_covered(kernel, itemsize, head_dim, name, shared_memory, gpu):
    KINDS[kernel](**tuned(kernel, head_dim, itemsize, gpu(name, shared_memory)))
    KINDS[kernel](**tuned(kernel, head_dim, itemsize, torch.device("cpu")))


@pytest.mark.parametrize(("shared_memory", "keys"), [(232448, 128), (166912, 64), (101376, 32), (1, 32)])
def test_what_does_not_fit_is_passed_over(shared_memory, keys, gpu):
    assert tuned("prefill", 96, 2, gpu("Some GPU", shared_memory))["block_keys"] == keys


def test_the_gpus_own_file_comes_first(gpu, monkeypatch):
    own = {"head_dim": 128, "itemsize": 2, "shared_memory": 0, "config": {"block_keys": 1}}
    files = {"nvidia_h100.json": {"decode": [own]}, "default.json": data._read("default.json")}
    monkeypatch.setattr(data, "_read", files.__getitem__)
    h100 = gpu("NVIDIA H100 80GB HBM3", 232448)
    assert tuned("decode", 128, 2, h100) == {"block_keys": 1}
    assert tuned("decode", 256, 2, h100)["block_keys"] > 1
    assert tuned("decode", 128, 2, gpu("NVIDIA A100-SXM4-80GB", 166912))["block_keys"] > 1


def test_what_no_entry_covers(gpu):
    with pytest.raises(LookupError, match="no configuration of decode for head dimension 512, numbers of 2 bytes"):
        tuned("decode", 512, 2, torch.device("cpu"))


def test_files_hold_what_the_kernels_take():
    for path in resources.files(data.__name__).iterdir():
        if path.name.endswith(".json"):
            content = json.loads(path.read_text("utf-8"))
            for kernel, kind in KINDS.items():
                for entry in content.get(kernel, []):
                    assert set(entry) == {"head_dim", "itemsize", "shared_memory", "config"}
                    kind(**entry["config"])
