# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks of lm-evaluation-harness, made from files of this machine and measured by any model's tokenizer.

lm-eval makes RULER's texts when it loads a task. It measures them by the tokenizer that has the model's name, which a
GGUF file has none of, and takes essays, what tells their sentences apart and questions from the network. Here the same
functions of lm-eval's make the same tasks with the tokenizer in the GGUF file and, if there is a `data_dir`, from what
that folder holds: `ESSAYS`, and for the QA tasks `ruler/NAME`, where NAME is the file that lm-eval fetches.

lm-eval gets to them by its own means: a task is a file, which may include another and name what makes its data.
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

# In a folder of data: essays as RULER's own script writes them, or those of the needle test's repository.
ESSAYS = ("ruler/PaulGrahamEssays.json", "needle/PaulGrahamEssays/*.txt")
_OPTION = "--metadata data_dir=DIR"

# lm-eval's folder of RULER, and what a file there says of the function that makes its data.
_FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"
_FUNCTION = re.compile(r"^custom_dataset: !function (\S+)$", re.MULTILINE)

# Folders of this process alone.
_kept = ExitStack()
atexit.register(_kept.close)


class RulerError(ValueError):
    """Something that RULER's tasks need is not there. One line, for users."""


def write_tasks(folder: Path) -> None:
    """Writes RULER's tasks, with their data from `dataset`, into a folder: lm-eval's `include_path`."""
    for path in _FOLDER.glob("*.yaml"):
        if function := _FUNCTION.search(path.read_text(encoding="utf-8")):
            lines = (
                f"include: {json.dumps(str(path))}",
                f"custom_dataset: !function {__name__}.dataset",
                f"dataset_kwargs: {{made_by: {function[1]}}}",
            )
            (folder / path.name).write_text("\n".join((*lines, "")), encoding="utf-8")


def dataset(made_by: str, data_dir: str | None = None, **metadata: Any) -> Any:
    """The data of a task, as a function of lm-eval's makes them.

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
    if name == "niah_utils" and folder is not None and (text := _essays(folder)):
        _tell_sentences_apart(text)  # first: the module looks for that, and else asks the network
    try:
        module = import_module(f"lm_eval.tasks.ruler.{name}")
    except ImportError as error:
        raise RulerError("RULER needs more packages: run 'pip install \"lm-eval[ruler]\"'") from error
    with _local(module, folder):
        return getattr(module, function)(**{**metadata, "tokenizer": _tokenizer(metadata)})


def _tokenizer(metadata: dict[str, Any]) -> str:
    """What transformers finds the model's tokenizer by: of a GGUF file, a folder that it is written to."""
    if named := metadata.get("tokenizer") or (not metadata.get("pretrained") and metadata.get("model")):
        return str(named)
    source = find(metadata.get("pretrained"))
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

    It has no option for either, so its functions that fetch them are replaced.
    """
    instead: dict[str, Callable[..., Any]] = {}
    if hasattr(module, "get_haystack"):
        instead["get_haystack"] = partial(_haystack, module.get_haystack, folder)
    if hasattr(module, "download_json"):
        instead["download_json"] = partial(_questions, module.download_json, folder)
        for reader in (module.read_squad, module.read_hotpotqa):
            reader.cache_clear()  # it may know those of another folder
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
            return own(type_haystack=type_haystack)
    if not (text := _essays(folder)):
        raise RulerError(f"{folder} holds no essays: it must hold {' or '.join(ESSAYS)}")
    return text.split()


@cache
def _essays(folder: Path) -> str:
    """The essays of a folder; empty if there are none."""
    whole, pattern = ESSAYS
    if (folder / whole).is_file():
        return str(json.loads((folder / whole).read_bytes())["text"])
    return " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern)))


@cache
def _tell_sentences_apart(text: str) -> None:
    """Where nltk has not loaded its model for that, one is trained on the text itself: some seconds for all essays.

    Where sentences end says between which words a needle may go, and nothing else.
    """
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
