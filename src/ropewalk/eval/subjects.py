"""What an evaluation asks: a language model, or a stand-in for it that runs the pipeline without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ropewalk.eval.methods import Method
    from ropewalk.integrations.transformers.models import LoadedModel

DUMMY = "dummy"


class Subject(Protocol):
    """What tasks ask. Token ids include special tokens."""

    @property
    def name(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...

    def under(self, method: Method) -> AbstractContextManager[object]:
        """The model run in that way, until the context ends."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def answer(self, token_ids: Sequence[int], new_tokens: int, stop: str | None = None) -> str:
        """A greedy continuation."""
        ...

    def log_likelihoods(self, token_ids: Sequence[int], first: int) -> list[float]:
        """Natural logarithm of the probability of each token from index `first`, 1 or more, given all before it."""
        ...


@dataclass(frozen=True)
class Model:
    """A transformers model.

    Args:
        trained_window: tokens that it was trained on.
        chunk: tokens read in one forward pass.
    """

    loaded: LoadedModel
    trained_window: int
    weights_hash: str
    chunk: int = 2048

    @property
    def name(self) -> str:
        return self.loaded.source.name

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    @property
    def device(self) -> str:
        return self.loaded.device

    def under(self, method: Method) -> AbstractContextManager[object]:
        return method.enter(self.loaded.model, self.trained_window)

    def encode(self, text: str) -> list[int]:
        return list(self.loaded.tokenizer(text)["input_ids"])

    def answer(self, token_ids: Sequence[int], new_tokens: int, stop: str | None = None) -> str:
        from ropewalk.integrations.transformers.generation import generate

        answer = generate(
            self.loaded.model,
            self.loaded.tokenizer,
            token_ids,
            max_new_tokens=new_tokens,
            chunk=self.chunk,
            stop=stop,
        )
        return answer.text

    def log_likelihoods(self, token_ids: Sequence[int], first: int) -> list[float]:
        import torch

        from ropewalk.integrations.transformers.scoring import log_likelihoods

        scores = log_likelihoods(self.loaded.model, torch.tensor([list(token_ids)]), first, self.chunk)
        return [float(score) for score in scores.tolist()]


@dataclass(frozen=True)
class Dummy:
    """No model: words are tokens, every answer is the same, and every token as likely. For tests of what is around a
    model."""

    reply: Callable[[Sequence[int]], str] = lambda token_ids: "12345"
    name: str = DUMMY
    weights_hash: str = ""
    dtype: str = "none"
    device: str = "none"

    def under(self, method: Method) -> AbstractContextManager[object]:
        return nullcontext()

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def answer(self, token_ids: Sequence[int], new_tokens: int, stop: str | None = None) -> str:
        return self.reply(token_ids)

    def log_likelihoods(self, token_ids: Sequence[int], first: int) -> list[float]:
        return [-1.0] * (len(token_ids) - first)


def weights_hash(loaded: LoadedModel) -> str:
    """What tells these weights from others: SHA-256 of their files, or the hub's commit."""
    source = loaded.source
    folder = Path(source.location)
    if not folder.is_dir():
        return str(getattr(loaded.model.config, "_commit_hash", None) or "")
    if source.gguf_file is not None:
        return _hash([folder / source.gguf_file])
    return _hash([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
