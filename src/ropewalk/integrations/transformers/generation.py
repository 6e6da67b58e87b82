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
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextStreamer

from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies

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
) -> None:
    """Reads all tokens but the last into the cache, `chunk` at a time, so that memory grows with the cache alone.

    Args:
        model: in eval mode, extended or not.
        input_ids: (1, tokens), int64.
        cache: what it holds already counts as the beginning of `input_ids`.
        chunk: tokens in one forward pass.
        on_progress: called after each chunk, and once before the first.

    Raises:
        ValueError: `chunk` is below 1, or `input_ids` is not one row of tokens.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more tokens, got {chunk}")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be one row of tokens (1, tokens), got shape {tuple(input_ids.shape)}")
    # Only the last position's scores over the vocabulary, which would be larger than the cache.
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    total = input_ids.shape[1] - 1
    done = cache.get_seq_length()
    report = on_progress or (lambda done, total: None)
    report(done, total)
    while done < total:
        part = input_ids[:, done : min(done + chunk, total)].to(model.device)
        model(input_ids=part, **options)
        done += part.shape[1]
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

    Raises:
        ValueError: the prompt is empty, or a number is out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    input_ids = torch.tensor([list(token_ids)], dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    settings = _generation_config(model, tokenizer, max_new_tokens, temperature)
    criteria = [] if stop is None else [_StopAt(stop, tokenizer, input_ids.shape[1])]
    decoder: Any = model  # its `generate` is not typed
    began = perf_counter()
    with fixed_frequencies(model, input_ids.shape[1] + max_new_tokens):
        prefill(model, input_ids, cache, chunk, on_progress)
        _wait_for(model)
        read = perf_counter()
        output = decoder.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=None if on_text is None else _Pieces(tokenizer, on_text, stop),
        )
    new = tuple(output[0, input_ids.shape[1] :].tolist())
    text = _decode(tokenizer, new)
    stopped = stop is not None and stop in text
    return Answer(
        text=text if stop is None else text.partition(stop)[0],
        token_ids=new,
        prompt_tokens=input_ids.shape[1],
        prefill_seconds=read - began,
        decode_seconds=perf_counter() - read,
        ended=stopped or new[-1] in _ends(settings),
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
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


class _StopAt(StoppingCriteria):
    """Ends when the new text holds `stop`."""

    def __init__(self, stop: str, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self._stop, self._tokenizer, self._prompt_tokens = stop, tokenizer, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        text = _decode(self._tokenizer, input_ids[0, self._prompt_tokens :].tolist())
        return torch.tensor([self._stop in text], device=input_ids.device)


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
