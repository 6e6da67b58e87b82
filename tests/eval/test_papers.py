# SPDX-License-Identifier: Apache-2.0
"""The papers' rows are held to themselves and to each other: means, scores that so many questions can have, rows that
stand in two places. Where they contradict, the index says so, and nowhere else."""

import csv
import re
from decimal import Decimal
from importlib.resources import files

import pytest

from ropewalk.eval.methods import CHANGES, UNMODIFIED
from ropewalk.eval.papers import figure, figures, hub_name, papers, sources, table, tables
from ropewalk.eval.tasks.leval import EXAMS
from ropewalk.eval.tasks.longbench import KINDS as LONGBENCH

FOLDER = files("ropewalk.data").joinpath("papers")
WITH_ROWS = [name for name, one in tables().items() if one.rows]

# Questions of L-Eval's exams that have one right answer each (its table 1), and of stories those of both halves.
QUESTIONS = {"quality": 202, "tpo": 269, "codeU": 90, "gsm100": 100, "sci_fi": 2 * 64}


def errata(name, column=None):
    return {(one.label, one.column) for one in table(name).errata if column in (None, one.column)}


def near(printed, exact):
    """Rounded or cut off at the last digit that is printed."""
    step = Decimal(1).scaleb(Decimal(printed).as_tuple().exponent)
    return -step / 2 <= exact - Decimal(printed) < step


def test_what_the_papers_have():
    assert set(papers()) == {"selfextend", "self", "leval", "longbench"}
    selfextend = [name for name in tables() if re.fullmatch(r"selfextend/table-\d", name)]
    assert selfextend == [f"selfextend/table-{number}" for number in range(1, 9)]
    assert list(figures()) == [f"selfextend/figure-{number}" for number in range(1, 11)]
    assert all(name.split("/")[0] in papers() for name in (*tables(), *figures()))
    assert all(re.fullmatch(r"\d{4}\.\d{5}", one.arxiv) for one in papers().values())
    # What is complete and what is not: a row that is found or lost changes this.
    assert {name: (one.status, len(one.rows)) for name, one in tables().items() if one.rows} == {
        "selfextend/table-2": ("partial", 11),
        "selfextend/table-3": ("partial", 10),
        "selfextend/phi-2": ("complete", 4),
        "self/leval": ("complete", 21),
        "leval/table-3": ("complete", 24),
        "longbench/readme": ("complete", 8),
    }


@pytest.mark.parametrize("name", tables())
def test_a_table_says_where_it_is_from_and_what_it_lacks(name):
    one = table(name)
    assert (one.id, bool(one.rows)) == (name, one.status != "missing")
    assert one.shows
    assert bool(one.missing) or one.status == "complete"
    assert {*one.sources, *(source for row in one.rows for source in row.sources)} <= set(sources())
    assert {source for row in one.rows for source in row.sources} <= set(one.sources)
    assert {setting.source for setting in one.settings} <= set(one.sources)
    for setting in one.settings:
        assert re.fullmatch(r"\w+=[\d.]+(, \w+=[\d.]+)*|", setting.parameters)
        assert setting.parameters or setting.note
    assert not one.rows or (one.data and one.metric)
    assert all(row.sources for row in one.rows)


@pytest.mark.parametrize("name", figures())
def test_a_figure_says_where_it_is_from(name):
    one = figure(name)
    assert one.id == name
    assert one.shows
    assert one.sources
    assert set(one.sources) <= set(sources())


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_are_whole(name):
    """As many cells as columns, each a score or nothing, a label once, and methods that Ropewalk has."""
    one = table(name)
    assert len({row.label for row in one.rows}) == len(one.rows)
    for row in one.rows:
        assert row.method in {*CHANGES, UNMODIFIED, "retrieval"}
        assert re.fullmatch(r"(\d+k)?", row.length)
        for cell in (*row.cells.values(), *([row.mean] if row.mean else [])):
            assert re.fullmatch(r"\d{1,3}(\.\d{1,2})?", cell)
            assert 0 <= float(cell) <= 100
        if one.status == "complete" and name != "self/leval":
            assert set(row.cells) == set(one.columns)
    tasks = EXAMS if set(one.columns) <= set(EXAMS) else LONGBENCH
    assert set(one.columns) <= set(tasks)
    for erratum in one.errata:
        assert erratum.column == "mean" or erratum.column in one.row(erratum.label).cells


def test_every_file_is_read_and_has_as_many_cells_as_columns():
    names = {file.name for file in FOLDER.iterdir() if file.name.endswith(".csv")}
    read = re.findall(r'^file = "(.*)"$', FOLDER.joinpath("index.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(read) == sorted(names)
    for name in names:
        header, *lines = csv.reader(FOLDER.joinpath(name).read_text(encoding="utf-8").splitlines())
        assert {len(line) for line in lines} == {len(header)}


@pytest.mark.parametrize("name", WITH_ROWS)
def test_means_are_those_of_the_cells(name):
    one = table(name)
    columns = one.mean_of or one.columns
    off = {
        (row.label, "mean")
        for row in one.rows
        if row.mean and not near(row.mean, sum(Decimal(row.cells[column]) for column in columns) / len(columns))
    }
    assert off == errata(name, "mean")


@pytest.mark.parametrize("name", WITH_ROWS)
def test_scores_are_those_of_so_many_questions(name):
    def possible(column, printed):
        one = Decimal(100) / QUESTIONS[column]
        exact = round(Decimal(printed) / one) * one
        # The score of stories is the mean of two that were cut off.
        return near(printed, exact) or (column == "sci_fi" and abs(exact - Decimal(printed)) < Decimal("0.02"))

    off = {
        (row.label, column)
        for row in table(name).rows
        for column in QUESTIONS.keys() & row.cells.keys()
        if not possible(column, row.cells[column])
    }
    assert off <= errata(name)
    assert off == {
        "self/leval": {
            ("SE-DeepSeek-R1-Distill-Qwen-7B", "sci_fi"),
            ("SELF-DeepSeek-R1-Distill-Qwen-7B", "quality"),
        }
    }.get(name, set())


# The same rows in two places, and the cells that differ.
TWICE = [
    ("selfextend/table-2", "longbench/readme", {
        "GPT-3.5-Turbo-16k": "GPT-3.5-Turbo-16k",
        "ChatGLM2-6B-32k": "ChatGLM2-6B-32k",
        "Llama-2-7b-chat": "Llama2-7B-chat-4k",
    }),
    ("selfextend/table-2", "selfextend/phi-2", {"Phi-2": "phi-2"}),
    ("selfextend/table-3", "leval/table-3", {
        "Llama-2-7b-chat": "Llama2-7b-chat",
        "Llama-2-13b-chat": "Llama2-13b-chat",
        "Longchat-1.5-7b-32k": "Longchat1.5-7b-32k",
        "Vicuna-1.5-7b-16k": "Vicuna1.5-7b-16k",
    }),
    ("selfextend/table-3", "self/leval", {
        "SE-Llama-2-7b-chat": "SE-Llama-2-7b-chat",
        "SE-Llama-2-13b-chat": "SE-Llama-2-13b-chat",
    }),
    ("self/leval", "leval/table-3", {
        "Llama-2-7b-chat": "Llama2-7b-chat",
        "Llama-2-13b-chat": "Llama2-13b-chat",
        "Claude 1.3-100k": "Claude1.3-100k",
        "GPT-4-32k": "GPT-4-32k",
        "Turbo-16k-0613": "Turbo-16k-0613",
        "ChatGLM2-6b-8k at 2k": "Chatglm2-6b-8k at 2k",
        "XGen-7b-8k (2k-4k-8k)": "XGen-7b-8k (2k-4k-8k)",
        "ChatGLM2-6b-8k at 8k": "Chatglm2-6b-8k at 8k",
        "ChatGLM2-6b-32k": "Chatglm2-6b-32k",
        "XGen-7b-8k": "XGen-7b-8k",
        "MPT-7b-65k": "MPT-7b-65k",
    }),
]  # fmt: skip


@pytest.mark.parametrize(("name", "other", "labels"), TWICE, ids=[f"{one}-{two}" for one, two, _ in TWICE])
def test_a_row_in_two_places_differs_where_the_index_says(name, other, labels):
    one, two = table(name), table(other)
    differ, same = set(), 0
    for label, called in labels.items():
        row, again = one.row(label), two.row(called)
        assert row.model == again.model
        for column in row.cells.keys() & again.cells.keys():
            same += row.value(column) == again.value(column)
            if row.value(column) != again.value(column):
                differ.add((label, column))
    assert same >= 4 * len(labels) - len(differ)
    assert differ <= errata(name)
    assert differ == {
        ("selfextend/table-2", "selfextend/phi-2"): {("Phi-2", "gov_report")},
        ("selfextend/table-3", "self/leval"): {("SE-Llama-2-13b-chat", "sci_fi")},
        ("self/leval", "leval/table-3"): {("Llama-2-13b-chat", "sci_fi")},
    }.get((name, other), set())


def test_se_phi_2_is_the_pictures_but_for_one_cell():
    row, picture = table("selfextend/table-2").row("SE-Phi-2"), table("selfextend/phi-2").row("8k")
    shared = row.cells.keys() & picture.cells.keys()
    assert {column for column in shared if row.value(column) != picture.value(column)} == {"multifieldqa_en"}
    assert len(shared) == 4
    assert table("selfextend/table-2").erratum("SE-Phi-2", "multifieldqa_en")


def test_self_is_as_much_better_as_its_abstract_says():
    """Up to 12% on L-Eval, of Qwen, and up to 5.4% on reading comprehension (of Llama-2-7b): both relative."""
    rows = table("self/leval")

    def gain(model):
        ours, theirs = rows.row(f"SELF-{model}"), rows.row(f"SE-{model}")
        return max(ours.value(exam) / theirs.value(exam) for exam in ("quality", "tpo", "coursera", "sci_fi")) - 1

    assert 0.12 <= gain("Qwen-7B") < 0.13
    assert 0.054 <= gain("Llama-2-7b-chat") < 0.055


def test_a_cell_is_what_is_printed_and_a_number():
    row = table("selfextend/table-2").row("SE-Mistral-7b-ins-0.1")
    assert (row.cells["multifieldqa_en"], row.value("multifieldqa_en"), row.mean) == ("49.50", 49.5, "39.86")
    assert (row.model, row.method, row.length) == ("Mistral-7B-Instruct-v0.1", "selfextend", "16k")
    assert hub_name(row.model) == "mistralai/Mistral-7B-Instruct-v0.1"
    assert hub_name("GPT-4-32k") is None
    # Cut off where it was read: nothing stands in for it.
    assert table("selfextend/table-2").row("SE-Phi-2").value("lcc") is None


def test_models_have_one_name():
    models = {row.model for one in tables().values() for row in one.rows}
    assert models == {model for model in models if model.strip() == model}
    folded = {re.sub(r"[^a-z0-9]", "", model.lower()) for model in models}
    assert len(folded) == len(models)


def test_settings_that_are_not_confirmed_are_told_apart():
    kinds = {setting.source: sources()[setting.source].kind for one in tables().values() for setting in one.settings}
    assert kinds == {
        "adagrope": "quoted",
        "project": "project",
        "longlm-issue-35": "thread",
        "self-script": "authors",
        "self-experiments": "authors",
    }


def test_an_unknown_name():
    with pytest.raises(
        ValueError, match=r"no table is called 'selfextend/table2'\. Did you mean 'selfextend/table-2'\?"
    ):
        table("selfextend/table2")
    with pytest.raises(
        ValueError, match=r"no figure is called 'selfextend/fig-3'\. Did you mean 'selfextend/figure-3'\?"
    ):
        figure("selfextend/fig-3")
    with pytest.raises(ValueError, match=r"no row is called 'SE-Phi'\. The rows are GPT"):
        table("selfextend/table-2").row("SE-Phi")
    assert figure("selfextend/figure-3").id == "selfextend/figure-3"
