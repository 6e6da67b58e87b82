# SPDX-License-Identifier: Apache-2.0
"""Which preset is a model's: that of a file beside its own, or the built-in one of its kind, sizes and name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.presets import FILE_NAME, BuiltIn, Preset, built_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Words at the end of a name that say how the weights are stored, and nothing of what was trained.
_FORMATS = (
    r"(-(hf|safetensors|gguf|ggml|gptq|awq|exl2|bnb|(bf|fp?)(8|16|32)|int[48]|\d-?bit|w\d+a\d+|g128"
    r"|i?q\d(-(k(-(s|m|l|xl))?|[01]|x{1,3}s|nl))?))*"
)


def find_preset(model: PreTrainedModel, name: str | None = None) -> Preset | None:
    """The preset of a model that nobody chose one for; None where none is surely its own.

    Args:
        name: what the model is called; by default the folder, file or repository that it was loaded from.

    Raises:
        OSError, ValueError: there is a file beside the model's, and it cannot be read or holds no preset.
    """
    path = _beside(model)
    if path is not None:
        try:
            return Preset.load(path)
        except ValueError as error:
            raise ValueError(
                f"{error}; it lies beside the model's files, and goes unread where a map is given"
            ) from error
    name = _name(model) if name is None else name
    found = [entry.preset for entry in built_in().values() if _is_called(entry, name) and not _others(entry, model)]
    return found[0] if len(found) == 1 else None


def why_none(model: PreTrainedModel, name: str | None = None) -> str:
    """Why `find_preset` finds none, in a sentence for who expected one; empty where nothing resembles the model."""
    name = _name(model) if name is None else name
    alike: list[str] = []
    for entry in built_in().values():
        others = _others(entry, model)
        if _is_called(entry, name):
            return f"the preset {entry.preset.name} is not taken for {name!r}, since its {' and '.join(others)}"
        if not others:
            alike.append(entry.preset.name)
    if not alike:
        return ""
    called = f"is called {name!r}" if name else "has no name"
    return f"its sizes are those of {' and '.join(alike)}, but it {called}: if it is one, say preset={alike[0]!r}"


def fetch_preset(location: str) -> None:
    """Gets the preset's file of a hub repository into the hub's cache, where `find_preset` looks; if there is one, and
    the hub can be asked. Does nothing for a folder."""
    from transformers.utils.hub import cached_file

    if not Path(location).exists():
        cached_file(
            location,
            FILE_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )


def _beside(model: PreTrainedModel) -> Path | None:
    """The preset's file beside the model's own. Of the hub's only what is on this machine already: nothing is asked."""
    location = model.config.name_or_path
    if not location:
        return None
    if Path(location).exists():
        path = Path(location) / FILE_NAME
        return path if path.exists() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(location, FILE_NAME, revision=getattr(model.config, "_commit_hash", None))
    except HFValidationError:  # it was a folder that is not there any more
        return None
    return Path(cached) if isinstance(cached, str) else None


def _name(model: PreTrainedModel) -> str:
    """The last part of where the model was loaded from; of a folder in the hub's cache, the repository's name."""
    parts = [part for part in re.split(r"[/\\]", model.config.name_or_path or "") if part]
    for repository, snapshots in pairwise(parts):
        if repository.startswith("models--") and snapshots == "snapshots":
            return repository.rpartition("--")[2]
    return parts[-1] if parts else ""


def _is_called(entry: BuiltIn, name: str) -> bool:
    """Whether a name is one of these models', written in any way, with or without what it says of the format."""
    written = re.sub(r"[^a-z0-9]+", "-", name.lower().removesuffix(".gguf")).strip("-")
    return any(re.fullmatch(re.sub(r"\W+", "-?", known) + _FORMATS, written) for known in entry.models)


def _others(entry: BuiltIn, model: PreTrainedModel) -> list[str]:
    """What a model's configuration says otherwise than these models' own: `hidden_size is 2048 instead of 4096`."""
    config = model.config.get_text_config(decoder=True)
    said = []
    for key, expected in entry.sizes.items():
        value = _value(config, key)
        if value not in (expected if isinstance(expected, list) else [expected]):
            said.append(f"{key} is {value} instead of {expected}")
    layers = _value(config, "num_hidden_layers")
    if not isinstance(layers, int) or layers > entry.layers:
        said.append(f"num_hidden_layers is {layers} instead of {entry.layers}")
    return said


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
    return config
