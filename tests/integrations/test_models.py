# SPDX-License-Identifier: Apache-2.0
import importlib.util

import pytest
import torch

from ropewalk.integrations.transformers.models import load
from ropewalk.integrations.transformers.quiet import quiet
from ropewalk.integrations.transformers.sources import ModelError, find
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


def test_load_a_folder(folder):
    loaded = load(find(str(folder)), dtype="float32", device="cpu")
    assert (loaded.dtype, loaded.device, loaded.trained_window) == ("float32", "cpu", 64)
    assert not loaded.model.training
    for name, value in tiny_model("llama", num_hidden_layers=1).state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value)
    text = "Hello, 12345."
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_load_a_gguf_file(gguf_file):
    loaded = load(find(str(gguf_file)), dtype="bfloat16", device="cpu")
    assert loaded.dtype == "bfloat16"
    assert loaded.trained_window == 64
    assert all(isinstance(parameter, torch.Tensor) for parameter in loaded.model.parameters())
    assert loaded.model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 94)


def test_loading_is_silent(folder, gguf_file, capfd):
    with quiet():
        load(find(str(folder)))
        load(find(str(gguf_file)))
    assert capfd.readouterr() == ("", "")


def test_dtype_by_default(folder, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})
    assert load(find(str(folder)), device="cpu").dtype == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx512_f": True})
    assert load(find(str(folder)), device="cpu").dtype == "float32"


def test_packages_for_gguf_are_missing(gguf_file, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ModelError, match=r"reading a GGUF file needs gguf: run 'pip install \"ropewalk\[gguf\]\"'"):
        load(find(str(gguf_file)))


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_folder(tmp_path, broken):
    folder = save_tiny_model(tmp_path / "broken", num_hidden_layers=1)
    (folder / broken).write_text("{")
    with pytest.raises(ModelError, match="cannot load the model 'broken': ") as caught, quiet():
        load(find(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_broken_gguf_file(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot load the model 'broken': ") as caught, quiet():
        load(find(str(path)))
    assert "\n" not in str(caught.value)


def test_wrong_arguments(folder, monkeypatch):
    with pytest.raises(ValueError, match="dtype must be one of auto, bfloat16, float16, float32, got 'int8'"):
        load(find(str(folder)), dtype="int8")
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, got 'tpu'"):
        load(find(str(folder)), device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA device was found"):
        load(find(str(folder)), device="cuda")


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with (
        pytest.raises(ModelError, match=r"'nobody/no-model': .*\(there is no folder 'nobody/no-model' here either\)"),
        quiet(),
    ):
        load(find("nobody/no-model"))
