# SPDX-License-Identifier: Apache-2.0
"""Scaled rotary frequencies, as transformers itself computes them from its rope parameters.

A model computes its frequencies in one module, from the configuration that the module was made with. To scale them, a
second such module is made from a changed copy of the configuration and takes the first one's place. The model's own
module and configuration stay as they are, so that putting the module back restores the model exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ropewalk.integrations.transformers import probe
from ropewalk.integrations.transformers.adapters import adapt
from ropewalk.integrations.transformers.changes import Changes
from ropewalk.integrations.transformers.extend import EXTENSION
from ropewalk.integrations.transformers.frequencies import changes_with_length, fixed
from ropewalk.integrations.transformers.probe import UnsupportedModelError

ScalingKind = Literal["linear", "ntk", "dynamic-ntk", "yarn"]

# Of a rotary embedding that `scaled` put in place.
_MARK = "ropewalk_scaling"
# Frequencies may have been rounded to bfloat16 with the rest of a model.
_TOLERANCE = 1e-2


@contextmanager
def scaled(model: PreTrainedModel, kind: ScalingKind, factor: float, trained_window: int) -> Iterator[None]:
    """The model with scaled frequencies, until the context ends: then it is exactly what it was.

    Args:
        model: with one rotary embedding, not scaled, that every attention layer uses.
        kind: of scaling. "ntk" raises the base to base * factor^(d / (d - 2)), with d the rotated dimensions of a head;
            the others are the rope types "linear", "dynamic" and "yarn" of transformers.
        factor: 1 or more; of "linear", "dynamic-ntk" and "yarn" as in rope parameters.
        trained_window: tokens that the model was trained on.

    Under "dynamic-ntk" the base grows with the text, as in transformers: each forward pass has the base of the longest
    position so far. A text read in several passes would therefore have keys of several bases in its cache; see
    `fixed_frequencies`.

    Raises:
        UnsupportedModelError: the model's frequencies cannot be scaled like that; nothing was changed.
        ValueError: the model is extended, or scaled, already.
    """
    name, own = _rotary_embedding(model)
    scaling = _made_like(own, kind, factor, trained_window)
    setattr(scaling, _MARK, kind)
    with _replaced(model, name, scaling):
        _check_layers(model, trained_window)
        yield


@contextmanager
def fixed_frequencies(model: nn.Module, length: int) -> Iterator[None]:
    """A model whose frequencies change with the length gets those of a text of `length` tokens, however it is read.

    Such a model ("dynamic", "longrope") computes its frequencies anew in each forward pass, from the longest position.
    Read in chunks, each chunk would have frequencies of its own, and keys in the cache would keep theirs. Within this
    context a text read in chunks and token by token is what it is in one forward pass of `length` tokens.
    Other models stay as they are, and so do extended ones, whose frequencies were measured to be the same up to the end
    of the map.
    """
    with ExitStack() as stack:
        if hasattr(model, EXTENSION):
            yield
            return
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if changes_with_length(module):
                stack.enter_context(_replaced(model, name, fixed(module, length)))
        yield


@contextmanager
def _replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    parent, _, attribute = name.rpartition(".")
    owner = model.get_submodule(parent)
    own = getattr(owner, attribute)
    setattr(owner, attribute, module)
    try:
        yield
    finally:
        setattr(owner, attribute, own)


def _rotary_embedding(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The one rotary embedding of a model, and its name.

    Raises:
        UnsupportedModelError: there is none, there are several, or it is scaled or of another kind.
        ValueError: the model is extended or scaled already.
    """
    kind = type(model).__name__
    if hasattr(model, EXTENSION):
        raise ValueError(f"this {kind} is extended: call ropewalk.restore(model) before its frequencies are scaled")
    probe.check_decoder(model)
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
    }
    if not found:
        raise UnsupportedModelError(f"{kind} keeps its rotations in a table, or has none: there is nothing to scale")
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{kind} has {len(found)} rotary embeddings ({', '.join(found)}): frequencies are scaled where all layers "
            "share one"
        )
    [(name, module)] = found.items()
    if hasattr(module, _MARK):
        raise ValueError(f"the frequencies of this {kind} are scaled already ({getattr(module, _MARK)})")
    config, rope_type = getattr(module, "config", None), getattr(module, "rope_type", None)
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(rope_type, dict):
        raise UnsupportedModelError(
            f"{name} of {kind} has frequencies for each kind of layer ({', '.join(map(str, rope_type))}): frequencies "
            "are scaled where all layers share them"
        )
    if not (isinstance(parameters, dict) and "rope_theta" in parameters and isinstance(rope_type, str)):
        raise UnsupportedModelError(
            f"{name} of {kind} is a {type(module).__name__} that does not say its rope parameters as those of "
            "transformers 5 do, so they cannot be changed"
        )
    if rope_type != "default":
        raise UnsupportedModelError(
            f"{kind} is scaled already: its rope_type is {rope_type!r}, and only 'default' ones can be scaled"
        )
    frequencies: Any = module.inv_freq
    dim = 2 * len(frequencies)
    expected = parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if dim < 4 or not torch.allclose(frequencies.double().cpu(), expected, rtol=_TOLERANCE, atol=0):
        raise UnsupportedModelError(
            f"{name} of {kind} has other frequencies than {parameters['rope_theta']}^(-2i/{dim}) for i from 0 to "
            f"{dim // 2 - 1}, of 2 or more: only such ones can be scaled"
        )
    return name, module


def _made_like(own: nn.Module, kind: ScalingKind, factor: float, trained_window: int) -> nn.Module:
    """A rotary embedding of the same class, from a changed copy of its configuration."""
    config: Any = copy.deepcopy(own.config)
    frequencies: Any = own.inv_freq
    config.rope_parameters = _rope_parameters(
        kind, factor, config.rope_parameters, trained_window, 2 * len(frequencies)
    )
    # Where transformers looks for the trained window: "dynamic" here, and "yarn" there before its own parameters.
    config.max_position_embeddings = trained_window
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = trained_window
    make: Any = type(own)
    try:
        made: nn.Module = make(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{make.__name__} cannot be made with rope parameters {config.rope_parameters}: {error}"
        ) from error
    if (shape := made.get_buffer("inv_freq").shape) != frequencies.shape:
        raise UnsupportedModelError(
            f"{make.__name__} has {len(frequencies)} frequencies, and {shape[0]} with rope parameters "
            f"{config.rope_parameters}: they cannot be scaled"
        )
    return made.to(frequencies.device).train(own.training)


def _rope_parameters(
    kind: ScalingKind, factor: float, own: Mapping[str, Any], trained_window: int, dim: int
) -> dict[str, Any]:
    match kind:
        case "linear":
            return {**own, "rope_type": "linear", "factor": factor}
        case "ntk":
            return {**own, "rope_theta": own["rope_theta"] * factor ** (dim / (dim - 2))}
        case "dynamic-ntk":
            return {**own, "rope_type": "dynamic", "factor": factor}
        case "yarn":
            return {
                **own,
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": trained_window,
            }


def _check_layers(model: PreTrainedModel, trained_window: int) -> None:
    """Measures that every layer rotates by the frequencies that are in place now.

    Raises:
        UnsupportedModelError: one does not.
    """
    probe.register_functions()
    changes = Changes()
    try:
        adapt(model, probe.farthest(trained_window, 0) + 1, changes)
        with fixed_frequencies(model, 4 * trained_window):
            layers = probe.probe(model, trained_window)
    finally:
        changes.undo()
    without = [layer.name for layer in layers if layer.rotary is None]
    if without:
        raise UnsupportedModelError(
            f"{len(without)} of {len(layers)} layers of {type(model).__name__} have no rotary embedding, such as "
            f"{without[0]}: frequencies are scaled where all layers have one"
        )
