# SPDX-License-Identifier: Apache-2.0
"""The papers' experiments: each can be run as it stands, and the papers' figures stand beside ours."""

import json
from dataclasses import replace

import pytest

from ropewalk.eval import papers, results, runner
from ropewalk.eval.methods import parse_all
from ropewalk.eval.reproduce import experiment, experiments, forecast, lines_of, models_of, runs_of
from ropewalk.eval.reproduce.comparison import comparison
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks import TASKS

MEASURED = {name: one for name, one in experiments().items() if not one.instead}
over_measured = pytest.mark.parametrize("name", MEASURED)


def test_every_table_and_figure_of_the_papers_has_an_entry():
    """Those that nobody here has read are named where the papers' rows are, with what to fetch."""
    unread = {"selfextend/table-6", "selfextend/table-7", "self/longbench", "selfextend/phi-2"}
    theirs = {name for name in [*papers.tables(), *papers.figures()] if name.startswith(("selfextend/", "self/"))}
    assert theirs - unread == set(experiments())


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
