# SPDX-License-Identifier: Apache-2.0
"""Presets as data: files, values that do not fit, lengths, and the built-in ones."""

import json
from dataclasses import replace

import pytest

from ropewalk import SELF, Identity, LengthError, Preset, ReRoPE, SelfExtend
from ropewalk.presets import built_in, read_preset
from ropewalk.testing import example_maps

PRESET = Preset(
    SelfExtend(6, 1024, start=5), 8192, "log-n", "disable", source="a table", published=True, name="somebody's"
)


@pytest.mark.parametrize(
    "preset",
    [PRESET, Preset(Identity(), 1), *(Preset(one, 64) for examples in example_maps().values() for one in examples)],
    ids=lambda preset: str(preset.position_map),
)
def test_a_file_holds_all_of_it(preset, tmp_path):
    path = tmp_path / "ropewalk.json"
    preset.save(path)
    assert Preset.load(path) == preset == read_preset(path) == read_preset(str(path))
    assert Preset.load(path).where == str(path)
    assert preset.position_map.start == json.loads(path.read_text())["map"]["start"]


def test_a_file_says_the_least_that_is_needed(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('\ufeff{"map": {"map": "selfextend", "group_size": 8, "window": 512}, "trained_window": 4096}')
    assert Preset.load(path) == Preset(SelfExtend(8, 512), 4096)


GOOD = PRESET.to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a preset is an object with a map and a trained_window, got []"),
        ({}, "a preset needs map and trained_window, got nothing"),
        ({"map": GOOD["map"]}, "a preset needs trained_window, got map"),
        ({**GOOD, "trained_windows": 1}, "no preset value is called 'trained_windows'. Did you mean 'trained_window'?"),
        ({**GOOD, "trained_window": 0}, "trained_window must be 1 or more, got 0"),
        ({**GOOD, "trained_window": "4k"}, "trained_window must be a whole number, got '4k'"),
        ({**GOOD, "trained_window": True}, "trained_window must be a whole number, got True"),
        ({**GOOD, "query_scaling": "log"}, "query scaling must be one of log-n, yarn, got 'log'"),
        ({**GOOD, "query_scaling": ["yarn"]}, "query scaling must be one of log-n, yarn, got ['yarn']"),
        ({**GOOD, "sliding_window": 4096}, "sliding_window must be 'keep' or 'disable', got 4096"),
        ({**GOOD, "published": "yes"}, "published must be true or false, got 'yes'"),
        ({**GOOD, "source": 4}, "source must be text, got 4"),
        ({**GOOD, "name": None}, "name must be text, got None"),
        ({**GOOD, "map": None}, "a map is described by a mapping"),
        ({**GOOD, "map": {"map": "selfexend"}}, "unknown map 'selfexend'"),
        ({**GOOD, "map": {"map": "rerope"}}, "map 'rerope' needs window"),
        ({**GOOD, "map": {"map": "rerope", "window": float("nan")}}, "window must be a whole number, got nan"),
        ({**GOOD, "map": {"map": "rerope", "window": 4, "start": -1}}, "start must be 0 or more, got -1"),
    ],
)
def test_what_does_not_fit_is_named(data, message, tmp_path):
    with pytest.raises(ValueError, match=r".") as error:
        Preset.from_dict(data)
    assert message in str(error.value)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"^no preset in '.*bad.json': ") as error:
        Preset.load(path)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "Expecting value"),
        (b"map = 4", "Expecting value"),
        (b"\xff\xfe", "can't decode byte"),
        (b'{"map": 1, "map": 2}', "'map' is there twice"),
        (b"[" * 100_000, "is nested too deep"),
    ],
    ids=["empty", "toml", "no utf-8", "twice", "deep"],
)
def test_what_is_no_json(written, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(written)
    with pytest.raises(ValueError, match=message) as error:
        read_preset(path)
    assert "bad.json" in str(error.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_preset("./not-there.json")
    with pytest.raises(OSError, match=r"is no regular file|Is a directory"):
        read_preset(tmp_path)
    with pytest.raises(OSError, match="not-there"):
        PRESET.save(tmp_path / "not-there" / "ropewalk.json")
    with pytest.raises(ValueError, match="preset must be the name of one or a path, got ''"):
        read_preset("")


def test_a_map_that_no_name_stands_for_is_not_saved(tmp_path):
    class Own(SelfExtend):
        name = "own"

    with pytest.raises(ValueError, match=r"Own\(.*\) is of no kind in ropewalk.MAPS, by whose names files are read"):
        Preset(Own(8, 512), 4096).save(tmp_path / "ropewalk.json")
    assert not list(tmp_path.iterdir())


def test_what_is_no_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"no preset is called 'llama-2-70b'. Did you mean 'llama-2-7b'\?.*\./ropewalk"
    ):
        read_preset("llama-2-70b")
    with pytest.raises(TypeError, match="got 4"):
        read_preset(4)
    with pytest.raises(ValueError, match=r"must be a position map such as .*, got 'selfextend'"):
        Preset("selfextend", 4096)


def test_words_of_a_file_steer_no_terminal():
    assert str(Preset(Identity(), 1, name="a\x1b[31mb", source="two\nlines")) == "a\\x1b[31mb: two lines"


def test_a_length_within_reach_leaves_the_map_as_it_is():
    reach = PRESET.position_map.max_length(8192)
    for length in (None, 1, reach):
        assert PRESET.map_for(length) == PRESET.position_map
    assert PRESET.map_for(reach + 1) == replace(SelfExtend.for_length(reach + 1, 8192), start=5)
    # Another window, another reach.
    assert PRESET.map_for(20_000, 4096) == replace(SelfExtend.for_length(20_000, 4096), start=5)
    assert type(Preset(SELF(3, 0.5, 8), 512).map_for(1500)) is SELF
    assert Preset(ReRoPE(8), 64).map_for(10**9) == ReRoPE(8)
    with pytest.raises(LengthError, match="reaches 64 tokens, the trained window itself, not 65"):
        Preset(Identity(), 64).map_for(65)
    with pytest.raises(ValueError, match="target_length must be 1 or more, got 0"):
        PRESET.map_for(0)


# The settings of the papers, and windows as published.
PAPERS = {
    "llama-2-7b": (SelfExtend(16, 1024), 4096, "keep", "LongBench"),
    "llama-2-13b": (SelfExtend(16, 1024), 4096, "keep", "LongBench"),
    "mistral-7b-instruct-v0.1": (SelfExtend(6, 1024), 8192, "disable", "LongBench"),
    "phi-2": (SelfExtend(12, 512), 2048, "keep", "LongBench"),
    "mpt-7b-chat": (SelfExtend(6, 512), 2048, "keep", "table 8"),
}
OURS = {
    "vicuna-7b-v1.5": 4096,
    "vicuna-13b-v1.5": 4096,
    "solar-10.7b": 4096,
    "gemma-2b": 8192,
    "gemma-7b": 8192,
    "qwen2-7b": 32_768,
    "deepseek-r1-distill-qwen-7b": 32_768,
}
WIDE = ["llama-3-8b", "llama-3-70b"]


def test_every_built_in_preset_is_named_here():
    assert set(built_in()) == {*PAPERS, *OURS, *WIDE}
    for name, entry in built_in().items():
        assert (entry.preset.name, entry.preset.where) == (name, "built in")
        assert entry.preset.query_scaling is None
        assert entry.preset.position_map.start == 0
        for called in (name, name.upper(), *entry.models):
            assert read_preset(called) is entry.preset


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_settings(name):
    preset = read_preset(name)
    position_map, window, sliding_window, source = PAPERS[name]
    assert (preset.position_map, preset.trained_window) == (position_map, window)
    assert preset.sliding_window == sliding_window
    assert preset.published
    assert source in preset.source


@pytest.mark.parametrize("name", OURS)
def test_ours_are_the_rule_for_four_times_the_window(name):
    preset, window = read_preset(name), OURS[name]
    assert preset.position_map == SelfExtend.for_length(4 * window, window)
    assert preset.trained_window == window
    assert not preset.published
    assert f"ours: eq. 5 for {4 * window:,} tokens" in preset.source


@pytest.mark.parametrize("name", WIDE)
def test_llama_3_has_about_100_neighbors_and_the_smallest_groups_that_meet_the_rule(name):
    preset = read_preset(name)
    own = preset.position_map
    assert abs(own.window - 100) <= own.group_size
    assert own.meets_rule(4 * 8192, 8192)
    assert not SelfExtend(own.group_size - 1, 100).meets_rule(4 * 8192, 8192)
    assert not preset.published
    assert "appendix G" in preset.source
