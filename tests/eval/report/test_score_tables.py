# SPDX-License-Identifier: Apache-2.0
import pytest
from made_up import SELFEXTEND, full, row, run

from ropewalk.eval import report
from ropewalk.eval.report import scores
from ropewalk.eval.report.score_tables import score_tables
from ropewalk.eval.report.scores import Score
from ropewalk.eval.report.series import together
from ropewalk.eval.tasks import About, about

BOTH = ("unmodified", SELFEXTEND)


def tables(*all_runs, task="passkey", words=None):
    return list(score_tables(task, together(all_runs), words or about(task)))


def texts(table):
    return [[cell.text for cell in one] for one in table.rows]


def marks(table):
    return [[cell.mark for cell in one[1:]] for one in table.rows]


def test_means_counts_intervals_and_noise():
    means, apart = tables(full())
    assert means.columns == apart.columns == ("method", "4k", "8k", "all")
    assert texts(means) == [["unmodified", "1.00", "0.50", "0.75"], [SELFEXTEND, "1.00", "1.00", "1.00"]]
    # Both texts of a place are found or missed, and there are two places.
    assert means.rows[0][2].details == ("0.09 to 0.91", "n=4", "places=2")
    assert means.caption == "Exact match by length"
    assert means.has_summary
    # Four rows tell little.
    assert marks(means) == [["", "", ""], ["≈", "≈", "≈"]]
    assert texts(apart) == [[SELFEXTEND, "+0.00", "+0.50", "+0.25"]]
    assert apart.caption == "Exact match by length: difference to the unmodified model"
    assert marks(apart) == [["≈", "≈", "≈"]]
    assert "no difference that n examples can show: the interval holds 0" in apart.note


def test_noise_is_judged_on_pairs():
    """Each score alone may be anywhere, and yet every example is better."""
    rows = [
        row(method, i / 40 + (method == SELFEXTEND) * (0.1 + 0.01 * (i % 3)), sample=i, metric="recall", task="new")
        for method in BOTH
        for i in range(30)
    ]
    means, apart = tables(run(rows, task="new"), task="new")
    assert [one[1].details[0] for one in means.rows] == ["0.28 to 0.44", "0.39 to 0.56"]  # they overlap
    assert marks(means) == [[""], [""]]
    assert (texts(apart), marks(apart)) == ([[SELFEXTEND, "+0.11"]], [[""]])


def test_only_examples_that_both_did_are_pairs():
    rows = [row("unmodified", 0.0, sample=i) for i in range(4)]
    rows += [row(SELFEXTEND, 1.0, sample=i) for i in (1, 3, 9)] + [row(SELFEXTEND, "ValueError: no", sample=2)]
    means, apart = tables(run(rows))
    assert means.rows[1][1].details[1] == "n=3"
    assert apart.rows[0][1].details[1] == "n=2"


def in_places(method, score, places=10, samples=5):
    return [
        row(method, float(score(place, i)), depth=place / places, sample=i)
        for place in range(places)
        for i in range(samples)
    ]


def test_intervals_follow_what_was_sampled():
    """Half of the keys found is one thing if it is every second one, and another if it is all of half of the places."""
    alone, together_ = (
        tables(run(in_places("unmodified", score), methods=("unmodified",)))[0].rows[0][1]
        for score in (lambda place, i: (place + i) % 2, lambda place, i: place % 2)
    )
    assert alone.text == together_.text == "0.50"
    assert (alone.details[0], together_.details[0]) == ("0.35 to 0.65", "0.20 to 0.80")
    assert together_.details[1:] == ("n=50", "places=10")
    note = tables(run(in_places("unmodified", lambda place, i: i % 2), methods=("unmodified",)))[0].note
    assert "What was sampled are places, and examples of one go together" in note


def test_differences_follow_what_was_sampled():
    """Of 10 keys that only one method finds, 2 places tell little, and 10 much."""
    for finds, mark in ((lambda place, i: place < 2, "≈"), (lambda place, i: i == place % 5, "")):
        rows = in_places("unmodified", lambda place, i: False) + in_places(SELFEXTEND, finds)
        _, apart = tables(run(rows))
        assert (texts(apart), marks(apart)) == ([[SELFEXTEND, "+0.20"]], [[mark]])


OTHERS = ("rerope(window=8)", "rerope(window=16)")


def test_methods_are_compared_with_the_best_of_them():
    rows = [
        row(method, i / 40 + more + 0.01 * (i % 3) * number, sample=i, metric="recall", task="needle", depth=i)
        for number, (method, more) in enumerate(
            {"unmodified": 0.2, SELFEXTEND: 0, OTHERS[0]: 0.1, OTHERS[1]: 0}.items()
        )
        for i in range(30)
    ]
    _, apart, best = tables(run(rows, task="needle", methods=BOTH + OTHERS), task="needle")
    # The unmodified model is none of them, and what ends in an error has no line.
    assert best.caption == f"Recall: difference to the best, {OTHERS[0]}"
    assert texts(best) == [[SELFEXTEND, "-0.11"], [OTHERS[1], "-0.09"]]
    assert "the method that has the best figure over all" in best.note
    assert len(apart.rows) == 3


def test_the_least_perplexity_is_the_best():
    rows = [
        perplexity(method, 4096, book, more + book)
        for method, more in {"unmodified": 2, SELFEXTEND: 2.1, OTHERS[0]: 2.2}.items()
        for book in range(4)
    ]
    *_, best = tables(run(rows, task="perplexity", methods=(*BOTH, OTHERS[0])), task="perplexity")
    assert best.caption == f"Perplexity: ratio to the best, {SELFEXTEND}"
    assert texts(best) == [[OTHERS[0], "1.11"]]


def test_tables_of_differences_say_what_they_can_tell():
    rows = [
        row(method, 0.5 + (method == SELFEXTEND) * 0.1 * (i % 2), sample=i, metric="recall", task="new")
        for method in BOTH
        for i in range(40)
    ]
    _, apart = tables(run(rows, task="new"), task="new")
    # Standard error 0.05 / sqrt(39): times 2.02 + 0.84 it is 0.02; and (2.80 * 0.05 / 0.05)^2 = 7.8 tell 0.05.
    assert "would tell a true difference of 0.02 from none" in apart.note
    assert "to tell 0.05, as far as examples are spread here, would take about 9 of them" in apart.note
    *_, few = tables(run([one for one in rows if one.example.endswith(("-10", "-11"))], task="new"), task="new")
    assert "is not known: there are too few examples, or all alike" in few.note


def test_without_an_unmodified_model_there_is_no_difference():
    assert [table.caption for table in tables(full((SELFEXTEND,)))] == ["Exact match by length"]


def by_task(tasks, task="new", score=lambda method, name, i: 0.25 + 0.5 * (i % 2), methods=BOTH):
    rows = [
        row(method, score(method, name, i), cell={"task": name}, task=task, metric="score", length=name, sample=i)
        for method in methods
        for name, count in tasks.items()
        for i in range(count)
    ]
    return run(rows, task=task, methods=methods)


def test_tasks_have_an_average_in_which_each_counts_the_same():
    def score(method, name, i):
        return {"a": 0.2, "b": 0.6}[name] + 0.1 * (i % 2)

    means, apart = tables(by_task({"a": 4, "b": 40}, score=score), task="new")
    assert means.columns == ("method", "a", "b", "average")
    assert texts(means)[0][1:] == ["0.25", "0.65", "0.45"]
    assert means.rows[0][3].details[1] == "n=44"
    assert "every task counts the same" in means.note
    assert texts(apart)[0][1:] == ["+0.00", "+0.00", "+0.00"]


def test_no_average_where_a_task_is_missing():
    whole = by_task({"a": 4, "b": 4}, methods=("unmodified",))
    part = by_task({"a": 4}, methods=(SELFEXTEND,))
    means, _ = tables(run([*whole.rows, *part.rows], task="new"), task="new")
    assert texts(means)[1] == [SELFEXTEND, "0.50", "-", "-"]


LONGBENCH = [
    "lcc", "trec", "qmsum", "qasper", "samsum", "musique", "hotpotqa", "2wikimqa", "triviaqa", "multi_news",
    "gov_report", "narrativeqa", "repobench-p", "passage_count", "multifieldqa_en", "passage_retrieval_en",
]  # fmt: skip


def test_many_tasks_are_grouped_in_tables_that_fit_a_page():
    found = tables(by_task(dict.fromkeys(LONGBENCH, 4), "longbench"), task="longbench")
    means, apart = found[:3], found[3:]
    assert [table.groups for table in means] == [table.groups for table in apart]
    assert [table.groups for table in means] == [
        (("single-document QA", 3), ("multi-document QA", 3)),
        (("summarization", 3), ("few-shot", 3)),
        (("synthetic", 2), ("code", 2), ("", 1)),
    ]
    assert means[0].columns == (
        "method", "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"
    )  # fmt: skip
    assert [table.has_summary for table in means] == [False, False, True]
    assert [bool(table.note) for table in means] == [False, False, True]
    assert means[1].caption == "Score by task, continued"
    # In percent, as LongBench has them.
    assert means[2].rows[0][5].text == "50.0"
    assert apart[2].rows[0][5].text == "+0.0"
    page = report.to_html(report.build([by_task(dict.fromkeys(LONGBENCH, 4), "longbench")]))
    assert '<th scope="colgroup" colspan="3">few-shot</th>' in page


def test_many_columns_without_groups():
    found = tables(by_task({f"t{i:02}": 3 for i in range(15)}, methods=("unmodified",)), task="new")
    assert [len(table.columns) - 1 for table in found] == [7, 7, 2]
    assert [column for table in found for column in table.columns[1:]] == [*(f"t{i:02}" for i in range(15)), "average"]


def perplexity(method, length, book, nll):
    made = row(method, 0.0, length, cell={"length": length}, sample=book, task="perplexity")
    return made.model_copy(update={"scores": {"nll": nll * 10, "tokens": 10.0, "perplexity": 2.0**nll}})


def test_perplexities_are_compared_by_their_ratio():
    rows = [
        perplexity(method, length, book, 1 + book + (method == SELFEXTEND) * 0.1 * (1 + book % 2))
        for method in BOTH
        for length in (4096, 8192)
        for book in range(4)
    ]
    means, apart = tables(run(rows, task="perplexity"), task="perplexity")
    # A book that is read at two lengths is one book: there is no column for both.
    assert means.columns == ("method", "4k", "8k")
    assert apart.caption == "Perplexity by length: ratio to the unmodified model"
    assert texts(apart) == [[SELFEXTEND, "1.16", "1.16"]]  # exp(0.15)
    assert marks(apart) == [["", ""]]
    assert apart.rows[0][1].details[1] == "n=4"


def test_what_a_task_computes_its_metrics_of_is_not_shown():
    rows = [row("unmodified", 1.0, sample=i) for i in range(2)]
    rows = [one.model_copy(update={"scores": one.scores | {"tokens": 9.0}}) for one in rows]
    for task, captions in {"passkey": ["Exact match"], "other": ["Exact match", "Tokens"]}.items():
        assert [table.caption for table in tables(run(rows), task=task, words=About(title="", measures=""))] == captions


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.0512, "0.0512"), (7.1234, "7.12"), (-3.0, "-3.00"), (2.5e9, "2.5e+09")]
)
def test_figures_of_any_size(value, text):
    assert Score(title="x", name="x").write(value) == text


def test_shares_have_two_decimals_or_are_percentages():
    assert Score(title="x", name="x", is_share=True).write(0.0512) == "0.05"
    assert Score(title="x", name="x", is_share=True, percent=True).write(0.0512) == "5.1"
    assert Score(title="x", name="x", is_share=True, percent=True).write_difference(0.0512) == "+5.1"


def test_numbers_are_in_order_and_words_after_them():
    rows = [row("unmodified", 1.0, cell={"x": x}, sample=i) for i, x in enumerate([10, "b", 9, 2.5, "a"])]
    assert scores.values_of("x", together([run(rows)])) == [2.5, 9, 10, "a", "b"]
