# SPDX-License-Identifier: Apache-2.0
"""What one of several processes does of a run, and the locks by which no two do the same."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one of several processes does: every `count`-th example, from `index` on, so that all have as long texts."""

    index: int = 0
    count: int = 1

    def of(self, examples: Sequence[T]) -> list[T]:
        return list(examples[self.index :: self.count])

    def __str__(self) -> str:
        return f"process {self.index + 1} of {self.count}"

    def lock(self, folder: Path, limit: int | None) -> FileLock:
        """Holds what tells others that this process writes; the system lets it go when the process ends, however it
        does.

        Processes that share a run have different examples, if each is told the same number of them: those can write
        together, and no others.

        Args:
            limit: of the examples of each method.

        Raises:
            Timeout: another writes what this one would.
        """
        division = f"of-{self.count}" + ("" if limit is None else f"-limit-{limit}")
        mine = FileLock(folder / f".running-{self.index}-{division}")
        mine.acquire(timeout=0)
        try:
            # Taken first and looked around afterwards: of two that come at once, not both can miss the other.
            for path in folder.glob(".running-*"):
                if not path.name.endswith(division):
                    its = FileLock(path)
                    its.acquire(timeout=0)
                    # Of a process that is gone.
                    release(its)
        except Timeout:
            release(mine)
            raise
        return mine


def release(lock: FileLock) -> None:
    """Lets others have it, and takes its file away."""
    if lock.is_locked:
        # While it is held: afterwards it may be another's.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


ALL = Share()
