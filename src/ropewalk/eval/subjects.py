# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks: a language model, or a stand-in for it that runs the pipeline without one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ropewalk.thinking import BEGIN, END, begun

if TYPE_CHECKING:
    from ropewalk.eval.methods import Method
    from ropewalk.integrations.transformers.generation import Answer
    from ropewalk.integrations.transformers.models import LoadedModel

DUMMY = "dummy"
# More tokens than a tokenizer makes of what a chat template ends with.
_TAIL = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, greedily.

    Attributes:
        token_ids: special ones included.
        new_tokens: of the answer, at most.
        stop: ends the answer, and is not in it; that of a model that thinks comes behind its thought.
    """

    token_ids: Sequence[int]
    new_tokens: int
    stop: str | None = None


@dataclass(frozen=True)
class Passage:
    """A text that is scored.

    Attributes:
        token_ids: special ones included.
        first: index of the first token that is scored, 1 or more; those before it are only read.
    """

    token_ids: Sequence[int]
    first: int


class Hashes(NamedTuple):
    """What tells a model from others that are called the same.

    Attributes:
        weights: SHA-256 of their files, or the hub's commit.
        config, tokenizer: SHA-256 of those files of a folder; empty where they are part of what `weights` is of, as in
            a GGUF file and on the hub.
    """

    weights: str = ""
    config: str = ""
    tokenizer: str = ""


_NONE = Hashes()


@dataclass(frozen=True)
class Model:
    """A transformers model.

    Args:
        trained_window: tokens that it was trained on.
        chunk: tokens of each row that are read in one forward pass.
    """

    loaded: LoadedModel
    trained_window: int
    hashes: Hashes
    batch_size: int = 1
    chunk: int = 2048

    @property
    def name(self) -> str:
        return self.loaded.source.name

    @property
    def dtype(self) -> str:
        return self.loaded.dtype

    @property
    def device(self) -> str:
        """What kind it is: which of several GPUs computes something makes no difference, and another kind may."""
        import torch

        device = torch.device(self.loaded.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @contextmanager
    def under(self, method: Method) -> Iterator[Model]:
        """Whom to ask for the model run in that way, until the context ends."""
        with _without_plans(), method.enter(self.loaded.model, self.trained_window):
            yield self

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """The tokens of a text, special ones included; as what a user says to a model that chats, where `chat` is asked
        for and the model knows how."""
        tokenizer = self.loaded.tokenizer
        if chat and tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
        return list(tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self.loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def in_thought(self, prompt: Prompt) -> bool:
        """Whether the model's chat template has begun a thought for it, in which its output begins."""
        return begun(str(self.loaded.tokenizer.decode(list(prompt.token_ids[-_TAIL:]))))

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """With their thoughts. A thought is not ended by what ends an answer."""
        thinks = len(self._marks) > 0
        asked = [replace(one, stop=None) if one.stop and (thinks or self.in_thought(one)) else one for one in prompts]
        alike = batches(asked, self._rows, lambda one: (one.new_tokens, one.stop))
        return [self._with_marks(answer) for batch in alike for answer in self._generate(batch)]

    @cached_property
    def _marks(self) -> dict[int, str]:
        """Around a thought, where the tokenizer has tokens for them: by those."""
        tokenizer = self.loaded.tokenizer
        known: list[tuple[Any, str]] = [(tokenizer.convert_tokens_to_ids(mark), mark) for mark in (BEGIN, END)]
        return {token: mark for token, mark in known if token not in (None, tokenizer.unk_token_id)}

    def _with_marks(self, answer: Answer) -> str:
        """Its text, with marks that the tokenizer takes for special tokens, which are not part of a text."""
        lost = {token: mark for token, mark in self._marks.items() if not self.decode([token])}
        if not lost.keys() & {*answer.token_ids}:
            return answer.text
        parts = groupby(answer.token_ids, lambda token: lost.get(token, ""))
        return "".join(mark * len([*its]) if mark else self.decode([*its]) for mark, its in parts)

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[list[float]]:
        """Of each passage, the natural logarithm of the probability of each scored token, given all before it."""
        from ropewalk.integrations.transformers.scoring import log_likelihoods

        scores: list[list[float]] = []
        for batch in batches(passages, self._rows):
            rows = [one.token_ids for one in batch]
            found = log_likelihoods(self.loaded.model, rows, [one.first for one in batch], self.chunk)
            scores += [one.tolist() for one in found]
        return scores

    @property
    def _rows(self) -> int:
        """Where frequencies change with the length, each text has its own."""
        from ropewalk.integrations.transformers.frequencies import changes_with_length

        return 1 if any(map(changes_with_length, self.loaded.model.modules())) else self.batch_size

    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Prompts that are asked alike."""
        from ropewalk.integrations.transformers.generation import generate_batch

        return generate_batch(
            self.loaded.model,
            self.loaded.tokenizer,
            [one.token_ids for one in prompts],
            max_new_tokens=prompts[0].new_tokens,
            chunk=self.chunk,
            stop=prompts[0].stop,
        )


@dataclass(frozen=True)
class Dummy:
    """No model: words are tokens, every answer is the same, and every token as likely. For tests of what is around a
    model."""

    reply: Callable[[Sequence[int]], str] = lambda token_ids: "12345"
    name: str = DUMMY
    hashes: Hashes = _NONE
    dtype: str = "none"
    device: str = "none"
    batch_size: int = 1

    def under(self, method: Method) -> AbstractContextManager[Dummy]:
        return nullcontext(self)

    def encode(self, text: str, chat: bool = False) -> list[int]:
        return [len(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join("x" * length for length in token_ids)

    def in_thought(self, prompt: Prompt) -> bool:
        return False

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        return [self.reply(prompt.token_ids) for prompt in prompts]

    def log_likelihoods(self, passages: Sequence[Passage]) -> list[list[float]]:
        return [[-1.0] * (len(one.token_ids) - one.first) for one in passages]


Subject = Model | Dummy


def batches(items: Sequence[T], size: int, kind: Callable[[T], object] = lambda item: None) -> Iterator[list[T]]:
    """All items in their order, in batches of at most `size` that are of one kind."""
    for _, alike in groupby(items, kind):
        while batch := list(islice(alike, size)):
            yield batch


def _without_plans() -> AbstractContextManager[None]:
    """torch's own attention by any kernel but cuDNN's, which plans each length anew: milliseconds a layer and step."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


# Of a model's folder, beside its weights. Files are looked at, not what transformers makes of them: that is another
# from release to release, and a run may go on under a later one.
_CONFIG_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*.py")
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "additional_chat_templates/*"),
)


def hashes_of(loaded: LoadedModel) -> Hashes:
    """Of a model's files, or of the hub's commit."""
    source = loaded.source
    folder = Path(source.location)
    if not folder.is_dir():
        return Hashes(str(getattr(loaded.model.config, "_commit_hash", None) or ""))
    if source.gguf_file is not None:
        return Hashes(_sha256([folder / source.gguf_file]))
    weights = _sha256([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return Hashes(weights, _of_settings(folder, _CONFIG_FILES), _of_settings(folder, _TOKENIZER_FILES))


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _of_settings(folder: Path, patterns: Sequence[str]) -> str:
    """Of files with their names; of a configuration without the names and versions in it."""
    from ropewalk.integrations.transformers.fingerprint import of_settings

    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        its = of_settings(json.loads(path.read_bytes())) if path.name.endswith("config.json") else _sha256([path])
        digest.update(f"{path.relative_to(folder).as_posix()} {its}\n".encode())
    return digest.hexdigest()
