# SPDX-License-Identifier: Apache-2.0
"""`--preset`, presets beside a model's files, and `ropewalk presets`."""

import json

import pytest
from typer.testing import CliRunner

from ropewalk import Preset, ReRoPE, SelfExtend
from ropewalk.cli import app
from ropewalk.presets import built_in
from ropewalk.testing.saved import save_tiny_model

TEXT = "The sea is wide. The hill is high. The bread is warm. On we walk, away and home again.\n" * 2
SMALL = ["--max-new-tokens", 2, "--dtype", "float32", "--device", "cpu"]
FOUND = Preset(SelfExtend(6, 24), 100, "log-n", name="tuned", source="measured")
GIVEN = Preset(ReRoPE(16), 80, name="given")


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(each) for each in arguments], input=input)


@pytest.fixture
def model(tmp_path):
    """A model's folder with a preset in it."""
    FOUND.save(save_tiny_model(tmp_path / "tiny", trained_window=128) / "ropewalk.json")
    return tmp_path / "tiny"


@pytest.fixture
def given(tmp_path):
    GIVEN.save(tmp_path / "given.json")
    return tmp_path / "given.json"


@pytest.fixture
def generate(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def generate(*arguments):
        result = run("generate", "--model", model, "--file", tmp_path / "text.txt", "--json", *SMALL, *arguments)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        return {key: report[key] for key in ("map", "trained_window", "query_scaling", "preset")}, result.stderr

    return generate


def test_what_goes_before_what(generate, model, given):
    found = f"tuned, {model / 'ropewalk.json'}: measured"
    report, said = generate()
    assert report == {
        "map": SelfExtend(6, 24).to_dict(),
        "trained_window": 100,
        "query_scaling": "log-n",
        "preset": found,
    }
    assert f"  preset   {found}\n" in said
    report, _ = generate("--preset", given)
    assert report["map"] == ReRoPE(16).to_dict()
    assert (report["trained_window"], report["query_scaling"], report["preset"]) == (80, None, f"given, {given}")
    report, said = generate("--map", "rerope", "--window", 8)
    assert report == {
        "map": ReRoPE(8).to_dict(),
        "trained_window": 128,
        "query_scaling": None,
        "preset": None,
    }
    assert "preset" not in said
    report, _ = generate("--group-size", 8, "--window", 16, "--preset", given)
    assert (report["map"], report["trained_window"]) == (SelfExtend(8, 16).to_dict(), 80)
    report, _ = generate("--query-scaling", "yarn", "--trained-window", 120)
    assert (report["map"], report["trained_window"]) == (SelfExtend(6, 24).to_dict(), 120)
    assert (report["query_scaling"], report["preset"]) == ("yarn", found)


def test_a_length_past_a_presets_reach(generate):
    reach = SelfExtend(6, 24).max_length(100)
    assert generate("--target-length", reach)[0]["map"] == SelfExtend(6, 24).to_dict()
    assert generate("--target-length", reach + 1)[0]["map"] == SelfExtend.for_length(reach + 1, 100).to_dict()


def test_windows_that_a_preset_disables(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny", "mistral-sliding")
    disable = tmp_path / "disable.json"
    Preset(SelfExtend(4, 16), 64, sliding_window="disable").save(disable)
    ask = ["generate", "--model", folder, "--prompt", "Why?", *SMALL, "--preset", disable]
    assert run(*ask).exit_code == 0
    refused = run(*ask, "--sliding-window", "keep")
    assert refused.exit_code == 2
    assert "sliding window of 24 tokens" in refused.stderr
    assert "preset" not in refused.stdout


def test_chat_and_kept_texts(model, given, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    ask = ["chat", "--model", model, "--file", tmp_path / "text.txt", "--keep", tmp_path / "kept", *SMALL]
    first = run(*ask, "--preset", given, "--target-length", 800, input="Why?\n")
    assert first.exit_code == 0, first.output
    assert f"preset   given, {given}" in first.stderr
    again = run(*ask, "--preset", given, input="Why?\n")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "Read already" in again.stderr
    other = tmp_path / "other.json"
    FOUND.save(other)
    refused = run(*ask, "--preset", other, input="Why?\n")
    assert refused.exit_code == 2
    assert "was read with --map rerope" in refused.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "Why?"],
        ["chat"],
        ["demo"],
        ["explain", "--length", 100],
        ["eval", "passkey", "--model", "dummy", "--lengths", 200, "-o", "out"],
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("lama-2-7b", "--preset: no preset is called 'lama-2-7b'. Did you mean 'llama-2-7b'?"),
        ("bad.json", "--preset: no preset in 'bad.json': trained_window must be 1 or more, got 0"),
        ("./not-there.json", "cannot read or write 'not-there.json': No such file or directory"),
    ],
)
def test_a_bad_preset_is_one_line_before_anything_is_done(command, preset, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps({"map": {"map": "identity"}, "trained_window": 0}))
    result = run(*command, "--preset", preset)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_broken_preset_beside_a_model(model):
    (model / "ropewalk.json").write_text("{")
    result = run("generate", "--model", model, "--prompt", "Why?", *SMALL)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: no preset in '{model / 'ropewalk.json'}': ")
    assert run("generate", "--model", model, "--prompt", "Why?", *SMALL, "--map", "selfextend").exit_code == 0


def test_explain():
    shown = run("explain", "--preset", "phi-2", "--length", 8192, "--json")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["map"] == SelfExtend(12, 512).to_dict()
    assert report["trained_window"] == 2048
    assert run("explain", "--preset", "phi-2", "--length", 20_000).stdout.startswith(
        str(SelfExtend.for_length(20_000, 2048))
    )
    refused = run("explain", "--length", 100)
    assert refused.exit_code == 2
    assert "pass --trained-window" in refused.stderr


def test_demo(model):
    result = run("demo", "--model", model, "--tokens", 600, "--json", "--dtype", "float32", "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    reach = SelfExtend(6, 24).max_length(100)
    assert reach < report["target_length"]
    assert report["map"] == SelfExtend.for_length(report["target_length"], 100).to_dict()
    assert report["trained_window"] == 100
    assert report["preset"].startswith("tuned, ")


def test_eval(model, tmp_path, given):
    disable = tmp_path / "disable.json"
    Preset(SelfExtend(8, 16), 64, "yarn", "disable").save(disable)
    ask = ["eval", "passkey", "--model", "dummy", "--lengths", 200, "--depths", 1, "--samples", 1]
    for arguments, methods, window in (
        (["--preset", given], {"unmodified", "rerope(window=16)"}, 80),
        (["--preset", given, "--trained-window", 99], {"unmodified", "rerope(window=16)"}, 99),
        (["--preset", given, "--method", "rerope(window=16)"], {"rerope(window=16)"}, 80),
        (
            ["--preset", disable, "--method", "rerope(window=16, start=0)"],
            {
                "rerope(window=16)",
                "selfextend(group_size=8, window=16, sliding_window='disable', query_scaling='yarn')",
            },
            64,
        ),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        result = run(*ask, "-o", folder, *arguments)
        assert result.exit_code == 0, result.output
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        assert {row["method"] for row in rows} == methods
        assert json.loads((folder / "config.json").read_text())["trained_window"] == window


def test_the_built_in_presets_are_shown():
    shown = run("presets").stdout
    listed = json.loads(run("presets", "--json").stdout)
    assert [Preset.from_dict(each) for each in listed] == [entry.preset for entry in built_in().values()]
    for entry in built_in().values():
        assert entry.preset.name in shown
        assert str(entry.preset.position_map) in shown
        assert entry.preset.source in shown
