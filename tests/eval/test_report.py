import base64
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from ropewalk.eval import report
from ropewalk.eval.report import estimates, figures, runs, tables
from ropewalk.eval.results import Config, Facts, Results, ResultsError, Row

SELFEXTEND = "selfextend(group_size=8, window=1024)"
FACTS = Facts(
    model="m", model_hash="h", dtype="float32", device="cpu", seed=0, commit="abc", versions={"torch": "2.13.0"}
)
SETTINGS = {"lengths": [4096, 8192], "depths": [0.0, 1.0], "samples": 2}
NASTY = "<script>alert(1)</script> | **a** `b` & $x_1$"


def config(task="passkey", methods=("unmodified", SELFEXTEND), **changes):
    return Config(
        **{"task": task, "version": 1, "settings": SETTINGS, "methods": methods, "model": "m", "model_hash": "h"}
        | {"seed": 0}
        | changes
    )


def row(method, score, length=4096, depth=0.0, sample=0, task="passkey", facts=FACTS, cell=None, metric="exact_match"):
    """A score that is a text is an error."""
    return Row(
        task=task,
        version=1,
        method=method,
        example=f"{length}-{depth}-{sample}",
        cell=cell or {"length": length, "depth": depth},
        scores={} if isinstance(score, str) else {metric: score},
        seconds=0.5,
        error=score if isinstance(score, str) else None,
        facts=facts,
    )


def grid(method, score):
    """All rows that `SETTINGS` ask for, by a function of length, depth and sample."""
    return [
        row(method, score(length, depth, sample), length, depth, sample)
        for length in SETTINGS["lengths"]
        for depth in SETTINGS["depths"]
        for sample in range(SETTINGS["samples"])
    ]


def run(rows, folder="results/a", **changes):
    return runs.Run(folder, config(**changes), tuple(rows))


def found(method):
    """The unmodified model finds what is short or at the end; others find all."""
    return lambda length, depth, sample: float(method != "unmodified" or length == 4096 or depth == 1)


def full(methods=("unmodified", SELFEXTEND), folder="results/a", **changes):
    return run([one for method in methods for one in grid(method, found(method))], folder, methods=methods, **changes)


def score_table(*all_runs):
    return next(tables.score_tables("passkey", runs.together(all_runs), ["length"]))


class Page(HTMLParser):
    """What a page would load, its tags, and its text."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.tags, self.text = [], set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "srcset", "href", "data", "poster")]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1)],
)
def test_wilson_against_published_values(successes, count, low, high):
    assert estimates.wilson(successes, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("freedom", "point"), [(3, 3.1824), (9, 2.2622), (30, 2.0423)])
def test_student_against_published_values(freedom, point):
    assert estimates._student(freedom) == pytest.approx(point, rel=3e-3)


def test_estimates():
    assert estimates.estimate([], proportion=True) is None
    assert estimates.estimate([2.0, 3.0], proportion=False).interval is None
    some = estimates.estimate([1.0, 2.0, 3.0, 4.0], proportion=False)
    assert some.mean == 2.5
    assert some.interval == pytest.approx((2.5 - 2.054, 2.5 + 2.054), abs=0.01)  # 3.1824 * 1.2910 / 2


def test_means_counts_intervals_and_noise():
    table = score_table(full())
    assert table.columns == ("method", "4k", "8k", "all")
    assert [[cell.text for cell in one] for one in table.rows] == [
        ["unmodified", "1.00", "0.50", "0.75"],
        [SELFEXTEND, "1.00", "1.00", "1.00"],
    ]
    assert table.rows[0][2].detail == "0.15 to 0.85, n=4"
    assert [cell.mark for cell in table.rows[0]] == [""] * 4
    assert [cell.mark for cell in table.rows[1]] == ["", "≈", "≈", "≈"]  # four rows tell little
    assert "overlaps that of the unmodified model" in table.note


def test_no_mark_where_the_intervals_are_apart():
    rows = [
        row(method, float(method == SELFEXTEND), sample=i) for method in ("unmodified", SELFEXTEND) for i in range(9)
    ]
    table = next(tables.score_tables("passkey", runs.together([run(rows)]), ["length"]))
    assert [cell.mark for cell in table.rows[1]] == ["", ""]
    assert table.columns == ("method", "all")


def test_a_task_without_words_of_its_own():
    rows = [
        row(method, 7.0 + i % 2, task="new_task", sample=i, cell={"book": book, "fixed": 1}, metric="bits_per_byte")
        for method in ("unmodified", SELFEXTEND)
        for i, book in enumerate(["alice", "frost"] * 4)
    ]
    page = report.build([run(rows, task="new_task")])
    (section,) = page.sections
    assert (page.title, section.pictures) == ("New task", ())
    assert [table.caption for table in section.tables] == ["Bits per byte by book"]
    assert section.tables[0].columns == ("method", "alice", "frost", "all")
    assert section.tables[0].rows[0][3].detail == "7.05 to 7.95, n=8"
    assert "better" not in section.tables[0].note
    assert "7.50" in report.to_html(page)


def test_what_a_task_computes_its_metrics_of_is_not_shown():
    rows = [row("unmodified", 1.0, sample=i) for i in range(2)]
    rows = [one.model_copy(update={"scores": one.scores | {"tokens": 9.0}}) for one in rows]
    series = runs.together([run(rows)])
    assert [table.caption for table in tables.score_tables("passkey", series, None)] == ["Exact match"]
    captions = [table.caption for table in tables.score_tables("other", series, None)]
    assert captions == ["Exact match", "Tokens"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (0.0512, "0.0512"), (7.1234, "7.12"), (-3.0, "-3.00"), (2.5e9, "2.5e+09")]
)
def test_figures_of_any_size(value, text):
    assert tables.figure(value, proportion=False) == text


def test_numbers_are_in_order_and_words_after_them():
    rows = [row("unmodified", 1.0, cell={"x": x}, sample=i) for i, x in enumerate([10, "b", 9, 2.5, "a"])]
    assert tables.values_of("x", runs.together([run(rows)])) == [2.5, 9, 10, "a", "b"]


def test_the_same_method_in_two_folders_stays_apart():
    series = runs.together([full(folder="a"), full(folder="b")])
    assert [one.label for one in series] == [
        "unmodified in a",
        "unmodified in b",
        f"{SELFEXTEND} in a",
        f"{SELFEXTEND} in b",
    ]
    assert [runs.baseline(one, series) for one in series] == [None, None, series[0], series[1]]
    (section,) = report.build([full(folder="a"), full(folder="b")]).sections
    assert "unmodified is in 2 folders (a, b): each is shown for itself" in section.notices[0]
    assert len(section.tables[0].rows) == 4


def test_methods_of_two_folders_are_put_together():
    one, other = full(("unmodified",), "a"), full((SELFEXTEND,), "b")
    series = runs.together([other, one])
    assert [each.label for each in series] == ["unmodified", SELFEXTEND]
    assert runs.baseline(series[1], series) is series[0]
    assert runs.notices([one, other], series) == []


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        ({"settings": SETTINGS | {"digits": 9}}, "The folders differ in digits:"),
        ({"model": "other", "model_hash": "g"}, "The folders differ in model, model hash:"),
    ],
)
def test_folders_that_differ_are_not_compared(change, notice):
    one, other = full(("unmodified",), "a"), full((SELFEXTEND,), "b", **change)
    series = runs.together([one, other])
    assert runs.baseline(series[1], series) is None
    notices = runs.notices([one, other], series)
    assert notices[0].startswith(notice)
    assert notices[-1].startswith("Nothing to compare with")
    assert (series[1].label == f"{SELFEXTEND} on other") == ("model" in change)


def test_other_devices_and_dtypes_are_told():
    rows = [row("unmodified", 1.0), row("unmodified", 1.0, sample=1, facts=FACTS.model_copy(update={"dtype": "half"}))]
    mixed = run(rows, settings={"x": 1}, methods=("unmodified",))
    assert runs.notices([mixed], runs.together([mixed])) == [
        "Not all rows were computed with the same dtype: float32, half."
    ]
    values = {row[0].text: row[1].text for row in tables.made_table(mixed).rows}
    assert values["dtype"] == "float32 (1 row); half (1 row)"


def test_partial_results():
    rows = grid("unmodified", found("unmodified"))[:5]
    partial = run(rows)
    (section,) = report.build([partial]).sections
    assert section.notices[0].startswith(
        f"results/a is not finished. Examples so far: unmodified 5 of 8, {SELFEXTEND} 0 of 8."
    )
    assert [cell.detail[-3:] for cell in section.tables[0].rows[0][1:]] == ["n=4", "n=1", "n=5"]
    values = [row[1].text for row in tables.made_table(partial).rows if row[0].text == "rows"]
    assert values == ["unmodified: 5 of 8", f"{SELFEXTEND}: 0 of 8"]


def test_failed_examples():
    memory = [f"OutOfMemoryError: tried to allocate {i}.5 GiB" for i in range(3)]
    rows = [*grid("unmodified", found("unmodified"))]
    rows += [row(SELFEXTEND, score, sample=i) for i, score in enumerate([1.0, "ValueError: no", *memory])]
    (section,) = report.build([run(rows)]).sections
    assert [[cell.text for cell in one] for one in section.failures.rows] == [
        [SELFEXTEND, "4 of 5", "3", memory[0]],
        [SELFEXTEND, "4 of 5", "1", "ValueError: no"],
    ]
    assert "4 of 13 examples failed: they have no score, and no mean counts them." in section.notices
    assert section.tables[0].rows[1][1].text == "1.00"
    assert report.build([full()]).sections[0].failures is None


def test_all_failed():
    page = report.build([run([row("unmodified", "ValueError: no")])])
    assert page.sections[0].tables == ()
    assert "ValueError: no" in report.to_html(page)
    assert "ValueError: no" in report.to_markdown(page, "x")


def test_markup_in_results_is_shown_as_it_is():
    nasty = full(("unmodified", NASTY), folder=f"dir {NASTY}", model=NASTY, settings=SETTINGS | {NASTY: NASTY})
    failed = row("unmodified", f"ValueError: {NASTY}", sample=7)
    page = report.build([runs.Run(nasty.folder, nasty.config, (*nasty.rows, failed))])
    html, plain = report.to_html(page), Page(report.to_html(page))
    assert "script" not in plain.tags
    assert "<script" not in html
    assert plain.text.count(NASTY) >= 5
    shown = Page(MarkdownIt("commonmark").enable("table").render(report.to_markdown(page, "x_files")))
    assert shown.tags <= {"h1", "h2", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "img", "ul", "li"}
    assert shown.text.count(NASTY) >= 5


def test_the_page_loads_nothing():
    html = report.to_html(report.build([full()]))
    page = Page(html)
    assert len(page.loaded) == 3  # two methods and their colors
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loaded)
    assert "script" not in page.tags
    assert not re.search(r"https?:|@import|url\(", html)
    for address in page.loaded:
        svg = base64.b64decode(address.split(",")[1]).decode()
        links = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith("#") for link in links)


def test_a_picture_for_each_method_and_one_scale():
    pictures = figures.pictures_of("passkey", runs.together([full()]))
    assert [picture.name for picture in pictures] == ["passkey-1", "passkey-2", "passkey-colors"]
    assert pictures[0].alt.endswith("for unmodified: exact match 0.75 over 8 texts")
    assert figures.pictures_of("passkey", runs.together([full()])) == pictures  # byte for byte
    without = run([row("unmodified", 1.0, cell={"size": 3})])
    assert figures.pictures_of("passkey", runs.together([without])) == []


def test_more_is_darker_in_grey_too():
    grey = [sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), figures.shade(i / 50), strict=True)) for i in range(51)]
    assert grey == sorted(grey, reverse=True)
    assert grey[0] > 0.9
    assert grey[-1] < 0.3


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'ropewalk\[plot\]'"):
        report.build([full()])


def test_two_tasks_are_two_sections():
    other = run([row("unmodified", 2.0, task="other")], "b", task="other", methods=("unmodified",))
    page = report.build([full(), other])
    assert page.title == "Evaluation"
    assert [section.about.title for section in page.sections] == ["Pass key retrieval", "Other"]
    assert [table.caption for table in page.made] == ["results/a", "b"]


def test_written_files(tmp_path):
    page, markdown = report.write(report.build([full()]), tmp_path / "new" / "page.html")
    assert page.read_text().startswith("<!doctype html>")
    linked = re.findall(r"\]\(<(.*?)>\)", markdown.read_text())
    assert len(linked) == 3
    assert all((markdown.parent / link).read_bytes().startswith(b"<?xml") for link in linked)


def test_read(tmp_path):
    with pytest.raises(ResultsError, match="there is no folder"):
        report.read(tmp_path / "none")
    with pytest.raises(ResultsError, match="holds no results"):
        report.read(tmp_path)
    results = Results(tmp_path, config())
    with pytest.raises(ResultsError, match="has no rows yet"):
        report.read(tmp_path)
    for one in (row("unmodified", "ValueError: no"), row("unmodified", 1.0), row(SELFEXTEND, 0.0)):
        results.add(one)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"task": "pass')  # a run that still goes on, or was killed
    read = report.read(tmp_path)
    assert [(one.method, one.error) for one in read.rows] == [("unmodified", None), (SELFEXTEND, None)]


def test_perplexity_is_pooled_over_tokens():
    """Not a mean of perplexities: the longer text counts for more."""
    one = estimates.pooled([2.0, 30.0], [1.0, 10.0])
    assert one.mean == pytest.approx(math.exp(32 / 11))
    assert one.interval is None
    three = estimates.pooled([2.0, 30.0, 9.0], [1.0, 10.0, 3.0])
    assert three.interval[0] < three.mean < three.interval[1]
    alike = estimates.pooled([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert alike.interval == pytest.approx((math.exp(2), math.exp(2)))
    assert estimates.pooled([], []) is None


def test_curves_need_two_values():
    rows = [
        row(method, 1.0, task="passkey-length", cell={"digits": digits})
        for method in ("unmodified", "$a$")
        for digits in (5, 36)
    ]
    one = run(rows, task="passkey-length", methods=("unmodified", "$a$"))
    [picture] = figures.pictures_of("passkey-length", runs.together([one]))
    assert "2 methods" in picture.alt
    assert b"<svg" in picture.svg
    few = run([its for its in rows if its.cell["digits"] == 5], task="passkey-length", methods=("unmodified", "$a$"))
    assert figures.pictures_of("passkey-length", runs.together([few])) == []
