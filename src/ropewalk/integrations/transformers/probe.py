# SPDX-License-Identifier: Apache-2.0
"""Finds out, by measurement on the model itself, how each attention layer rotates its queries and keys.

One token on its own attends to itself alone, so in every layer its key at position p is R(p) times the same vector:
`R(p) k_0 = k_p` holds exactly if the rotation is understood, whatever the layers in between compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ropewalk.integrations.transformers.changes import Changes, own_configurations
from ropewalk.ops.call import device_lacks
from ropewalk.ops.rotary import Rotary

PROBE_NAME = "ropewalk-probe"

_TOKENS = 4
_SHORT_POSITIONS = (0, 1, 2, 5, 17, 63)
# How far a map without an end is followed.
_FAR = 1 << 20
# Largest difference, relative to the size of a pair of dimensions, that rounding in the model's dtype explains.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 2e-3}


_OTHERWISE = "models without positions, ALiBi, learned position embeddings and precomputed rotations are not supported"


class UnsupportedModelError(ValueError):
    """A model that cannot be extended; the message says why."""


@dataclass(frozen=True)
class ProbedLayer:
    """An attention module and what was measured: its rotary embedding (None if it has none), its sliding window.

    `frequencies` is the name of the model's buffer that holds the rotary embedding's.
    """

    name: str
    module: nn.Module
    rotary: Rotary | None
    frequencies: str | None
    head_dim: int
    sliding_window: int | None


@dataclass
class _Call:
    module: nn.Module
    query: Tensor
    key: Tensor
    sliding_window: int | None


# Of the probe that runs in this thread.
_calls: ContextVar[list[_Call] | None] = ContextVar("calls of a probe", default=None)


def probe(model: PreTrainedModel, trained_window: int, reach: int | float = 0) -> list[ProbedLayer]:
    """Measures every attention layer of the model, in the order they run.

    Args:
        model: is what it was, afterwards.
        trained_window: tokens; rotation is measured up to 4 times as far at least.
        reach: tokens that a text may have, which is measured to its end; `math.inf` is followed for 2^20 tokens.

    Raises:
        UnsupportedModelError: attention does not go through transformers' interface, or keys do not rotate as found.
    """
    end = max(4 * trained_window, (_FAR if math.isinf(reach) else int(reach)) - 1)
    long_positions = (0, trained_window - 1, 2 * trained_window, 4 * trained_window, end)
    with _probing(model), torch.no_grad():
        short_calls = _run(model, _SHORT_POSITIONS)
        candidates = _inverse_frequencies(model)
        if not short_calls:
            raise UnsupportedModelError(
                f"the attention of {type(model).__name__} does not go through transformers' AttentionInterface, "
                "so nothing can be put in its place"
            )
        rotaries = _Rotaries(model, candidates)
        measured = [rotaries.measure(call, _SHORT_POSITIONS) for call in short_calls]
        long_calls = _run(model, long_positions)
        for call, rotary in zip(long_calls, measured, strict=True):
            rotaries.confirm(call, rotary, long_positions)
    if all(rotary is None for rotary in measured):
        raise UnsupportedModelError(
            f"no layer of {type(model).__name__} rotates its keys: it has no rotary embedding to extend ({_OTHERWISE})"
        )
    layers: dict[nn.Module, ProbedLayer] = {}
    for call, rotary in zip(short_calls, measured, strict=True):
        name = rotaries.name(call.module)
        source = None if rotary is None else rotaries.source(rotary)
        layer = ProbedLayer(name, call.module, rotary, source, call.key.shape[-1], call.sliding_window)
        if layers.setdefault(call.module, layer) != layer:
            raise UnsupportedModelError(f"{name} of {type(model).__name__} attends in two different ways")
    return list(layers.values())


def check_decoder(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for models that show without a run that they cannot be extended."""
    if (lacks := device_lacks(model.device)) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be extended where it is: {lacks}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder: only decoders are supported")
    if not _inverse_frequencies(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no rotary embedding that could be extended: none of its buffers holds inverse "
            f"frequencies ({_OTHERWISE})"
        )


def check_mask(mask_function: Callable[..., Any] | None, options: Mapping[str, Any]) -> None:
    """Raises UnsupportedModelError if a mask shows a token what comes after it.

    Args:
        mask_function: what transformers gives a mask interface; None is causal.
        options: further arguments of the mask interface.
    """
    # What `and_masks` makes shows less than causal attention does: windows, which the probe compares with those of the
    # attention, and packed sequences, which show in the positions.
    narrower = getattr(mask_function, "__name__", "") == "and_mask"
    if options.get("use_vmap") or not (narrower or mask_function in (None, causal_mask_function)):
        raise UnsupportedModelError(
            "only causal attention can be extended: this mask shows tokens what comes after them (encoders, prefix "
            "language models, image tokens seen both ways)"
        )


def register_functions() -> None:
    """Makes the probing functions known to transformers."""
    AttentionInterface.register(PROBE_NAME, _capture)
    AttentionMaskInterface.register(PROBE_NAME, _stand_in)


class _Mask:
    """Takes a mask's place; knows how many keys it shows, and can do what a `LayoutMask` can: be handed on."""

    ndim = 4

    def __init__(self, window: int | None) -> None:
        self.window = window

    def contiguous(self) -> _Mask:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_use_of_mask()

    def __getitem__(self, index: object) -> NoReturn:
        _refuse_use_of_mask()

    @classmethod
    def __torch_function__(cls, *arguments: Any) -> NoReturn:
        _refuse_use_of_mask()


def _refuse_use_of_mask() -> NoReturn:
    raise UnsupportedModelError(
        "this model computes with its attention mask outside of transformers' AttentionInterface (attention of its "
        "own, or an indexer that chooses keys by their content), so nothing can be put in its place"
    )


def _stand_in(*args: Any, mask_function: Callable[..., Any] | None = None, **kwargs: Any) -> _Mask:
    """Mask function in transformers' sense."""
    check_mask(mask_function, kwargs)
    return _Mask(kwargs.get("local_size"))


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Mask | Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Keeps what it is given. One token's attention is its own value."""
    calls = _calls.get()
    if calls is None:
        raise RuntimeError("the probing attention function was called outside of a probe")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{type(module).__name__} is not causal: only causal attention can be extended")
    if isinstance(attention_mask, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} makes an attention mask of its own: only attention to all keys, or to those in a "
            "sliding window, is supported"
        )
    window = None if attention_mask is None else attention_mask.window
    if window != sliding_window:
        raise UnsupportedModelError(
            f"{type(module).__name__} sees {window or 'all'} keys by its mask and {sliding_window or 'all'} by "
            "its sliding window: attention in chunks and other patterns are not supported"
        )
    calls.append(_Call(module, query, key, sliding_window))
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _run(model: PreTrainedModel, positions: tuple[int, ...]) -> list[_Call]:
    """Calls of every layer for a few tokens, each alone, at each of the positions; rows: position-major."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.linspace(0, vocabulary - 1, _TOKENS, device=model.device).long()
    calls: list[_Call] = []
    token = _calls.set(calls)
    try:
        model(
            input_ids=tokens.repeat(len(positions))[:, None],
            position_ids=torch.tensor(positions, device=model.device).repeat_interleave(_TOKENS)[:, None],
            use_cache=False,
        )
        return calls
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model does with what it did not expect
        raise UnsupportedModelError(
            f"{type(model).__name__} could not be probed with single tokens: {type(error).__name__}: {error}"
        ) from error
    finally:
        _calls.reset(token)


class _Rotaries:
    """Matches captured keys with the model's inverse frequencies. Layers that rotate alike share one `Rotary`."""

    def __init__(self, model: PreTrainedModel, candidates: dict[str, Tensor]) -> None:
        self._model = model
        self._candidates = candidates
        self._names = {module: name for name, module in model.named_modules()}
        self._known: dict[tuple[str, bool, int], Rotary] = {}

    def name(self, module: nn.Module) -> str:
        name: str = self._names[module]
        return name

    def source(self, rotary: Rotary) -> str:
        """The buffer that a measured rotary embedding was made from."""
        return next(source for (source, _, _), known in self._known.items() if known is rotary)

    def measure(self, call: _Call, positions: tuple[int, ...]) -> Rotary | None:
        query, key = _by_position(call.query, positions), _by_position(call.key, positions)
        tolerance = _TOLERANCE[call.key.dtype]
        if max(_unrotated_error(query), _unrotated_error(key)) < tolerance:
            return None
        best = float("inf")
        for source, frequencies in self._candidates.items():
            dim = 2 * frequencies.shape[0]
            if dim > key.shape[-1]:
                continue
            for interleaved in (False, True):
                for offset in {0, key.shape[-1] - dim}:
                    rotary = self._known.get((source, interleaved, offset))
                    rotary = rotary or Rotary(frequencies.float().clone(), interleaved, offset)
                    error = max(_rotation_error(query, positions, rotary), _rotation_error(key, positions, rotary))
                    if error < tolerance:
                        return self._known.setdefault((source, interleaved, offset), rotary)
                    best = min(best, error)
        finding = f"is off by at least {best:.2g} of a key's size, where {tolerance:.2g} is allowed in {call.key.dtype}"
        raise UnsupportedModelError(
            f"{self.name(call.module)} of {type(self._model).__name__} does not rotate its keys by any inverse "
            f"frequencies found in the model ({', '.join(self._candidates)}): R(c) k_p = k_(p+c) "
            + (finding if best < float("inf") else f"fits none of them, in heads of {call.key.shape[-1]} dimensions")
        )

    def confirm(self, call: _Call, rotary: Rotary | None, positions: tuple[int, ...]) -> None:
        """Checks a measured rotation far out, where frequencies that depend on the length would have changed."""
        query, key = _by_position(call.query, positions), _by_position(call.key, positions)
        if rotary is None:
            error = max(_unrotated_error(query), _unrotated_error(key))
        else:
            error = max(_rotation_error(query, positions, rotary), _rotation_error(key, positions, rotary))
        if error >= _TOLERANCE[call.key.dtype]:
            parameters = getattr(self._model.config.get_text_config(), "rope_parameters", None)
            raise UnsupportedModelError(
                f"{self.name(call.module)} of {type(self._model).__name__} rotates differently past position "
                f"{positions[1]} than before (off by {error:.2g} of a key's size): cached keys cannot be re-rotated "
                f"when frequencies or scales change with the length (rope_parameters: {parameters})"
            )


def _by_position(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """(positions * tokens, heads, 1, dim) as float64 (heads * tokens, positions, dim)."""
    return x[:, :, 0].double().view(len(positions), _TOKENS, *x.shape[1::2]).permute(2, 1, 0, 3).flatten(0, 1)


def _unrotated_error(x: Tensor) -> float:
    return float((x - x[:, :1]).norm() / x.norm().clamp(min=1e-30))


def _rotation_error(x: Tensor, positions: tuple[int, ...], rotary: Rotary) -> float:
    """Largest error of `R(p) x_0 = x_p` over pairs of dimensions, relative to the pair's size."""
    angles = rotary.phases(torch.tensor(positions, device=x.device))
    error = rotary.rotate(x[:, :1].expand_as(x), angles.cos(), angles.sin()) - x
    size = x.square().mean(dim=(0, 1)).sqrt()
    floor = 1e-3 * size.max()
    return float((error.square().mean(dim=(0, 1)).sqrt() / size.clamp(min=floor)).max())


def _inverse_frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's inverse frequencies by name, without the copies that dynamic kinds keep of their originals."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1
    }


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """The model on the probing functions, in eval mode; afterwards it is what it was, whatever it did to itself."""
    before = [
        (attributes, dict(attributes)) for module in model.modules() for attributes in (vars(module), module._buffers)
    ]
    contents = [(buffer, buffer.clone()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    try:
        # Configurations may be shared with models that are in use meanwhile.
        for configuration in own_configurations(model.modules(), Changes()):
            configuration._attn_implementation = PROBE_NAME
        model.train(False)
        yield
    finally:
        _put_back(before, contents)


def _put_back(before: list[tuple[dict[str, Any], dict[str, Any]]], contents: list[tuple[Tensor, Tensor]]) -> None:
    for attributes, were in before:
        for name in attributes.keys() - were.keys():
            del attributes[name]
        for name, value in were.items():
            if attributes.get(name) is not value or name not in attributes:
                attributes[name] = value
    for buffer, content in contents:
        if not torch.equal(buffer, content):
            buffer.copy_(content)
