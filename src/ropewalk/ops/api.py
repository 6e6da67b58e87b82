# SPDX-License-Identifier: Apache-2.0
"""`attention`: the operator as users call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ropewalk.maps import Identity, PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops.call import Call, Pages, Positions, check, check_start
from ropewalk.ops.implementations import Implementation, check_name, choose, run, step_of
from ropewalk.ops.layout import Layout
from ropewalk.ops.rotary import Rotary


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap | Sequence[PositionMap],
    rotary: Rotary | None,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_scaling: QueryScaling | None = None,
    far_keys: Tensor | None = None,
    positions: Positions | None = None,
    slopes: Tensor | None = None,
    pages: Pages | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Causal attention under a position map, for prefill, chunked prefill and decode.

    Query and key arrive rotated by the model at their true positions, as a cache holds them; `rotary` says how, so that
    each band can re-rotate them: `R(b) = R(b - n) R(n)`. With 5 keys, 3 queries and W = 2 (n: near, f: far, -: unseen):

        f f n n... query slot 2:  f n n - -
                   query slot 3:  f f n n -
                   query slot 4:  f f f n n

    Args:
        query: (batch, heads, queries, head_dim), float32, bfloat16, float16 or float64.
        key: (batch, key heads, keys, head_dim); heads is a multiple of key heads, which are never expanded.
        value: (batch, key heads, keys, value_dim).
        position_map: which positions the rotation uses; or one map for each key head.
        rotary: the model's rotary embedding, which keeps the tables that are made for it. None for a layer without one,
            where only which keys are seen matters: then nothing is kept between calls.
        layout: which slots hold tokens; by default all do, and the queries are the last keys. A query slot that holds
            no token gives zeros.
        scale: of the scores, above 0; by default `head_dim ** -0.5`.
        softcap: `softcap * tanh(score / softcap)` instead of the score (Gemma 2).
        sinks: (heads,), a logit a head that takes part in the softmax and adds nothing (gpt-oss).
        query_scaling: factor on each query by its true position.
        far_keys: (batch, key heads, far slots, head_dim), the key slots before the last query's neighbor window,
            already turned to the far band's `key_positions`, for a map with one far band: a caller that keeps them
            between calls spares the operator the work. Slots of keys that are far from no query may hold anything.
            impl="reference" turns the keys itself, and so does "fused" for one query.
        positions: true positions of the tokens where they are not the indices of their slots.
        slopes: (heads,), takes `slope * (query position - key position)` away from each score, at the positions that
            the map gives both (ALiBi).
        pages: where several texts have their keys; `query`, `key` and `value` are then as `Pages` says.
        key_scale, value_scale: factors that make numbers of key and value true, shaped so that they can be broadcast
            to them: for keys and values of 8 bits. Their dtype is then any that torch converts to float32.
        impl: "auto" chooses; "reference" is the specification, in float32, and holds the whole matrix; "fused" is one
            kernel for near and far keys, on CUDA devices; "flash" is one kernel pass a band; "blocks" is plain tensor
            operations, for whatever the others cannot take. The last three use memory linear in the number of keys.
            For one query a row without gaps "fused" does not wait for the device: a tensor `query_start` is not read,
            and what lies past the last key slot counts as that slot. torch.compile does not trace "fused".

    Returns:
        (batch, heads, queries, value_dim), in the query's dtype.

    Raises:
        ValueError: an argument does not fit the others, or `impl` does not take this call.
    """
    if torch.compiler.is_compiling():
        # Maps are objects, which a graph cannot hold: it ends here, and goes on afterwards.
        return _untraced(**locals())  # type: ignore[no-any-return]
    check_name(impl)
    maps: tuple[PositionMap, ...] | None = None
    if isinstance(position_map, Sequence):
        maps, position_map = tuple(position_map), next(iter(position_map), Identity())
    call = Call(
        query,
        key,
        value,
        position_map,
        Rotary.none() if rotary is None else rotary,
        layout,
        _usual_scale(query) if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        query_scaling=query_scaling,
        far_keys=far_keys,
        head_maps=maps,
        positions=positions,
        slopes=slopes,
        pages=pages,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    check(call)
    name = choose(call, impl)
    step = step_of(call, name)
    # A step does not wait for a start that only the device knows.
    if layout is not None and (step is None or not isinstance(layout.query_start, Tensor)):
        check_start(layout)
    return run(call, name, step)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _untraced(**arguments: Any) -> Tensor:
    return attention(**arguments)


def _usual_scale(query: Tensor) -> float:
    # What is no such tensor is told by `check`.
    return float(max(query.shape[-1], 1) ** -0.5) if isinstance(query, Tensor) and query.ndim else 1.0
