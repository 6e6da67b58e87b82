# SPDX-License-Identifier: Apache-2.0
"""The papers' experiments: each can be run as it stands, and the papers' figures stand beside ours."""

import json
import re
from dataclasses import replace

import pytest

from ropewalk.eval import papers, results, runner
from ropewalk.eval.methods import parse_all
from ropewalk.eval.reproduce import (
    experiment,
    experiments,
    first_prompt,
    forecast,
    lines_of,
    matrix,
    models_of,
    names,
    not_run,
    runs_of,
)
from ropewalk.eval.reproduce.comparison import comparison
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks import TASKS

MEASURED = {name: one for name, one in experiments().items() if one.is_measured}
over_measured = pytest.mark.parametrize("name", MEASURED)


def test_every_table_and_figure_of_the_papers_has_an_entry():
    """Or a line on why it has none."""
    theirs = [name for name in [*papers.tables(), *papers.figures()] if name.startswith(("selfextend/", "self/"))]
    assert sorted(names()) == sorted(theirs)
    assert [name for name in names() if name.startswith("selfextend/table")] == [
        f"selfextend/table-{number}" for number in range(1, 9)
    ]
    for name in set(theirs) - set(experiments()):
        assert not papers.table(name).number or papers.table(name).shows == "Unknown here."
        with pytest.raises(ValueError, match=f"{name} is not run: {re.escape(not_run()[name])}"):
            experiment(name)


@pytest.mark.parametrize(("typed", "meant"), [("table-2", "selfextend/table-2"), ("leval", "self/leval")])
def test_a_name_without_its_paper(typed, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        experiment(typed)


def test_what_figures_show_that_measure_nothing():
    figure = experiment("selfextend/figure-7")
    prompt, right = first_prompt(TASKS[figure.task](**figure.settings))
    assert right.isdecimal()
    assert f"The pass key is {right}. Remember it." in prompt
    assert prompt.endswith("What is the pass key? The pass key is")
    # As the paper's caption has it: 10 tokens, window of 7, G = 2, W = 4; eq. 2 by hand.
    rows = [
        [int(one) for one in line.split()] for line in matrix(*experiment("selfextend/figure-3").matrix).split("\n")
    ]
    assert rows == [[m - n if m - n < 4 else m // 2 - n // 2 + 2 for n in range(m + 1)] for m in range(10)]


@over_measured
def test_an_experiment_can_be_run_as_it_stands(name):
    one = MEASURED[name]
    kind = TASKS[one.task]
    for line in one.lines:
        task = kind(**{**one.settings, **line.settings})
        assert task.settings if one.task == "passkey" else task  # others read data for theirs
        assert parse_all([line.method], 1, 8192)
    assert one.score in kind.metrics or one.task == "short"
    assert one.unknown or one.table


@over_measured
def test_rows_are_the_papers(name):
    one = MEASURED[name]
    known = {row.label: row for row in papers.table(one.table).rows} if one.table else {}
    named = [line for line in one.lines if line.row]
    assert len({line.row for line in named}) == len(named)
    for line in named:
        row = known[line.row]
        assert papers.hub_name(row.model) == line.model
        assert line.method.partition("(")[0] in (row.method, "identity", "unmodified")
        if one.by == "task":
            assert set(row.cells) <= set(TASKS[one.task](**{**one.settings, **line.settings}).tasks)


def test_rows_of_models_that_can_be_had_are_run():
    for name in ("selfextend/table-2", "selfextend/table-3"):
        rows = {row.label for row in papers.table(name).rows if papers.hub_name(row.model) and row.cells}
        assert rows <= {line.row for line in MEASURED[name].lines}


def test_lines_of_a_model_that_are_asked_alike_are_one_run():
    one = experiment("selfextend/table-2")
    for called in ("meta-llama/Llama-2-7b-chat-hf", "/models/Llama-2-7b-chat-hf/", "some/llama-2-7b-chat"):
        runs = runs_of(one, called, {})
        assert [run.name for run in runs] == ["length-3500", "length-15500", "length-25000"]
        assert runs[0].rows == {"unmodified": "Llama-2-7b-chat"}
        assert runs[2].rows == {"selfextend(group_size=16, window=1024)": "SE-Llama-2-7b-chat"}
    (run,) = runs_of(experiment("selfextend/figure-4"), "mistralai/Mistral-7B-Instruct-v0.1", {})
    assert (run.trained_window, len(run.rows)) == (8192, 2)


@pytest.mark.parametrize("model", [None, "dummy", "HuggingFaceTB/SmolLM2-135M"])
@over_measured
def test_another_model_is_asked_the_same_under_what_is_recommended(name, model):
    for run in runs_of(MEASURED[name], model, {}):
        assert run.rows == dict.fromkeys(MEASURED[name].otherwise, "")
        assert run.trained_window is None


def test_another_model_is_asked_once():
    """With the settings of one of the paper's models, and by the paper's grid or map where that is what it shows."""
    (run,) = runs_of(experiment("self/leval"), None, {})
    assert list(run.rows) == ["unmodified", "selfextend", "self"]
    assert "new_tokens" not in run.settings
    (run,) = runs_of(experiment("selfextend/figure-2"), None, {})
    assert any("window=0" in method for method in run.rows)


def test_settings_in_the_place_of_the_papers():
    (run,) = runs_of(experiment("selfextend/table-3"), None, {"length": "2k"})
    assert run.settings["length"] == "2k"


@over_measured
def test_an_override_leaves_the_papers_rows_beside_ours(name):
    """Also where it makes one run of lines that differ in nothing else, of which one may have no row."""
    one = MEASURED[name]
    varied = {key for line in one.lines for key in line.settings}
    for model in models_of(one):
        rows = [line.row for line in lines_of(one, model) if line.row]
        for key in varied:
            runs = runs_of(one, model, {key: 4096})
            assert sorted(row for run in runs for row in run.rows.values() if row) == sorted(rows)


def test_forecasts():
    for one in MEASURED.values():
        costs = [forecast(one, model) for model in models_of(one)]
        assert any(costs)
        for cost in filter(None, costs):
            assert 0.01 < cost[0] < 500
            assert 3 < cost[1] < 100
    # Answers are counted, as many as there are and as long as a line has them.
    for one in MEASURED.values():
        assert (one.new_tokens > 0) == (one.task != "perplexity")
        least = one.model_copy(update={"new_tokens": 0, "lines": tuple(line.model_copy(update={"settings": {}})
                                                                      for line in one.lines)})  # fmt: skip
        for model in filter(lambda model: forecast(one, model), models_of(one)):
            assert (forecast(one, model)[0] > forecast(least, model)[0]) == (one.task != "perplexity")
    short = experiment("selfextend/table-4")
    hours = (
        forecast(short, "microsoft/phi-2")[0]
        - forecast(short.model_copy(update={"new_tokens": 0}), "microsoft/phi-2")[0]
    )
    assert hours == pytest.approx(2 * 1319 * 256 * 0.025 / 3600)  # gsm8k's questions, under two methods
    thinking, plain = (forecast(experiment("self/leval"), model)[0] for model in
                       ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "meta-llama/Llama-2-7b-chat-hf"))  # fmt: skip
    assert thinking > 7 * plain
    # A sweep counts as often as it has methods.
    few, many = experiment("selfextend/table-4"), experiment("selfextend/figure-8")
    assert forecast(many, "microsoft/phi-2")[0] > 6 * forecast(few, "microsoft/phi-2")[0]


def kept(tmp_path, one, run, data_dir):
    """A run of the dummy, done."""
    more = {} if data_dir is None else {"data_dir": data_dir}
    task, subject = TASKS[one.task](**run.settings, **more), Dummy()
    methods = parse_all(run.rows, 1, 4096)
    with results.Results(tmp_path / run.name, runner.config_of(task, methods, subject, 0)) as folder:
        runner.run(task, methods, subject, folder, runner.facts_of(task, subject, 0))
    return run, results.read(tmp_path / run.name)


def test_the_papers_figures_beside_ours(tmp_path):
    one = experiment("selfextend/table-2")
    folder = tmp_path / "longbench" / "full"
    folder.mkdir(parents=True)
    lines = [{"context": f"The city of {i} is old.", "input": "Which?", "answers": ["12345"]} for i in range(3)]
    for task in ("qasper", "hotpotqa"):
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = runs_of(one, "meta-llama/Llama-2-7b-chat-hf", {"tasks": "qasper,hotpotqa"})[0]
    [table] = comparison("it", one, [kept(tmp_path, one, run, tmp_path)], ["3 questions"])
    assert table.columns == ("task", "paper: Llama-2-7b-chat", "unmodified")
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert cells == {"qasper": ["19.2", "100.0"], "hotpotqa": ["25.4", "100.0"]}
    assert "3 questions" in table.note
    assert "The paper's figures were read in the table of others, https://aclanthology.org" in table.note
    assert "part" not in table.caption + table.note


def test_a_part_of_the_examples_says_that_it_is_one(tmp_path):
    """By what was asked, whatever the command was told."""
    one = experiment("selfextend/figure-4")
    [run] = runs_of(one, None, {"lengths": "800", "samples": 3, "depths": "0.5", "tiled": False})
    run, its = kept(tmp_path, one, run, None)
    assert "part" not in comparison("it", one, [(run, its)])[0].note
    longer = replace(its, config=its.config.model_copy(update={"examples": 50}))
    means, apart = comparison("it", one, [(run, longer)])
    assert means.caption == "it: exact match, of a part of the examples"
    assert apart.caption.startswith(means.caption)
    assert "Of a part of the examples alone: 3 of 50 of each method." in means.note
    assert "it did not run this model" in means.note
    note = comparison("it", one, [(run, replace(its, rows=its.rows[:-1]))])[0].note
    assert f"Of a part of the examples alone: 2 of 3 of {its.methods[1]}." in note
    failed = its.rows[-1].model_copy(update={"scores": {}, "error": "RuntimeError: no"})
    [means, *_] = comparison("it", one, [(run, replace(its, rows=(*its.rows[:-1], failed)))])
    assert "part" not in means.caption
    assert f"Failed, and left out: 1 of {its.methods[1]}." in means.note


@pytest.mark.parametrize("name", [name for name, one in MEASURED.items() if one.table and papers.table(one.table).rows])
def test_figures_that_something_is_against_are_marked(name, tmp_path):
    """All of them, and no others; also in rows of methods that were asked for without their parameters."""
    one = MEASURED[name]
    theirs = papers.table(one.table)
    passkey = experiment("selfextend/figure-4")
    run = runs_of(passkey, None, {"lengths": "800", "samples": 1, "depths": "0.5", "tiled": False})[0]
    template = kept(tmp_path, passkey, run, None)[1]
    marked, shown = set(), set()
    for model in models_of(one):
        for run in runs_of(one, model, {}):
            methods = [method.name for method in parse_all(run.rows, 16896, 4096)]
            rows = tuple(
                template.rows[0].model_copy(
                    update={"method": method, "example": column, "cell": {"task": column}, "scores": {one.score: 1.0}}
                )
                for method in methods
                for column in theirs.columns
            )
            config = template.config.model_copy(update={"methods": tuple(methods)})
            means = comparison(name, one, [(run, replace(template, config=config, rows=rows))])[0]
            for place, head in enumerate(means.columns):
                if head.startswith("paper: "):
                    shown.add(head.removeprefix("paper: "))
                    for line in means.rows:
                        if line[place].mark:
                            marked.add((head.removeprefix("paper: "), line[0].text))
                            assert f"{line[place].mark} Contradicted: {line[0].text} of {head[7:]}. " in means.note
    assert shown == {line.row for line in one.lines if line.row}
    cells = {row.label: row.cells for row in theirs.rows if row.label in shown}
    assert marked == {(its.label, its.column) for its in theirs.errata if its.column in cells.get(its.label, {})}


def test_methods_are_compared_question_by_question(tmp_path):
    """Also with the unmodified model that read shorter texts, as in the paper; documents are what was sampled."""
    one = experiment("selfextend/table-2")
    folder = tmp_path / "longbench" / "full"
    folder.mkdir(parents=True)
    lines = [{"context": f"The city of {i // 2} is old.", "input": str(i), "answers": ["12345"]} for i in range(8)]
    (folder / "qasper.jsonl").write_text("\n".join(map(json.dumps, lines)))
    runs = runs_of(one, "meta-llama/Llama-2-7b-chat-hf", {"tasks": "qasper"})
    done = [kept(tmp_path, one, run, tmp_path) for run in runs]
    # One of the questions of each of two documents that the unmodified model does not know.
    wrong = {"qasper-0", "qasper-2"}
    rows = [row.model_copy(update={"scores": {"score": float(row.example not in wrong)}}) for row in done[0][1].rows]
    done[0] = (done[0][0], replace(done[0][1], rows=tuple(rows)))
    means, apart = comparison("it", one, done)
    assert means.columns[1:3] == ("paper: Llama-2-7b-chat", "unmodified, length-3500")
    assert means.rows[0][2].details[1:] == ("n=8", "documents=4")
    assert [row[0].text for row in apart.rows] == [name for name in means.columns[3:] if not name.startswith("paper: ")]
    assert [row[1].text for row in apart.rows] == ["+25.0"] * 2
    # Two of four documents tell little, which stands in both tables.
    assert [row[1].mark for row in apart.rows] == [cell.mark for cell in means.rows[0][3:] if cell.details] == ["≈"] * 2
    assert apart.rows[0][1].details[1:] == ("n=8", "documents=4")
    assert "four of five such experiments would tell a true difference" in apart.note


def test_a_sweep_has_a_line_for_each_method(tmp_path):
    one = experiment("selfextend/figure-2")
    [run] = runs_of(one, None, {"text": "alice", "lengths": "512"})
    [table, *_] = comparison("it", one, [kept(tmp_path, one, run, None)])
    assert table.columns == ("method, by length", "512")
    assert [row[0].text for row in table.rows] == [
        "unmodified",
        *(f"selfextend(group_size={size}, window=0)" for size in (2, 4, 8, 16)),
    ]
    assert {row[1].text for row in table.rows} == {"2.72"}


def test_each_task_has_the_papers_score(tmp_path):
    """ARC and HellaSwag theirs by normed likelihood, GSM8K by its answers: of rows with other scores too."""
    passkey, one = experiment("selfextend/figure-4"), experiment("selfextend/table-4")
    run = runs_of(passkey, None, {"lengths": "800", "samples": 1, "depths": "0.5", "tiled": False})[0]
    its = kept(tmp_path, passkey, run, None)[1]
    rows = tuple(
        its.rows[0].model_copy(
            update={
                "method": "unmodified",
                "example": f"{task}-{number}",
                "cell": {"task": task},
                "scores": {"acc": 0.0, score: 1.0},
            }
        )
        for task, score in one.scores.items()
        for number in range(3)
    )
    run = runs_of(one, None, {})[0]
    tables = comparison("it", one, [(run, replace(its, rows=rows))])
    assert {line[0].text: line[1].text for table in tables for line in table.rows} == dict.fromkeys(one.scores, "100.0")
    assert comparison("it", one, [(run, replace(its, rows=()))]) == []
