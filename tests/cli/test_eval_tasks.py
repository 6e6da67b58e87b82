# SPDX-License-Identifier: Apache-2.0
"""A task is a class and an entry in `TASKS`: its command, and all else, follow from its fields."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.cli.eval import tasks as commands
from ropewalk.eval.results import read, read_config
from ropewalk.eval.subjects import Dummy, Prompt
from ropewalk.eval.tasks import TASKS
from ropewalk.eval.tasks.base import Example, Generation, Metric, PreparedTask
from ropewalk.eval.tasks.leval.scores import SCORES
from ropewalk.eval.tasks.settings import Lengths, written

RESULTS = Path(__file__).parents[2] / "docs" / "results"
# Read files, which `data_dir` writes, and where those of a task are.
MADE_UP = {
    "leval": "leval/*/*.jsonl",
    "longbench": "longbench/*/*.jsonl",
    "longeval-lines": "longeval/lines/*.jsonl",
    "kv-retrieval": "kv_retrieval/*.jsonl.gz",
    "short": "short/*/*.jsonl",
}


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["settings"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


class Echo(PreparedTask):
    """Whether a word is given back.

    Nobody's paper has this.
    """

    name = "echo"
    metrics: ClassVar = {"same": Metric("same word")}

    lengths: Lengths = Field((1024, 2000), description="Of [words], comma-separated.")
    case: Literal["lower", "upper"] = Field("lower", description="Of the word.")
    polite: bool = Field(True, description="Ask nicely.")
    most: int | None = Field(None, ge=2, description="Words; all if not given.")
    seed: int = 0

    def examples(self):
        return [Example(f"{length}-{self.case}", length, {"length": length}) for length in self.lengths]

    def prepare(self, example, subject):
        word = getattr("Word", self.case)()
        ids = subject.encode(f"{'Please say' if self.polite else 'Say'} {word}")
        return Generation(Prompt(ids, 4), word, lambda answer: {"same": float(answer == word)})


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setitem(TASKS, "echo", Echo)


def test_a_task_is_a_class_and_an_entry(echo, tmp_path):
    assert "Whether a word is given back." in run("--help").stdout
    shown = " ".join(run("echo", "--help").stdout.replace("│", " ").split())
    for part in (
        "Nobody's paper has this.",
        "--lengths TEXT Of [words], comma-separated. [default: 1024,2000]",
        "--case lower|upper Of the word. [default: lower]",
        "--polite --no-polite",
        "--most INTEGER Words; all if not given. --",
        "--limit",
    ):
        assert part in shown
    result = run("echo", "--model", "dummy", "--lengths", "1k,16", "--no-polite", "--seed", "3", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    given = {"lengths": [1024, 16], "case": "lower", "polite": False, "most": None, "seed": 3}
    assert settings_of(tmp_path) == given
    assert [(row["target"], row["prompt_tokens"]) for row in rows_of(tmp_path)] == [("word", 2)] * 4
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(page)]).exit_code == 0
    assert "Same word" in page.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_options_say_the_defaults(name):
    """What the help shows, given as it is, changes nothing; but for what changes nothing at all."""
    kind = TASKS[name]
    shown = {one: field.default for one, field in kind.model_fields.items()
             if field.default not in (None, ()) and one not in kind().without_effect}  # fmt: skip
    given = {one: default if isinstance(default, bool) else written(default) for one, default in shown.items()}
    assert commands.task_of(kind, given) == kind()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_and_every_option_is_explained(name):
    assert TASKS[name].about()
    assert all(field.description for one, field in TASKS[name].model_fields.items() if one != "seed")


IDLE = [
    ("passkey-length", "--length 16k --characters 16000", "--length", "--characters 16000"),
    ("perplexity", "--text alice --bucket 1024", "--bucket", "--mode sliding"),
    ("perplexity", "--mode start --books 3", "--books", "--mode start"),
    ("perplexity", "--mode start --windows 0", "--windows", "--mode start"),
    ("perplexity", "--mode start --bucket 9", "--bucket", "--mode start"),
    ("perplexity", "--mode positions --stride 9", "--stride", "--mode positions"),
    ("perplexity", "--mode positions --windows 9", "--windows", "--mode positions"),
    ("perplexity", "--mode positions --tokens 65536", "--tokens", "--mode positions"),
    ("perplexity", "--text alice --data-dir .", "--data-dir", "--text alice"),
    ("perplexity", "--text alice --books 3", "--books", "--text alice"),
    ("perplexity", "--text alice --seed 0", "--seed", "--text alice"),
    ("needle", "--text alice --data-dir .", "--data-dir", "--text alice"),
    ("leval", "--mode options --new-tokens 512", "--new-tokens", "--mode options"),
    ("longbench", "--tasks lcc,trec --no-chat", "--chat", "--tasks trec,lcc"),
    ("short", "--tasks mmlu,hellaswag --new-tokens 9", "--new-tokens", "--tasks hellaswag,mmlu"),
    ("short", "--tasks truthfulqa_mc2 --seed 3", "--seed", "--tasks truthfulqa_mc2"),
    ("short", "--chunk 512", "--chunk", "short"),
    *((name, "--seed 0", "--seed", name) for name, kind in TASKS.items() if "seed" not in kind.model_fields),
]


@pytest.mark.parametrize(("name", "given", "option", "why"), IDLE)
def test_what_has_no_effect_is_refused_before_anything_is_read(name, given, option, why, tmp_path):
    """Also where it is given as its default, as whoever gives it expects that it counts. No model is looked for."""
    result = run(name, *given.split(), "--model", tmp_path / "no model", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option} has no effect with {why}")
    assert result.stderr.count("\n") == 1


OTHERS = {
    "perplexity": ({}, {"mode": "start"}, {"mode": "positions"}),
    "leval": ({}, {"mode": "options"}),
    "passkey-length": ({}, {"characters": 900}),
}


@pytest.mark.parametrize(("name", "choice"), [(name, one) for name in TASKS for one in OTHERS.get(name, ({},))])
def test_what_is_not_refused_has_an_effect_on_what_is_run(name, choice):
    """Of a task's settings at least one way to run it heeds each."""
    task = TASKS[name](**choice)
    assert {*task.without_effect} < {*TASKS[name].model_fields}
    assert not {*task.without_effect} & {*choice}
    heeded = [{*TASKS[name].model_fields} - {*TASKS[name](**one).without_effect} for one in OTHERS.get(name, ({},))]
    assert set.union(*heeded) == {*TASKS[name].model_fields}


NUMBERS = [
    (name, one)
    for name, kind in TASKS.items()
    for one, field in kind.model_fields.items()
    if one != "seed" and isinstance(field.default, int | tuple) and not isinstance(field.default, bool)
    and all(isinstance(its, int | float) for its in (field.default if isinstance(field.default, tuple) else ()))
] + [("perplexity", "tokens"), ("short", "questions")]  # fmt: skip


@pytest.mark.parametrize(("name", "setting"), NUMBERS)
def test_no_number_is_larger_than_anybody_means(name, setting, tmp_path):
    option = f"--{setting.replace('_', '-')}"
    for value in ("99999999999", "9" * 40):
        result = run(name, "--model", "dummy", "-o", tmp_path / "out", option, value)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {option}")
        assert value in result.stderr
        assert result.stderr.count("\n") == 1


COMMANDS = [
    shlex.split(line)[1:]
    for line in (RESULTS / "commands.sh").read_text().replace("\\\n", " ").splitlines()
    if line.startswith("ropewalk eval ")
]


def test_published_commands_mean_what_was_run(monkeypatch):
    made = []
    monkeypatch.setattr(commands, "evaluate", lambda task, run: made.append(task))
    for command in COMMANDS:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        folder = RESULTS.parents[1] / command[command.index("--output") + 1]
        task, written = made[-1], read_config(folder).complete.settings
        asked = task.model_dump(mode="json", exclude={"data_dir"})
        assert asked == {name: written[name] for name in asked}
        # So the same command goes on with the folder: what it would ask and how it scores is what is there.
        assert task.version == read_config(folder).version
    assert len(made) == len(COMMANDS) > 10


@pytest.fixture
def data_dir(tmp_path):
    """A few examples of each task, in files as the real ones."""

    def write(name, *lines):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    questions = ["Question 1. Which?", "Question 2. What?"]
    write("leval/closed/coursera.jsonl", {"input": "long " * 900, "instructions": questions, "outputs": ["B", "BC"]})
    for task, answer, classes in (("passage_count", "12345", None), ("trec", "Food", ["Food", "City"])):
        one = {"context": "a word " * 400, "input": "Which?", "answers": [answer], "all_classes": classes}
        write(f"longbench/full/{task}.jsonl", one, one)
    asked = {"prompt": "line a: REGISTER_CONTENT is <12345>\n" * 9, "expected_number": 12345, "num_lines": 9}
    write("longeval/lines/9_lines.jsonl", *({**asked, "random_idx": ["a", place]} for place in (0, 4)))
    pairs = [["a", "12345"], ["b", "2"]]
    write("kv_retrieval/kv-retrieval-2_keys.jsonl.gz", {"ordered_kv_records": pairs, "key": "a", "value": "12345"})
    write("short/gsm8k/test.jsonl", *({"question": f"{i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(7)))
    return tmp_path / "data"


SMALL = {
    "passkey": "--lengths 200,1k --depths 3 --samples 2",
    "passkey-length": "--length 600 --digits 5,36 --samples 6",
    "perplexity": "--text alice --lengths 1k,4k",
    "needle": "--text alice --lengths 200,1k --depths 3 --samples 2",
    "longeval-lines": "--lines 9",
    "kv-retrieval": "--keys 2 --depths 3",
    "leval": "--tasks coursera --mode options --length 300",
    "longbench": "--tasks passage_count,trec --length 200",
    "short": "--tasks gsm8k --limit 3",
}
# Another number of examples, or a word of the error: as another run is refused.
OTHER = {
    "passkey": "--digits 8",
    "passkey-length": "--digits 6",
    "perplexity": "--mode positions",
    "needle": "--no-chat",
    "longeval-lines": "--no-chat",
    "kv-retrieval": "--query-aware",
    "leval": "--mode generate",
    "longbench": "--no-chat",
    "short": "--questions 5",
}


@pytest.mark.parametrize(
    ("name", "examples", "scores"),
    [
        ("passkey", 24, [{"exact_match": 0}]),
        ("passkey-length", 24, [{"exact_match": 0}]),
        ("perplexity", 4, [{"nll": 4096, "tokens": 4096, "perplexity": pytest.approx(2.71828, rel=1e-4)}]),
        ("needle", 24, [{"recall": 0, "exact_match": 0}]),
        ("longeval-lines", 4, [{"accuracy": 1}]),
        ("kv-retrieval", 6, [{"accuracy": 1}]),
        ("leval", 2, [{"accuracy": 0.25, "probability": 0.25}]),
        ("longbench", 8, [{"score": 0}, {"score": 1}]),
        ("short", 6, [{"exact_match,strict-match": 0, "exact_match,flexible-extract": 0}]),
    ],
)
def test_a_run_and_the_same_again(name, examples, scores, data_dir, tmp_path):
    if name == "short":
        pytest.importorskip("lm_eval")
    out = tmp_path / "out"
    arguments = [name, "--model", "dummy", *SMALL[name].split(), "-o", out]
    arguments += ["--data-dir", data_dir] if name in MADE_UP else []
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{examples} examples done: {out}\n"
    # What is recommended for texts inside the window changes nothing; for the short tasks it is for longer ones.
    assert first.stderr.count("changed in those by selfextend(group_size=1, window=1024): expect") == (name != "short")
    assert first.stderr.count("note: ") == (name != "short") + (name in ("leval", "short"))
    rows = rows_of(out)
    assert all(row["prompt_tokens"] for row in rows)
    assert all(any(row["scores"] == one for one in scores) for row in rows)
    assert run(*arguments).stdout.startswith(f"{examples} were there already, 0 examples done")
    assert "was started with settings" in run(*arguments, *OTHER[name].split()).stderr
    if name in MADE_UP:
        for path in data_dir.glob(MADE_UP[name]):
            path.write_text(path.read_text() + path.read_text())
        assert "was started with settings" in run(*arguments).stderr


@pytest.mark.parametrize(
    ("name", "more", "count"),
    [
        *zip(TASKS, [""] * len(TASKS), [12, 12, 2, 12, 2, 3, 1, 4, 7], strict=True),
        # 2 of each span of 100 tokens.
        ("passkey", "--tiled --span 100", 3 * 2 * (1 + 4)),
        ("perplexity", "--mode positions", 2),
        ("leval", "--mode generate", 2),
    ],
)
def test_a_page_of_a_part_says_so(name, more, count, data_dir, tmp_path):
    if name == "short":
        pytest.importorskip("lm_eval")
    out, page = tmp_path / "out", tmp_path / "page.html"
    arguments = [name, "--model", "dummy", *SMALL[name].removesuffix(" --limit 3").split(), *more.split(), "-o", out]
    arguments += ["--data-dir", data_dir] if name in MADE_UP else []
    # All the same, if it is all.
    for limit in (max(1, count - 1), count):
        result = run(*arguments, "--method", "unmodified", "--limit", limit)
        assert result.exit_code == 0, result.output
        assert CliRunner().invoke(app, ["report", str(out), "-o", str(page)]).exit_code == 0
        part = f"is not finished. Examples so far: unmodified {limit} of {count}. A mean"
        assert (part in page.with_suffix(".md").read_text()) == (limit < count)


@pytest.fixture
def scored_once(data_dir, tmp_path, monkeypatch):
    """What asks exams, and a folder of an earlier version, which gave half of every score."""
    arguments = ["leval", "--tasks", "coursera", "--length", "300", "--data-dir", data_dir, "--model", "dummy"]
    with monkeypatch.context() as earlier:
        earlier.setattr(TASKS["leval"], "version", 1)
        earlier.setitem(SCORES, "coursera", lambda answer, right: 0.5)
        assert run(*arguments, "-o", tmp_path / "once").exit_code == 0
    return arguments, tmp_path / "once"


def test_answers_are_scored_again(scored_once, tmp_path, monkeypatch):
    arguments, once = scored_once
    assert "was started with version 1, not 2" in run(*arguments, "-o", once).stderr
    before = read(once)
    assert {row.scores["exact_match"] for row in before.rows} == {0.5}
    now = tmp_path / "now"
    with monkeypatch.context() as silent:
        silent.setattr(Dummy, "answers", None)
        result = run(*arguments, "--rescore", once, "-o", now)
    assert (result.exit_code, result.stdout) == (0, f"4 answers scored again: {now}\n")
    after = read(now)
    assert {row.scores["exact_match"] for row in after.rows} == {0.0}
    assert after.config == before.config.model_copy(update={"version": 2})
    for old, new in zip(before.rows, after.rows, strict=True):
        assert new.facts.commit.startswith(f"{old.facts.commit}, scored again by ")
        assert new.facts.version == 2
        assert new.model_copy(update={"scores": old.scores, "facts": old.facts}) == old
    # The folder is one of this version: it can be gone on with, and has a page.
    assert run(*arguments, "-o", now).stdout.startswith("4 were there already, 0 examples done")
    assert CliRunner().invoke(app, ["report", str(now), "-o", str(tmp_path / "page.html")]).exit_code == 0


def test_what_cannot_be_scored_again(scored_once, tmp_path, data_dir):
    arguments, once = scored_once

    def refused(*more, output=tmp_path / "now"):
        result = run(*arguments, "--rescore", once, "-o", output, *more)
        assert (result.exit_code, result.stdout) == (2, "")
        assert not (tmp_path / "now").exists()
        return result.stderr

    assert "--output must be another folder than that of --rescore" in refused(output=once)
    for option, value in (("method", "yarn"), ("limit", 3), ("batch-size", 1), ("chunk", 9), ("preset", "phi-2")):
        assert f"--{option} has no effect with --rescore, which asks nothing" in refused(f"--{option}", value)
    assert "was started with settings" in refused("--length", "301")
    assert "was started with settings" in refused("--mode", "options")
    rows = (once / "results.jsonl").read_text()
    (once / "results.jsonl").write_text(rows.replace('"target":"B"', '"target":"C"'))
    assert "coursera-0-0 of" in refused()
    (once / "results.jsonl").write_text(rows.replace("coursera-0-0", "coursera-7-0"))
    assert "is no example of leval any more: ask again" in refused()
    likely = tmp_path / "likely"
    options = [*arguments, "--mode", "options"]
    assert run(*options, "-o", likely).exit_code == 0
    result = run(*options, "--rescore", likely, "-o", tmp_path / "now")
    assert "leval scores likelihoods with these settings, and rows do not keep those: ask again" in result.stderr


def test_nothing_to_ask(data_dir, tmp_path, echo, monkeypatch):
    path = data_dir / "leval" / "closed" / "coursera.jsonl"
    arguments = ["--model", "dummy", "-o", tmp_path / "out"]
    asked = ["leval", *SMALL["leval"].split(), "--data-dir", data_dir, *arguments]
    path.write_text(json.dumps({"input": "long", "instructions": [], "outputs": []}) + "\n")
    result = run(*asked)
    assert (result.exit_code, result.stderr) == (2, "error: coursera.jsonl holds no questions: load it again\n")
    path.write_text(json.dumps({"input": "long", "instructions": ["Which?"], "outputs": ["AB"]}) + "\n")
    nothing = "error: {} has nothing to ask with these options and data: choose others\n"
    result = run(*asked)
    assert (result.exit_code, result.stderr) == (2, nothing.format("leval"))
    monkeypatch.setattr(Echo, "examples", lambda self: iter(()))
    result = run("echo", *arguments)
    assert (result.exit_code, result.stderr) == (2, nothing.format("echo"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Of each kind of setting one that it cannot be.
        ("passkey --lengths 4k,many", "--lengths must be whole numbers such as 4096 or 16k, got 'many'"),
        ("passkey --lengths 0", "--lengths must be whole numbers such as 4096 or 16k, got '0'"),
        ("passkey --depths 0.5,1.5", "--depths must be numbers from 0 to 1, or how many there are, got '0.5,1.5'"),
        ("passkey --samples 0", "--samples: Input should be greater than or equal to 1, got '0'"),
        ("passkey --samples ten", "--samples: Input should be a valid integer"),
        ("passkey-length --length 1k,2k", "--length must be whole numbers such as 4096 or 16k, got '1k,2k'"),
        (
            "perplexity --mode slidin",
            "--mode must be one of sliding, start, positions, got 'slidin'. Did you mean 'sliding'?",
        ),
        ("perplexity --lengths 200", "--lengths must be longer than the stride of 256 tokens, got 200"),
        ("perplexity --stride 100000", "--lengths must be longer than the stride of 100000 tokens, got 4096"),
        (
            "leval --tasks gsm",
            "--tasks must be one of coursera, gsm100, quality, tpo, sci_fi, codeU, got 'gsm'. Did you",
        ),
        *(
            (f"{name} --data-dir=", "--data-dir': must name a file or a folder, got ''")
            for name, kind in TASKS.items()
            if "data_dir" in kind.model_fields
        ),
        ("leval --tasks gsm100 --mode options", "--tasks must have options to choose from, as the mode asks for, got"),
        ("longbench --length 1", "--length: Input should be greater than or equal to 2, got 1"),
        ("short --tasks gsm8k,helaswag", "gsm8k, got 'helaswag'. Did you mean 'hellaswag'?"),
        # Data.
        ("needle --text esays", "no text is called 'esays'. Did you mean 'essays'?"),
        ("needle --data-dir nowhere", "nowhere holds no essays: --data-dir must hold needle/PaulGrahamEssays/*.txt"),
        (
            "leval --data-dir nowhere",
            "cannot read nowhere/leval/closed/coursera.jsonl (No such file or directory): --da",
        ),
        (
            "longbench --subset mini --data-dir nowhere",
            "--data-dir must hold longbench/minilongbench/narrativeqa.jsonl",
        ),
        (
            "longeval-lines",
            "longeval/lines/200_lines.jsonl is needed: get it from longeval/evaluation/lines/testcases of "
            "DachengLi1/LongChat on GitHub, or leave it out of --lines, and name the folder that holds it by "
            "--data-dir",
        ),
        ("kv-retrieval --data-dir nowhere", "cannot read nowhere/kv_retrieval/kv-retrieval-75_keys.jsonl.gz (No such"),
        ("short --data-dir nowhere", "cannot read nowhere/short/arc/ARC-Challenge-Test.jsonl"),
        ("short --method selfexend --data-dir nowhere", "Did you mean 'selfextend'?"),
        # No task.
        ("passky", "No such command 'passky'."),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("ropewalk.cli.model_options.load_model", None)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    result = run(*arguments.split(), "--model", tmp_path / "model", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_lm_eval(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ropewalk.eval.tasks.short.harness", raising=False)
    monkeypatch.delattr("ropewalk.eval.tasks.short.harness", raising=False)
    result = run("short", "--model", "dummy", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: the short tasks are lm-eval's, and lm_eval is not installed: run 'pip install \"ropewalk[lm-eval]\"'\n"
    )


def test_without_what_tasks_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "ropewalk.eval.tasks", None)
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    result = run("passkey")
    assert result.exit_code == 2
    assert result.stderr.endswith("is not installed: run 'pip install \"ropewalk[eval]\"'\n")
