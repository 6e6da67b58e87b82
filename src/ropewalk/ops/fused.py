"""Attention under a position map from the Triton kernels: near and far keys in one pass, a decode step in two launches.

Needs Triton: imported only where these kernels run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ropewalk.maps import Band, PositionMap
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction
from ropewalk.ops.layout import Step
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.triton import decode, prefill
from ropewalk.ops.triton.between import between
from ropewalk.ops.triton.rotate import rotate

logger = logging.getLogger("ropewalk")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    far_keys: Tensor | None = None,
) -> Tensor:
    """Attention of one span: queries are the last of the keys."""
    query, key, value = _readable(query), _readable(key), _readable(value)
    far_keys = None if far_keys is None else _readable(far_keys)
    past = key.shape[2] - query.shape[2]
    parts = []
    for first, stop, bands in position_map.bands_by_query(past, key.shape[2]):
        run = (query[:, :, first - past : stop - past], key[:, :, :stop], value[:, :, :stop])
        parts.append(_attend_bands(*run, bands, rotary, scale, softcap, sinks, far_keys))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    step: Step,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row. Far keys are turned on their way from memory: to read kept ones costs as much."""
    return decode.decode(
        _readable(query),
        _readable(key),
        _readable(value),
        position_map,
        rotary,
        step.first_slots,
        step.lengths,
        scale,
        softcap,
        sinks,
    )


def _attend_bands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: tuple[Band, ...],
    rotary: Rotary | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    far_keys: Tensor | None,
) -> Tensor:
    """The nearest band and the one that goes on to the first key in one pass, and all between them in another."""
    keys = key.shape[2]
    past = keys - query.shape[2]
    near, *farther = (band for band in bands if band.first < max(keys, 1))
    far_query = far_key = far_first = None
    if farther and farther[-1].stop is None:
        far = farther.pop()
        far_first = far.first
        far_query = _moved_from(max(far_first - past, 0), query, far.query_positions, past, rotary)
        if (far_key := far_keys) is None:
            far_key = _moved(key[:, :, : keys - far_first], far.key_positions, 0, rotary)
    result = _banded(
        _moved(query, near.query_positions, past, rotary),
        _moved(key, near.key_positions, 0, rotary),
        value,
        far_query,
        far_key,
        scale,
        near.stop,
        far_first,
        softcap,
        sinks,
        return_lse=bool(farther),
    )
    if isinstance(result, Tensor):
        return result
    return _between(query, key, value, farther, rotary, *result, scale, softcap)


def _banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_query: Tensor | None,
    far_key: Tensor | None,
    scale: float,
    window: int | None,
    far_first: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prefill.banded`, or the kernel for Hopper GPUs where it takes the call. Which and why is logged once."""
    tensors = (query, key, value, far_query, far_key)
    reason = _not_hopper(query.device)
    if reason is None and (softcap is not None or sinks is not None):
        reason = "softcap or sinks"
    if reason is None and not query.numel():
        reason = "no queries"
    if reason is None:
        from ropewalk.ops.triton import hopper

        reason = hopper.lacks(query, key, value, far_key, window)
        if reason is None:
            _log_kernel("prefill", None)
            return hopper.banded(*tensors, scale, window, far_first, return_lse)
    _log_kernel("prefill", reason)
    return prefill.banded(*tensors, scale, window, far_first, softcap, sinks, return_lse)


def _between(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: Sequence[Band],
    rotary: Rotary | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`between.between`, or the kernel for Hopper GPUs, likewise."""
    reason = _not_hopper(query.device)
    if reason is None:
        from ropewalk.ops.triton import hopper_between

        reason = hopper_between.lacks(query, key, value, output, rotary, softcap)
        if reason is None:
            _log_kernel("prefill of narrow bands", None)
            return hopper_between.between(query, key, value, bands, rotary, output, lse, scale)
    _log_kernel("prefill of narrow bands", reason)
    return between(query, key, value, bands, rotary, output, lse, scale, softcap)


@cache
def _not_hopper(device: torch.device) -> str | None:
    """Why the kernels for Hopper GPUs cannot be had; None if they can."""
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return torch.cuda.get_device_name(device)
    try:
        from ropewalk.ops.triton import hopper_between  # noqa: F401
    except ImportError as error:
        return f"this installation ({error})"
    return None


@cache
def _log_kernel(work: str, reason: str | None) -> None:
    if reason is None:
        logger.info("%s runs on the kernel for Hopper GPUs", work)
    else:
        logger.info("%s runs on the portable kernel; the one for Hopper GPUs does not take %s", work, reason)


def _readable(x: Tensor) -> Tensor:
    """x as kernels read it, with dimensions of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _moved(
    x: Tensor, function: PositionFunction, begin: int, rotary: Rotary | None, out: Tensor | None = None
) -> Tensor:
    """As `rotary.moved`, in one pass through memory; into `out` where there is something to move."""
    if rotary is None or function == TRUE_POSITIONS:
        return x
    cosine, sine = rotary.shift(function, begin, begin + x.shape[2], x.device)
    return rotate(x, cosine, sine, rotary, out)


def _moved_from(first: int, x: Tensor, function: PositionFunction, begin: int, rotary: Rotary | None) -> Tensor:
    """The same, with anything in the tokens before `first`."""
    if rotary is None or function == TRUE_POSITIONS or first == 0:
        return _moved(x, function, begin, rotary)
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _moved(x[:, :, first:], function, begin + first, rotary, turned[:, :, first:])
    return turned
