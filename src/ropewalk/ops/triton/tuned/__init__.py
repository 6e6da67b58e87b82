# SPDX-License-Identifier: Apache-2.0
"""Tuned configurations of the kernels: one data file a GPU, and `default.json` for what they leave out."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, Literal

import torch

Kernel = Literal["prefill", "decode", "narrow", "hopper_prefill", "hopper_narrow"]


@cache
def tuned(kernel: Kernel, head_dim: int, itemsize: int, device: torch.device) -> dict[str, Any]:
    """The configuration to run a kernel with: the first entry, of the GPU's own file and then of the default one, that
    covers the call and that the GPU has the shared memory for.

    Args:
        itemsize: bytes of a number.

    Raises:
        LookupError: no entry covers the call.
    """
    for entry in (*_entries(_file(device), kernel), *_entries("default.json", kernel)):
        covers = head_dim <= entry["head_dim"] and itemsize == entry["itemsize"]
        if covers and entry["shared_memory"] <= _shared_memory(device):
            return dict(entry["config"])
    raise LookupError(
        f"no configuration of {kernel} for head dimension {head_dim}, numbers of {itemsize} bytes, {device}"
    )


def _entries(file: str | None, kernel: str) -> list[dict[str, Any]]:
    return [] if file is None else _read(file).get(kernel, [])


@cache
def _read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.files(__name__).joinpath(file).read_text("utf-8"))
    return content


def _file(device: torch.device) -> str | None:
    """The file whose name the GPU's name begins with: `nvidia_h100.json` for "NVIDIA H100 80GB HBM3"."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "_")
    files = (path.name for path in resources.files(__name__).iterdir() if path.name.endswith(".json"))
    return max((file for file in files if name.startswith(file.removesuffix(".json"))), key=len, default=None)


def _shared_memory(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    properties: Any = torch.cuda.get_device_properties(device)
    return float(properties.shared_memory_per_block_optin)
