# SPDX-License-Identifier: Apache-2.0
"""How a GGUF file turns its positions. transformers reads little of that and drops the rest in silence.

llama.cpp writes and reads these files, so a file means what it means there. That is put into the rope parameters of the
configuration, before the model is made from it: transformers' own rotary embedding then does the rest. A file whose
rotation rope parameters cannot say is refused.

    in the file                                   rope type
    rope.scaling.type linear, with a factor       linear
    rope.scaling.type yarn                        yarn
    rope_freqs.weight (Llama 3.1)                 llama3; longrope, where no parameters of llama3 give these factors
    rope_factors_{long,short}.weight (Phi-3)      longrope
    rope.dimension_count, rope.freq_base          partial_rotary_factor and rope_theta, of any type
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ropewalk.integrations.transformers.sources import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The attribute of a configuration that holds the window that a scaled model was trained on before it was scaled.
TRAINED_WINDOW = "trained_window"

_Factors = npt.NDArray[np.float64]

_FREQS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_KINDS = ("none", "linear", "yarn", "longrope")
_SCALING_KEYS = {
    *("type", "factor", "original_context_length", "finetuned", "attn_factor", "alpha"),
    *("yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"),
}
# What rope parameters say of any type of rotation, as opposed to how one type is scaled.
_UNSCALED = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "truncate")
# Llama 3.1's; its converter knows no other original length.
_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
# float32 factors, computed from float32 frequencies.
_ROUNDING = 3e-6
# Divisors from here on leave a frequency at rest (Gemma 4 writes 1e30).
_AT_REST = 1e20


def configuration(
    location: str,
    gguf_file: str,
    *,
    trust_remote_code: bool = False,
    revision: str = "main",
    subfolder: str = "",
) -> PreTrainedConfig:
    """The configuration that transformers reads from a GGUF file, with the file's own rotation in it.

    Where the file scales its frequencies, the original context length, if it says one, becomes the trained window
    (`models.trained_window`); `max_position_embeddings` stays the context length. Of `rope_freqs` it is the longest
    wavelength that is not scaled in full, as in Llama 3.1, unless the file says another.

    Args:
        location: a folder or a hub name.
        gguf_file: name of the file there.
        trust_remote_code: as of `from_pretrained`, like the arguments after it.

    Raises:
        ModelError: the file's rotation cannot be read, or not be said in rope parameters.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    where: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        location, gguf_file=gguf_file, trust_remote_code=trust_remote_code, **where
    )
    path = cached_file(location, gguf_file, **where)
    assert path is not None  # it raises where there is none
    file = _read(Path(path))
    own = getattr(config, "rope_parameters", None) or {}
    # Models with sliding windows scale the frequencies of their other layers alone.
    own = own.get("full_attention", own)
    if "rope_theta" not in own:
        if scalings := file.scalings():
            raise file.error(
                f"it has {' and '.join(scalings)}, and {type(config).__name__} has no rope parameters for it"
            )
        return config
    own |= _unscaled(file, config, own)
    scaling = _scaling(file, own, int(_head_dim(config) * own.get("partial_rotary_factor", 1.0)))
    if scaling is None:
        return config
    if scaling.trained_window is not None:
        setattr(config, TRAINED_WINDOW, min(scaling.trained_window, file.context or scaling.trained_window))
    kept = {key: own[key] for key in _UNSCALED if key in own}
    reason: Exception | None = None
    for parameters in scaling.spellings:
        own.clear()
        own |= kept | parameters
        if "original_max_position_embeddings" in parameters and hasattr(config, "original_max_position_embeddings"):
            # transformers looks there first.
            config.original_max_position_embeddings = parameters["original_max_position_embeddings"]
        try:
            config.validate_rope()
        except (KeyError, ValueError) as error:
            reason = reason or error
        else:
            return config
    raise file.error(f"it has {' and '.join(file.scalings())}, which {type(config).__name__} does not take ({reason})")


@dataclass(frozen=True)
class _File:
    """What a GGUF file says about rotation: metadata without the architecture's name, and tensors in float64."""

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, _Factors]

    def error(self, problem: str) -> ModelError:
        return ModelError(
            f"cannot read how '{self.name}' turns its positions: {problem}. Convert the model anew, or pass its folder "
            "or its name on the hub"
        )

    def number(self, key: str, least: float = 0.0) -> float | None:
        """A finite number, `least` or more; None where the file does not say it."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not (least <= value < math.inf):
            raise self.error(f"{key} is {value!r}, and a number of {least:g} or more was expected")
        return value

    @property
    def context(self) -> int | None:
        context = self.number("context_length", 1)
        return None if context is None else int(context)

    @property
    def original(self) -> int | None:
        original = self.number("rope.scaling.original_context_length", 1)
        return None if original is None else int(original)

    @property
    def kind(self) -> str:
        kind = self.metadata.get("rope.scaling.type", "linear")
        if kind not in _KINDS:
            raise self.error(f"rope.scaling.type is {kind!r}, and one of {', '.join(_KINDS)} was expected")
        return str(kind)

    @property
    def factor(self) -> float:
        """Of "linear" and "yarn"; 1 where nothing is scaled."""
        kind = self.kind
        if kind == "none":
            return 1.0
        key = "rope.scaling.factor" if "rope.scaling.factor" in self.metadata else "rope.scale_linear"
        factor = self.number(key)
        if factor is None and ("rope.scaling.type" not in self.metadata or kind == "longrope"):
            return 1.0
        # llama.cpp writes linear and 0 for a model that is not scaled.
        if factor == 0 and kind != "yarn":
            return 1.0
        if factor is None or factor < 1:
            raise self.error(
                f"rope.scaling.type is {kind!r} and {key} {factor}, and a number of 1 or more was expected"
            )
        return factor

    def scalings(self) -> list[str]:
        """What scales the frequencies, in words."""
        kind, factor = self.kind, self.factor
        found = [f"rope.scaling.type {kind} with factor {factor:g}"] if kind == "yarn" or factor != 1 else []
        if _FREQS in self.tensors and not np.all(self.tensors[_FREQS] == 1):
            found.append(_FREQS)
        if self.tensors.keys() & {_LONG, _SHORT} or (kind == "longrope" and not found):
            found.append(f"{_LONG} and {_SHORT}")
        return found

    def factors(self, name: str, count: int) -> _Factors:
        """A tensor of `count` numbers above 0, by which frequencies are divided."""
        if name not in self.tensors:
            raise self.error(f"there is no {name}, which its other rope scaling needs")
        factors = self.tensors[name]
        if factors.shape != (count,):
            raise self.error(f"{name} has the shape {factors.shape}, and ({count},) was expected, a factor a frequency")
        if not np.all((factors > 0) & (factors < math.inf)):
            wrong = factors[~((factors > 0) & (factors < math.inf))][0]
            raise self.error(f"{name} holds {wrong}, and numbers above 0 were expected")
        return factors


@dataclass(frozen=True)
class _Scaling:
    """Rope parameters that all say one scaling, the plainest first, and the tokens that it was put on top of."""

    spellings: list[dict[str, Any]]
    trained_window: int | None


def _read(path: Path) -> _File:
    # The reader of gguf takes seconds for a vocabulary.
    from transformers.integrations.gguf.reader import read_gguf_metadata

    everything, names = read_gguf_metadata(str(path))
    prefix = f"{everything['general.architecture']}."
    metadata = {key.removeprefix(prefix): value for key, value in everything.items() if key.startswith(prefix)}
    tensors: dict[str, _Factors] = {}
    if any("rope_" in name for name in names):
        from gguf import GGUFReader, dequantize

        tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in GGUFReader(path).tensors
            if "rope_" in tensor.name
        }
    file = _File(path.name, metadata, tensors)
    known = {*(f"rope.scaling.{key}" for key in _SCALING_KEYS), _FREQS, _LONG, _SHORT}
    for name in (*metadata, *tensors):
        if (name.startswith("rope.scaling.") or name in tensors) and name not in known:
            raise file.error(f"it says {name}, which is not known here")
    if file.number("rope.scaling.alpha"):
        raise file.error(
            f"rope.scaling.alpha is {metadata['rope.scaling.alpha']}, and no rope type of transformers has it"
        )
    return file


def _head_dim(config: Any) -> int:
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config["full_attention"]
    head_dim = getattr(config, "head_dim", None)
    return int(head_dim or config.hidden_size // config.num_attention_heads)


def _unscaled(file: _File, config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Base and rotated dimensions, where the file says them."""
    changed: dict[str, Any] = {}
    base = file.number("rope.freq_base")
    if base == 0:
        raise file.error("rope.freq_base is 0, and a number above 0 was expected")
    if base is not None:
        changed["rope_theta"] = base
    dim, head_dim = file.number("rope.dimension_count", 2), _head_dim(config)
    share = own.get("partial_rotary_factor")
    # Gemma 4 has its rotated dimensions in rope_freqs.
    if dim is None or own.get("rope_type") == "proportional" or dim == int(head_dim * (share or 1.0)):
        return changed
    if share is None or dim > head_dim or dim % 2:
        raise file.error(
            f"rope.dimension_count is {dim}, and a {config.model_type} of transformers turns all {head_dim} dimensions "
            "of a head"
            if share is None
            else f"rope.dimension_count is {dim}, and an even number up to the {head_dim} dimensions of a head was "
            "expected"
        )
    share = dim / head_dim
    changed["partial_rotary_factor"] = share if int(head_dim * share) == dim else math.nextafter(share, 1.0)
    if hasattr(config, "partial_rotary_factor"):
        config.partial_rotary_factor = changed["partial_rotary_factor"]
    return changed


def _at_rest(file: _File, dim: int) -> bool:
    """Whether rope_freqs say what a "proportional" rope type says already: the first frequencies, and none else."""
    if _FREQS not in file.tensors:
        return not file.scalings()
    factors = file.tensors[_FREQS]
    return len(file.scalings()) == 1 and bool(
        np.all(factors[: dim // 2] == 1) and np.all(factors[dim // 2 :] >= _AT_REST)
    )


def _scaling(file: _File, own: dict[str, Any], dim: int) -> _Scaling | None:
    scalings, original, context = file.scalings(), file.original, file.context
    if own.get("rope_type") == "proportional" and _at_rest(file, dim):
        return None
    if len(scalings) > 1:
        raise file.error(f"it has {' and '.join(scalings)}, and one scaling was expected")
    attention = file.number("rope.scaling.attn_factor")
    if file.tensors.keys() & {_LONG, _SHORT} or (file.kind == "longrope" and scalings):
        long, short = file.factors(_LONG, dim // 2), file.factors(_SHORT, dim // 2)
        if original is None or original < 2 or context is None:
            raise file.error(
                f"it has {_LONG}, and not the length that it begins at (rope.scaling.original_context_length)"
            )
        extent = max(1.0, context / original)
        if attention is None:
            # What converters write.
            attention = math.sqrt(1 + math.log(extent) / math.log(original))
        return _Scaling([_longrope(short, long, original, attention, extent)], original)
    if file.kind == "yarn":
        return _Scaling([_yarn(file, original, attention)], original)
    if attention not in (None, 1):
        raise file.error(
            f"rope.scaling.attn_factor is {attention:g}, and only yarn and longrope of transformers have one"
        )
    if not scalings:
        return None
    parameters: dict[str, Any] | None
    if scalings[0] == _FREQS:
        factors = file.factors(_FREQS, dim // 2)
        if original is not None and context is not None and original >= context:
            original = None  # what llama.cpp takes where a file does not say it
        parameters = _llama3(factors, own["rope_theta"], original)
        if parameters is not None:
            original = int(parameters["original_max_position_embeddings"])
    else:
        factors = np.full(dim // 2, file.factor)
        parameters = {"rope_type": "linear", "factor": file.factor}
    # Factors that are the same at any length.
    plain = _longrope(factors, factors, original or context or _LLAMA3_LENGTH, 1.0, 1.0)
    return _Scaling([plain] if parameters is None else [parameters, plain], original)


def _longrope(short: _Factors, long: _Factors, original: int, attention: float, extent: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
        "factor": extent,
    }


def _yarn(file: _File, original: int | None, attention: float | None) -> dict[str, Any]:
    factor = file.factor
    if original is None:
        raise file.error("rope.scaling.type is 'yarn', and rope.scaling.original_context_length is missing")
    extrapolation = file.metadata.get("rope.scaling.yarn_ext_factor", 1)
    if extrapolation != 1 and not extrapolation < 0:  # below 0 it is not set
        raise file.error(f"rope.scaling.yarn_ext_factor is {extrapolation}, and yarn of transformers has 1")
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for name in ("beta_fast", "beta_slow"):
        if beta := file.number(f"rope.scaling.yarn_{name}"):
            parameters[name] = beta
    usual = 1 + 0.1 * math.log(factor)
    if multiplier := file.number("rope.scaling.yarn_log_multiplier"):
        parameters |= {"mscale": 1.0, "mscale_all_dim": multiplier}
        usual /= 1 + 0.1 * multiplier * math.log(factor)
    if attention is not None and not any(math.isclose(attention, each, rel_tol=1e-5) for each in (1, usual)):
        raise file.error(
            f"rope.scaling.attn_factor is {attention:g} under yarn, where 1 or {usual:g} was expected: writers mean "
            "the whole attention factor by it, llama.cpp what multiplies it"
        )
    if whole := file.number("rope.scaling.yarn_attn_factor"):
        parameters["attention_factor"] = float(whole)
    return parameters


def _llama3(factors: _Factors, base: float, original: int | None) -> dict[str, Any] | None:
    """Parameters of Llama 3.1's scaling that give these divisors; None where there are none.

    A frequency that turns t times a token is divided by 1 / ((1 - s) / factor + s), where s is (original t - low) /
    (high - low), cut to 0..1. So s is a line in t, which two frequencies between the ends tell; only the ratios of
    original, low and high matter, so one of them is by convention: low is 1, where the original length is not known.
    """
    factor = float(factors.max())
    turns = base ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    candidates = [(original or _LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH)]
    between = (factors > 1 + _ROUNDING) & (factors < factor * (1 - _ROUNDING))
    if between.sum() >= 2:
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[between], smooth[between], 1)
        if slope > 0 > start:
            low = 1.0 if original is None else -start * original / slope
            width = low / -start
            length = round(slope * width) if original is None else original
            candidates.append((length, round(low, 4), round(low + width, 4)))
    for length, low, high in candidates:
        smooth = np.clip((length * turns - low) / (high - low), 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=_ROUNDING, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    return None
