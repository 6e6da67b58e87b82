# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest
import torch
from gguf_files import CONTEXT, write_gguf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ropewalk
from ropewalk.cli import app
from ropewalk.integrations.transformers import gguf_rope
from ropewalk.integrations.transformers.models import load
from ropewalk.integrations.transformers.quiet import quiet
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies
from ropewalk.integrations.transformers.sources import ModelError, find

ORIGINAL, BASE, DIM = 64, 10_000.0, 16
TEXT = torch.arange(2, 92)[None]  # past the original length
SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [1.0, 1.5, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
EXTENT = math.sqrt(1 + math.log(CONTEXT / ORIGINAL) / math.log(ORIGINAL))
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": ORIGINAL,
}


def plain(base=BASE, dim=DIM):
    return base ** (-np.arange(0, dim, 2) / dim)


def yarn(factor, original, fast=32, slow=1):
    """YaRN's "by parts" (arXiv 2309.00071, section 3.2), with the ramp over dimensions as its authors' code has it."""
    first, last = (DIM * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(BASE)) for turns in (fast, slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), DIM - 1)
    kept = 1 - np.clip((np.arange(DIM // 2) - first) / max(last - first, 1e-3), 0, 1)
    return plain() * (kept + (1 - kept) / factor)


def llama3(factor, low, high, original, base=BASE, dim=DIM):
    """Llama 3.1: what to divide frequencies by, one at a time."""
    factors = []
    for frequency in plain(base, dim):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


LLAMA3 = llama3(8.0, 1.0, 16.0, 512)
ODD = np.array([1.0, 1.0, 2.0, 1.5, 3.0, 2.5, 4.0, 3.5])
# What a file says, its rope parameters, its frequencies, what they are multiplied by, and its trained window.
CASES = {
    "none": ({"rope.scaling.type": "none"}, {}, {"rope_type": "default"}, plain(), 1.0, CONTEXT),
    "as llama.cpp saves an unscaled model": (
        {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 0.0,
            "rope.scaling.attn_factor": 1.0,
            "rope.scaling.original_context_length": CONTEXT,
            "rope.scaling.finetuned": False,
            "rope.scaling.yarn_log_multiplier": 0.0,
        },
        {},
        {"rope_type": "default"},
        plain(),
        1.0,
        CONTEXT,
    ),
    "a length and no scaling": (
        {"rope.scaling.original_context_length": ORIGINAL},
        {"rope_freqs.weight": np.ones(DIM // 2)},
        {"rope_type": "default"},
        plain(),
        1.0,
        CONTEXT,
    ),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
        {"rope_type": "linear", "factor": 4.0},
        plain() / 4,
        1.0,
        CONTEXT,
    ),
    "linear with a length": (
        {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 2.5,
            "rope.scaling.original_context_length": ORIGINAL,
        },
        {},
        {"rope_type": "linear", "factor": 2.5},
        plain() / 2.5,
        1.0,
        ORIGINAL,
    ),
    "linear by its old name": (
        {"rope.scale_linear": 2.0},
        {},
        {"rope_type": "linear", "factor": 2.0},
        plain() / 2,
        1.0,
        CONTEXT,
    ),
    "yarn": (
        YARN,
        {},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
        yarn(4.0, ORIGINAL),
        1 + 0.1 * math.log(4),
        ORIGINAL,
    ),
    "yarn with all it can say": (
        YARN
        | {
            "rope.scaling.yarn_beta_fast": 8.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_log_multiplier": 0.5,
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.attn_factor": 1.0,
        },
        {},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        yarn(4.0, ORIGINAL, 8, 2),
        (1 + 0.1 * math.log(4)) / (1 + 0.05 * math.log(4)),
        ORIGINAL,
    ),
    "yarn with an attention factor": (
        YARN | {"rope.scaling.yarn_attn_factor": 0.75},
        {},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
            "attention_factor": 0.75,
        },
        yarn(4.0, ORIGINAL),
        0.75,
        ORIGINAL,
    ),
    "Llama 3.1": (
        {},
        {"rope_freqs.weight": LLAMA3},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 16.0,
            "original_max_position_embeddings": 512,
        },
        plain() / LLAMA3,
        1.0,
        CONTEXT,  # not longer than what the file takes
    ),
    "Llama 3.1 with a length": (
        {"rope.scaling.original_context_length": ORIGINAL},
        {"rope_freqs.weight": LLAMA3},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 0.125,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": ORIGINAL,
        },
        plain() / LLAMA3,
        1.0,
        ORIGINAL,
    ),
    "factors of no formula": (
        {},
        {"rope_freqs.weight": ODD},
        {
            "rope_type": "longrope",
            "short_factor": ODD.tolist(),
            "long_factor": ODD.tolist(),
            "original_max_position_embeddings": CONTEXT,
            "attention_factor": 1.0,
            "factor": 1.0,
        },
        plain() / ODD,
        1.0,
        CONTEXT,
    ),
    "longrope": (
        {"rope.scaling.original_context_length": ORIGINAL, "rope.scaling.attn_factor": 1.25},
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        {
            "rope_type": "longrope",
            "short_factor": np.float32(SHORT).tolist(),
            "long_factor": np.float32(LONG).tolist(),
            "original_max_position_embeddings": ORIGINAL,
            "attention_factor": 1.25,
            "factor": 4.0,
        },
        plain() / LONG,
        1.25,
        ORIGINAL,
    ),
    "longrope by name": (
        {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": ORIGINAL},
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        {
            "rope_type": "longrope",
            "short_factor": np.float32(SHORT).tolist(),
            "long_factor": np.float32(LONG).tolist(),
            "original_max_position_embeddings": ORIGINAL,
            "attention_factor": EXTENT,
            "factor": 4.0,
        },
        plain() / LONG,
        EXTENT,
        ORIGINAL,
    ),
}
ARCHITECTURES = ("llama", "qwen2", "phi3")


def read(path, **options):
    return load(find(str(path)), dtype="float32", device="cpu", **options)


def frequencies(model, length):
    """Those of a text of this length, and what its rotated queries and keys are multiplied by."""
    with fixed_frequencies(model, length):
        rotary = model.model.rotary_emb
        return rotary.inv_freq.double().numpy(), rotary.attention_scaling


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_a_file_is_what_it_says(tmp_path, case, architecture):
    metadata, tensors, parameters, wanted, attention, window = CASES[case]
    path = write_gguf(tmp_path / "model.gguf", architecture, metadata=metadata, tensors=tensors)
    if architecture == "phi3" and parameters["rope_type"] == "yarn":
        with pytest.raises(
            ModelError, match=r"it has rope\.scaling\.type yarn with factor 4, which Phi3Config does not"
        ):
            read(path)
        return
    loaded = read(path)
    found, scaling = frequencies(loaded.model, CONTEXT)
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    assert scaling == pytest.approx(attention, rel=1e-6)
    assert loaded.trained_window == window
    assert loaded.model.config.max_position_embeddings == CONTEXT

    own = loaded.model.config.rope_parameters
    if architecture != "phi3" or parameters["rope_type"] in ("default", "longrope"):
        assert {name: value for name, value in own.items() if name != "partial_rotary_factor"} == {
            "rope_theta": BASE,
            **parameters,
        }
    else:  # the one type that a Phi3Config takes
        assert (own["rope_type"], own["short_factor"]) == ("longrope", own["long_factor"])
        parameters = own

    # The same weights under a configuration that is made with these parameters.
    config = type(loaded.model.config).from_dict(
        loaded.model.config.to_dict() | {"rope_parameters": {"rope_theta": BASE, **parameters}}
    )
    with quiet():
        other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(loaded.model.state_dict())
    torch.testing.assert_close(loaded.model(TEXT).logits, other(TEXT).logits, rtol=0, atol=0)


def test_short_factors(tmp_path):
    metadata, tensors, *_ = CASES["longrope"]
    loaded = read(write_gguf(tmp_path / "model.gguf", "phi3", metadata=metadata, tensors=tensors))
    np.testing.assert_allclose(frequencies(loaded.model, ORIGINAL)[0], plain() / SHORT, rtol=2e-6)
    np.testing.assert_allclose(frequencies(loaded.model, ORIGINAL + 1)[0], plain() / LONG, rtol=2e-6)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])  # Llama 3.1 8B, Llama 3.2 1B
def test_llama_3_as_it_is(tmp_path, factor, head_dim):
    factors = llama3(factor, 1.0, 4.0, 8192, 500_000.0, head_dim)
    path = write_gguf(
        tmp_path / "model.gguf",
        metadata={"rope.freq_base": 500_000.0, "rope.dimension_count": head_dim},
        tensors={"rope_freqs.weight": factors},
        context=131_072,
        hidden=head_dim,
        heads=1,
    )
    loaded = read(path)
    assert loaded.model.config.rope_parameters == {
        "rope_theta": 500_000.0,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert loaded.trained_window == 8192
    np.testing.assert_allclose(frequencies(loaded.model, 1)[0], plain(500_000.0, head_dim) / factors, rtol=2e-6)


@pytest.mark.parametrize("original", [2048, 5000])
@pytest.mark.parametrize("high", [2.0, 4.0, 7.5])
def test_llama_3_of_another_length(tmp_path, original, high):
    factors = llama3(16.0, 1.0, high, original, BASE, 128)
    path = write_gguf(
        tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors}, context=65_536, hidden=128, heads=1
    )
    loaded = read(path)
    parameters = loaded.model.config.rope_parameters
    assert (parameters["rope_type"], parameters["high_freq_factor"]) == ("llama3", high)
    assert loaded.trained_window == parameters["original_max_position_embeddings"] == original
    np.testing.assert_allclose(frequencies(loaded.model, 1)[0], plain(BASE, 128) / factors, rtol=2e-6)


def test_partial_rotation(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "phi3", metadata={"rope.dimension_count": 12})
    loaded = read(path)
    np.testing.assert_allclose(frequencies(loaded.model, 1)[0], plain(dim=12), rtol=2e-6)
    assert loaded.model(TEXT).logits.isfinite().all()

    factors = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    path = write_gguf(
        tmp_path / "longrope.gguf",
        "phi3",
        metadata={"rope.dimension_count": 12, "rope.scaling.original_context_length": ORIGINAL},
        tensors={"rope_factors_long.weight": factors, "rope_factors_short.weight": factors},
    )
    np.testing.assert_allclose(frequencies(read(path).model, 1)[0], plain(dim=12) / factors, rtol=2e-6)

    path = write_gguf(tmp_path / "qwen2.gguf", "qwen2", metadata={"rope.dimension_count": 12})
    with pytest.raises(ModelError, match="dimension_count is 12, and a qwen2 of transformers turns all 16 dimensions"):
        read(path)


REFUSED = {
    "an unknown type": ({"rope.scaling.type": "ntk"}, {}, "type is 'ntk', and one of none, linear, yarn, longrope was"),
    "a type that is a number": ({"rope.scaling.type": 3}, {}, "type is 3, and one of none"),
    "an unknown setting": (
        YARN | {"rope.scaling.mscale": 1.0},
        {},
        "says rope.scaling.mscale, which is not known here",
    ),
    "an unknown tensor": ({}, {"rope_other.weight": [1.0]}, "it says rope_other.weight, which is not known here"),
    "linear without a factor": ({"rope.scaling.type": "linear"}, {}, "'linear' and rope.scale_linear None"),
    "yarn without a factor": ({"rope.scaling.type": "yarn"}, {}, "is 'yarn' and rope.scale_linear None, and a number"),
    "yarn with factor 0": (
        YARN | {"rope.scaling.factor": 0.0},
        {},
        "is 'yarn' and rope.scaling.factor 0.0, and a number",
    ),
    "a small factor": (YARN | {"rope.scaling.factor": 0.5}, {}, "rope.scaling.factor 0.5, and a number of 1 or more"),
    "nan": (YARN | {"rope.scaling.factor": math.nan}, {}, "rope.scaling.factor is nan, and a number of 0 or more was"),
    "infinity": (YARN | {"rope.scaling.factor": math.inf}, {}, "rope.scaling.factor is inf, and a number of 0 or more"),
    "a negative one": (
        YARN | {"rope.scaling.factor": -4.0},
        {},
        "rope.scaling.factor is -4.0, and a number of 0 or more",
    ),
    "a text": (YARN | {"rope.scaling.factor": "4"}, {}, "rope.scaling.factor is '4', and a number of 0 or more was"),
    "no length": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {},
        "type is 'yarn', and rope.scaling.original_context_length is missing",
    ),
    "length 0": (
        YARN | {"rope.scaling.original_context_length": 0},
        {},
        "original_context_length is 0, and a number of 1 or more was expected",
    ),
    "two meanings": (
        YARN | {"rope.scaling.attn_factor": 0.5},
        {},
        "attn_factor is 0.5 under yarn, where 1 or 1.13863 was",
    ),
    "half of yarn": (
        YARN | {"rope.scaling.yarn_ext_factor": 0.5},
        {},
        "yarn_ext_factor is 0.5, and yarn of transformers",
    ),
    "attention without yarn": ({"rope.scaling.attn_factor": 1.5}, {}, "attn_factor is 1.5, and only yarn and longrope"),
    "alpha": ({"rope.scaling.alpha": 1000.0}, {}, "rope.scaling.alpha is 1000.0, and no rope type of transformers has"),
    "base 0": ({"rope.freq_base": 0.0}, {}, "rope.freq_base is 0, and a number above 0 was expected"),
    "a wrong shape": ({}, {"rope_freqs.weight": [1.0, 2.0]}, r"rope_freqs.weight has the shape \(2,\), and \(8,\) was"),
    "a factor 0": ({}, {"rope_freqs.weight": [0.0] * 8}, "rope_freqs.weight holds 0.0, and numbers above 0 were"),
    "a factor nan": ({}, {"rope_freqs.weight": [math.nan] * 8}, "rope_freqs.weight holds nan, and numbers above 0"),
    "two scalings": (
        YARN,
        {"rope_freqs.weight": [2.0] * 8},
        "it has rope.scaling.type yarn with factor 4 and rope_freqs.weight, and one scaling was expected",
    ),
    "long factors alone": (
        {"rope.scaling.original_context_length": ORIGINAL},
        {"rope_factors_long.weight": LONG},
        "there is no rope_factors_short.weight",
    ),
    "longrope without factors": ({"rope.scaling.type": "longrope"}, {}, "there is no rope_factors_long.weight"),
    "longrope without a length": (
        {},
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        r"not the length that it begins at \(rope.scaling.original_context_length\)",
    ),
    "longrope of another shape": (
        {"rope.scaling.original_context_length": ORIGINAL},
        {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT[:-1]},
        r"rope_factors_short.weight has the shape \(7,\), and \(8,\) was expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path, case):
    metadata, tensors, message = REFUSED[case]
    path = write_gguf(tmp_path / "model.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(ModelError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("cannot read how 'model.gguf' turns its positions: ")


def test_models_with_sliding_windows_scale_the_other_layers(tmp_path):
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.key_length": 16}
    write_gguf(tmp_path / "model.gguf", "gemma3", metadata=metadata | {"rope.freq_base": 1_000_000.0})
    config = gguf_rope.configuration(str(tmp_path), "model.gguf")
    assert config.rope_parameters == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
    }


@pytest.mark.filterwarnings("ignore:a text of .* tokens uses relative positions")
@pytest.mark.parametrize("case", ["linear with a length", "yarn", "Llama 3.1 with a length"])
def test_extend_takes_the_original_length(tmp_path, case):
    metadata, tensors, *_ = CASES[case]
    loaded = read(write_gguf(tmp_path / "model.gguf", metadata=metadata, tensors=tensors))
    unmodified = loaded.model(TEXT[:, :16]).logits
    with ropewalk.extend(loaded.model, ropewalk.SelfExtend(4, 16)) as handle:
        assert handle.trained_window == ORIGINAL
        assert handle.max_length == ropewalk.SelfExtend(4, 16).max_length(ORIGINAL)
        torch.testing.assert_close(loaded.model(TEXT[:, :16]).logits, unmodified)
        assert loaded.model(TEXT).logits.isfinite().all()


def test_the_command_line_says_the_original_length(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", metadata=YARN)
    document = tmp_path / "document.txt"
    document.write_text("Aheneveralittleabab" * 4)
    arguments = [
        *("generate", "--model", str(path), "--file", str(document), "--max-new-tokens", "4", "--json"),
        *("--dtype", "float32", "--device", "cpu", "--group-size", "4", "--window", "16"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trained_window"] == ORIGINAL

    write_gguf(path, metadata=REFUSED["no length"][0])
    arguments.remove("--json")
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: cannot read how 'model.gguf' turns its positions: ")
