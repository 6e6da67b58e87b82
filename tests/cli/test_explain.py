# SPDX-License-Identifier: Apache-2.0
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from typer.testing import CliRunner

import ropewalk
from ropewalk import SELF, Identity, LeakyReRoPE, ReRoPE, SelfExtend
from ropewalk.cli import app
from ropewalk.cli.map_options import MapOptions
from ropewalk.explanation import explain
from ropewalk.map_picture import draw, last_query_curve, miniature
from ropewalk.maps import MAPS, DualChunk, Infinite, LMInfinite, SlidingWindow, StreamingLLM, from_dict
from ropewalk.testing.maps import example_maps

EXAMPLES = [example for name in MAPS for example in example_maps()[name]]
SIZES = ["--trained-window", "4096", "--length", "16384"]
ISSUE = ["explain", "--map", "selfextend", "--group-size", "8", "--window", "1024", *SIZES]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments):
    """The one line on stderr of a command that must fail with exit code 2 and nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


# The explanation itself.


def test_explanation_of_the_issue():
    explanation = explain(SelfExtend(8, 1024), trained_window=4096, length=16_384)
    assert explanation.largest_relative_position == 2943
    assert explanation.max_length == 25_600
    assert explanation.recommended_length == 9216
    assert explanation.verdict == "possible"
    assert "2,943" in explanation.advice
    assert str(SelfExtend.for_length(16_384, 4096)) in explanation.advice
    assert [(band.query_position, band.key_position) for band in explanation.bands] == [
        ("m", "n"),
        ("m // 8 + 896", "n // 8"),
    ]


@pytest.mark.parametrize(
    ("position_map", "length", "verdict"),
    [
        (SelfExtend(8, 1024), 1024, "unmodified"),
        (SelfExtend(8, 1024), 1025, "recommended"),
        (SelfExtend(8, 1024), 9216, "recommended"),
        (SelfExtend(8, 1024), 9217, "possible"),
        (SelfExtend(8, 1024), 25_600, "possible"),
        (SelfExtend(8, 1024), 25_601, "too long"),
        (SelfExtend(8, 1024, start=3000), 3000, "unmodified"),
        (SelfExtend(8, 1024, start=3000), 3001, "possible"),
        (Identity(), 4096, "unmodified"),
        (Identity(), 4097, "too long"),
        (ReRoPE(1024), 10**9, "recommended"),
        (ReRoPE(3000), 10**9, "possible"),
        (DualChunk(3072, 1024), 3072, "unmodified"),
        (DualChunk(3072, 1024), 10**9, "recommended"),
        (DualChunk(3072, 1025), 4096, "recommended"),
        (DualChunk(3072, 1025), 4097, "too long"),
        (SlidingWindow(4096), 4096, "unmodified"),
        (SlidingWindow(4096), 4097, "recommended"),
        (SlidingWindow(4097), 4097, "too long"),
        (Infinite(1000), 1000, "unmodified"),
        (Infinite(1000), 1001, "recommended"),
        (StreamingLLM(4, 4092), 4092, "unmodified"),
        (StreamingLLM(4, 4092), 10**9, "recommended"),
        (LMInfinite(10, 4096), 4097, "too long"),
    ],
)
def test_verdicts_change_at_the_limits(position_map, length, verdict):
    assert explain(position_map, 4096, length).verdict == verdict


@pytest.mark.parametrize("position_map", EXAMPLES, ids=str)
def test_explanation_is_json_and_agrees_with_the_map(position_map):
    data = json.loads(json.dumps(explain(position_map, 16, 40).to_dict(), allow_nan=False))
    assert from_dict(data["map"]) == position_map
    assert data["largest_relative_position"] == position_map.relative_positions(40).max().item()
    assert data["max_length"] == (None if math.isinf(position_map.max_length(16)) else position_map.max_length(16))
    tokens = torch.arange(40)
    reached = [band for band in position_map.bands if band.sees(tokens[:, None], tokens).any()]
    assert len(data["bands"]) == len(reached)
    for said, band in zip(data["bands"], reached, strict=True):
        for m, n in [(0, 0), (20, 3), (20, 17), (39, 0), (39, 36), (39, 39)]:
            assert eval(said["keys"], {"m": m, "n": n}) == bool(band.sees(torch.tensor(m), torch.tensor(n)))


def test_advice_keeps_start_and_grouping():
    advice = explain(SELF(3, 0.02, 1024, "distance", start=700), 4096, 16_384).advice
    assert "grouping='distance'" in advice
    assert "start=700" in advice


@pytest.mark.parametrize("length", [0, -5])
def test_a_text_without_tokens_is_refused(length):
    with pytest.raises(ValueError, match=rf"length must be .*got {length}"):
        explain(Identity(), 4096, length)


@pytest.mark.parametrize("position_map", EXAMPLES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 30])
def test_curve_is_the_last_row_of_the_matrix(position_map, length):
    distances, relative = last_query_curve(position_map, length)
    assert distances.tolist() == list(range(length))
    assert relative.tolist() == position_map.relative_positions(length)[-1].flip(0).tolist()


def test_curve_of_a_long_text_is_sampled_but_keeps_band_edges():
    distances, _ = last_query_curve(SelfExtend(8, 1024), 1_000_000)
    assert len(distances) < 3000
    assert {0, 1023, 1024, 999_999} <= set(distances.tolist())


def test_miniature_is_the_paper_figure_for_long_texts_and_the_map_itself_for_short_ones():
    assert miniature(SelfExtend(8, 1024), 16_384) == (SelfExtend(2, 4), 10)
    assert miniature(SELF(grouping="distance"), 16_384)[0].grouping == "distance"
    assert miniature(SelfExtend(3, 5), 12) == (SelfExtend(3, 5), 12)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_every_map_is_drawn(name, suffix, tmp_path):
    path = tmp_path / f"picture{suffix}"
    draw(explain(example_maps()[name][0], 16, 40), path)
    check_picture(path)


@pytest.mark.parametrize(
    ("position_map", "trained_window", "length"),
    [
        (SelfExtend(2, 4), 1, 1),
        (SelfExtend(2, 4, start=8), 7, 8),
        (LeakyReRoPE(2.5, 3), 2, 12),
        (Identity(), 8, 1 << 40),
        (SELF(5, 1.0, 3, "distance"), 1 << 20, 9),
    ],
    ids=str,
)
def test_odd_sizes_are_drawn(position_map, trained_window, length, tmp_path):
    draw(explain(position_map, trained_window, length), tmp_path / "odd.svg")
    check_picture(tmp_path / "odd.svg")


def test_the_same_explanation_is_the_same_svg(tmp_path):
    for name in ("a.svg", "b.svg"):
        draw(explain(SelfExtend(2, 4), 7, 10), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def check_picture(path):
    if path.suffix == ".svg":
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 200
    else:
        from matplotlib.image import imread

        pixels = imread(path)[..., :3]
        assert pixels.shape[0] > 500
        assert pixels.shape[1] > 1000
        assert 0.02 < (pixels.min(axis=2) < 0.95).mean() < 0.6  # neither blank nor a blot


# The command.


def test_text_output_of_the_issue():
    result = run(*ISSUE)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for expected in ("SelfExtend(group_size=8, window=1024)", "m // 8 + 896", "n // 8", "2,943", "25,600", "9,216"):
        assert expected in result.stdout
    assert "Possible, but past the rule of eq. 5" in result.stdout


def test_json_output_is_the_explanation_and_nothing_else():
    result = run(*ISSUE, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert json.loads(result.stdout) == explain(SelfExtend(8, 1024), 4096, 16_384).to_dict()


def test_json_schema():
    data = json.loads(run("explain", "--map", "rerope", *SIZES, "--json").stdout)
    assert data == {
        "map": {"map": "rerope", "start": 0, "window": 1024},
        "trained_window": 4096,
        "length": 16_384,
        "bands": [
            {"keys": "m - 1023 <= n <= m", "first": 0, "stop": 1024, "query_position": "m", "key_position": "n"},
            {
                "keys": "0 <= n < m - 1023",
                "first": 1024,
                "stop": None,
                "query_position": "1024",
                "key_position": "0",
            },
        ],
        "largest_relative_position": 1024,
        "max_length": None,
        "recommended_length": None,
        "verdict": "recommended",
        "advice": data["advice"],
    }
    assert data["advice"].startswith("Good:")


def test_bands_of_other_edges_are_told_by_their_keys():
    result = run("explain", "--map", "streaming-llm", "--sinks", 4, "--window", 96, *SIZES)
    assert result.exit_code == 0, result.output
    for expected in ("keys n of query m", "m - 95 <= n <= m", "0 <= n < min(m - 95, 4)", "min(m, 99)", "are not seen"):
        assert expected in result.stdout


def test_many_bands_are_cut_in_the_table_but_not_in_json():
    arguments = ["explain", "--map", "self", "--grouping", "distance", *SIZES]
    bands = json.loads(run(*arguments, "--json").stdout)["bands"]
    assert len(bands) == 32
    assert "... 24 more bands" in run(*arguments).stdout


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_written_and_named(suffix, tmp_path):
    path = tmp_path / f"map.{suffix}"
    result = run(*ISSUE, "--picture", path)
    assert result.exit_code == 0, result.output
    assert str(path) in result.stdout
    check_picture(path)
    assert json.loads(run(*ISSUE, "--picture", path, "--json").stdout)["picture"] == str(path)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "identity"])
def test_without_parameters_the_map_is_chosen_for_the_length(name):
    data = json.loads(run("explain", "--map", name, *SIZES, "--json").stdout)
    assert from_dict(data["map"]) == MAPS[name].for_length(16_384, 4096)
    assert data["verdict"] == "recommended"


def test_start_alone_leaves_the_rest_to_the_rule():
    data = json.loads(run("explain", "--start", 512, *SIZES, "--json").stdout)
    chosen = SelfExtend.for_length(16_384, 4096)
    assert from_dict(data["map"]) == SelfExtend(chosen.group_size, chosen.window, start=512)


@pytest.mark.parametrize("position_map", EXAMPLES, ids=str)
def test_every_parameter_of_every_map_is_an_option(position_map):
    parameters = position_map.to_dict()
    arguments = ["explain", "--map", parameters.pop("map"), "--trained-window", "16", "--length", "40", "--json"]
    for name, value in parameters.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert from_dict(json.loads(result.stdout)["map"]) == position_map


def test_map_options_without_a_length_take_only_what_is_given():
    assert MapOptions("selfextend", {"group_size": 2, "window": 4}).choose() == SelfExtend(2, 4)
    assert MapOptions("self", {}).choose() == SELF()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["explian"], "Did you mean 'explain'?"),
        (["explain", "--map", "selfextent", *SIZES], "Did you mean 'selfextend'?"),
        (["explain", "--map", "ReRoPe", *SIZES], "Did you mean 'rerope'?"),
        (["explain", "--map", "zzz", *SIZES], "The maps are identity, selfextend, self, rerope, leaky-rerope"),
        (["explain", "--groupsize", "8", *SIZES], "--group-size"),
        (["explain", "--map", "rerope", "--group-size", "8", *SIZES], "has no --group-size; its options are"),
        (["explain", "--map", "rerope", "--capacity", "8", *SIZES], "--window"),
        (["explain", "--group-size", "8", *SIZES], "--map selfextend needs --window"),
        (["explain", "--map", "leaky-rerope", "--window", "8", *SIZES], "needs --factor"),
        (["explain", "--group-size", "0", *SIZES], "group_size must be 1 or more, got 0"),
        (["explain", "--map", "leaky-rerope", "--window", "-3", *SIZES], "window must be 1 or more, got -3"),
        (["explain", "--group-size", "0", "--window", "4", *SIZES], "group_size must be 1 or more, got 0"),
        (["explain", "--group-size", "2", "--window", "-4", *SIZES], "got -4"),
        (["explain", "--group-size", "2", "--window", str(10**30), *SIZES], str(10**30)),
        (["explain", "--group-size", "two", "--window", "4", *SIZES], "--group-size"),
        (
            ["explain", "--map", "self", "--grouping", "logistic", *SIZES],
            "released, got 'logistic'",
        ),
        (["explain", "--map", "self", "--rate", "nan", *SIZES], "rate must be"),
        (["explain", "--trained-window", "4096", "--length", "0"], "--length must be from 1 to"),
        (["explain", "--trained-window", "-3", "--length", "9"], "got -3"),
        (["explain", "--trained-window", "4096", "--length", str(10**30)], str(10**30)),
        (["explain", "--length", "9"], "--trained-window"),
        (["explain", "--trained-window", "64", "--length", "99999"], "cannot reach a target length of 99999"),
        ([*ISSUE, "--picture", "map.pdf"], "--picture must end in .png or .svg, got 'map.pdf'"),
        (
            [*ISSUE, "--picture", "/no/such/folder/map.png"],
            "'/no/such/folder/map.png': No such file",
        ),
        ([*ISSUE, "more"], "more"),
        (["--colour"], "--colour"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, expected):
    assert expected in error_of(*arguments)


def test_a_mistake_with_json_is_json_on_stderr():
    result = run("explain", "--map", "selfextent", *SIZES, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "selfextend" in json.loads(result.stderr)["error"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'ropewalk[plot]'" in error_of(*ISSUE, "--picture", tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


def test_help_lists_every_parameter_with_what_it_means():
    for arguments in ([], ["--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "explain" in result.stdout
    result = CliRunner().invoke(app, ["explain", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    for expected in ("--group-size", "--window", "--capacity", "--rate", "--grouping", "--factor", "--start"):
        assert expected in result.stdout


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"ropewalk {ropewalk.__version__}\n"


# In a process of its own.


def python(code, *arguments):
    return subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)


def test_as_a_process():
    code = "from ropewalk.cli import main; main()"
    good = python(code, *ISSUE, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["max_length"] == 25_600


def test_imports_stay_light():
    heavy = "print([name for name in {!r} if name in sys.modules])"
    package = python(f"import sys, ropewalk; {heavy.format(('matplotlib', 'typer', 'rich', 'transformers'))}")
    assert package.stdout == "[]\n", package.stderr
    command = python(f"import sys, ropewalk.cli; {heavy.format(('matplotlib', 'transformers'))}")
    assert command.stdout == "[]\n", command.stderr
