# SPDX-License-Identifier: Apache-2.0
"""The model inside of what others put around it: adapters, compilers, copies on several devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ropewalk.integrations.transformers.adapters import replaces_forward
from ropewalk.integrations.transformers.probe import UnsupportedModelError

_T = TypeVar("_T")


def _nothing(wrapper: Any) -> str:
    return ""


def _replicas(wrapper: Any) -> str:
    # A replica has its original's attributes, and with them a forward that computes with the original's weights.
    if len(wrapper.device_ids) > 1 and any(map(replaces_forward, wrapper.modules())):
        return (
            "copies its modules to each device at every call, and the attention of this architecture is replaced by "
            "one that cannot be copied like that: load the model with device_map='auto' instead"
        )
    return ""


def _beside_base(wrapper: Any) -> str:
    config = wrapper.active_peft_config
    if config.is_prompt_learning:
        return "puts virtual tokens before each text"
    if getattr(config, "alora_invocation_tokens", None):
        return "looks for the tokens that turn its adapter on"
    return ""


@dataclass(frozen=True)
class _Wrapper:
    """A class that has a model inside.

    Args:
        attribute: the model, or the next wrapper.
        refused: why no model can be extended inside of it, and what to do instead; empty where one can.
        beside: what it does that the model inside, called by itself, does not; empty where that is nothing.
    """

    attribute: str
    refused: Callable[[Any], str] = _nothing
    beside: Callable[[Any], str] = _nothing


# By the names of the classes, so that nothing is imported.
_WRAPPERS = {
    "peft.peft_model.PeftModel": _Wrapper("base_model", beside=_beside_base),
    "peft.mixed_model.PeftMixedModel": _Wrapper("base_model"),
    "peft.tuners.xlora.model.XLoraModel": _Wrapper("lora_model", beside=lambda _: "weighs its adapters by the text"),
    "peft.tuners.poly.model.PolyModel": _Wrapper("model", beside=lambda _: "chooses its adapters by the task"),
    "peft.tuners.tuners_utils.BaseTuner": _Wrapper("model"),
    "torch._dynamo.eval_frame.OptimizedModule": _Wrapper("_orig_mod"),
    "torch.nn.parallel.data_parallel.DataParallel": _Wrapper("module", refused=_replicas),
    "torch.nn.parallel.distributed.DistributedDataParallel": _Wrapper("module"),
}

_PROMPTS_BESIDE = (
    "attends to its prompts beside the attention, with queries at their true positions, which go past the trained "
    "window: train LoRA or prefix tuning instead"
)

# Modules, in or around a model, that cannot be extended: why, and what to do instead.
_REFUSED = {
    "peft.tuners.adaption_prompt.model.AdaptionPromptModel": _PROMPTS_BESIDE,
    "peft.tuners.adaption_prompt.layer.AdaptedAttention": _PROMPTS_BESIDE,
    "peft.tuners.shadow.model.ShadowModel": (
        "attends in a second model of its own, which would stay as it is: train LoRA instead"
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "takes the place of modules and of their weights: load the model with tp_plan='auto' or device_map='auto' "
        "instead"
    ),
}


def unwrapped(model: Any) -> PreTrainedModel:
    """The model itself, which computes for whatever is around it, and so is what is extended.

    Raises:
        UnsupportedModelError: it cannot be extended as it is wrapped.
        TypeError: there is no transformers model that it is known to be around.
    """
    return _unwrapped(model, to_call=False)


def callable_alone(model: Any) -> PreTrainedModel:
    """`unwrapped`, of a model that is to be called in its wrapper's place.

    Raises:
        ValueError: the wrapper does something that would then not be done.
    """
    return _unwrapped(model, to_call=True)


def _unwrapped(model: Any, to_call: bool) -> PreTrainedModel:
    if isinstance(model, nn.Module) and not (to_call and isinstance(model, PreTrainedModel)):
        for module in model.modules():
            if (why := _entry(module, _REFUSED)) is not None:
                raise _refusal(module, why)
    around = model
    while not isinstance(model, PreTrainedModel):
        wrapper = _entry(model, _WRAPPERS)
        if wrapper is None:
            raise TypeError(_unknown(around))
        if why := wrapper.refused(model):
            raise _refusal(model, why)
        if to_call and (why := wrapper.beside(model)):
            raise ValueError(
                f"this {type(model).__name__} {why}, and the model inside, which would be called here, does not: "
                "extend it, and call its own forward or generate"
            )
        model = getattr(model, wrapper.attribute)
    return model


def _entry(module: Any, table: Mapping[str, _T]) -> _T | None:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)


def _refusal(module: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"a model with {type(module).__name__} cannot be extended: it {why}")


def _unknown(given: Any) -> str:
    kind = type(given).__name__
    named = given.named_modules() if isinstance(given, nn.Module) else getattr(given, "__dict__", {}).items()
    for name, inner in named:
        if isinstance(inner, PreTrainedModel):
            return f"{kind} is no transformers model, but holds a {type(inner).__name__} as {name}: pass that one"
    return f"expected a transformers PreTrainedModel, or a wrapper with one inside, got {kind}"
