# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks of lm-evaluation-harness, made from files of this machine and measured by any model's tokenizer.

lm-eval makes RULER's texts when it loads a task. It measures them by a tokenizer that it loads by the model's name, which
a GGUF file is none of, and takes essays, a model that tells sentences apart and questions from the network. Here the
same tasks are made by the same functions from the tokenizer in the GGUF file and, with `--metadata data_dir=DIR`, from
files of that folder: those of `ESSAYS`, and for the QA tasks `ruler/NAME`, where NAME is what lm-eval fetches.

The tasks come to lm-eval by its own means: files that include its own and name another function for the data.
"""

from __future__ import annotations

import atexit
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import lm_eval.tasks

from ropewalk.integrations.transformers.sources import find

# Of lm-eval, where RULER's modules are, and its files with the name of the function that makes a task's data.
_PACKAGE = "lm_eval.tasks.ruler"
_FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"
_FUNCTION = re.compile(r"^custom_dataset: !function (\S+)$", re.MULTILINE)

# In a folder of data: as RULER's own script writes them, or those of the needle test's repository.
ESSAYS = ("ruler/PaulGrahamEssays.json", "needle/PaulGrahamEssays/*.txt")
_OPTION = "--metadata data_dir=DIR"

# What is made for this process alone.
_kept = ExitStack()
atexit.register(_kept.close)


class RulerError(ValueError):
    """Something that RULER's tasks need is not there. One line, for users."""


def tasks() -> list[str]:
    """The names of RULER's tasks."""
    names = (re.search(r"^task: (\S+)$", path.read_text(), re.MULTILINE) for path in _files())
    return sorted(name[1] for name in names if name)


def write_tasks(folder: Path) -> None:
    """Writes RULER's tasks, with their data from `dataset`, into a folder: lm-eval's `include_path`."""
    for path, function in _files().items():
        lines = (
            f"include: {json.dumps(str(path))}",
            f"custom_dataset: !function {__name__}.dataset",
            f"dataset_kwargs: {{made_by: {function}}}",
        )
        (folder / path.name).write_text("\n".join((*lines, "")))


def dataset(made_by: str, data_dir: str | None = None, **metadata: Any) -> Any:
    """The data of a task: what lm-eval's own function makes, from local files.

    Args:
        made_by: that function, `module.name` in lm-eval's folder of RULER.
        data_dir: folder of data; None to fetch what does not come with a package, as lm-eval does.
        metadata: of lm-eval's task, with the arguments of its model.

    Raises:
        RulerError: something is missing.
        ModelError: there is no such model.
    """
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise RulerError(f"data_dir must be a folder that holds {' or '.join(ESSAYS)}, got {data_dir!r}")
    name, _, function = made_by.rpartition(".")
    try:
        module = import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise RulerError('RULER\'s tasks need more packages: run \'pip install "lm-eval[ruler]"\'') from error
    metadata["tokenizer"] = _tokenizer(metadata)
    with _local(module, folder):
        return getattr(module, function)(**metadata)


def _files() -> dict[Path, str]:
    """lm-eval's files of tasks, and the function that makes the data of each."""
    found = ((path, _FUNCTION.search(path.read_text())) for path in sorted(_FOLDER.glob("*.yaml")))
    return {path: function[1] for path, function in found if function}


def _tokenizer(metadata: dict[str, Any]) -> str | None:
    """What lm-eval finds the model's tokenizer by: a folder with that of a GGUF file, which it cannot read by itself."""
    named = [metadata.get(key) for key in ("tokenizer", "pretrained", "model")]
    given = next((str(name) for name in named if name), None)
    if given is not None and given != metadata.get("pretrained"):
        return given
    source = find(given)
    return source.location if source.gguf_file is None else _unpacked(source.location, source.gguf_file)


@cache
def _unpacked(location: str, gguf_file: str) -> str:
    from transformers import AutoTokenizer

    folder = _kept.enter_context(TemporaryDirectory())
    AutoTokenizer.from_pretrained(location, gguf_file=gguf_file).save_pretrained(folder)
    return folder


@contextmanager
def _local(module: ModuleType, folder: Path | None) -> Iterator[None]:
    """Until the context ends, a module of lm-eval's takes essays and questions from a folder.

    It has no option for either: functions of its own, which ask the network, are replaced.
    """
    instead: dict[str, Callable[..., Any]] = {}
    if hasattr(module, "get_haystack"):
        instead["get_haystack"] = partial(_haystack, module.get_haystack, folder)
    if hasattr(module, "download_json"):
        instead["download_json"] = partial(_questions, module.download_json, folder)
        for reader in (module.read_squad, module.read_hotpotqa):
            reader.cache_clear()  # of another folder
    before = {name: getattr(module, name) for name in instead}
    try:
        vars(module).update(instead)
        yield
    finally:
        vars(module).update(before)


def _haystack(own: Callable[..., Any], folder: Path | None, type_haystack: str) -> Any:
    """What needles are hidden in; of essays, their words."""
    if type_haystack != "essay":
        return own(type_haystack=type_haystack)
    if folder is None:
        with _fetching("the essays", f"name a folder that holds {' or '.join(ESSAYS)} by {_OPTION}"):
            words: list[str] = own(type_haystack=type_haystack)
    else:
        words = _essays(folder).split()
    _tell_sentences_apart(" ".join(words))
    return words


def _essays(folder: Path) -> str:
    whole, pattern = ESSAYS
    if (folder / whole).is_file():
        return str(json.loads((folder / whole).read_bytes())["text"])
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern))]
    if not texts:
        raise RulerError(f"{folder} holds no essays: {_OPTION} must hold {' or '.join(ESSAYS)}")
    return " ".join(texts)


@cache
def _tell_sentences_apart(text: str) -> None:
    """Where nltk has no model for it and cannot fetch one, one is trained on the text itself: where sentences end says
    between which of them a needle goes, and nothing else."""
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        folder = Path(_kept.enter_context(TemporaryDirectory()))
        nltk.data.path.append(str(folder))  # before anything is written: nltk writes nowhere else
        models = folder / "tokenizers" / "punkt_tab"
        models.mkdir(parents=True)
        save_punkt_params(PunktTrainer(text).get_params(), str(models / "english"))


def _questions(own: Callable[[str], Any], folder: Path | None, url: str) -> Any:
    name = f"ruler/{url.rpartition('/')[2]}"
    if folder is None:
        with _fetching(url, f"fetch it elsewhere, and name a folder that holds it as {name} by {_OPTION}"):
            return own(url)
    if not (folder / name).is_file():
        raise RulerError(f"{folder} holds no {name}: fetch {url}")
    return json.loads((folder / name).read_bytes())


@contextmanager
def _fetching(what: str, otherwise: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RulerError(f"{what} cannot be fetched ({type(error).__name__}): {otherwise}") from error
