# SPDX-License-Identifier: Apache-2.0
"""Reads a long prompt chunk by chunk, and generates from it as text comes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ropewalk.integrations.transformers.extend import check_length
from ropewalk.integrations.transformers.far_keys import new_cache
from ropewalk.integrations.transformers.place import place
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies
from ropewalk.integrations.transformers.wrappers import callable_alone

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

# Called with the tokens read so far and those to read in all.
OnProgress = Callable[[int, int], None]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a model answered, and how long it took.

    Attributes:
        text: the answer, special tokens left out.
        token_ids: every new token.
        prompt_tokens: length of the prompt.
        prefill_seconds: time to read the prompt.
        decode_seconds: time to write the answer.
        ended: whether a token that ends texts, or `stop`, was written; else it is as long as was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    ended: bool


@dataclass(frozen=True)
class PrefillCost:
    """Seconds to read n tokens: `linear * n + quadratic * n^2`. The square is the attention's part."""

    linear: float
    quadratic: float

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> PrefillCost:
        """From (tokens read, seconds) measured; least squares, with neither part below 0. None measured: 0."""
        if not points:
            return cls(0.0, 0.0)
        n = [float(tokens) for tokens, _ in points]
        t = [seconds for _, seconds in points]
        s2, s3, s4 = (sum(x**power for x in n) for power in (2, 3, 4))
        st1, st2 = sum(x * y for x, y in zip(n, t, strict=True)), sum(x * x * y for x, y in zip(n, t, strict=True))
        determinant = s2 * s4 - s3 * s3
        if determinant > 1e-9 * s2 * s4:
            linear, quadratic = (st1 * s4 - st2 * s3) / determinant, (s2 * st2 - s3 * st1) / determinant
            if linear >= 0 and quadratic >= 0:
                return cls(linear, quadratic)
            if linear < 0:
                return cls(0.0, st2 / s4)
        return cls(st1 / s2, 0.0)

    def seconds(self, tokens: int) -> float:
        return self.linear * tokens + self.quadratic * tokens**2


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    chunk: int = 2048,
    on_progress: OnProgress | None = None,
    attention_mask: Tensor | None = None,
) -> None:
    """Reads all tokens but the last into the cache, `chunk` at a time, so that memory grows with the cache alone.

    Args:
        model: in eval mode, extended or not.
        input_ids: (rows, tokens), int64.
        cache: what it holds already counts as the beginning of `input_ids`.
        chunk: tokens of each row in one forward pass.
        on_progress: called after each chunk, and once before the first.
        attention_mask: (rows, tokens), 0 for padding, which is on the left; None if there is none.

    Raises:
        LengthError: the tokens are more than the map of an extended model reaches (eq. 4); nothing was read.
        ValueError: `chunk` is below 1, or `input_ids` are not rows of tokens.
    """
    model = callable_alone(model)
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more tokens, got {chunk}")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be rows of tokens (rows, tokens), got shape {tuple(input_ids.shape)}")
    check_length(model, input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(dim=1).max()))
    # Only the last position's scores over the vocabulary, which would be larger than the cache.
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    total = input_ids.shape[1] - 1
    done, device = cache.get_seq_length(), place(model)
    report = on_progress or (lambda done, total: None)
    report(done, total)
    positions = None if attention_mask is None else (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    while done < total:
        end = min(done + chunk, total)
        if attention_mask is not None and positions is not None:
            options["attention_mask"] = attention_mask[:, :end].to(device)
            options["position_ids"] = positions[:, done:end].to(device)
        model(input_ids=input_ids[:, done:end].to(device), **options)
        done = end
        report(done, total)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Sequence[int],
    *,
    max_new_tokens: int,
    chunk: int = 2048,
    temperature: float = 0.0,
    stop: str | None = None,
    on_progress: OnProgress | None = None,
    on_text: OnText | None = None,
    cache: Cache | None = None,
) -> Answer:
    """Reads a prompt chunk by chunk and writes the answer; in the calling thread, so that Ctrl-C stops it at once.

    A model whose rotary frequencies change with the length has those of the prompt and the longest answer together.

    Args:
        model: in eval mode, extended or not.
        tokenizer: the model's.
        token_ids: the prompt, special tokens included.
        max_new_tokens: longest answer.
        chunk: tokens in one forward pass of the prefill.
        temperature: of the sampling, with the other sampling settings the model came with; 0 is greedy.
        stop: text that ends the answer, and is not part of it.
        on_progress: see `prefill`.
        on_text: called with each piece of the answer as it comes, whole words at a time; `stop` ends up in no piece.
        cache: holds the beginning of the prompt already, and in the end all and the answer; by default a new one.

    Raises:
        LengthError: the prompt, or later the answer, is past what the map of an extended model reaches (eq. 4).
        ValueError: the prompt is empty, or a number is out of range.
    """
    [answer] = _generate(
        model, tokenizer, [token_ids], max_new_tokens, chunk, stop, temperature, on_progress, on_text, cache
    )
    return answer


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    chunk: int = 2048,
    stop: str | None = None,
) -> list[Answer]:
    """`generate` of several prompts together, greedily, padded on the left to the longest of them.

    Their frequencies are those of the longest prompt where they change with the length, and their times are those of
    all together.
    """
    return _generate(model, tokenizer, prompts, max_new_tokens, chunk, stop)


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    chunk: int,
    stop: str | None,
    temperature: float = 0.0,
    on_progress: OnProgress | None = None,
    on_text: OnText | None = None,
    cache: Cache | None = None,
) -> list[Answer]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    model = callable_alone(model)
    settings = _generation_config(model, tokenizer, max_new_tokens, temperature)
    input_ids, mask = _padded(prompts, settings.pad_token_id, place(model))
    cache = new_cache(model) if cache is None else cache
    longest = input_ids.shape[1]
    criteria = [] if stop is None else [_StopAt(stop, tokenizer, longest)]
    decoder: Any = model  # its `generate` is not typed
    began = perf_counter()
    with fixed_frequencies(model, longest + max_new_tokens):
        prefill(model, input_ids, cache, chunk, on_progress, None if mask.all() else mask)
        _wait_for(model)
        read = perf_counter()
        output = decoder.generate(
            input_ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=None if on_text is None else _Pieces(tokenizer, on_text, stop),
        )
    seconds = read - began, perf_counter() - read
    return [
        _answer(tokenizer, prompt, row.tolist(), stop, settings, *seconds)
        for prompt, row in zip(prompts, output[:, longest:], strict=True)
    ]


def _padded(prompts: Sequence[Sequence[int]], filler: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens, filled on the left, and their attention mask."""
    if not all(prompts):
        raise ValueError("a prompt must have 1 token or more, got an empty one")
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), filler or 0, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    new: list[int],
    stop: str | None,
    settings: Any,
    prefill_seconds: float,
    decode_seconds: float,
) -> Answer:
    """Of one row, whose tokens after its end are the batch's."""
    ends = _ends(settings)
    end = next((i for i, token in enumerate(new) if token in ends), None)
    new = new if end is None else new[: end + 1]
    text = _decode(tokenizer, new)
    stopped = stop is not None and stop in text
    return Answer(
        text=text if stop is None else text.partition(stop)[0],
        token_ids=tuple(new),
        prompt_tokens=len(prompt),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        ended=stopped or end is not None,
    )


def _ends(settings: Any) -> list[int]:
    """The tokens that end a text."""
    ends = settings.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> Any:
    """The model's own settings, with the length and the kind of sampling that were asked for."""
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens = max_new_tokens
    config.max_length = None
    config.min_length = None
    config.num_beams = 1
    # MPT's configuration says otherwise, and a whole text would go behind what the cache holds of it.
    config.use_cache = True
    config.do_sample = temperature > 0
    if temperature > 0:
        config.temperature = temperature
    else:
        config.temperature = config.top_p = config.top_k = config.min_p = config.typical_p = None
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    config.eos_token_id = ends
    if config.pad_token_id is None:
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return config


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _wait_for(model: PreTrainedModel) -> None:
    if (device := place(model)).type == "cuda":
        torch.cuda.synchronize(device)


class _StopAt(StoppingCriteria):
    """Ends a row when its new text holds `stop`."""

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self._stop, self._tokenizer, self._prompt_tokens = stop, tokenizer, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [_decode(self._tokenizer, row) for row in input_ids[:, self._prompt_tokens :].tolist()]
        return torch.tensor([self._stop in text for text in texts], device=input_ids.device)


class _Pieces(TextStreamer):
    """Hands the new text on as it comes, up to `stop`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, stop: str | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._stop, self._stopped = on_text, stop, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._stop is not None and not self._stopped and self._stop in text:
            text, self._stopped = text.partition(self._stop)[0], True
            self._on_text(text)
        elif text and not self._stopped:
            self._on_text(text)
