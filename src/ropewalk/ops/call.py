# SPDX-License-Identifier: Apache-2.0
"""One call of the operator as a value, and the one place where its arguments are checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops.layout import Layout, Slots, Span
from ropewalk.ops.rotary import Rotary, far_band

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A sink past this weighs as if it were infinite, and its products do not overflow.
LARGEST_SINK = 1e38
# Of a scale or softcap, which kernels take in float32.
_LARGEST_NUMBER = 1e38

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


@dataclass(frozen=True, eq=False)
class Positions:
    """True positions of tokens, where they are not the indices of their slots: a cache whose slots were thinned out, or
    the axes of an image (M-RoPE). A query sees no later slot.

    Args:
        queries, keys: int64, (batch, slots), or (batch, slots, axes) where pairs of dimensions were rotated by axes of
            their own. Each axis is then mapped for itself, and keeps its true distance where a key is further along it
            than the query; which keys are seen is decided by the first.
        axis_of_pair: int64, (pairs,), the axis of each pair of dimensions; None where there is one axis.
    """

    queries: Tensor
    keys: Tensor
    axis_of_pair: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Pages:
    """Where several texts of different lengths have their keys, in pages that they share one store of.

    Key and value are then (pages, key heads, slots of a page, head_dim), and query (1, heads, queries of all texts,
    head_dim), one text's after the other's.

    Args:
        table: int32 or int64, (texts, pages): the pages of a text, in order; entries past its length are not read.
        lengths: likewise, (texts,): tokens of a text, those of the queries included, which are its last.
        query_starts: likewise, (texts + 1,): the first query of each text, and the end of the last one's.
    """

    table: Tensor
    lengths: Tensor
    query_starts: Tensor


@dataclass(slots=True, eq=False)
class Call:
    """What the operator is asked: the arguments of `ropewalk.ops.attention`, which describes them. Not to be changed.

    Args:
        layout: None where every slot holds a token and the queries are the last keys.
        head_maps: instead of `position_map`, one for each key head.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    position_map: PositionMap
    rotary: Rotary
    layout: Layout | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    query_scaling: QueryScaling | None = None
    far_keys: Tensor | None = None
    head_maps: tuple[PositionMap, ...] | None = None
    positions: Positions | None = None
    slopes: Tensor | None = None
    pages: Pages | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def past(self) -> int:
        """Keys before the first query, where there is no layout."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (self.query, self.key, self.value, self.sinks, self.slopes)
        )

    def extra(self, *known: str) -> str | None:
        """What the call has that only some implementations know; None if nothing.

        Args:
            known: to the implementation that asks: "slopes", "positions".
        """
        if self.pages is not None:
            return "pages"
        if self.positions is not None and "positions" not in known:
            return "positions of tokens"
        if self.slopes is not None and "slopes" not in known:
            return "slopes (ALiBi)"
        if self.key_scale is not None or self.value_scale is not None:
            return "keys and values with scales"
        if self.head_maps is not None and len(set(self.head_maps)) > 1:
            return "maps that differ by head"
        return "positions that differ by rotary dimension" if self.position_map.by_pair else None

    def parts(self) -> Iterator[tuple[Span, Call]]:
        """Calls without a layout and without query scaling, each of some rows whose tokens lie in the same slots."""
        if self.layout is None:
            rows = Span(slice(0, self.query.shape[0]), slice(0, self.query.shape[2]), slice(0, self.key.shape[2]))
            yield rows, self._scaled()
            return
        for span in self.layout.spans(self.query.shape[0]):
            far = self.far_keys
            positions = self.positions
            part = replace(
                self,
                query=_take(self.query, span.rows, span.queries),
                key=_take(self.key, span.rows, span.keys),
                value=_take(self.value, span.rows, span.keys),
                layout=None,
                far_keys=None if far is None else _take(far, span.rows, _before(span.keys, far.shape[2])),
                positions=positions
                and Positions(
                    positions.queries[span.rows][:, span.queries],
                    positions.keys[span.rows][:, span.keys],
                    positions.axis_of_pair,
                ),
                key_scale=_taken_scale(self.key_scale, self.key, span),
                value_scale=_taken_scale(self.value_scale, self.value, span),
            )
            yield span, part._scaled()

    def _scaled(self) -> Call:
        if self.query_scaling is None:
            return self
        if self.positions is None:
            tokens = torch.arange(self.past, self.key.shape[2], device=self.query.device)
        else:
            tokens = self.positions.queries[:, None]
            tokens = tokens[..., 0] if self.positions.queries.ndim == 3 else tokens
        factors = self.query_scaling(tokens).to(self.query.dtype)[..., None]
        return replace(self, query=self.query * factors, query_scaling=None)


def device_lacks(device: torch.device) -> str | None:
    """What a device needs to be right under a map, and has not; None where nothing is known to be missing."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return f"device {device.type} has no float64, in which positions become angles: move it to the CPU"
    return None


def side_by_side(x: MaybeTensor) -> MaybeTensor:
    """x with the numbers of a head side by side, as every kernel reads them."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def laid_side_by_side(call: Call) -> Call:
    """The call with every tensor that a kernel reads `side_by_side`: itself where they all are."""
    tensors = (call.query, call.key, call.value, call.sinks, call.slopes, call.far_keys)
    if all(x is None or x.stride(-1) == 1 for x in tensors):
        return call
    return replace(
        call,
        query=side_by_side(call.query),
        key=side_by_side(call.key),
        value=side_by_side(call.value),
        sinks=side_by_side(call.sinks),
        slopes=side_by_side(call.slopes),
        far_keys=side_by_side(call.far_keys),
    )


def check(call: Call) -> None:
    """Refuses what does not fit, for every implementation.

    Raises:
        ValueError: says which argument does not fit, and how.
    """
    problem = _type_problem(call) or _shape_problem(call) or _number_problem(call) or _layout_problem(call)
    # Asked only where there is something to look at: a decode step has microseconds to spare.
    if problem is None and (call.sinks is not None or call.slopes is not None or call.head_maps is not None):
        problem = _head_problem(call)
    scaled = call.key_scale is not None or call.value_scale is not None
    if problem is None and (scaled or call.positions is not None or call.pages is not None):
        problem = _extra_problem(call)
    if problem is None and call.far_keys is not None:
        problem = _far_problem(call)
    if problem is not None:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name in ("query", "key", "value")
                           if isinstance(x := getattr(call, name), Tensor))  # fmt: skip
        raise ValueError(f"attention: {problem}; {shapes}")


def check_start(layout: Layout) -> None:
    """Refuses queries that have no room among the keys. Reads the device where `query_start` is a tensor.

    Raises:
        ValueError: they have none.
    """
    queries, keys = layout.query_length, layout.key_length
    if not 0 <= layout.first_query <= keys - queries:
        raise ValueError(
            f"attention: query_start {layout.first_query} leaves no room for {queries} queries among {keys} keys"
        )


# What an argument must be, beside None.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("query", "key", "value", "sinks", "far_keys", "slopes", "key_scale", "value_scale"), Tensor),
    **dict.fromkeys(("scale", "softcap"), Real),
    "rotary": Rotary,
    "layout": Layout,
    "query_scaling": QueryScaling,
    "positions": Positions,
    "pages": Pages,
}


_NEEDED = ("query", "key", "value", "rotary", "scale")
_KIND_NAMES = {Real: "number", Tensor: "tensor"}


def _type_problem(call: Call) -> str | None:
    for name, kind in _TYPES.items():
        x = getattr(call, name)
        if not isinstance(x, kind) and not (x is None and name not in _NEEDED):
            return f"{name} must be a {_KIND_NAMES.get(kind, kind.__name__)}, got {x!r:.60}"
    for one in call.head_maps or (call.position_map,):
        if not isinstance(one, PositionMap):
            return f"position_map must be a map such as SelfExtend(8, 1024), or one a key head, got {one!r:.60}"
        one.check()
    for values in (call.positions, call.pages):
        if values is not None and not all(
            isinstance(x, Tensor) or (name == "axis_of_pair" and x is None) for name, x in vars(values).items()
        ):
            names = [name for name in vars(values) if name != "axis_of_pair"]
            return f"{', '.join(names)} of {type(values).__name__} must be tensors"
    return None


def _shape_problem(call: Call) -> str | None:
    q, k, v = call.query.shape, call.key.shape, call.value.shape
    if not len(q) == len(k) == len(v) == 4:
        return "tensors must be (batch, heads, tokens, head_dim)"
    if call.pages is None and not q[0] == k[0] == v[0]:
        return "batch sizes differ"
    if k[:3] != v[:3]:
        return "key and value heads or lengths differ"
    if q[3] != k[3]:
        return "query and key head dimensions differ"
    if q[3] == 0:
        return "head_dim must be 1 or more"
    if k[1] == 0 or q[1] == 0 or q[1] % k[1] != 0:
        return "query heads must be a multiple of key heads, 1 or more of either"
    if call.query.dtype not in _DTYPES:
        return f"query must be float32, bfloat16, float16 or float64, got {call.query.dtype}"
    if call.key.dtype != call.query.dtype and call.key_scale is None:
        return f"dtypes differ: query {call.query.dtype}, key {call.key.dtype}"
    if call.value.dtype != call.query.dtype and call.value_scale is None:
        return f"dtypes differ: query {call.query.dtype}, value {call.value.dtype}"
    if not call.query.device == call.key.device == call.value.device:
        return f"devices differ: query {call.query.device}, key {call.key.device}, value {call.value.device}"
    if (lacks := device_lacks(call.query.device)) is not None:
        return lacks
    if call.rotary.offset < 0 or call.rotary.offset + call.rotary.dim > q[3]:
        return f"a rotary embedding of {call.rotary.dim} dimensions from {call.rotary.offset} on does not fit"
    return None


def _number_problem(call: Call) -> str | None:
    if not 0 < call.scale <= _LARGEST_NUMBER:
        return f"scale must be above 0, and finite, got {call.scale!s:.60}"
    if call.softcap is not None and not 0 < call.softcap <= _LARGEST_NUMBER:
        return f"softcap must be above 0, and finite, got {call.softcap!s:.60}"
    return None


def _layout_problem(call: Call) -> str | None:
    layout = call.layout
    if layout is None:
        if call.pages is None and call.query.shape[2] > call.key.shape[2]:
            return "there are more queries than keys"
        return None
    if call.pages is not None:
        return "pages say where tokens lie: layout must be left out"
    lengths = (layout.query_length, layout.key_length, layout.query_start)
    if not all(x is None or isinstance(x, int | Tensor) for x in lengths):
        return f"lengths and start of a layout must be whole numbers, got {', '.join(map(repr, lengths))}"
    if layout.query_length != call.query.shape[2] or layout.key_length != call.key.shape[2]:
        return f"layout is for {layout.query_length} queries and {layout.key_length} keys"
    start, mask = layout.query_start, layout.key_mask
    if isinstance(start, Tensor) and start.numel() != 1:
        return f"query_start must be one number, got {tuple(start.shape)}"
    if mask is not None and mask.is_meta:
        return "key_mask is on the meta device, and holds nothing"
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != call.query.shape[0]):
        return f"key_mask must be (batch, keys), got {tuple(mask.shape)}"
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        return f"key_mask must say for each slot whether it holds a token (bool, or 0 and 1), got {mask.dtype}"
    return None


def _head_problem(call: Call) -> str | None:
    heads, key_heads = call.query.shape[1], call.key.shape[1]
    for name, x in (("sinks", call.sinks), ("slopes", call.slopes)):
        if x is None:
            continue
        if x.shape != (heads,):
            return f"{name} must be one number a head, shape ({heads},), got {tuple(x.shape)}"
        if x.dtype not in _DTYPES or x.device != call.query.device:
            return f"{name} must be floating-point numbers on {call.query.device}, got {x.dtype} on {x.device}"
    if call.slopes is not None and any(one.by_pair for one in call.head_maps or (call.position_map,)):
        return "slopes need one position a token, and the map has positions by rotary dimension"
    if call.head_maps is not None and len(call.head_maps) != key_heads:
        return f"maps must be one for each of {key_heads} key heads, got {len(call.head_maps)}"
    return None


def _extra_problem(call: Call) -> str | None:
    batch, queries, keys = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    if call.positions is not None:
        for name, x, tokens in (
            ("queries", call.positions.queries, queries),
            ("keys", call.positions.keys, keys),
        ):
            if x.shape[:2] != (batch, tokens) or x.ndim > 3 or x.dtype != torch.int64:
                return f"positions of {name} must be int64 {(batch, tokens)}, got {x.dtype} {tuple(x.shape)}"
            if x.device != call.query.device:
                return f"positions of {name} must be on {call.query.device}, got {x.device}"
        if call.positions.queries.shape[2:] != call.positions.keys.shape[2:]:
            return "positions of queries and of keys must have the same axes"
        if not _axes_fit(call.positions, call.rotary.pairs):
            return f"axis_of_pair must name one of the axes of positions for each of {call.rotary.pairs} pairs"
    if call.pages is not None:
        pages = call.pages
        for x in (pages.table, pages.lengths, pages.query_starts):
            if x.dtype not in (torch.int32, torch.int64):
                return f"tensors of pages must be int32 or int64, got {x.dtype}"
        texts = pages.table.shape[0]
        if pages.table.ndim != 2 or pages.lengths.shape != (texts,) or pages.query_starts.shape != (texts + 1,):
            return (
                f"pages must have a table (texts, pages), lengths (texts,) and query_starts (texts + 1,), got "
                f"{tuple(pages.table.shape)}, {tuple(pages.lengths.shape)} and {tuple(pages.query_starts.shape)}"
            )
        if batch != 1:
            return "the queries of texts in pages must be one row"
        if call.far_keys is not None or call.positions is not None:
            return "pages take neither far_keys nor positions"
    for name, scale, x in (("key", call.key_scale, call.key), ("value", call.value_scale, call.value)):
        if scale is not None and (scale.ndim > 4 or not _broadcasts(scale, x)):
            return f"{name}_scale must be broadcast to {tuple(x.shape)}, got {tuple(scale.shape)}"
    return None


def _axes_fit(positions: Positions, pairs: int) -> bool:
    axis_of_pair, axes = positions.axis_of_pair, positions.keys.shape[2:]
    if axis_of_pair is None or not axes:
        return axis_of_pair is None and not axes
    return axis_of_pair.shape == (pairs,) and bool(((axis_of_pair >= 0) & (axis_of_pair < axes[0])).all())


def _broadcasts(x: Tensor, to: Tensor) -> bool:
    pairs = zip(reversed(x.shape), reversed(to.shape), strict=False)
    return all(size in (1, wanted) for size, wanted in pairs)


def _far_problem(call: Call) -> str | None:
    far_keys, key = call.far_keys, call.key
    assert far_keys is not None
    if far_keys.device != key.device:
        return f"devices differ: key {key.device}, far_keys {far_keys.device}"
    band = far_band(call.position_map) if call.head_maps is None else None
    if band is None:
        return f"far_keys needs a map with one far band, which {call.position_map} is not"
    last = key.shape[2] - 1 if call.layout is None else call.layout.first_query + call.layout.query_length - 1
    needed = band.high(last)
    fits = far_keys.ndim == 4 and (*far_keys.shape[:2], far_keys.shape[3]) == (*key.shape[:2], key.shape[3])
    if not fits or far_keys.shape[2] < needed or far_keys.dtype != key.dtype:
        return f"far_keys {tuple(far_keys.shape)}, {far_keys.dtype}, do not fit {key.dtype}: {needed} slots are needed"
    return None


def _take(x: Tensor, rows: slice, slots: Slots) -> Tensor:
    return x[rows][:, :, slots]


def _before(slots: Slots, end: int) -> Slots:
    return slots if isinstance(slots, slice) else slots[slots < end]


def _taken_scale(scale: Tensor | None, x: Tensor, span: Span) -> Tensor | None:
    return None if scale is None else _take(scale.expand(x.shape), span.rows, span.keys)
