# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ropewalk.eval.methods import Method, of_preset, parse, parse_all
from ropewalk.eval.scalings import NTK, DynamicNTK, Linear, YaRN
from ropewalk.eval.subjects import Hashes, Model
from ropewalk.integrations.transformers import scoring
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.sources import Source
from ropewalk.maps import MAPS, SELF, Infinite, LeakyReRoPE, SelfExtend
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.presets import Preset
from ropewalk.testing import TINY_MODELS, tiny_model


def log_likelihoods(model, ids, first, *arguments):
    """Of one text (1, tokens)."""
    return scoring.log_likelihoods(model, ids.tolist(), [first], *arguments)[0]


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("unmodified", None),
        ("unmodified(sliding_window='disable')", None),
        ("selfextend(group_size=8, window=1024)", SelfExtend(8, 1024)),
        ("selfextend(group_size=8,window=1024,start=4096)", SelfExtend(8, 1024, start=4096)),
        ("self(capacity=16, rate=0.02, window=1024, grouping='distance')", SELF(16, 0.02, 1024, "distance")),
        ("leaky-rerope(factor=8, window=512)", LeakyReRoPE(8, 512)),
        ("selfextend", SelfExtend.for_length(16384, 8192)),
        ("sliding-window(window=1024)", SlidingWindow(1024)),
        ("sliding-window", SlidingWindow(8192)),
        ("linear(factor=4)", Linear(4.0)),
        ("linear", Linear(2.0)),
        ("ntk(factor=2.5)", NTK(2.5)),
        ("ntk", NTK(4.0)),
        ("dynamic-ntk", DynamicNTK(2.0)),
        ("yarn", YaRN(2.0)),
        ("infinite(window=1024)", Infinite(1024)),
        ("infinite", Infinite(8192)),
        ("selfextend(group_size=8, window=1024, sliding_window='disable')", SelfExtend(8, 1024)),
        ("selfextend(query_scaling='yarn')", SelfExtend.for_length(16384, 8192)),
    ],
)
def test_a_name_says_all(text, change):
    method = parse(text, 16384, 8192)
    assert method.change == change
    assert parse(method.name, 1, 8192) == method


@pytest.mark.parametrize("position_map", [each for kind in MAPS.values() for each in kind.examples()], ids=str)
def test_what_changes_nothing_keeps_every_distance(position_map):
    method = Method("some", position_map)
    tokens = torch.arange(40)
    kept = position_map.relative_positions(40) == (tokens[:, None] - tokens).clamp(min=-1)
    found = [length for length in range(1, 41) if method.changes_nothing(length, 64)]
    assert all(kept[:length, :length].all() for length in found)
    assert found == list(range(1, len(found) + 1))
    assert len(found) == 40 or not position_map.is_identity


@pytest.mark.parametrize(
    ("text", "longest", "expected"),
    [
        ("selfextend", 20480, True),  # on a trained window of 131072: groups of 1
        ("self", 20480, True),
        ("rerope", 20480, True),
        ("infinite", 131072, True),
        ("selfextend", 70000, False),
        ("selfextend(group_size=8, window=1024)", 1024, True),
        ("selfextend(group_size=8, window=1024)", 1025, False),
        ("selfextend(group_size=8, window=1024, start=2000)", 2000, True),
        ("selfextend(group_size=8, window=1024, start=2000)", 2001, False),
        ("selfextend(group_size=1, window=9, query_scaling='log-n')", 131072, True),
        ("selfextend(group_size=1, window=9, query_scaling='log-n')", 131073, False),
        ("selfextend(sliding_window='disable')", 20480, False),
        ("yarn", 20480, True),
        ("yarn", 140000, False),
        ("dynamic-ntk", 20480, True),
        ("unmodified", 20480, False),
    ],
)
def test_what_changes_nothing(text, longest, expected):
    assert parse(text, longest, 131072).changes_nothing(longest, 131072) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selfexend", "no method is called 'selfexend'. Did you mean 'selfextend'\\?"),
        (
            "unmodified(start=3)",
            "^method unmodified\\(start=3\\): there is no parameter 'start'. .*are sliding_window$",
        ),
        ("unmodified(sliding_window='off')", "^method unmodified.* must be 'keep' or 'disable', got 'off'"),
        (
            "selfextend(group_size=8)",
            "^method selfextend\\(group_size=8\\): it needs window too, or no parameter at all$",
        ),
        ("leaky-rerope(window=8)", "^method leaky-rerope\\(window=8\\): it needs factor too"),
        (
            "selfextend(grup_size=8, window=3)",
            "there is no parameter 'grup_size'. Did you mean 'group_size'\\? Its parameters",
        ),
        ("linear(factor=2, factor=3)", "^'linear\\(factor=2, factor=3\\)' gives factor more than once"),
        ("selfextend(8, 1024)", "a method is a name, or a name with parameters such as"),
        ("selfextend(group_size=open('x'))", "a method is a name"),
        ("selfextend(group_size=8, width=3)", "width"),
        ("selfextend(group_size=0, window=3)", "group_size"),
        ("selfextend(sliding_window='off')", "sliding_window must be 'keep' or 'disable', got 'off'"),
        ("selfextend(query_scaling='log')", "query scaling must be one of log-n, yarn, got 'log'"),
        ("linear(factor=2.0, sliding_window='disable')", "sliding_window"),
        ("linear(factor=0.5)", "factor of linear must be a number from 1 to 1024, got 0.5"),
        ("yarn(factor='4')", "factor of yarn must be a number from 1 to 1024, got '4'"),
        ("ntk(factor=1e999)", "got inf"),
        ("dynamic-ntk(factor=True)", "got True"),
        ("linear(factors=2)", "factors"),
        ("infinite(window=0)", "window must be 1 or more, got 0"),
        ("infinite(window=2.5)", "got 2.5"),
        ("sliding-window(window=0)", "window must be 1 or more, got 0"),
        ("dynamicntk", "Did you mean 'dynamic-ntk'"),
        ("", "a method is a name"),
    ],
)
def test_what_is_no_method(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, 16384, 8192)


def names(*texts):
    return [method.name for method in parse_all(texts, 16384, 8192)]


def test_a_sweep_is_every_combination_as_written():
    assert names("unmodified", "selfextend(group_size={16, 4}, window={512, 1024})", "unmodified") == [
        "unmodified",
        "selfextend(group_size=16, window=512)",
        "selfextend(group_size=16, window=1024)",
        "selfextend(group_size=4, window=512)",
        "selfextend(group_size=4, window=1024)",
    ]
    assert names("self(capacity=9, window={512}, grouping={'distance', 'anchored'})") == [
        "self(capacity=9, rate=0.02, window=512, grouping='distance')",
        "self(capacity=9, rate=0.02, window=512, grouping='anchored')",
    ]
    # The same method twice is asked once.
    assert names("yarn(factor={2, 2.0, 4})", "yarn") == ["yarn(factor=2.0)", "yarn(factor=4.0)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "selfextend(group_size={8, 0}, window={3, 4})",
            r"^method selfextend\(group_size=0, window=3\): group",
        ),
        ("selfextend(group_size={4, 8})", r"^method selfextend\(group_size=4\): .*window"),
        (
            "yarn(factor={2, 0.5})",
            r"^method yarn\(factor=0.5\): factor of yarn must be a number from 1 to 1024, got 0.5",
        ),
        ("selfextend(group_size={}, window=3)", "a set of values such as {4, 8}: got 'selfextend"),
        ("selfextend(group_size={*[4, 8]}, window=3)", "a set of values such as"),
        ("selfextend(group_size={open('x')}, window=3)", "a set of values such as"),
        ("unmodified(x={1, 2})", "there is no parameter .x."),
    ],
)
def test_what_is_no_sweep(text, message):
    with pytest.raises(ValueError, match=message):
        names(text)


def test_one_method_is_no_sweep():
    with pytest.raises(ValueError, match="is a sweep of 2 methods, and one is expected"):
        parse("yarn(factor={2, 4})", 16384, 8192)


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic-ntk", "yarn"])
def test_nothing_is_scaled_inside_the_trained_window(name):
    assert parse(name, 8000, 8192).name == f"{name}(factor=1.0)"


@pytest.mark.parametrize("name", MAPS)
def test_every_registered_map_is_a_method(name):
    assert parse(name, 4096, 8192).change.name == name


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic-ntk", "yarn"])
def test_the_largest_factor(name):
    model = tiny_model("llama", trained_window=64)
    with parse(f"{name}(factor=1024)", 160, 64).enter(model, 64), torch.no_grad():
        assert model(torch.arange(1, 81)[None]).logits.isfinite().all()


@pytest.mark.parametrize("text", ["selfextend", "linear", "ntk", "dynamic-ntk", "yarn", "sliding-window(window=8)"])
def test_a_model_under_a_method(text):
    model = tiny_model("llama")
    ids = torch.arange(1, 81)[None]
    with torch.no_grad():
        before = model(ids).logits
        with parse(text, 160, 64).enter(model, 64):
            assert not torch.allclose(model(ids).logits, before, atol=0.1)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("name", "without"), [("mistral-sliding", {"sliding_window": None}), ("llama", {})])
def test_an_unmodified_model_without_its_window_reads_on(name, without):
    """Past the trained window too, where the paper's first table has such a model."""
    ids = torch.arange(1, 81)[None]
    with torch.no_grad():
        expected = TINY_MODELS[name].build(64, **without)(ids).logits
        with parse("unmodified(sliding_window='disable')", 80, 64).enter(model := tiny_model(name), 64):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_presets_method_is_what_the_preset_says():
    preset = Preset(SelfExtend(4, 16), 64, "yarn", "disable")
    method = of_preset(preset, 100, 64)
    assert method == parse("selfextend(group_size=4, window=16, sliding_window='disable', query_scaling='yarn')", 1, 64)
    model = tiny_model("mistral-sliding")
    with method.enter(model, 64) as handle:
        assert handle.position_map == SelfExtend(4, 16)
        assert handle.query_scaling.kind == "yarn"
        assert all(layer.extended for layer in handle.layers)


def test_a_sliding_window_is_that_of_transformers():
    """Mistral with and without the window in its configuration; read at once, and in chunks past the window."""
    model, expected = tiny_model("mistral"), tiny_model("mistral-sliding")
    ids = torch.randint(1, 96, (1, 70), generator=torch.Generator().manual_seed(0))
    with parse("sliding-window(window=24)", 70, 64).enter(model, 64), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=2e-4)
        scores = log_likelihoods(model, ids, 1, 16)
        torch.testing.assert_close(scores, log_likelihoods(expected, ids, 1, 16), rtol=0, atol=2e-4)


def test_no_attention_that_plans_every_length_anew():
    """As an evaluation runs a model; what was allowed before is allowed again."""
    subject = Model(LoadedModel(Source("tiny", ""), tiny_model("llama"), None), 64, Hashes("hash"))
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    with subject.under(parse("unmodified", 64, 64)):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
