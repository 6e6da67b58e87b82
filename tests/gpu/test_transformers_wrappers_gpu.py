# SPDX-License-Identifier: Apache-2.0
"""Models that are spread over devices, and caches that are offloaded: what needs a GPU, or two."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import ropewalk
from ropewalk.testing import tiny_model

MAP = ropewalk.SelfExtend(3, 8)
# On a GPU the kernels sum in another order.
CLOSE = {"rtol": 0, "atol": 2e-3}

pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu on one"),
]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def text(batch=1):
    return torch.randint(1, 96, (batch, 60), generator=torch.Generator().manual_seed(0))


def on_cpu(name, ids, **arguments):
    model = tiny_model(name)
    with ropewalk.extend(model, MAP, trained_window=64):
        return model(ids, **arguments).logits


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_offloaded_caches(name, kind):
    model, ids = tiny_model(name).to("cuda"), text()
    with ropewalk.extend(model, MAP):
        cache = kind(config=model.config, offloading=True, **({"max_cache_len": 70} if kind is StaticCache else {}))
        parts = [
            model(ids[:, begin:end].cuda(), past_key_values=cache, use_cache=True).logits
            for begin, end in ((0, 30), (30, 45), *((i, i + 1) for i in range(45, 60)))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1).cpu(), on_cpu(name, ids), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gptj", "falcon", "mpt"])
def test_weights_in_memory_that_are_brought_to_a_device(name):
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model(name), text()
    accelerate.cpu_offload(model, execution_device=torch.device("cuda"))
    with ropewalk.extend(model, MAP, trained_window=64):
        torch.testing.assert_close(model(ids).logits.cpu(), on_cpu(name, ids), **CLOSE)


@two_devices
@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj", "falcon", "mpt"])
@pytest.mark.parametrize("mask", ["none", "left", "gaps"])
def test_layers_on_two_devices(name, mask):
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model(name), text(2)
    layers = next(each for each, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    own = [each for each, module in model.named_modules() if module._parameters and not each.startswith(layers)]
    device_map = {each: 0 for each in own}
    device_map |= {f"{layers}.{n}": int(n > 0) for n in range(len(model.get_submodule(layers)))}
    accelerate.dispatch_model(model, device_map)
    arguments = {}
    if mask != "none":
        slots = torch.ones(2, 60, dtype=torch.long)
        slots[0, slice(0, 10) if mask == "left" else slice(20, 30)] = 0
        arguments["attention_mask"] = slots
        if name not in ("mpt",):
            arguments["position_ids"] = (slots.cumsum(-1) - 1).clamp(min=0)
    with ropewalk.extend(model, MAP, trained_window=64):
        actual = model(ids.cuda(), **{key: value.cuda() for key, value in arguments.items()}).logits.cpu()
    seen = arguments.get("attention_mask", torch.ones(2, 60)).bool()
    torch.testing.assert_close(actual[seen], on_cpu(name, ids, **arguments)[seen], **CLOSE)


@two_devices
@pytest.mark.parametrize("name", ["llama", "gemma3", "gptj"])
def test_data_parallel_on_two_devices(name):
    model, ids = tiny_model(name).to("cuda"), text(4)
    wrapper = torch.nn.DataParallel(model)
    with ropewalk.extend(wrapper, MAP) as handle:
        assert handle.model is model
        actual = wrapper(ids.cuda(), use_cache=False).logits
    torch.testing.assert_close(actual.cpu(), on_cpu(name, ids), **CLOSE)


PARALLEL = """
import sys
import torch, ropewalk
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 61)[None] * 7 % 96
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
bare = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to(model.device)
ids = ids.to(model.device)
with torch.no_grad():
    plain = model(ids).logits
    with ropewalk.extend(model, ropewalk.SelfExtend(3, 8)), ropewalk.extend(bare, ropewalk.SelfExtend(3, 8)):
        torch.testing.assert_close(model(ids).logits, bare(ids).logits, rtol=0, atol=2e-3)
        assert (model(ids).logits - plain).abs().max() > 0.5
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
torch.distributed.destroy_process_group()
"""


@two_devices
def test_tensor_parallel_on_two_devices(tmp_path):
    script, folder = tmp_path / "parallel.py", tmp_path / "llama"
    script.write_text(PARALLEL)
    tiny_model("llama").save_pretrained(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    process = subprocess.run(command, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr


@two_devices
def test_device_map_auto(tmp_path):
    """With as little room on the first device as makes layers go to the second."""
    pytest.importorskip("accelerate")
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    room = {0: 100 * 1024, 1: 1 << 30}
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", device_map="auto", max_memory=room), text()
    assert len({parameter.device for parameter in model.parameters()}) == 2
    with ropewalk.extend(model, MAP):
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), on_cpu("llama", ids), **CLOSE)
