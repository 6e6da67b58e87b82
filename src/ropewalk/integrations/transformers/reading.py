# SPDX-License-Identifier: Apache-2.0
"""Reads a text once, and asks about it often.

    with ropewalk.extend(model, target_length=32_768):
        reading = read(model, tokenizer, text)
        print(reading.ask("What was decided?").text)
        print(reading.ask("By whom?").text)
        reading.save("report.reading")

Each question is asked of the text alone: the cache goes back to the end of the text after every answer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ropewalk.integrations.transformers import fingerprint, kept
from ropewalk.integrations.transformers.far_keys import FarKeysLayer, new_cache
from ropewalk.integrations.transformers.framing import Document, Frame, shared
from ropewalk.integrations.transformers.frequencies import changes_with_length
from ropewalk.integrations.transformers.generation import Answer, OnProgress, OnText, generate, prefill
from ropewalk.integrations.transformers.kept import Kept, ReadingError
from ropewalk.integrations.transformers.place import place
from ropewalk.integrations.transformers.roomy import RoomyLayer
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies
from ropewalk.integrations.transformers.versions import versions
from ropewalk.integrations.transformers.wrappers import callable_alone
from ropewalk.maps import from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens that a question and its answer may have, where nothing is said about it.
_ROOM = 2048
# Tokens that no text has: a window so large drops none.
_NEVER_FULL = 1 << 32
# What a kept file must agree on with the model it is loaded for: the fact, and how it differs.
_AGREE = {
    "config": "its model has another configuration",
    "dtype": "its model has another dtype ({0}, not {1})",
    "weights": "its model has other weights",
    "frequencies": "its model rotates by other frequencies",
    "adapters": "its model has other adapters on ({0}, not {1})",
}


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    chat: bool | None = None,
    target_length: int | None = None,
    chunk: int = 2048,
    allow_control_tokens: bool = False,
    on_progress: OnProgress | None = None,
) -> Reading:
    """Reads a text, for questions to be asked about it.

    Args:
        model: in eval mode, extended or not; it stays so while questions are asked.
        tokenizer: the model's.
        text: what comes before every question; it may be empty.
        chat: whether to apply the tokenizer's chat template; by default if it has one.
        target_length: tokens that the text, a question and its answer may have. It matters for models whose rotary
            frequencies follow the length (dynamic NTK, LongRoPE): theirs are those of so many tokens throughout. By
            default the text's and 2048 more.
        chunk: tokens in one forward pass.
        allow_control_tokens: whether `<|im_end|>` and the like in the text or a question are control tokens.
        on_progress: see `generation.prefill`.

    Raises:
        LengthError: the text is past what the map of an extended model reaches (eq. 4); nothing was read.
        ControlTokenError: the text holds a control token that cannot be written in other tokens.
        ValueError: a number is out of range, or there is no chat template where one was asked for.
    """
    document = Document(tokenizer, text, Frame.of(tokenizer, chat), allow_control_tokens)
    return read_document(model, document, target_length, chunk, on_progress)


def read_document(
    model: PreTrainedModel,
    document: Document,
    target_length: int | None = None,
    chunk: int = 2048,
    on_progress: OnProgress | None = None,
) -> Reading:
    """`read`, of a text that is in its frame already."""
    token_ids = document.token_ids
    model = callable_alone(model)
    length = len(token_ids) + _ROOM if target_length is None else target_length
    if length <= len(token_ids):
        raise ValueError(f"target_length must be more than the {len(token_ids)} tokens of the text, got {length}")
    cache = new_cache(model)
    began = perf_counter()
    with fixed_frequencies(model, length):
        # All but the last token of a prompt are read, and this one stands for a question's first.
        prefill(model, torch.tensor([[*token_ids, 0]]), cache, chunk, on_progress)
        state = _state(model)
    return Reading(model, document, length, chunk, cache, state, perf_counter() - began)


def check_keepable(cache: DynamicCache) -> None:
    """Looks whether a file can hold what such a cache will.

    Raises:
        ReadingError: it has a layer of a kind that keeps something else than keys and values.
    """
    for number, layer in enumerate(cache.layers):
        if _kind(layer) is None and not _is_dummy(layer):
            raise ReadingError(f"layer {number} keeps a {type(layer).__name__}, which cannot be kept in a file")


@dataclass(eq=False)
class Reading:
    """A text that a model read. See `read`, which makes it.

    Attributes:
        model: that read it.
        document: the text, and how a question becomes a prompt.
        length: tokens that the text, a question and its answer may have in a model whose frequencies follow the length.
        chunk: tokens in one forward pass.
        cache: what the model keeps of the text.
        seconds: that it took to read, or to load.
    """

    model: PreTrainedModel
    document: Document
    length: int
    chunk: int
    cache: DynamicCache = field(repr=False)
    _state: dict[str, Any] = field(repr=False)
    seconds: float
    # Tokens of the text that the cache holds, and layers that cannot go back to them by themselves.
    _held: int = field(init=False, repr=False)
    _copies: dict[int, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._held = self.tokens
        self._copies = {n: _copy(layer) for n, layer in enumerate(self._layers) if not _can_go_back(layer)}

    @property
    def _layers(self) -> list[Any]:
        return list(self.cache.layers)

    @property
    def tokens(self) -> int:
        """Those of the text that are read once; the last few may be read again with each question."""
        return len(self.document.token_ids)

    def ask(
        self,
        question: str = "",
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        stop: str | None = None,
        on_progress: OnProgress | None = None,
        on_text: OnText | None = None,
    ) -> Answer:
        """The answer to a question about the text, as if nothing else had been asked.

        Args:
            question: goes behind the text; without one the model goes on from the text.
            max_new_tokens: longest answer.
            temperature, stop, on_progress, on_text: see `generation.generate`.

        Raises:
            LengthError: the prompt, or later the answer, is past what the map of an extended model reaches (eq. 4).
            ReadingError: the model is not as it was when it read the text, or there is no room for the answer.
        """
        prompt = self.document.prompt(question)
        needed = len(prompt) + max_new_tokens
        if needed > self.length and any(map(changes_with_length, self.model.modules())):
            raise ReadingError(
                f"the question and its answer make {needed} tokens, and the text was read with the frequencies of "
                f"{self.length}: read it anew with target_length={needed}"
            )
        with fixed_frequencies(self.model, self.length):
            self._check(_state(self.model))
            self._go_back(min(shared(prompt, self.document.token_ids), self._held, max(0, len(prompt) - 1)))
            try:
                return generate(
                    self.model,
                    self.document.tokenizer,
                    prompt,
                    max_new_tokens=max_new_tokens,
                    chunk=self.chunk,
                    temperature=temperature,
                    stop=stop,
                    on_progress=on_progress,
                    on_text=on_text,
                    cache=self.cache,
                )
            finally:
                # An answer that was interrupted may have left a layer behind.
                self._go_back(min([shared(prompt, self.document.token_ids), *map(_length, self._layers)]))

    def save(self, path: str | Path) -> None:
        """Keeps what was read in a file, for `load`.

        Raises:
            ReadingError: it cannot be written; what was at `path` still is.
        """
        check_keepable(self.cache)
        tensors: dict[str, Tensor] = {"token_ids": torch.tensor(self.document.token_ids, dtype=torch.int64)}
        self._go_back(self._held)
        if self._held < self.tokens:
            raise ReadingError("a question changed how the end of the text is read: save a reading before asking")
        layers: list[Any] = []
        for number, layer in enumerate(self._layers):
            if layer.keys is None:  # its module uses another layer's
                layers.append(None)
                continue
            layers.append([_kind(layer), layer.get_seq_length()])
            tensors[f"{number}.keys"], tensors[f"{number}.values"] = layer.keys, layer.values
        frame = self.document.frame
        facts = {
            **self._state,
            **_made_with(self.model),
            "model": type(self.model).__name__,
            "frame": [frame.head, frame.tail, frame.chat],
            "allow_control_tokens": self.document.allow_control_tokens,
            "length": self.length,
            "layers": layers,
        }
        kept.write(Path(path), tensors, facts, self.document.text)

    @classmethod
    def load(
        cls, path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chunk: int = 2048
    ) -> Reading:
        """What `save` kept, for the same model in the same state.

        Args:
            path: of the file.
            model: with the same weights, and extended as it was when it read the text.
            tokenizer: the model's.
            chunk: tokens of a question in one forward pass.

        Raises:
            ReadingError: there is no such file, it is broken, or it was made by another model or otherwise.
        """
        began, model = perf_counter(), callable_alone(model)
        file = Kept.open(Path(path))
        try:
            facts, frame = file.facts, Frame(*file.facts["frame"])
            document = Document(tokenizer, file.text, frame, facts["allow_control_tokens"])
            length, layers = facts["length"], facts["layers"]
            with fixed_frequencies(model, length):
                state = _state(model)
                _check_facts(file, {**state, **_made_with(model)})
            tensors = file.tensors(place(model))
            if document.token_ids != tensors["token_ids"].tolist():
                raise _differs(file, "the tokenizer reads its text as other tokens")
            cache = _cache(model, layers, tensors)
        except ReadingError:
            raise
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ReadingError(f"{str(file.path)!r} is a broken kept reading ({error!r})") from error
        return cls(model, document, length, chunk, cache, state, perf_counter() - began)

    def _check(self, state: dict[str, Any]) -> None:
        """The model must be as it was."""
        for fact, value in state.items():
            if value == (before := self._state[fact]):
                continue
            if fact == "dtype":
                how = f"in {before}, and the model now is in {value}"
            elif fact == "extension":
                how = f"with {_told(before)}, and the model now has {_told(value)}"
            elif fact == "adapters":
                how = f"with the adapters {before}, and the model now has {value}"
            else:
                how = "with other rotary frequencies than the model now has"
            raise ReadingError(f"the text was read {how}: read it anew")

    def _go_back(self, tokens: int) -> None:
        """Leaves so many tokens of the text in the cache, and nothing else."""
        if tokens < self.tokens and self._copies:
            number = min(self._copies)
            raise ReadingError(
                f"layer {number} keeps a {type(self._copies[number]).__name__}, which cannot go back into the text, "
                "where this question begins: ask another way, or read the text anew"
            )
        for number, layer in enumerate(self._layers):
            if number in self._copies:
                vars(layer).update(vars(_copy(self._copies[number])))
            elif isinstance(layer, RoomyLayer):
                if (more := layer.get_seq_length() - tokens) > 0:
                    layer.crop(-more)
            elif layer.keys is not None:
                layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length = tokens
        self._held = tokens


def _can_go_back(layer: Any) -> bool:
    """Whether a layer still has what it had after each token; a window that `extend` disabled never drops one."""
    if type(layer) is DynamicSlidingWindowLayer:
        return bool(layer.sliding_window > _NEVER_FULL)
    return _kind(layer) == DynamicLayer.__name__ or _is_dummy(layer)


def _kind(layer: Any) -> str | None:
    """What a file calls a layer, and None if it cannot hold what that keeps."""
    if type(layer) in (DynamicLayer, RoomyLayer, FarKeysLayer):
        return DynamicLayer.__name__
    return DynamicSlidingWindowLayer.__name__ if type(layer) is DynamicSlidingWindowLayer else None


def _is_dummy(layer: Any) -> bool:
    """Whether a layer never keeps anything; not every release of transformers has such ones."""
    return type(layer).__name__ == "DummyLayer"


def _copy(layer: Any) -> Any:
    """A layer as it is now. Those with a window make new tensors where they change; others may write into theirs."""
    return copy.copy(layer) if type(layer) is DynamicSlidingWindowLayer else copy.deepcopy(layer)


def _length(layer: Any) -> int:
    """Tokens that a layer holds; no limit where it keeps none, or counts them otherwise."""
    if not _can_go_back(layer) or layer.keys is None:
        return _NEVER_FULL
    return min(int(layer.keys.shape[-2]), int(layer.values.shape[-2]))


def _state(model: PreTrainedModel) -> dict[str, Any]:
    """Of a model: what must not change between the text and a question."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "extension": fingerprint.of_extension(model),
        "frequencies": fingerprint.of_frequencies(model),
        "adapters": fingerprint.of_adapters(model),
    }


def _made_with(model: PreTrainedModel) -> dict[str, Any]:
    """What else must be the same for a kept file."""
    made = {name: version for name, version in versions().items() if name != "python"}
    try:
        return {"versions": made, "config": fingerprint.of_config(model), "weights": fingerprint.of_weights(model)}
    except ValueError as error:
        raise ReadingError(f"what this model reads cannot be kept: {error}") from error


def _check_facts(file: Kept, now: dict[str, Any]) -> None:
    """Refuses a file that was made otherwise than it would be now."""
    for name, version in now["versions"].items():
        if (other := file.facts["versions"][name]) != version:
            raise _differs(file, f"it was made with {name} {other}, not {version}")
    for fact, how in _AGREE.items():
        if file.facts[fact] != now[fact]:
            raise _differs(file, how.format(file.facts[fact], now[fact]))
    if file.facts["extension"] != now["extension"]:
        was, is_now = _told(file.facts["extension"]), _told(now["extension"])
        raise _differs(file, f"its text was read with {was}, and the model has {is_now}")


def _differs(file: Kept, how: str) -> ReadingError:
    return ReadingError(f"{str(file.path)!r} does not fit: {how}. Read the text anew, into another file")


def _told(extension: Mapping[str, Any] | None) -> str:
    """What `fingerprint.of_extension` found, in words."""
    if extension is None:
        return "no map"
    scaling = f" and query scaling {extension['query_scaling'][0]}" if extension["query_scaling"] else ""
    return f"the map {from_dict(extension['map'])} in {len(extension['layers'])} layers{scaling}"


def _cache(model: PreTrainedModel, layers: list[Any], tensors: dict[str, Tensor]) -> DynamicCache:
    """The cache that was saved."""
    cache = new_cache(model)
    for number, described in enumerate(layers):
        if described is None:
            continue
        kind, tokens = described
        keys, values = tensors[f"{number}.keys"], tensors[f"{number}.values"]
        if kind == DynamicLayer.__name__:
            cache.update(keys, values, number)
            continue
        layer: Any = cache.layers[number]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, tokens
    return cache
