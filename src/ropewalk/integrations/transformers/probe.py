# SPDX-License-Identifier: Apache-2.0
"""Finds out, by measurement on the model itself, how each attention layer rotates its queries and keys.

One token on its own attends to itself alone, so in every layer its key at position p is R(p) times the same vector:
`R(p) k_0 = k_p` holds exactly if the rotation is understood, whatever the layers in between compute.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ropewalk.integrations.transformers import refusals
from ropewalk.integrations.transformers.adapters import has_adapter, table_frequencies
from ropewalk.integrations.transformers.changes import Changes, own_configurations
from ropewalk.integrations.transformers.place import place
from ropewalk.integrations.transformers.refusals import UnsupportedModelError as UnsupportedModelError
from ropewalk.integrations.transformers.watch import paths
from ropewalk.ops.call import device_lacks
from ropewalk.ops.rotary import Rotary

PROBE_NAME = "ropewalk-probe"

_TOKENS = 4
# Of a text whose keys are counted.
_TEXT = 129
_SHORT_POSITIONS = (0, 1, 2, 5, 17, 63)
# That every model has, and a text that is as long as nothing else in a model.
_FIRST_POSITIONS, _FIRST_TOKENS = (0, 1, 2, 5), tuple(range(13))
# How far a map without an end is followed.
_FAR = 1 << 20
# Largest difference, relative to the size of a pair of dimensions, that rounding in the model's dtype explains.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 2e-3}


# What transformers calls what a layer attends to, where that is no text.
_BESIDE_THE_TEXT = {"cross_attention_states", "encoder_hidden_states", "key_value_states"}

# How the name of a table of rotations ends.
_TABLE = "embed_positions"

# What an attention may be given beside queries, keys, values and masks, without another score for it.
_HARMLESS = {"position_ids", "cache_position", "s_aux"}


class _OwnAttentionError(UnsupportedModelError):
    """Attention that was computed with the mask outside of transformers' interface."""


@dataclass(frozen=True)
class ProbedLayer:
    """An attention module and what was measured.

    Attributes:
        rotary: None if it has none.
        frequencies: name of the model's buffer that the rotary embedding's were found in, and what it holds; None
            without a rotary embedding, or where the buffer is a table of rotations.
        sliding_window: keys that it sees, the query's own included; None for all.
        chunk: tokens of the blocks that it attends within; None for none.
        slopes: of its heads (ALiBi); None for none.
        axes: of its positions, as of images and videos; 0 where it has one, or they are not understood.
        axis_of_pair: int64, (pairs,), by which of them each pair turns.
        is_cross: whether it attends to something beside the text, as to an image, and so was not measured.
    """

    name: str
    module: nn.Module
    rotary: Rotary | None
    frequencies: tuple[str, Tensor] | None = field(compare=False)
    head_dim: int
    sliding_window: int | None
    chunk: int | None
    slopes: Tensor | None = field(compare=False)
    axes: int
    axis_of_pair: Tensor | None = field(compare=False)
    is_cross: bool = False


# Where a rotary embedding comes from: a buffer's name, whether pairs are interleaved, the first dimension; 1 for the
# buffer's frequencies, -1 for those turning the other way, and 0 for those in another order.
_Source = tuple[str, bool, int, int]


@dataclass
class _Call:
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    sliding_window: int | None
    chunk: int | None


# Of the probe that runs in this thread.
_calls: ContextVar[list[_Call] | None] = ContextVar("calls of a probe", default=None)
# Whether it gives no masks, to see what a model does beside computing with them.
_without_masks: ContextVar[bool] = ContextVar("a probe without masks", default=False)


def farthest(trained_window: int, reach: int | float) -> int:
    """The last position that `probe` measures."""
    return max(4 * trained_window, (_FAR if math.isinf(reach) else int(reach)) - 1)


def probe(
    model: PreTrainedModel,
    trained_window: int,
    reach: int | float = 0,
    slopes: Mapping[nn.Module, Tensor] | None = None,
) -> list[ProbedLayer]:
    """Measures every attention layer of the model, in the order they run.

    Args:
        model: is what it was, afterwards.
        trained_window: tokens; rotation is measured up to 4 times as far at least.
        reach: tokens that a text may have, which is measured to its end; `math.inf` is followed for 2^20 tokens.
        slopes: of the modules that have ALiBi.

    Raises:
        UnsupportedModelError: attention does not go through transformers' interface, or keys do not rotate as found.
    """
    slopes = slopes or {}
    far_positions = (0, trained_window - 1, 2 * trained_window, 4 * trained_window, farthest(trained_window, reach))
    with _probing(model), torch.no_grad():
        short_calls = _run(model, _SHORT_POSITIONS)
        candidates = _inverse_frequencies(model)
        if not short_calls:
            raise UnsupportedModelError(_without_calls(model))
        _check_keys(model)
        rotaries = _Rotaries(model, candidates)
        far_calls = _run(model, far_positions)
        measured = []
        for short, far in zip(short_calls, far_calls, strict=True):
            measured.append(rotaries.measure(short, far, _SHORT_POSITIONS, far_positions))
            rotaries.confirm(far, measured[-1], far_positions)
        axes = _count_axes(model)
        axis_of_pairs = _axis_of_pairs(model, axes, measured, far_positions) if axes else [None] * len(measured)
    if all(rotary is None for rotary in measured) and not slopes:
        raise UnsupportedModelError(refusals.without_positions(type(model).__name__))
    layers: dict[nn.Module, ProbedLayer] = {}
    for call, rotary, axis_of_pair in zip(short_calls, measured, axis_of_pairs, strict=True):
        name = rotaries.name(call.module)
        source = None if rotary is None else rotaries.source(rotary)
        layer = ProbedLayer(
            name=name,
            module=call.module,
            rotary=rotary,
            frequencies=source,
            head_dim=call.key.shape[-1],
            sliding_window=call.sliding_window,
            chunk=call.chunk,
            slopes=slopes.get(call.module),
            axes=0 if axis_of_pair is None else axes,
            axis_of_pair=axis_of_pair,
        )
        if layers.setdefault(call.module, layer) != layer:
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} attends in two different ways; {refusals.AS_IT_IS}"
            )
    return _with_cross_attention(model, list(layers.values()))


def _with_cross_attention(model: PreTrainedModel, layers: list[ProbedLayer]) -> list[ProbedLayer]:
    """The measured layers, and those between them that a text alone does not run: they attend to an image, say."""
    named = dict(model.named_modules())
    models = [name for name, module in named.items() if isinstance(module, PreTrainedModel)]

    def innermost(name: str) -> str:
        return max((path for path in ("", *paths(name)) if path in models), key=len)

    found, inside = {layer.name: layer for layer in layers}, {innermost(layer.name) for layer in layers}
    cross = [
        ProbedLayer(name, module, None, None, 0, None, None, None, 0, None, is_cross=True)
        for name, module in named.items()
        if name not in found and _is_cross_attention(module) and innermost(name) in inside
    ]
    if not cross:
        return layers
    found |= {layer.name: layer for layer in cross}
    return [found[name] for name in named if name in found]


def _is_cross_attention(module: nn.Module) -> bool:
    if not (type(module).__name__.endswith("Attention") and hasattr(module, "config")):
        return False
    return not _BESIDE_THE_TEXT.isdisjoint(inspect.signature(module.forward).parameters)


def check_decoder(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for models that show without a run that they cannot be extended."""
    device = place(model)
    if device.type == "meta":
        raise UnsupportedModelError(
            f"{type(model).__name__} has no weights yet (its first are on the meta device, and no hook of accelerate "
            "brings them from elsewhere): load them before it is extended"
        )
    if (lacks := device_lacks(device)) is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be extended where it is: {lacks}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(refusals.encoder_decoder(type(model).__name__))
    indexers = [type(module).__name__ for module in model.modules() if "Indexer" in type(module).__name__]
    if indexers:
        raise UnsupportedModelError(refusals.sparse(type(model).__name__, indexers[0]))
    if not (_inverse_frequencies(model) or any(map(has_adapter, model.modules()))):
        raise UnsupportedModelError(_without_rotary(model))


def _without_rotary(model: PreTrainedModel) -> str:
    """What a model without inverse frequencies has instead."""
    kind = type(model).__name__
    if not _weighs_tokens(model):
        return refusals.without_attention(kind)
    register_functions()
    try:
        with _probing(model), torch.no_grad():
            calls = _run(model, _SHORT_POSITIONS)
    except _OwnAttentionError as error:
        return refusals.learned(kind) if _adds_positions(model) else str(error)
    except UnsupportedModelError as error:
        return str(error)
    if not calls:
        return _without_calls(model)
    if all(_unrotated_error(_by_position(call.key, _SHORT_POSITIONS)) < _TOLERANCE[call.key.dtype] for call in calls):
        return refusals.without_positions(kind)
    return refusals.learned(kind)


def _adds_positions(model: PreTrainedModel) -> bool:
    """Whether a token on its own, which attends to itself alone, is another at another position."""
    at = torch.tensor(_FIRST_POSITIONS, device=place(model))[:, None]
    with _kept(model), torch.no_grad():
        outputs = _forward(model, _tokens(model)[1:2].expand(len(at), 1), at)[0].double()
    return bool((outputs - outputs[:1]).abs().max() > 1e-3 * outputs.abs().max())


def _without_calls(model: PreTrainedModel) -> str:
    """Why nothing of a model came to the attention interface."""
    kind = type(model).__name__
    return refusals.own_attention(kind) if _weighs_tokens(model) else refusals.without_attention(kind)


def _weighs_tokens(model: PreTrainedModel) -> bool:
    """Whether a layer weighs the tokens before a token, as attention does and recurrent layers do not.

    Shapes say so, and some models change their weights when they run: none is read.
    """
    shapes = {name: x.to("meta") for name, x in (*model.named_parameters(), *model.named_buffers())}
    weighs = _Weighs(len(_FIRST_TOKENS))
    with _kept(model), torch.no_grad(), weighs:
        try:
            tokens = torch.tensor([_FIRST_TOKENS], device="meta")
            torch.func.functional_call(model, shapes, (tokens,), {"use_cache": False})
        except Exception:  # what looks at contents cannot run so, and is said to
            return True
    return weighs.found


class _Weighs(TorchFunctionMode):
    """Notes whether a text's tokens are weighed by a softmax over those before them."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.found = tokens, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, first = getattr(function, "__name__", ""), args[0] if args else None
        if name == "scaled_dot_product_attention":
            self.found = True
        elif name == "softmax" and isinstance(first, Tensor) and first.ndim > 2:
            self.found |= self.tokens in first.shape[-2:] and first.shape[-1] >= self.tokens
        return function(*args, **(kwargs or {}))


def _check_keys(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError where a layer attends to other keys than one a token."""
    vocabulary = model.config.get_text_config().vocab_size
    calls: list[_Call] = []
    token = _calls.set(calls)
    try:
        _forward(model, torch.arange(_TEXT, device=place(model))[None] % vocabulary, None)
    finally:
        _calls.reset(token)
    for call in calls:
        if call.key.shape[2] != _TEXT:
            attention = f"{type(call.module).__name__} of {type(model).__name__}"
            raise UnsupportedModelError(refusals.compressed(attention, call.key.shape[2], _TEXT))


def check_mask(
    mask_function: Callable[..., Any] | None, rows: int, queries: int, keys: int, first: int | Tensor, device: Any
) -> None:
    """Raises UnsupportedModelError if a mask shows a token what comes after it.

    Args:
        mask_function: what transformers gives a mask interface; None is causal.
        rows, queries, keys: of the mask.
        first: key of the first query.
        device: that what the mask is made of is on.
    """
    # What `and_masks` makes shows less than causal attention does: windows, which the probe compares with those of the
    # attention, and packed sequences, which show in the positions.
    if mask_function in (None, causal_mask_function) or getattr(mask_function, "__name__", "") == "and_mask":
        return
    assert mask_function is not None
    start = int(first)
    row = torch.arange(rows, device=device)[:, None]
    later = torch.arange(start, max(start, min(start + queries, keys - 1)), device=device)[None]
    # Of every token the one after it, as parts that are seen both ways have two at least; and all after the first.
    pairs = [(later, later + 1), (torch.full_like(later, start), later + 1)]
    if later.numel() and any(_any_shown(mask_function, row, *pair) for pair in pairs):
        raise UnsupportedModelError(refusals.not_causal_mask())


def _any_shown(mask_function: Callable[..., Any], rows: Tensor, queries: Tensor, keys: Tensor) -> bool:
    rows, queries, keys = torch.broadcast_tensors(rows, queries, keys)  # type: ignore[no-untyped-call]
    head = torch.zeros_like(rows)
    try:
        return bool(mask_function(rows, head, queries, keys).any())
    except (IndexError, RuntimeError, TypeError, ValueError):  # written for one pair at a time
        flat = [x.flatten() for x in (rows, head, queries, keys)]
        return bool(torch.vmap(mask_function)(*flat).any())


def register_functions() -> None:
    """Makes the probing functions known to transformers."""
    AttentionInterface.register(PROBE_NAME, _capture)
    AttentionMaskInterface.register(PROBE_NAME, _stand_in)


class _Mask:
    """Takes a mask's place; knows which keys it shows, and can do what a `LayoutMask` can: be handed on."""

    ndim = 4

    def __init__(self, window: int | None, chunk: int | None, queries: int, keys: int) -> None:
        self.window, self.chunk = window, chunk
        self.shape = (1, 1, queries, keys)

    def contiguous(self) -> _Mask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> _Mask:
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_use_of_mask()

    def __getitem__(self, index: object) -> _Mask:
        """Some of its queries."""
        if not (isinstance(index, tuple) and all(isinstance(one, slice) for one in index) and index[-1] == slice(None)):
            _refuse_use_of_mask()
        return self

    @classmethod
    def __torch_function__(cls, *arguments: Any) -> NoReturn:
        _refuse_use_of_mask()


def _refuse_use_of_mask() -> NoReturn:
    raise _OwnAttentionError("an attention mask was computed with")  # `_forward` says by what


def _stand_in(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    device: Any = None,
    **kwargs: Any,
) -> _Mask | None:
    """Mask function in transformers' sense."""
    if isinstance(given := kwargs.get("attention_mask"), _Mask):
        return given  # made by a model for one within it
    check_mask(mask_function, batch_size, q_length, kv_length, q_offset, device)
    if _without_masks.get():
        return None
    size = kwargs.get("local_size")
    if size and mask_function is not None and _shows(mask_function, _in_chunks(size), size):
        return _Mask(None, size, q_length, kv_length)
    return _Mask(size, None, q_length, kv_length)


def _in_chunks(size: int) -> Callable[[int, int], bool]:
    return lambda query, key: key <= query and key // size == query // size


def _shows(mask_function: Callable[..., Any], expected: Callable[[int, int], bool], size: int) -> bool:
    """Whether a mask shows what is expected at and around the places where windows and chunks of `size` end."""
    places = sorted({max(0, times * size + more) for times in range(4) for more in (-1, 0, 1, size // 2)})
    tokens = [torch.tensor(place, device="cpu") for place in places]
    first = torch.tensor(0, device="cpu")
    try:
        return all(
            bool(mask_function(first, first, query, key)) == expected(int(query), int(key))
            for query in tokens
            for key in tokens
        )
    except IndexError:  # made of something with an entry a token, of which there is one
        return False


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
        raise UnsupportedModelError(refusals.not_causal(type(module).__name__))
    if isinstance(attention_mask, Tensor):
        raise UnsupportedModelError(refusals.own_mask(type(module).__name__))
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor) and name not in _HARMLESS:
            refusal = refusals.bias if "bias" in name else refusals.unknown_argument
            raise UnsupportedModelError(refusal(type(module).__name__, name))
    window, chunk = (None, None) if attention_mask is None else (attention_mask.window, attention_mask.chunk)
    if sliding_window not in (None, window):
        raise UnsupportedModelError(
            f"{type(module).__name__} sees {window or 'all'} keys by its mask and {sliding_window} by its sliding "
            f"window: such a pattern cannot be extended; {refusals.AS_IT_IS}"
        )
    # Where the module itself says nothing, the mask alone counts.
    calls.append(_Call(module, query, key, value, window, chunk))
    if query.shape[2] > 1:
        return value.new_zeros((query.shape[0], query.shape[2], query.shape[1], value.shape[3])), None
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _run(model: PreTrainedModel, positions: tuple[int, ...]) -> list[_Call]:
    """Calls of every layer for a few tokens, each alone, at each of the positions; rows: position-major."""
    at = torch.tensor(positions, device=place(model)).repeat_interleave(_TOKENS)[:, None]
    calls: list[_Call] = []
    token = _calls.set(calls)
    try:
        _forward(model, _tokens(model).repeat(len(positions))[:, None], at)
        return calls
    finally:
        _calls.reset(token)


def _tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.linspace(0, vocabulary - 1, _TOKENS, device=place(model)).long()


def _forward(model: PreTrainedModel, tokens: Tensor, positions: Tensor | None) -> Any:
    # Models without positions, such as those with ALiBi, take none.
    taken = "position_ids" in inspect.signature(model.forward).parameters or not any(map(has_adapter, model.modules()))
    at = {"position_ids": positions} if taken and positions is not None else {}
    try:
        return model(input_ids=tokens, use_cache=False, **at)
    except _OwnAttentionError as error:
        token = _without_masks.set(True)
        try:
            model(input_ids=tokens, use_cache=False, **at)
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise  # says more
        except Exception:  # not every model does without a mask
            pass
        finally:
            _without_masks.reset(token)
        raise _OwnAttentionError(refusals.own_use_of_mask(f"{_raised_in(error)} of {type(model).__name__}")) from error
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model does with what it did not expect
        if "can't allocate memory" in str(error):
            raise  # as an OutOfMemoryError is
        raise UnsupportedModelError(
            f"{type(model).__name__} could not be probed with {'single tokens' if at else 'a text'}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _raised_in(error: Exception) -> str:
    """The class of the innermost module whose code an error comes from."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next(type(owner).__name__ for owner in reversed(frames) if isinstance(owner, nn.Module))


class _Rotaries:
    """Matches captured keys with the model's inverse frequencies. Layers that rotate alike share one `Rotary`."""

    def __init__(self, model: PreTrainedModel, candidates: dict[str, Tensor]) -> None:
        self._model = model
        self._candidates = candidates
        self._names = {module: name for name, module in model.named_modules()}
        self._known: dict[_Source, Rotary] = {}

    def name(self, module: nn.Module) -> str:
        name: str = self._names[module]
        return name

    def source(self, rotary: Rotary) -> tuple[str, Tensor] | None:
        """The buffer of frequencies that a measured rotary embedding was made from, and what it holds."""
        name = next(source for (source, *_), known in self._known.items() if known is rotary)
        return None if name.endswith(_TABLE) else (name, self._candidates[name].float().clone())

    def measure(
        self, short: _Call, far: _Call, positions: tuple[int, ...], far_positions: tuple[int, ...]
    ) -> Rotary | None:
        """How a module rotates.

        Args:
            short, far: its calls at `positions` and at `far_positions`.
        """
        query, key = _by_position(short.query, positions), _by_position(short.key, positions)
        tolerance = _TOLERANCE[short.key.dtype]
        if max(_unrotated_error(query, scaled=True), _unrotated_error(key)) < tolerance:
            return None
        best = float("inf")
        for source, rotary in self._hypotheses(short, far, positions, far_positions):
            error = max(_rotation_error(query, positions, rotary, scaled=True), _rotation_error(key, positions, rotary))
            if error < tolerance:
                return self._known.setdefault(source, rotary)
            best = min(best, error)
        if _unrotated_error(_by_position(short.value, positions)) > tolerance:
            layer, kind = self.name(short.module), type(self._model).__name__
            raise UnsupportedModelError(refusals.positions_elsewhere(layer, kind))
        finding = (
            f"is off by at least {best:.2g} of a key's size, where {tolerance:.2g} is allowed in {short.key.dtype}"
        )
        raise UnsupportedModelError(
            f"{self.name(short.module)} of {type(self._model).__name__} does not rotate its keys by any inverse "
            f"frequencies found in the model ({', '.join(self._candidates)}): R(c) k_p = k_(p+c) "
            + (finding if best < float("inf") else f"fits none of them, in heads of {short.key.shape[-1]} dimensions")
            + f"; {refusals.AS_IT_IS}"
        )

    def _hypotheses(
        self, short: _Call, far: _Call, positions: tuple[int, ...], far_positions: tuple[int, ...]
    ) -> Iterator[tuple[_Source, Rotary]]:
        """Rotary embeddings that a module may have: frequencies as they are found, turning the other way, and then in
        an order of their own."""
        head_dim = short.key.shape[-1]
        places = [
            (source, interleaved, offset)
            for source, frequencies in self._candidates.items()
            for interleaved in (False, True)
            for offset in sorted({0, head_dim - 2 * len(frequencies)})
            if 2 * len(frequencies) <= head_dim
        ]
        for order in (1, -1, 0):
            for source, interleaved, offset in places:
                key, frequencies = (source, interleaved, offset, order), self._candidates[source].float()
                if key in self._known:
                    yield key, self._known[key]
                elif order:
                    yield key, Rotary(order * frequencies, interleaved, offset)
                else:
                    keys = (_by_position(short.key, positions), _by_position(far.key, far_positions))
                    at = positions + far_positions
                    yield key, _in_any_order(torch.cat(keys, dim=1), at, frequencies, interleaved, offset)

    def confirm(self, call: _Call, rotary: Rotary | None, positions: tuple[int, ...]) -> None:
        """Checks a measured rotation far out, where frequencies that depend on the length would have changed."""
        query, key = _by_position(call.query, positions), _by_position(call.key, positions)
        if rotary is None:
            error = max(_unrotated_error(query, scaled=True), _unrotated_error(key))
        else:
            error = max(_rotation_error(query, positions, rotary, scaled=True), _rotation_error(key, positions, rotary))
        if error >= _TOLERANCE[call.key.dtype]:
            parameters = getattr(self._model.config.get_text_config(), "rope_parameters", None)
            raise UnsupportedModelError(
                f"{self.name(call.module)} of {type(self._model).__name__} rotates differently past position "
                f"{positions[1]} than before (off by {error:.2g} of a key's size): cached keys cannot be re-rotated "
                f"when frequencies or scales change with the length (rope_parameters: {parameters}); "
                f"{refusals.AS_IT_IS}"
            )


def _by_position(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """(positions * tokens, heads, 1, dim) as float64 (heads * tokens, positions, dim)."""
    return x[:, :, 0].double().view(len(positions), _TOKENS, *x.shape[1::2]).permute(2, 1, 0, 3).flatten(0, 1)


def _unrotated_error(x: Tensor, scaled: bool = False) -> float:
    expected = x[:, :1].expand_as(x)
    if scaled:
        expected = _as_long(expected, x)
    return float((x - expected).norm() / x.norm().clamp(min=1e-30))


def _rotation_error(x: Tensor, positions: tuple[int, ...], rotary: Rotary, scaled: bool = False) -> float:
    """Largest error of `R(p) x_0 = x_p` over pairs of dimensions, relative to the pair's size.

    Args:
        scaled: whether a factor of each position is no error. Queries may have one, which stays when they are turned.
    """
    angles = rotary.phases(torch.tensor(positions, device=x.device))
    expected = rotary.rotate(x[:, :1].expand_as(x), angles.cos(), angles.sin())
    if scaled:
        expected = _as_long(expected, x)
    size = x.square().mean(dim=(0, 1)).sqrt()
    floor = 1e-3 * size.max()
    return float(((expected - x).square().mean(dim=(0, 1)).sqrt() / size.clamp(min=floor)).max())


def _as_long(x: Tensor, y: Tensor) -> Tensor:
    """x times the factor, 0 or more, that brings it nearest to y, for each position."""
    factor = (x * y).sum(dim=(0, 2), keepdim=True) / x.square().sum(dim=(0, 2), keepdim=True).clamp(min=1e-30)
    return x * factor.clamp(min=0)


def _in_any_order(x: Tensor, positions: tuple[int, ...], frequencies: Tensor, interleaved: bool, offset: int) -> Rotary:
    """The rotary embedding that gives each pair of dimensions the one of `frequencies` that fits it best."""
    errors = []
    for frequency in frequencies:
        rotary = Rotary(frequency.expand(len(frequencies)).clone(), interleaved, offset)
        angles = rotary.phases(torch.tensor(positions, device=x.device))
        error = (rotary.rotate(x[:, :1].expand_as(x), angles.cos(), angles.sin()) - x).square().sum(dim=(0, 1))
        first, second = rotary.halves(error)
        errors.append(first + second)
    return Rotary(frequencies[torch.stack(errors).argmin(dim=0)], interleaved, offset)


def _count_axes(model: PreTrainedModel) -> int:
    """Axes that the positions of images have on a model; 0 where its configuration says of none."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    sections = [kind["mrope_section"] for kind in kinds if kind.get("mrope_section")]
    return len(sections[0]) if sections else 0


def _axis_of_pairs(
    model: PreTrainedModel, axes: int, measured: list[Rotary | None], positions: tuple[int, ...]
) -> list[Tensor | None]:
    """By which axis each pair of dimensions turns, int64, (pairs,) a call; None where it is not by one alone."""
    at = torch.tensor(positions, device=place(model)).repeat_interleave(_TOKENS)[:, None]
    tokens = _tokens(model).repeat(len(positions))[:, None]
    errors: list[list[tuple[Tensor, Tensor]]] = []
    for axis in range(axes):
        calls: list[_Call] = []
        token = _calls.set(calls)
        try:
            each = [at if number == axis else torch.zeros_like(at) for number in range(axes)]
            _forward(model, tokens, torch.stack(each))
        finally:
            _calls.reset(token)
        dtypes = [call.key.dtype for call in calls]
        errors.append([
            (torch.zeros(0), torch.zeros(0)) if rotary is None else _turned_and_still(call.key, positions, rotary)
            for call, rotary in zip(calls, measured, strict=True)
        ])  # fmt: skip
    found: list[Tensor | None] = []
    for number, rotary in enumerate(measured):
        if rotary is None:
            found.append(None)
            continue
        turned, still = (torch.stack([errors[axis][number][kind] for axis in range(axes)]) for kind in (0, 1))
        chosen = (turned - still).argmin(dim=0)
        tolerance = _TOLERANCE[dtypes[number]]
        others = still.scatter(0, chosen[None], 0.0)
        fits = bool((turned.gather(0, chosen[None]) < tolerance).all() and (others < tolerance).all())
        found.append(chosen.cpu() if fits else None)
    return found


def _turned_and_still(key: Tensor, positions: tuple[int, ...], rotary: Rotary) -> tuple[Tensor, Tensor]:
    """How far each pair of a key's dimensions is from being turned to the positions, and from having stayed, (pairs,),
    relative to the pair's size."""
    x = _by_position(key, positions)
    angles = rotary.phases(torch.tensor(positions, device=x.device))
    stayed = x[:, :1].expand_as(x)
    halves = rotary.halves(x.square().mean(dim=(0, 1)))
    size = (halves[0] + halves[1]).sqrt().clamp(min=1e-30)

    def apart(expected: Tensor) -> Tensor:
        first, second = rotary.halves((expected - x).square().mean(dim=(0, 1)))
        return (first + second).sqrt() / size

    return apart(rotary.rotate(stayed, angles.cos(), angles.sin())), apart(stayed)


def _inverse_frequencies(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's inverse frequencies by name, without the copies that dynamic kinds keep of their originals; where it
    has only tables of rotations, those of the first."""
    named = dict(model.named_buffers())
    found = {
        name: buffer
        for name, buffer in named.items()
        if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1
    }
    tables = [name for name, buffer in named.items() if name.endswith(_TABLE) and buffer.ndim == 2]
    return found or {name: table_frequencies(named[name]) for name in tables[:1] if len(named[name]) > 1}


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """The model on the probing functions, in eval mode; afterwards it is what it was, whatever it did to itself."""
    with _kept(model):
        # Configurations may be shared with models that are in use meanwhile.
        for configuration in own_configurations(model.modules(), Changes()):
            configuration._attn_implementation = PROBE_NAME
        yield


@contextmanager
def _kept(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode; afterwards it is what it was."""
    before = [
        (attributes, dict(attributes)) for module in model.modules() for attributes in (vars(module), module._buffers)
    ]
    contents = [(buffer, buffer.clone()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    try:
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
