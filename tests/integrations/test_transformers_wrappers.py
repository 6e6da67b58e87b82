# SPDX-License-Identifier: Apache-2.0
"""Models as they come: in wrappers, with adapters, spread out, offloaded, quantised; and the caches they read into.

What each is compared with is the bare model, extended, which other tests hold to the numbers of the specification.
"""

import copy
import subprocess
import sys

import pytest
import torch
from tiny import CLOSE, MAP, logits, options, text
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import ropewalk
from ropewalk import ModelChangedError, UnsupportedModelError
from ropewalk.integrations.transformers import scoring
from ropewalk.integrations.transformers.generation import generate
from ropewalk.integrations.transformers.kept import ReadingError
from ropewalk.integrations.transformers.reading import Reading, read
from ropewalk.ops.layout import Layout
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import tiny_tokenizer

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

IDS = text(60)
# Of models that do not say it.
WINDOW = {"trained_window": 64}

pytestmark = [
    # Of peft 0.21 about transformers 5.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # Of transformers and torch, while they trace.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny llama's folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


def adapted(config, model=None, **others):
    """A model with an adapter that does something, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(tiny_model("llama") if model is None else model, config, **others).eval()


def lora(**others):
    return peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False, **others}
    )


CAUSAL = {"task_type": "CAUSAL_LM"}
# What puts adapters into a model's own modules, or makes its weights anew.
ADAPTERS = {
    "LoRA": lambda: adapted(lora(**CAUSAL)),
    "LoRA on everything": lambda: adapted(lora(target_modules="all-linear", **CAUSAL)),
    "DoRA": lambda: adapted(lora(use_dora=True, **CAUSAL)),
    "no task": lambda: adapted(lora()),
    "mixed": lambda: adapted(lora(), mixed=True),
    "IA3": lambda: adapted(
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False, **CAUSAL)
    ),
    "LoHa": lambda: adapted(peft.LoHaConfig(target_modules=["q_proj", "k_proj"], r=4, init_weights=False, **CAUSAL)),
    "the attention itself": lambda: adapted(lora(target_modules=["up_proj"], modules_to_save=["self_attn"], **CAUSAL)),
}
WRAPPERS = {
    **ADAPTERS,
    "the tuner": lambda: ADAPTERS["LoRA"]().base_model,
    "torch.compile": lambda: torch.compile(tiny_model("llama"), backend="eager"),
    "torch.compile of LoRA": lambda: torch.compile(ADAPTERS["LoRA"](), backend="eager"),
    "DataParallel": lambda: nn.DataParallel(tiny_model("llama")),
    "DataParallel of LoRA": lambda: nn.DataParallel(ADAPTERS["LoRA"]()),
}
over_wrappers = pytest.mark.parametrize("kind", WRAPPERS)


def inside(wrapper):
    """Found otherwise than by what is tested."""
    return next(module for module in wrapper.modules() if type(module).__name__ == "LlamaForCausalLM")


def bare(wrapper):
    """A model of its own, without adapters or anything around it, that computes the same."""
    wrapper = getattr(wrapper, "_orig_mod", getattr(wrapper, "module", wrapper))
    twin = copy.deepcopy(wrapper)
    return twin.merge_and_unload() if hasattr(twin, "merge_and_unload") else twin


def assert_nothing_left(model):
    assert not [name for module in model.modules() for name in vars(module) if "ropewalk" in name]
    assert all(not module._forward_pre_hooks for module in model.modules())


@over_wrappers
def test_a_wrapper_computes_what_the_bare_model_does(kind):
    wrapper = WRAPPERS[kind]()
    model, twin = inside(wrapper), bare(wrapper)
    plain = logits(wrapper, IDS)
    assert_close(plain, logits(twin, IDS), **CLOSE)
    with ropewalk.extend(wrapper, MAP) as handle, ropewalk.extend(twin, MAP):
        assert handle.model is model
        expected = logits(twin, IDS)
        assert (expected - plain).abs().max() > 0.5
        assert_close(logits(wrapper, IDS), expected, **CLOSE)
        assert_close(logits(model, IDS), expected, **CLOSE)
        assert handle.active
    assert torch.equal(logits(wrapper, IDS), plain)
    assert_nothing_left(wrapper)


@over_wrappers
def test_a_wrapper_is_told_of_what_the_model_inside_is(kind):
    wrapper = WRAPPERS[kind]()
    model = inside(wrapper)
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not extended"):
        ropewalk.restore(wrapper)
    handle = ropewalk.extend(wrapper, MAP)
    for given in (wrapper, model):
        with pytest.raises(ValueError, match="already extended"):
            ropewalk.extend(given, MAP)
    ropewalk.restore(wrapper)
    assert not handle.active
    assert_nothing_left(wrapper)
    with ropewalk.extend(model, MAP):  # and the other way round
        expected = logits(model, IDS)
        assert_close(logits(wrapper, IDS), expected, **CLOSE)
        ropewalk.restore(wrapper)
    assert_nothing_left(wrapper)


@over_wrappers
def test_what_would_be_wrong_in_a_wrapper_is_an_error(kind):
    wrapper = WRAPPERS[kind]()
    with ropewalk.extend(wrapper, MAP):
        inside(wrapper).half()
        with pytest.raises(Exception, match=r"cast to torch\.float16"):
            wrapper(IDS)


@over_wrappers
def test_generating_scoring_and_reading_with_a_wrapper(kind, tmp_path):
    wrapper = WRAPPERS[kind]()
    twin, tokenizer, prompt = bare(wrapper), tiny_tokenizer(chat=True), IDS[0].tolist()
    found = []
    for model in (wrapper, twin):
        with ropewalk.extend(model, MAP):
            answer = generate(model, tokenizer, prompt, max_new_tokens=6)
            scores = scoring.log_likelihoods(model, [prompt], [30])[0]
            reading = read(model, tokenizer, "The sea is wide.")
            reading.save(tmp_path / "kept")
            again = Reading.load(tmp_path / "kept", model, tokenizer)
            asked = [one.ask("Why?", max_new_tokens=6).token_ids for one in (reading, again)]
            with pytest.raises(ropewalk.LengthError):
                scoring.log_likelihoods(model, [[1] * 500], [30])
        found.append((answer.token_ids, scores, asked))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1], **CLOSE)
    assert found[0][2] == found[1][2]


def test_data_parallel_of_a_model_with_a_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        wrapper = nn.parallel.DistributedDataParallel(model)
        plain = logits(wrapper, IDS)
        with ropewalk.extend(wrapper, MAP) as handle:
            assert handle.model is model
            assert_close(logits(wrapper, IDS), logits(model, IDS), **CLOSE)
        assert torch.equal(logits(wrapper, IDS), plain)
    finally:
        torch.distributed.destroy_process_group()


# What is done to a model with two adapters while it is extended. It stays right.
SWAPS = {
    "merged": lambda model: model.merge_adapter(),
    "merged and not": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "another adapter": lambda model: model.set_adapter("other"),
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "off and on": lambda model: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()),
    "deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "unloaded": lambda model: model.merge_and_unload(),
    "one more": lambda model: (model.add_adapter("third", lora(**CAUSAL)), model.set_adapter("third")),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_adapters_are_swapped_while_extended(swap):
    def two():
        model = ADAPTERS["LoRA"]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model.add_adapter("other", lora(**CAUSAL))
        return model.eval()

    def swapped(model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            SWAPS[swap](model)
        return inside(model).eval()

    model = two()
    with ropewalk.extend(model, MAP) as handle:
        before = logits(model, IDS)
        actual = logits(swapped(model), IDS)
        assert handle.active
    assert_nothing_left(model)
    with ropewalk.extend(swapped(two()), MAP) as other:
        assert_close(actual, logits(other.model, IDS), **CLOSE)
    kept = swap in ("merged", "merged and not", "off and on", "unloaded")
    assert ((actual - before).abs().max() < 1e-3) == kept


def test_an_adapter_that_comes_later():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP) as handle:
        wrapper = adapted(lora(**CAUSAL), model)
        actual = logits(wrapper, IDS)
        assert handle.active
        with ropewalk.extend(bare(ADAPTERS["LoRA"]()), MAP) as other:
            assert_close(actual, logits(other.model, IDS), **CLOSE)
        ropewalk.restore(wrapper)
    assert_nothing_left(wrapper)


def test_an_adapter_of_transformers_itself():
    model = tiny_model("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter(lora(**CAUSAL))
    with ropewalk.extend(model, MAP), ropewalk.extend(bare(ADAPTERS["LoRA"]()), MAP) as other:
        assert_close(logits(model, IDS), logits(other.model, IDS), **CLOSE)


def test_attention_that_comes_with_an_adapter_is_told_from_the_model_s_own():
    # What else it changes is nothing yet.
    config = lora(target_modules=["up_proj"], modules_to_save=["self_attn"], init_lora_weights=True, **CAUSAL)
    model = adapted(config)
    with ropewalk.extend(model, MAP):
        expected = logits(model, IDS)
        with model.disable_adapter(), pytest.raises(ModelChangedError, match="switched on or off"):
            model(IDS)
        assert torch.equal(logits(model, IDS), expected)
    with model.disable_adapter(), ropewalk.extend(model, MAP) as handle:
        assert_close(logits(model, IDS), expected, **CLOSE)  # whose copy it is
        assert handle.layers[0].name == "model.layers.0.self_attn.original_module"


# Tokens that are nobody's, before each text.
PROMPTS = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
    "P-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=32, **CAUSAL),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=5, **CAUSAL),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_are_tokens(kind):
    wrapper, twin = adapted(PROMPTS[kind]), tiny_model("llama")
    plain = logits(wrapper, IDS)
    with ropewalk.extend(wrapper, MAP), ropewalk.extend(twin, MAP):
        prompt = wrapper.get_prompt(batch_size=1)
        if kind == "prefix tuning":
            expected = logits(twin, IDS, past_key_values=prompt)
        else:
            embedded = torch.cat((prompt, twin.get_input_embeddings()(IDS)), dim=1)
            expected = twin(inputs_embeds=embedded).logits
        actual = logits(wrapper, IDS)
        assert_close(actual, expected, **CLOSE)
        assert (actual - plain).abs().max() > 0.5
    assert torch.equal(logits(wrapper, IDS), plain)


# What the model inside, called by itself, would leave out.
BESIDE = {
    **{kind: (lambda kind=kind: adapted(PROMPTS[kind]), "puts virtual tokens before each text") for kind in PROMPTS},
    "aLoRA": (lambda: adapted(lora(alora_invocation_tokens=[5, 6], **CAUSAL)), "tokens that turn its adapter on"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_a_wrapper_does_beside_its_model_is_not_left_out(kind):
    make, message = BESIDE[kind]
    wrapper, tokenizer = make(), tiny_tokenizer()
    calls = (
        lambda: generate(wrapper, tokenizer, [1, 2], max_new_tokens=2),
        lambda: scoring.log_likelihoods(wrapper, [[1, 2, 3]], [1]),
        lambda: read(wrapper, tokenizer, "The sea"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"this PeftModelForCausalLM .*{message}"):
            call()


def test_readings_and_adapters(tmp_path):
    """What was read with an adapter is not asked about without it."""
    model, tokenizer = ADAPTERS["LoRA"](), tiny_tokenizer(chat=True)
    with ropewalk.extend(model, MAP):
        reading = read(model, tokenizer, "The sea is wide.")
        reading.save(tmp_path / "kept")
        answer = reading.ask("Why?", max_new_tokens=4).token_ids
        with model.disable_adapter():
            with pytest.raises(ReadingError, match=r"with the adapters \['default'\], and the model now has \[\]"):
                reading.ask("Why?", max_new_tokens=4)
            with pytest.raises(ReadingError, match=r"other adapters on \(\['default'\], not \[\]\)"):
                Reading.load(tmp_path / "kept", model, tokenizer)
        assert reading.ask("Why?", max_new_tokens=4).token_ids == answer


class Around(nn.Module):
    """Of somebody else's."""

    def __init__(self, model):
        super().__init__()
        self.inner = model


class Pipeline:
    def __init__(self, model):
        self.model = model


def replicated(name):
    wrapper = nn.DataParallel(tiny_model(name))
    wrapper.device_ids = [0, 1]
    return wrapper


def shadowed():
    return adapted(peft.ShadowConfig(**CAUSAL))


REFUSED = {
    "adaption prompt": (
        lambda: adapted(peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **CAUSAL)),
        UnsupportedModelError,
        "AdaptionPromptModel cannot be extended: .*: train LoRA or prefix tuning instead",
    ),
    "adaption prompt, inside": (
        lambda: inside(adapted(peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, **CAUSAL))),
        UnsupportedModelError,
        "AdaptedAttention cannot be extended: .*: train LoRA or prefix tuning instead",
    ),
    "replicas": (
        lambda: replicated("falcon"),
        UnsupportedModelError,
        "DataParallel cannot be extended: .*: load the model with device_map='auto' instead",
    ),
    "somebody's": (
        lambda: Around(tiny_model("llama")),
        TypeError,
        "Around is no transformers model, but holds a LlamaForCausalLM as inner: pass that one",
    ),
    "a pipeline": (
        lambda: Pipeline(tiny_model("llama")),
        TypeError,
        "Pipeline is no transformers model, but holds a LlamaForCausalLM as model: pass that one",
    ),
    "no model": (lambda: nn.Linear(2, 2), TypeError, "expected a transformers PreTrainedModel, .* got Linear"),
    "a name": (lambda: "llama", TypeError, "expected a transformers PreTrainedModel, .* got str"),
    "no weights": (
        lambda: tiny_model("llama").to("meta"),
        UnsupportedModelError,
        "LlamaForCausalLM has no weights yet .*: load them",
    ),
}
if hasattr(peft, "ShadowConfig"):
    REFUSED["shadow"] = (shadowed, UnsupportedModelError, "ShadowModel cannot be extended: .*: train LoRA instead")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    make, error, message = REFUSED[kind]
    given = make()
    before = (
        {name: dict(vars(module)) for name, module in given.named_modules()} if isinstance(given, nn.Module) else {}
    )
    with pytest.raises(error, match=message):
        ropewalk.extend(given, MAP)
    for name, attributes in before.items():
        assert vars(given.get_submodule(name)) == attributes


@pytest.mark.filterwarnings("ignore:FSDP")
def test_fully_sharded_models_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapper = FullyShardedDataParallel(tiny_model("llama"), device_id=torch.device("cpu"))
        with pytest.raises(UnsupportedModelError, match=r"FullyShardedDataParallel cannot be extended: .*tp_plan="):
            ropewalk.extend(wrapper, MAP)
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_of_a_model_whose_attention_is_its_own():
    model = tiny_model("llama")
    wrapper = nn.DataParallel(model)
    wrapper.device_ids = [0, 1]
    with ropewalk.extend(wrapper, MAP) as handle:
        assert handle.model is model


# Ways of accelerate to keep weights elsewhere, and bring each module's when it runs.
def offload(model, how, folder):
    cpu = torch.device("cpu")
    if how == "memory":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif how == "memory, with buffers":
        accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=True)
    elif how == "disk":
        accelerate.disk_offload(model, folder, execution_device=cpu)
    else:
        layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
        own = [name for name, module in model.named_modules() if module._parameters and not name.startswith(layers)]
        device_map = {name: "cpu" for name in own}
        device_map |= {f"{layers}.{n}": "disk" if n else "cpu" for n in range(len(model.get_submodule(layers)))}
        accelerate.dispatch_model(
            model, device_map, main_device=cpu, offload_dir=folder, force_hooks=True, offload_buffers=True
        )


WAYS = ["memory", "memory, with buffers", "disk", "half on disk"]
# Frequencies that are held, tables of rotations, and forwards that are replaced.
SOME = ["llama", "gemma3", "phi3-longrope", "gptj", "falcon", "falcon-alibi", "bloom", "mpt"]
over_offloaded = pytest.mark.parametrize("name", SOME)


@over_offloaded
@pytest.mark.parametrize("how", WAYS)
def test_offloaded_weights(name, how, tmp_path):
    model = tiny_model(name)
    plain = logits(model, IDS)
    with ropewalk.extend(model, MAP, **WINDOW):
        expected = logits(model, IDS)
    offload(model, how, tmp_path / "weights")
    assert any(parameter.is_meta for parameter in model.parameters())
    with ropewalk.extend(model, MAP, **WINDOW) as handle:
        assert_close(logits(model, IDS), expected, **CLOSE)
        assert_close(
            scored(model), torch.gather(expected.log_softmax(-1)[:, :-1], 2, IDS[:, 1:, None])[0, 29:, 0], **CLOSE
        )
        answer = generate(model, tiny_tokenizer(), IDS[0].tolist(), max_new_tokens=4)
        assert answer.prompt_tokens == IDS.shape[1]
        assert handle.active
    assert_close(logits(model, IDS), plain, **CLOSE)
    assert_nothing_left(model)


def scored(model):
    return scoring.log_likelihoods(model, IDS.tolist(), [30])[0]


@over_offloaded
def test_hooks_come_and_go_while_extended(name):
    """accelerate's hooks replace the forward of modules, and so do some extensions."""
    model = tiny_model(name)
    plain = logits(model, IDS)
    handle = ropewalk.extend(model, MAP, **WINDOW)
    expected = logits(model, IDS)
    offload(model, "memory", None)
    for module in model.modules():  # those whose forward is replaced too
        if not hasattr(module, "_hf_hook"):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert_close(logits(model, IDS), expected, **CLOSE)
    assert handle.active
    handle.restore()
    assert_close(logits(model, IDS), plain, **CLOSE)

    handle = ropewalk.extend(model, MAP, **WINDOW)
    assert_close(logits(model, IDS), expected, **CLOSE)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_close(logits(model, IDS), expected, **CLOSE)
    handle.restore()
    assert_close(logits(model, IDS), plain, **CLOSE)
    assert_nothing_left(model)


def test_hooks_run_around_a_forward_that_is_replaced():
    class Counting(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = tiny_model("falcon"), Counting()
    accelerate.hooks.add_hook_to_module(model.transformer.h[0].self_attention, hook)
    with ropewalk.extend(model, MAP):
        hook.calls = 0
        model(IDS)
        assert hook.calls == 1
    model(IDS)
    assert hook.calls == 2


def test_held_frequencies_do_not_copy_offloaded_weights():
    model = tiny_model("phi3-longrope")
    offload(model, "memory, with buffers", None)
    hook = model.model.rotary_emb._hf_hook
    with ropewalk.extend(model, MAP):
        assert model.model.rotary_emb._hf_hook is hook
    assert model.model.rotary_emb._hf_hook is hook


@pytest.mark.parametrize("kilobytes", [None, 60, 20])
def test_device_map_auto(saved, kilobytes, tmp_path):
    limits = {} if kilobytes is None else {"max_memory": {"cpu": kilobytes * 1024}, "offload_folder": tmp_path}
    model = AutoModelForCausalLM.from_pretrained(saved, device_map="auto", **limits)
    assert any(parameter.is_meta for parameter in model.parameters()) == bool(limits)
    twin = tiny_model("llama")
    with ropewalk.extend(model, MAP), ropewalk.extend(twin, MAP):
        assert_close(logits(model, IDS), logits(twin, IDS), **CLOSE)
    assert_close(logits(model, IDS), logits(twin, IDS), **CLOSE)


def test_a_layout_is_moved_once_to_each_device():
    layout = Layout(2, 4, key_mask=torch.ones(1, 4, dtype=torch.bool))
    assert layout.on(torch.device("cpu")) is layout
    moved = layout.on(torch.device("meta"))
    assert moved.key_mask.is_meta
    assert layout.on(torch.device("meta")) is moved


PARALLEL = """
import sys, warnings
import torch, ropewalk
from transformers import AutoModelForCausalLM
warnings.simplefilter("ignore")
ids = torch.arange(1, 61)[None] * 7 % 96
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
bare = AutoModelForCausalLM.from_pretrained(sys.argv[1])
weight = model.model.layers[0].self_attn.q_proj.weight
assert weight.to_local().shape[0] * 2 == bare.model.layers[0].self_attn.q_proj.weight.shape[0]
close = {"rtol": 0, "atol": 2e-4}
with torch.no_grad():
    plain = model(ids).logits
    with ropewalk.extend(model, ropewalk.SelfExtend(3, 8)), ropewalk.extend(bare, ropewalk.SelfExtend(3, 8)):
        torch.testing.assert_close(model(ids).logits, bare(ids).logits, **close)
        assert (model(ids).logits - plain).abs().max() > 0.5
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
torch.distributed.destroy_process_group()
"""


def test_tensor_parallel_on_two_processes(saved, tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, saved]
    process = subprocess.run(command, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr


UNPICKLED = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    pairs = pickle.load(file)
with torch.no_grad():
    for kind, model, ids, extended, plain in pairs:
        import ropewalk
        torch.testing.assert_close(model(ids).logits, extended, rtol=0, atol=2e-4, msg=kind)
        ropewalk.restore(model)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=2e-4, msg=kind)
        with ropewalk.extend(model, ropewalk.SelfExtend(3, 8), trained_window=64):
            torch.testing.assert_close(model(ids).logits, extended, rtol=0, atol=2e-4, msg=kind)
"""


def test_unpickled_in_another_process(tmp_path):
    import pickle

    kinds = {kind: WRAPPERS[kind] for kind in ("LoRA", "mixed", "IA3", "DataParallel")}
    kinds |= {name: (lambda name=name: tiny_model(name)) for name in SOME}
    pairs = []
    for kind, make in kinds.items():
        model = make()
        plain = logits(model, IDS)
        ropewalk.extend(model, MAP, **WINDOW)
        pairs.append((kind, model, IDS, logits(model, IDS), plain))
    path, script = tmp_path / "models", tmp_path / "unpickled.py"
    with path.open("wb") as file:
        pickle.dump(pairs, file)
    script.write_text(UNPICKLED)
    process = subprocess.run([sys.executable, script, path], text=True, capture_output=True)
    assert process.returncode == 0, process.stderr


# Quantised weights, by what transformers needs for them.
def bits(name, **others):
    import transformers

    return getattr(transformers, name)(**others)


QUANTISED = {
    "quanto, 8 bits": ("optimum.quanto", lambda: bits("QuantoConfig", weights="int8")),
    "quanto, 4 bits": ("optimum.quanto", lambda: bits("QuantoConfig", weights="int4")),
    "bitsandbytes, 8 bits": ("bitsandbytes", lambda: bits("BitsAndBytesConfig", load_in_8bit=True)),
    "bitsandbytes, 4 bits": (
        "bitsandbytes",
        lambda: bits("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_weights(kind, saved):
    package, configuration = QUANTISED[kind]
    pytest.importorskip(package)
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=configuration())
    plain, short = logits(model, IDS), logits(model, IDS[:, :8])
    twin = unquantised(model)
    # Of what rounds its activations too.
    rounding = (logits(twin, IDS) - plain).abs().max().item()
    with ropewalk.extend(model, MAP) as handle, ropewalk.extend(twin, MAP):
        assert handle.active
        # Within the window nothing changes; past it, it is what the same numbers give in float32.
        assert_close(logits(model, IDS[:, :8]), short, **CLOSE)
        actual, expected = logits(model, IDS), logits(twin, IDS)
        assert (actual - plain).abs().max() > 3
        assert_close(actual, expected, rtol=0, atol=max(2 * rounding, 2e-4))
    assert rounding < 0.6
    assert torch.equal(logits(model, IDS), plain)
    assert_nothing_left(model)


def unquantised(model):
    """A model with the weights that the quantised one stands for, from what its modules answer."""
    twin = tiny_model("llama")
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear):
            weight = model.get_submodule(name)(torch.eye(module.in_features)).T
            module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return twin


# GPTQ and AWQ: not run, as no wheel of theirs computes on a CPU.


def steps(model, cache, sizes=(30, 15, *[1] * 15)):
    """Logits of a text that is read into a cache."""
    parts, begin = [], 0
    for size in sizes:
        parts.append(logits(model, IDS[:, begin : begin + size], past_key_values=cache, use_cache=True))
        begin += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_sliding_and_full_caches(name, kind):
    model = tiny_model(name)
    with ropewalk.extend(model, MAP, **options(name)):
        cache = kind(config=model.config, **({"max_cache_len": 70} if kind is StaticCache else {}))
        assert_close(steps(model, cache), logits(model, IDS), **CLOSE)


def test_a_quantised_cache():
    """It holds what it holds: attention over the same keys, unquantised, is the same."""
    pytest.importorskip("optimum.quanto")
    from transformers import QuantizedCache

    model = tiny_model("llama")
    options = {"nbits": 4, "q_group_size": 16}
    with ropewalk.extend(model, MAP):
        expected = logits(model, IDS)
        cache = QuantizedCache("quanto", model.config, residual_length=16, **options)
        steps(model, cache, (30, 15, *[1] * 14))
        held = DynamicCache(config=model.config)
        for number, layer in enumerate(cache.layers):
            keys, values = (
                torch.cat((layer._dequantize(whole), rest), dim=-2)
                for whole, rest in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values))
            )
            assert keys.shape[2] == 59
            held.update(keys, values, number)
        last = IDS[:, 59:]
        actual = logits(model, last, past_key_values=cache)
        assert_close(actual, logits(model, last, past_key_values=held), **CLOSE)
        assert (actual - expected[:, 59:]).abs().max() > 1e-3  # it was quantised


def test_generate_with_a_quantised_cache():
    pytest.importorskip("optimum.quanto")
    from transformers import QuantizedCache

    model, settings = tiny_model("llama"), {"nbits": 4, "q_group_size": 16, "residual_length": 16}
    arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 8)):
        expected, cache, new = IDS, QuantizedCache("quanto", model.config, **settings), IDS
        for _ in range(20):
            scores = logits(model, new, past_key_values=cache, use_cache=True)[:, -1:]
            scores[..., model.generation_config.eos_token_id or 0] = -torch.inf
            new = scores.argmax(-1)
            expected = torch.cat((expected, new), dim=1)
        settings = {"backend": "quanto", **settings}
        actual = model.generate(IDS, cache_implementation="quantized", cache_config=settings, **arguments)
        assert torch.equal(actual, expected)
