# SPDX-License-Identifier: Apache-2.0
"""Presets on models: whose is whose, what goes before what, and the papers' models at their true shapes."""

import logging
from dataclasses import replace
from functools import partial

import huggingface_hub.constants
import pytest
import torch
import transformers
from naive import _pairs
from tiny import in_chunks, logits, text
from torch.testing import assert_close
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import hub

import ropewalk
from ropewalk import Preset, ReRoPE, SelfExtend
from ropewalk.integrations.transformers import models, sources
from ropewalk.integrations.transformers.presets import fetch_preset, find_preset, why_none
from ropewalk.presets import built_in, read_preset
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import save_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:a text of .* tokens uses relative positions")


def llama(hidden, heads, key_heads, layers, window=4096, theta=10_000.0, **more):
    return "LlamaConfig", {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": window,
        "rope_theta": theta,
        **more,
    }


def other(kind, *sizes, **more):
    return kind, llama(*sizes, **more)[1]


LLAMA_2_7B, LLAMA_2_13B = llama(4096, 32, 32, 32), llama(5120, 40, 40, 40)
LLAMA_3_8B, LLAMA_3_70B = (llama(*sizes, window=8192, theta=5e5) for sizes in ((4096, 32, 8, 32), (8192, 64, 8, 80)))
MISTRAL = other("MistralConfig", 4096, 32, 8, 32, window=32_768, sliding_window=4096)
GEMMA_2B = other("GemmaConfig", 2048, 8, 1, 18, window=8192, head_dim=256)
GEMMA_7B = other("GemmaConfig", 3072, 16, 16, 28, window=8192, head_dim=256)
QWEN2 = other("Qwen2Config", 3584, 28, 4, 28, window=32_768, theta=1e6)
DISTILL = other("Qwen2Config", 3584, 28, 4, 28, window=131_072)
SOLAR = llama(4096, 32, 8, 48)
PHI_2 = other("PhiConfig", 2560, 32, 32, 32, window=2048, partial_rotary_factor=0.4)
MPT = (
    "MptConfig",
    {"d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 2048, "attn_config": {"alibi": True}},
)

# The published configurations, as far as positions go, by the names on the hub.
PUBLISHED = [
    ("llama-2-7b", "meta-llama/Llama-2-7b-hf", LLAMA_2_7B),
    ("llama-2-7b", "meta-llama/Llama-2-7b-chat-hf", LLAMA_2_7B),
    ("llama-2-13b", "meta-llama/Llama-2-13b-hf", LLAMA_2_13B),
    ("llama-2-13b", "meta-llama/Llama-2-13b-chat-hf", LLAMA_2_13B),
    ("mistral-7b-instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", MISTRAL),
    (
        "mistral-7b-instruct-v0.1",
        "mistralai/Mistral-7B-Instruct-v0.1",
        (MISTRAL[0], MISTRAL[1] | {"sliding_window": None}),
    ),
    ("phi-2", "microsoft/phi-2", PHI_2),
    ("mpt-7b-chat", "mosaicml/mpt-7b-chat", MPT),
    ("vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5", LLAMA_2_7B),
    ("vicuna-13b-v1.5", "lmsys/vicuna-13b-v1.5", LLAMA_2_13B),
    ("solar-10.7b", "upstage/SOLAR-10.7B-v1.0", SOLAR),
    ("solar-10.7b", "upstage/SOLAR-10.7B-Instruct-v1.0", SOLAR),
    ("gemma-2b", "google/gemma-2b-it", GEMMA_2B),
    ("gemma-7b", "google/gemma-7b", GEMMA_7B),
    ("gemma-7b", "google/gemma-1.1-7b-it", GEMMA_7B),
    ("qwen2-7b", "Qwen/Qwen2-7B-Instruct", QWEN2),
    ("qwen2-7b", "Qwen/Qwen2-7B", (QWEN2[0], QWEN2[1] | {"max_position_embeddings": 131_072})),
    ("deepseek-r1-distill-qwen-7b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", DISTILL),
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B", LLAMA_3_8B),
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", LLAMA_3_8B),
    ("llama-3-70b", "meta-llama/Meta-Llama-3-70B-Instruct", LLAMA_3_70B),
]
over_published = pytest.mark.parametrize(
    ("preset", "name", "config"), PUBLISHED, ids=[f"{name}-{number}" for number, (_, name, _) in enumerate(PUBLISHED)]
)


def configuration(name, config, **changes):
    kind, options = config
    made = getattr(transformers, kind)(**{**options, **changes})
    made._name_or_path = name
    return made


class Named(PreTrainedModel):
    """A model as far as its preset goes: its configuration."""

    def __init__(self, name, config, **changes):
        torch.nn.Module.__init__(self)
        self.config = configuration(name, config, **changes)


def small(name, config, layers=1, **changes):
    """A model with random weights and the sizes that matter: few layers, a narrow MLP and few words."""
    sizes = {"num_hidden_layers": layers, "intermediate_size": 32, "vocab_size": 96, "pad_token_id": 0}
    made = configuration(name, config, **{**sizes, "bos_token_id": None, "eos_token_id": None, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(made)
        # Sharp attention: what is freshly initialised attends almost evenly, and shows no positions.
        for part, parameter in model.named_parameters():
            if "q_proj.weight" in part or "k_proj.weight" in part:
                torch.nn.init.normal_(parameter, std=2.5 * parameter.shape[1] ** -0.5)
    model.config._name_or_path = name
    model.train(False)
    return model


@over_published
def test_the_published_configuration(preset, name, config):
    found = find_preset(Named(name, config))
    assert found is built_in()[preset].preset
    assert why_none(Named(name, config))  # nothing else takes it


@pytest.mark.parametrize(
    "name",
    [
        "Llama-2-7b-chat-hf",
        "/models/llama2-7b-chat",
        "./Llama_2_7B/",
        "TheBloke/Llama-2-7B-Chat-GGUF",
        "TheBloke/Llama-2-7B-chat-AWQ",
        "/x/llama-2-7b-chat.Q4_K_M.gguf",
        "llama-2-7b.Q8_0.gguf",
        "unsloth/llama-2-7b-bnb-4bit",
        "C:\\models\\Llama-2-7b-fp16",
        "/c/hub/models--meta-llama--Llama-2-7b-chat-hf/snapshots/f5db02db724555f92da89c216ac04704f23d4590",
    ],
)
def test_a_name_in_other_writing(name):
    assert find_preset(Named(name, LLAMA_2_7B)).name == "llama-2-7b"


@over_published
def test_other_sizes_are_another_model(preset, name, config):
    for key, value in built_in()[preset].sizes.items():
        if key == "model_type":
            continue
        changes = {
            "rope_parameters.rope_type": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            "rope_parameters.rope_theta": {"rope_theta": 123.0},
            "attn_config.alibi": {"attn_config": {"alibi": False}},
            "head_dim": {"head_dim": 128},
        }.get(key, {key: (max(value) if isinstance(value, list) else value) * 2})
        model = Named(name, config, **changes)
        assert find_preset(model) is None, key
        assert f"the preset {preset} is not taken" in why_none(model)
        assert key in why_none(model)
    layers = built_in()[preset].layers
    assert find_preset(Named(name, config, num_hidden_layers=layers + 1)) is None
    assert find_preset(Named(name, config, num_hidden_layers=2)) is built_in()[preset].preset  # it was cut
    wrong = MISTRAL if config[0] != MISTRAL[0] else LLAMA_3_8B
    assert find_preset(Named(name, wrong)) is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("", LLAMA_2_7B),
        ("my-finetune", LLAMA_2_7B),
        ("yahma/llama-7b-hf", LLAMA_2_7B),
        ("togethercomputer/LLaMA-2-7B-32K", LLAMA_2_7B),
        ("NousResearch/Yarn-Llama-2-7b-64k", LLAMA_2_7B),
        ("lmsys/vicuna-7b-v1.3", LLAMA_2_7B),
        ("lmsys/vicuna-7b-v1.5-16k", LLAMA_2_7B),
        ("meta-llama/Llama-2-70b-hf", LLAMA_2_7B),
        ("meta-llama/Llama-3.1-8B-Instruct", LLAMA_3_8B),
        ("gradientai/Llama-3-8B-Instruct-262k", LLAMA_3_8B),
        ("mistralai/Mistral-7B-Instruct-v0.2", MISTRAL),
        ("mistralai/Mistral-7B-v0.1", MISTRAL),
        ("Qwen/Qwen2.5-7B-Instruct", QWEN2),
        ("Qwen/Qwen2-Math-7B", QWEN2),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", DISTILL),
        ("microsoft/phi-1_5", PHI_2),
        ("google/gemma-2-2b", GEMMA_2B),
        ("mosaicml/mpt-7b", MPT),
        ("mosaicml/mpt-7b-storywriter", MPT),
        ("upstage/SOLAR-10.7B", SOLAR),
    ],
)
def test_other_names_are_other_models(name, config):
    model = Named(name, config)
    assert find_preset(model) is None
    assert f"preset={find_preset(Named(names_of(config), config)).name!r}" in why_none(model)


def names_of(config):
    """The name of the first model that has this configuration."""
    return next(name for _, name, published in PUBLISHED if published == config)


def test_tiny_models_have_none_and_nothing_is_said_of_them():
    for name in ("llama", "mistral", "phi", "gemma", "qwen2"):
        assert find_preset(tiny_model(name)) is None
        assert why_none(tiny_model(name)) == ""


@pytest.mark.parametrize(
    ("preset", "name", "config"),
    [
        each
        for each in PUBLISHED
        if each[0] in ("llama-2-7b", "mistral-7b-instruct-v0.1", "phi-2", "mpt-7b-chat", "gemma-2b")
    ],
)
def test_without_a_length_the_preset_says_how(preset, name, config, caplog):
    model = small(name, config)
    expected = built_in()[preset].preset
    with caplog.at_level(logging.INFO, "ropewalk"), ropewalk.extend(model) as handle:
        assert handle.preset is expected
        assert handle.position_map == expected.position_map
        assert handle.trained_window == expected.trained_window
        assert handle.query_scaling is None
        assert all(layer.extended for layer in handle.layers)
        said = f"preset           {preset}, built in: {expected.source}"
        assert said in str(handle)
        assert said in caplog.text
        assert "in the place of" not in str(handle)
    # Farther than its map reaches: one of its kind for that length, and it says so.
    reach = expected.position_map.max_length(expected.trained_window)
    with ropewalk.extend(model, target_length=reach) as handle:
        assert handle.position_map == expected.position_map
    with ropewalk.extend(model, target_length=reach + 1) as handle:
        assert handle.position_map == SelfExtend.for_length(reach + 1, expected.trained_window)
        assert f"in the place of its map {expected.position_map}, which reaches {reach} tokens" in str(handle)
    model.config._name_or_path = "my-own"
    with pytest.raises(ValueError, match=rf"preset=...; its sizes .* 'my-own': if it is one, say preset='{preset}'"):
        ropewalk.extend(model)
    with ropewalk.extend(model, preset=name.rpartition("/")[2].removesuffix("-hf").lower()) as handle:
        assert handle.preset is expected


def test_windows_of_mistral_are_as_the_preset_says():
    name, config = "mistralai/Mistral-7B-Instruct-v0.1", MISTRAL
    model = small(name, config)
    with ropewalk.extend(model) as handle:
        assert [layer.extended for layer in handle.layers] == [True]
        assert handle.trained_window == 8192
        assert model.config.sliding_window > 1 << 30
    assert model.config.sliding_window == 4096
    with pytest.raises(ropewalk.UnsupportedModelError, match="sliding window of 4096 tokens"):
        ropewalk.extend(model, SelfExtend(6, 1024))  # a map was given: nothing else is looked for
    kept = replace(read_preset("mistral-7b-instruct-v0.1"), sliding_window="keep")
    with pytest.raises(ropewalk.UnsupportedModelError, match="sliding window of 4096 tokens"):
        ropewalk.extend(model, preset=kept)


FOUND = Preset(SelfExtend(4, 16), 60, "yarn", name="tuned", source="measured")


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a preset in it."""
    FOUND.save(save_tiny_model(tmp_path / "tiny") / "ropewalk.json")
    return tmp_path / "tiny"


def test_what_goes_before_what(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with ropewalk.extend(model) as handle:
        assert handle.preset == FOUND
        assert (handle.position_map, handle.trained_window) == (SelfExtend(4, 16), 60)
        assert handle.query_scaling.kind == "yarn"
        assert f"preset           tuned, {folder / 'ropewalk.json'}: measured" in str(handle)
    given = Preset(ReRoPE(8), 48)
    given.save(tmp_path / "given.json")
    for preset in (given, tmp_path / "given.json", str(tmp_path / "given.json")):
        with ropewalk.extend(model, preset=preset) as handle:
            assert (handle.position_map, handle.trained_window, handle.query_scaling) == (ReRoPE(8), 48, None)
            assert handle.preset == given
    with ropewalk.extend(model, SelfExtend(2, 8)) as handle:  # an explicit map: no preset is looked for
        assert (handle.preset, handle.position_map, handle.trained_window) == (None, SelfExtend(2, 8), 64)
        assert "preset" not in str(handle)
    with ropewalk.extend(model, SelfExtend(2, 8), preset=given, query_scaling="log-n") as handle:
        assert (handle.position_map, handle.trained_window) == (SelfExtend(2, 8), 48)
        assert handle.query_scaling.kind == "log-n"
        assert "in the place of its map ReRoPE(window=8), which reaches inf tokens" in str(handle)
    with ropewalk.extend(model, trained_window=50) as handle:
        assert (handle.position_map, handle.trained_window) == (SelfExtend(4, 16), 50)
    with ropewalk.extend(model, ReRoPE, target_length=500, preset=FOUND) as handle:
        assert handle.position_map == ReRoPE.for_length(500, 60)
    (folder / "ropewalk.json").unlink()
    with pytest.raises(ValueError, match=r"or target_length=\.\.\., or preset=\.\.\.$"):
        ropewalk.extend(model)
    with ropewalk.extend(model, target_length=200) as handle:
        assert (handle.preset, handle.position_map) == (None, SelfExtend.for_length(200, 64))


def test_the_preset_beside_a_model_goes_before_the_built_in_one(tmp_path):
    FOUND.save(tmp_path / "ropewalk.json")
    folder = tmp_path / "Llama-2-7b-hf"
    folder.mkdir()
    assert find_preset(Named(str(folder), LLAMA_2_7B)).name == "llama-2-7b"
    FOUND.save(folder / "ropewalk.json")
    assert find_preset(Named(str(folder), LLAMA_2_7B)) == FOUND


def test_a_broken_preset_beside_a_model_is_told(folder):
    (folder / "ropewalk.json").write_text('{"map": {"map": "rerope", "window": 0}, "trained_window": 64}')
    model = AutoModelForCausalLM.from_pretrained(folder)
    for arguments in ({}, {"target_length": 100}):
        with pytest.raises(ValueError, match=r"ropewalk.json': window must be 1 or more, got 0; it lies beside"):
            ropewalk.extend(model, **arguments)
    ropewalk.extend(model, SelfExtend(2, 8)).restore()
    ropewalk.extend(model, preset=FOUND).restore()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache with one repository, `owner/tiny`, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "cached_file", partial(hub.cached_file, cache_dir=tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return save_tiny_model(repository / "snapshots" / COMMIT)


def test_a_preset_in_the_hubs_cache(hub_cache):
    model = AutoModelForCausalLM.from_pretrained("owner/tiny", cache_dir=hub_cache.parents[2])
    assert model.config.name_or_path == "owner/tiny"
    assert find_preset(model) is None
    FOUND.save(hub_cache / "ropewalk.json")
    assert find_preset(model) == FOUND
    # By a folder of its own, as who downloads a whole repository has it.
    assert find_preset(AutoModelForCausalLM.from_pretrained(hub_cache)) == FOUND
    for gone in ("./not-there", "/not/there", "owner/tiny/not-there", "owner/not-there"):
        model.config._name_or_path = gone
        assert find_preset(model) is None


def test_the_loader_asks_the_hub_for_that_file_alone(hub_cache, monkeypatch):
    asked, original = [], hub.cached_file

    def cached_file(location, name, **options):
        asked.append((location, name))
        return original(location, name, **options)

    monkeypatch.setattr(hub, "cached_file", cached_file)
    fetch_preset("owner/tiny")  # there is none, and no network to ask
    fetch_preset("owner/not-there")
    assert asked == [("owner/tiny", "ropewalk.json"), ("owner/not-there", "ropewalk.json")]
    asked.clear()
    loaded = models.load(sources.Source("tiny", str(hub_cache)), "float32", "cpu")
    assert not any(name == "ropewalk.json" for _, name in asked)  # a folder's is looked at where it lies
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: loaded.model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: loaded.tokenizer)
    models.load(sources.Source("owner/tiny", "owner/tiny"), "float32", "cpu")
    assert asked == [("owner/tiny", "ropewalk.json")]


# The papers' models at the true shape of their attention, with a text that just goes past the window.
SHAPES = {
    "llama-2-7b": LLAMA_2_7B,
    "mistral-7b-instruct-v0.1": MISTRAL,
    "phi-2": PHI_2,
    "solar-10.7b": SOLAR,
    "gemma-2b": GEMMA_2B,
    "llama-3-8b": LLAMA_3_8B,
    "qwen2-7b": QWEN2,
}


def narrow(config):
    """The same attention on a hidden size of 128, where a configuration takes both."""
    kind, options = config
    if kind == "PhiConfig":
        return config
    head = options.get("head_dim", options["hidden_size"] // options["num_attention_heads"])
    return kind, {**options, "hidden_size": 128, "head_dim": head}


def by_definition(model, ids, position_map, rows):
    """Logits of some tokens of a model with one layer, whose attention is computed in float64 from un-rotated keys and
    the relative positions alone."""

    def attend(module, query, key, value, mask, scaling, **kwargs):
        query, key, value = (x.double() for x in (query, key, value))
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        frequencies = model.model.rotary_emb.inv_freq.double()
        back = torch.polar(torch.ones(()).double(), -torch.arange(length)[:, None] * frequencies)
        (query_pairs, query_rest), (key_pairs, key_rest) = (_pairs(x, "", len(frequencies)) for x in (query, key))
        output = torch.zeros_like(query)
        for row in rows:
            relative = position_map.relative_to(torch.tensor([[row]]), torch.arange(row + 1))[0]
            turned = torch.polar(torch.ones(()).double(), relative[:, None] * frequencies)
            keys = (key_pairs * back)[:, :, : row + 1].conj() * turned
            scores = ((query_pairs * back)[:, :, row, None] * keys).sum(-1).real
            scores = scores + (query_rest[:, :, row, None] * key_rest[:, :, : row + 1]).sum(-1)
            output[:, :, row] = ((scores * scaling).softmax(-1)[..., None] * value[:, :, : row + 1]).sum(2)
        return output.transpose(1, 2).float().contiguous(), None

    AttentionInterface.register("by-definition", attend)
    model.set_attn_implementation("by-definition")
    try:
        return logits(model, ids)[:, rows]
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("preset", SHAPES)
def test_the_papers_models(preset):
    chosen = read_preset(preset)
    own = chosen.position_map
    window, group = own.window, own.group_size
    model = small(preset, narrow(SHAPES[preset]))
    ids = text(window * 5 // 4 + 3 * group + 2)
    short, last = ids[:, : min(window, 1024)], ids.shape[1] - 1
    rows = [window - 1, window, window + group, last]
    plain = logits(model, short)
    with ropewalk.extend(model, preset=chosen) as handle:
        assert handle.position_map == own
        assert_close(logits(model, short), plain, rtol=0, atol=1e-4)
        extended = logits(model, ids)
        chunks = in_chunks(model, ids, (window // 2 + 3, window // 2 - 3, 1, group))
        assert_close(chunks, extended, rtol=0, atol=2e-4)
    expected = by_definition(model, ids, own, rows)
    assert_close(extended[:, rows], expected, rtol=0, atol=2e-4)
    assert (extended[:, last] - by_definition(model, ids, ropewalk.Identity(), [last])[:, 0]).abs().max() > 0.005
    assert torch.equal(logits(model, short), plain)
