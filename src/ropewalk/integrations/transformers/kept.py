# SPDX-License-Identifier: Apache-2.0
"""The file that holds what a model read: safetensors, with facts about how it was read. Nothing in it is ever run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ropewalk.files import replacing
from ropewalk.integrations.transformers import fingerprint

# Raised when what the file holds means something else.
FORMAT = 1
_KEY, _TEXT, _DIGEST = "ropewalk.reading", "text", "tensors"


class ReadingError(ValueError):
    """A kept reading that is missing, broken, of something else, or cannot be written. One line, for users."""


@dataclass(frozen=True)
class Kept:
    """A file whose facts were read, and whose tensors were not yet.

    Attributes:
        path: of the file.
        facts: plain data, as `write` got it.
        text: that was read.
    """

    path: Path
    facts: dict[str, Any]
    text: str

    @classmethod
    def open(cls, path: Path) -> Kept:
        """Looks at a file.

        Raises:
            ReadingError: there is none, or it is not a whole one that `write` wrote.
        """
        check_place(path)
        if not path.exists():
            raise ReadingError(f"there is no file {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                described = (file.metadata() or {}).get(_KEY)
                if described is None:
                    raise ReadingError(f"{str(path)!r} is no kept reading: it holds other tensors")
                facts = json.loads(described)
                if facts["format"] != FORMAT:
                    raise ReadingError(
                        f"{str(path)!r} is a kept reading of format {facts['format']}, and this version of ropewalk "
                        f"knows format {FORMAT}: read the text anew"
                    )
                text = bytes(file.get_tensor(_TEXT).tolist()).decode()
        except OSError as error:
            raise ReadingError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ReadingError):
                raise
            raise _broken(path, error) from error
        return cls(path, facts, text)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Loads the tensors.

        Raises:
            ReadingError: they cannot be read, or are not those that were written.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if _digest(found, self.facts) != self.facts[_DIGEST]:
                    raise ReadingError(f"{str(self.path)!r} is broken: it does not hold what was written")
                return {name: tensor.to(device) for name, tensor in found.items() if name != _TEXT}
        except (OSError, SafetensorError) as error:
            raise _broken(self.path, error) from error


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], text: str) -> None:
    """Writes a file, which then is there as a whole or not at all.

    Raises:
        ReadingError: it cannot be written; what was at `path` still is.
    """
    check_place(path, sum(tensor.nbytes for tensor in tensors.values()))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    whole[_TEXT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
    described = {**facts, "format": FORMAT}
    described[_DIGEST] = _digest(whole, described)
    try:
        with replacing(path) as unfinished:
            save_file(whole, unfinished, {_KEY: json.dumps(described)})
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ReadingError(f"cannot write {str(path)!r}: {reason}") from error


def check_place(path: Path, size: int = 0) -> None:
    """Looks whether a file of so many bytes can be at `path`, before any long work is done for it.

    Raises:
        ReadingError: its folder is missing or full, or something that is not a file is there.
    """
    try:
        if path.is_symlink():  # what it leads to is written
            path = Path(os.path.realpath(path))
        if path.exists() and not path.is_file():
            raise ReadingError(f"{str(path)!r} is {'a folder' if path.is_dir() else 'a device'}, not a file")
        if not path.parent.is_dir():
            raise ReadingError(f"there is no folder {str(path.parent)!r} for {path.name!r}")
        if size and not os.access(path.parent, os.W_OK):
            raise ReadingError(f"cannot write {str(path)!r}: its folder is read-only")
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise ReadingError(f"cannot look at {str(path)!r}: {error.strerror or error}") from error
    if size > free:
        raise ReadingError(
            f"{str(path)!r} would take {size / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there"
        )


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Of all that a file holds, but for the digest itself."""
    said = json.dumps({name: fact for name, fact in facts.items() if name != _DIGEST}, sort_keys=True)
    return hashlib.sha256(f"{fingerprint.of_tensors(tensors.items())} {said}".encode()).hexdigest()


def _broken(path: Path, error: Exception) -> ReadingError:
    return ReadingError(f"{str(path)!r} is no kept reading, or a broken one ({' '.join(str(error).split())[:120]})")
