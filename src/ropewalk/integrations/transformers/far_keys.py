"""Far views that are kept: memory that buys decode speed on the CPU.

Keys stay in the cache at their true positions, so every decode step turns the far ones again. What is kept here is the
turned copy, beside each layer of a dynamic cache and never inside it: it goes when the cache goes, and is used only
while the cache's keys are provably those that it was made from.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ropewalk.maps import PositionMap
from ropewalk.ops import Implementation, Layout, Rotary
from ropewalk.ops.rotary import far_band, rerotated

logger = logging.getLogger("ropewalk")

# What attention modules call the cache that they are given.
_CACHE_ARGUMENTS = ("past_key_values", "layer_past")

# Room for keys to come is an eighth of the kept ones, and this many at least.
_LEAST_ROOM = 64
# Keys turned at a time, so that they pass through a processor's cache.
_KEYS_AT_A_TIME = 2048


def unsupported(model: PreTrainedModel, module: nn.Module, position_map: PositionMap, impl: Implementation) -> str:
    """Why the far keys of an attention module cannot be kept; empty if they can."""
    if far_band(position_map) is None:
        bands = len(position_map.bands)
        return f"{position_map} has {bands} bands" if bands > 2 else f"{position_map} moves no key"
    if impl == "reference":
        return "impl='reference' uses none"
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, where turning keys is cheap"
    if not {*_CACHE_ARGUMENTS} & {*inspect.signature(module.forward).parameters} or not hasattr(module, "layer_idx"):
        return f"{type(module).__name__} does not say which cache it uses"
    return ""


@dataclass(frozen=True)
class _Seen:
    """A key tensor as it was, recognised later without being kept alive."""

    storage: StorageWeakRef
    version: int | None  # counts changes in place; tensors made in inference mode have none
    shape: torch.Size
    where: tuple[int, ...]

    @classmethod
    def of(cls, key: Tensor) -> _Seen:
        version = None if key.is_inference() else key._version
        where = (int(key.storage_offset()), *key.stride())
        storage = StorageWeakRef(key.untyped_storage())  # type: ignore[no-untyped-call]
        return cls(storage, version, key.shape, where)

    def begins_with(self, key: Tensor) -> bool:
        """Whether `key` is the tensor that was seen, or its first slots (a cropped cache): the same memory, which the
        weak reference keeps from being given away anew, read in the same way and not written since."""
        if key.ndim != 4:
            return False
        now = _Seen.of(key)
        same = (now.storage, now.version, now.where) == (self.storage, self.version, self.where)
        shape = (*self.shape[:2], key.shape[2], self.shape[3])
        return same and key.shape == shape and key.shape[2] <= self.shape[2]


@dataclass
class _Kept:
    """The far view of one cache layer.

    Attributes:
        buffer: (batch, key heads, slots, head_dim); slots without a token, and those from `filled` on, hold anything.
        filled: key slots that are turned already.
        starts: rows of the batch and the first key slot that holds a token in them.
    """

    buffer: Tensor
    filled: int
    starts: tuple[tuple[slice, int], ...]
    seen: _Seen


class FarKeys:
    """Far views of the caches that one attention module is used with; also that module's forward pre-hook.

    A copy starts empty.
    """

    def __init__(self, position_map: PositionMap, rotary: Rotary) -> None:
        band = far_band(position_map)
        assert band is not None
        self._map, self._band, self._rotary = position_map, band, rotary
        self._kept: WeakKeyDictionary[DynamicLayer, _Kept] = WeakKeyDictionary()
        self._cache: ReferenceType[Cache] | None = None
        self._index = 0
        # Whether the cache was looked at since the last attention, before this forward pass added its keys.
        self._looked = False

    def __reduce__(self) -> tuple[Any, ...]:
        return FarKeys, (self._map, self._rotary)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(kept.buffer.nbytes for kept in self._kept.values())

    def clear(self) -> None:
        """Lets go of everything."""
        self._kept.clear()
        self._cache = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the module adds keys to its cache: drops the kept view of keys that are no longer those it has."""
        if torch.compiler.is_compiling():
            return
        used = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        self._cache, self._index, self._looked = None, getattr(module, "layer_idx", 0), True
        if isinstance(used, Cache):
            self._cache = ref(used)
            layer = self._layer()
            if layer is not None and (kept := self._kept.get(layer)) is not None:
                if layer.keys is not None and kept.seen.begins_with(layer.keys):
                    kept.filled = min(kept.filled, layer.keys.shape[2])
                else:
                    del self._kept[layer]

    def view(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor | None:
        """The far view of `key`, brought up to date, if it belongs to a cache whose view can be kept.

        Returns:
            As `far_keys` of `ropewalk.ops.attention`: (batch, key heads, slots, head_dim).
        """
        layer = self._layer()
        looked, self._looked = self._looked, False
        if layer is None or key.device.type != "cpu":
            return None
        if layer.keys is None or layer.keys.shape != key.shape or not _Seen.of(key).begins_with(layer.keys):
            _log_recomputed("the model does not attend to the keys as its cache holds them")
            return None
        kept = self._kept.pop(layer, None)
        if kept is not None and not looked and not kept.seen.begins_with(key):
            kept = None
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return None
        starts = _starts(layout, key.shape[0])
        end = self._band.high(key.shape[2] - 1)
        if starts is None or key.shape[2] - min(start for _, start in starts) <= max(
            self._band.first_query, self._map.start
        ):
            return None
        if kept is None or kept.starts != starts:
            kept = _Kept(key[:, :, :0], 0, starts, _Seen.of(key))
        self._fill(kept, key, end)
        kept.seen = _Seen.of(key)
        self._kept[layer] = kept
        return kept.buffer[:, :, :end]

    def _fill(self, kept: _Kept, key: Tensor, end: int) -> None:
        # A buffer made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if kept.buffer.shape[2] < end:
                room = max(_LEAST_ROOM, end // 8)
                grown = key.new_empty((*key.shape[:2], end + room, key.shape[3]))
                grown[:, :, : kept.filled] = kept.buffer[:, :, : kept.filled]
                kept.buffer = grown
            for rows, start in kept.starts:
                for begin in range(max(kept.filled, start), end, _KEYS_AT_A_TIME):
                    slots = slice(begin, min(begin + _KEYS_AT_A_TIME, end))
                    turned = rerotated(key[rows, :, slots], self._band.key_positions, begin - start, self._rotary)
                    kept.buffer[rows, :, slots] = turned
        kept.filled = max(kept.filled, end)

    def _layer(self) -> DynamicLayer | None:
        """The layer of the cache in use whose keys are a plain, growing tensor."""
        used = None if self._cache is None else self._cache()
        if used is None or self._index >= len(used.layers):
            return None
        layer = used.layers[self._index]
        # Other subclasses may do anything with their keys. Models whose sliding window is disabled have layers with a
        # window that is never reached.
        if isinstance(layer, DynamicLayer) and type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            return layer
        _log_recomputed(f"{type(layer).__name__} is not a cache that grows")
        return None


@cache
def _log_recomputed(reason: str) -> None:
    logger.info("far keys are recomputed: %s", reason)


def _starts(layout: Layout, batch: int) -> tuple[tuple[slice, int], ...] | None:
    """First key slot that holds a token, by rows; None where a row has gaps or no query."""
    spans = layout.spans(batch)
    if sum(span.rows.stop - span.rows.start for span in spans) != batch:
        return None
    starts = []
    for span in spans:
        if not isinstance(span.keys, slice):
            return None
        starts.append((span.rows, span.keys.start))
    return tuple(starts)
