# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs that keep alive what they point to, and nothing longer.

A graph holds addresses, not tensors. CUDA lets an object be tied to a graph and says when the graph, and whatever was
instantiated from it, is gone; torch has no call for that. The word comes on a thread of the driver, where Python must
not run: it is a semaphore that is posted, and looked at the next time that something is tied.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch

_NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
_MOVE = 1  # CU_GRAPH_USER_OBJECT_MOVE
_SEMAPHORE_BYTES = 64  # more than a sem_t takes anywhere

_lock = threading.Lock()
# By capture: its semaphore, and what its graph points to.
_tied: dict[int, tuple[ctypes.Array[ctypes.c_char], dict[int, object]]] = {}


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def tie(thing: object) -> None:
    """Keeps a thing alive as long as the graph that is being captured on the current stream.

    Raises:
        RuntimeError: the driver refuses.
    """
    capture, graph = _capture()
    with _lock:
        _let_go()
        if capture not in _tied:
            semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
            _libc().sem_init(semaphore, 0, 0)
            user_object = ctypes.c_void_p()
            posted = ctypes.cast(_libc().sem_post, ctypes.c_void_p)
            _call("cuUserObjectCreate", ctypes.byref(user_object), semaphore, posted, 1, _NO_DESTRUCTOR_SYNC)
            _call("cuGraphRetainUserObject", graph, user_object, 1, _MOVE)
            _tied[capture] = semaphore, {}
        _tied[capture][1][id(thing)] = thing


def _let_go() -> None:
    """Of what belonged to graphs that are gone."""
    gone = [capture for capture, (semaphore, _) in _tied.items() if _libc().sem_trywait(semaphore) == 0]
    for capture in gone:
        del _tied[capture]


def _capture() -> tuple[int, ctypes.c_void_p]:
    """Number of the capture on the current stream, and its graph."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    _call(
        "cuStreamGetCaptureInfo_v2",
        stream,
        ctypes.byref(status),
        ctypes.byref(number),
        ctypes.byref(graph),
        None,
        None,
    )
    return number.value, graph


def _call(name: str, *arguments: Any) -> None:
    error = getattr(_driver(), name)(*arguments)
    if error:
        raise RuntimeError(f"{name} failed with CUDA error {error}: tables cannot be tied to the graph being captured")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
