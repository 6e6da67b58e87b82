"""What an evaluation asks: a language model, or a stand-in for it that runs the pipeline without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ropewalk.eval import infinite
from ropewalk.eval.infinite import Infinite

if TYPE_CHECKING:
    from ropewalk.eval.methods import Method
    from ropewalk.integrations.transformers.generation import Answer
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

    def under(self, method: Method) -> AbstractContextManager[Subject]:
        """Whom to ask for the model run in that way, until the context ends."""
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

    @contextmanager
    def under(self, method: Method) -> Iterator[Subject]:
        if isinstance(method.change, Infinite):
            yield InBlocks(self.loaded, self.trained_window, self.weights_hash, self.chunk, window=method.change.window)
            return
        with method.enter(self.loaded.model, self.trained_window):
            yield self

    def encode(self, text: str) -> list[int]:
        return list(self.loaded.tokenizer(text)["input_ids"])

    def answer(self, token_ids: Sequence[int], new_tokens: int, stop: str | None = None) -> str:
        return self._generate(token_ids, new_tokens, stop).text

    def log_likelihoods(self, token_ids: Sequence[int], first: int) -> list[float]:
        import torch

        from ropewalk.integrations.transformers.scoring import log_likelihoods

        scores = log_likelihoods(self.loaded.model, torch.tensor([list(token_ids)]), first, self.chunk)
        return [float(score) for score in scores.tolist()]

    def _generate(self, token_ids: Sequence[int], new_tokens: int, stop: str | None) -> Answer:
        from ropewalk.integrations.transformers.generation import generate

        return generate(
            self.loaded.model,
            self.loaded.tokenizer,
            token_ids,
            max_new_tokens=new_tokens,
            chunk=self.chunk,
            stop=stop,
        )


@dataclass(frozen=True)
class InBlocks(Model):
    """A transformers model that reads every text block by block, each as a text of its own; see `infinite`.

    Args:
        window: tokens of a block.
    """

    window: int = field(kw_only=True)

    def answer(self, token_ids: Sequence[int], new_tokens: int, stop: str | None = None) -> str:
        def generate(tokens: Sequence[int], at_most: int) -> tuple[Sequence[int], bool]:
            answer = self._generate(tokens, at_most, stop)
            return answer.token_ids, answer.ended

        written = infinite.continued(token_ids, new_tokens, self.window, generate)
        # `stop` may lie across two blocks.
        text = str(self.loaded.tokenizer.decode(written, skip_special_tokens=True))
        return text if stop is None else text.partition(stop)[0]

    def log_likelihoods(self, token_ids: Sequence[int], first: int) -> list[float]:
        scores: list[float] = []
        for text, own_first in infinite.blocks(token_ids, first, self.window):
            scores += super().log_likelihoods(text, own_first)
        return scores


@dataclass(frozen=True)
class Dummy:
    """No model: words are tokens, every answer is the same, and every token as likely. For tests of what is around a
    model."""

    reply: Callable[[Sequence[int]], str] = lambda token_ids: "12345"
    name: str = DUMMY
    weights_hash: str = ""
    dtype: str = "none"
    device: str = "none"

    def under(self, method: Method) -> AbstractContextManager[Subject]:
        return nullcontext(self)

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
