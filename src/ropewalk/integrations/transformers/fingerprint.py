# SPDX-License-Identifier: Apache-2.0
"""What tells one model from another, and one state of a model from the next: what a kept reading is held to.

Not cryptographic: any changed number changes a fingerprint, but one who wants to can make two that agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropewalk.integrations.transformers.extend import EXTENSION, Extension

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A view of a tensor's bits by the size of its elements in bytes.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of each tensor whose order counts too.
_SAMPLED = 1024
# Of a configuration: what does not change what a model computes.
_NO_MATTER = frozenset({"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "name_or_path"})


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of named tensors, from the sum of all their bits and a sample in order: fast enough for gigabytes.

    Raises:
        ValueError: one is not a plain tensor with its numbers in memory.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        plain = tensor.detach()
        if plain.is_meta or plain.is_complex() or type(plain) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"{name} is a {type(tensor).__name__} on {tensor.device}, whose numbers cannot be read")
        bits = plain.contiguous().reshape(-1).view(_INTEGERS[plain.element_size()])
        sample = bits[:: max(1, len(bits) // _SAMPLED)].tolist()
        total = int(bits.sum(dtype=torch.int64))
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)} {total} {sample}\n".encode())
    return digest.hexdigest()


def of_weights(model: PreTrainedModel) -> str:
    """Of every parameter and buffer but the rotary frequencies; see `of_tensors`."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return of_tensors((name, tensor) for name, tensor in named if "inv_freq" not in name)


def of_frequencies(model: PreTrainedModel) -> str:
    """Of the rotary frequencies, and of the factor on the attention that comes with some."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        own = [(key, buffer) for key, buffer in module.named_buffers(recurse=False) if key.endswith("inv_freq")]
        # "original" ones are what frequencies that change with the length are computed from, not those in use.
        used = [(key, buffer) for key, buffer in own if "original" not in key]
        if used:
            factors = {key: value for key, value in vars(module).items() if key.endswith("attention_scaling")}
            digest.update(f"{name} {of_tensors(used)} {sorted(factors.items())}\n".encode())
    return digest.hexdigest()


def of_adapters(model: PreTrainedModel) -> list[str]:
    """The adapters of PEFT that are on in some module, by name; those that are merged are part of the weights."""
    found = set()
    for module in model.modules():
        disabled = getattr(module, "disable_adapters", None)  # a method of whole models
        if isinstance(disabled, bool) and not disabled:
            active: Any = module.active_adapters
            found.add("+".join(active))
    return sorted(found)


def of_config(model: PreTrainedModel) -> str:
    """Of its configuration, but for the names and versions in it."""
    return of_settings(model.config.to_dict())


def of_settings(settings: Any) -> str:
    """Of a configuration as plain data, but for the names and versions in it."""

    def matters(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {str(key): matters(inner) for key, inner in value.items() if key not in _NO_MATTER}
            return {key: inner for key, inner in kept.items() if not key.startswith("_")}
        return [matters(inner) for inner in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(matters(settings), sort_keys=True, default=str).encode()).hexdigest()


def of_extension(model: PreTrainedModel) -> dict[str, Any] | None:
    """What `ropewalk.extend` did to a model, as plain data; None where it did nothing."""
    extension: Extension | None = getattr(model, EXTENSION, None)
    if extension is None:
        return None
    scaling = extension.query_scaling
    maps = [layer.position_map for layer in extension.layers if layer.position_map is not None]
    return {
        "map": extension.position_map.to_dict(),
        **({"maps": [one.to_dict() for one in maps]} if len(set(maps)) > 1 else {}),
        "layers": [layer.name for layer in extension.layers if layer.extended],
        "query_scaling": None if scaling is None else [scaling.kind, extension.trained_window],
    }
