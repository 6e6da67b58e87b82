# SPDX-License-Identifier: Apache-2.0
import base64
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made_up import FACTS, SELFEXTEND, SETTINGS, config, found, full, grid, row, run
from markdown_it import MarkdownIt

from ropewalk.eval import report
from ropewalk.eval.report import build, tables
from ropewalk.eval.report.notices import notices
from ropewalk.eval.report.series import baseline, together
from ropewalk.eval.results import Results, ResultsError, Run, read
from ropewalk.files import printable

NASTY = "<script>alert(1)</script> | **a** `b` & $x_1$"


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


def test_a_task_without_words_of_its_own():
    rows = [
        row(method, 7.0 + i % 2, task="new_task", sample=i, cell={"book": book, "fixed": 1}, metric="bits_per_byte")
        for method in ("unmodified", SELFEXTEND)
        for i, book in enumerate(["alice", "frost"] * 4)
    ]
    page = report.build([run(rows, task="new_task")])
    (section,) = page.sections
    assert (page.title, section.figures) == ("New task", ())
    assert [table.caption for table in section.tables] == [
        "Bits per byte by book",
        "Bits per byte by book: difference to the unmodified model",
    ]
    assert section.tables[0].columns == ("method", "alice", "frost", "all")
    assert section.tables[0].rows[0][3].details == ("7.05 to 7.95", "n=8")
    assert "better" not in section.tables[0].note
    assert "7.50" in report.to_html(page)


def test_the_same_method_in_two_folders_stays_apart():
    series = together([full(folder="a"), full(folder="b")])
    assert [one.label for one in series] == [
        "unmodified in a",
        "unmodified in b",
        f"{SELFEXTEND} in a",
        f"{SELFEXTEND} in b",
    ]
    assert [baseline(one, series) for one in series] == [None, None, series[0], series[1]]
    (section,) = report.build([full(folder="a"), full(folder="b")]).sections
    assert "unmodified and 1 other method are in 2 folders (a, b): each is shown for itself" in section.notices[0]
    assert len(section.tables[0].rows) == 4


def test_methods_of_two_folders_are_put_together():
    one, other = full(("unmodified",), "a"), full((SELFEXTEND,), "b")
    series = together([other, one])
    assert [each.label for each in series] == ["unmodified", SELFEXTEND]
    assert baseline(series[1], series) is series[0]
    assert notices([one, other], series) == []


@pytest.mark.parametrize(
    ("change", "notice"),
    [
        ({"settings": SETTINGS | {"digits": 9}}, "The folders differ in digits:"),
        ({"model": "other", "model_hash": "g"}, "The folders differ in model, model hash:"),
        ({"config_hash": "d"}, "The folders differ in config hash:"),
        ({"tokenizer_hash": "u"}, "The folders differ in tokenizer hash:"),
    ],
)
def test_folders_that_differ_are_not_compared(change, notice):
    hashes = {"config_hash": "c", "tokenizer_hash": "t"}
    one, other = full(("unmodified",), "a", **hashes), full((SELFEXTEND,), "b", **hashes | change)
    series = together([one, other])
    assert baseline(series[1], series) is None
    found_notices = notices([one, other], series)
    assert found_notices[0].startswith(notice)
    assert found_notices[-1].startswith("Nothing to compare with")
    assert (series[1].label == f"{SELFEXTEND} on other") == ("model" in change)


def test_other_devices_and_dtypes_are_told():
    rows = [row("unmodified", 1.0), row("unmodified", 1.0, sample=1, facts=FACTS.model_copy(update={"dtype": "half"}))]
    mixed = run(rows, settings={"x": 1}, methods=("unmodified",))
    assert notices([mixed], together([mixed])) == ["Not all rows were computed with the same dtype: float32, half."]
    values = {row[0].text: row[1].text for row in tables.made_table(mixed).rows}
    assert values["dtype"] == "float32 (1 row); half (1 row)"


def test_partial_results():
    rows = grid("unmodified", found("unmodified"))[:5]
    partial = run(rows)
    (section,) = report.build([partial]).sections
    assert section.notices[0].startswith(
        f"results/a is not finished. Examples so far: unmodified 5 of 8, {SELFEXTEND} 0 of 8."
    )
    assert [cell.details[1:] for cell in section.tables[0].rows[0][1:]] == [
        ("n=4", "places=2"), ("n=1",), ("n=5", "places=3")
    ]  # fmt: skip
    values = [row[1].text for row in tables.made_table(partial).rows if row[0].text == "rows"]
    assert values == ["unmodified: 5 of 8", f"{SELFEXTEND}: 0 of 8"]


def test_methods_that_changed_nothing():
    methods = ("unmodified", SELFEXTEND, "selfextend(group_size=1, window=1024)", "somebody's")
    whole = full(methods, trained_window=8192)
    for count, names in ((1024, ", ".join(methods[1:3])), (1025, methods[2])):
        rows = tuple(row.model_copy(update={"prompt_tokens": count}) for row in whole.rows)
        [section] = build([replace(whole, rows=rows)]).sections
        assert section.notices == (
            f"No prompt has more than {count:,} tokens, and nothing is changed in those by {names}: they were read as "
            "by the unmodified model.",
        )
    # Where that is not known, nothing is said.
    assert build([whole]).sections[0].notices == ()


def test_failed_examples():
    memory = [f"OutOfMemoryError: tried to allocate {i}.5 GiB" for i in range(3)]
    rows = [*grid("unmodified", found("unmodified"))]
    rows += [row(SELFEXTEND, score, sample=i) for i, score in enumerate([1.0, "ValueError: no", *memory])]
    (section,) = report.build([run(rows)]).sections
    assert [[cell.text for cell in one] for one in section.tables[-1].rows] == [
        [SELFEXTEND, "4 of 5", "3", memory[0]],
        [SELFEXTEND, "4 of 5", "1", "ValueError: no"],
    ]
    assert "4 of 13 examples failed: they have no score, and no mean counts them." in section.notices
    assert section.tables[0].rows[1][1].text == "1.00"
    assert {table.kind for table in report.build([full()]).sections[0].tables} == {"scores"}


def test_all_failed():
    page = report.build([run([row("unmodified", "ValueError: no")])])
    assert [table.kind for table in page.sections[0].tables] == ["failures"]
    assert "ValueError: no" in report.to_html(page)
    assert "ValueError: no" in report.to_markdown(page, "x")


def test_markup_in_results_is_shown_as_it_is():
    nasty = full(("unmodified", NASTY), folder=f"dir {NASTY}", model=NASTY, settings=SETTINGS | {NASTY: NASTY})
    failed = row("unmodified", f"ValueError: {NASTY}", sample=7)
    page = report.build([Run(nasty.folder, nasty.config, (*nasty.rows, failed))])
    html, plain = report.to_html(page), Page(report.to_html(page))
    assert "script" not in plain.tags
    assert "<script" not in html
    assert plain.text.count(NASTY) >= 5
    shown = Page(MarkdownIt("commonmark").enable("table").render(report.to_markdown(page, "x_files")))
    assert shown.tags <= {"h1", "h2", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "img", "ul", "li"}
    assert shown.text.count(NASTY) >= 5


# What files of somebody else may hold where a name is expected.
NAMES = {
    "a path": "../../../PWNED",
    "an absolute path": "/tmp/PWNED",
    "no name": "",
    "a folder": ".",
    "a long name": "x" * 300,
    "a picture of Markdown": "x>) <script>alert(1)</script> ![a](<b",
    "HTML": '"><img src=x onerror=alert(1)><!--',
    "an end of a comment": "--><svg onload=alert(1)>--!>",
    "a link": "[a](javascript:alert(1)) https://a.example www.a.example a@b.example <https://b.example>",
    "attributes": "x {onclick=alert(1)} {: onclick=alert(1) } {{ 7 * 7 }} {% raw %}",
    "a formula": r"$\frac$ $$x$$ \(x\) `x` ~~x~~ ^x^",
    "a line": "a\n\n# b\r\n<script>\x0b\u2028---\n",
    "what steers a terminal": "\x1b]0;x\x07\x1b[2J\x9b31m\x00\x7f\u202egnp.exe\ufeff\ud800",
}


def from_somebody(name):
    """A run whose every word is this one."""
    facts = FACTS.model_copy(update={"device": name, "dtype": name, "commit": name, "versions": {name: name}})
    rows = [
        row(method, score, length, depth, task=name, facts=facts, metric=name, sample=sample)
        for method in ("unmodified", name)
        for length in (1, 2)
        for depth in (0.0, 1.0)
        for sample, score in enumerate((0.5, 1.0, name or "error"))
    ]
    rows = [one.model_copy(update={"cell": {name: one.cell["length"], "depth": one.cell["depth"]}}) for one in rows]
    rows += [row("unmodified", 1.0, cell={name: name, "x": 1}, sample=9, metric=name, task=name, facts=facts)]
    changes = {"settings": {name: [name, {name: name}]}, "methods": ("unmodified", name), "model": name, "task": name}
    return Run(name, config(**changes), tuple(rows), (name, name))


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_words_of_somebody_else_are_words(name, tmp_path):
    """Wherever they go: the names of files, HTML, Markdown and pictures."""
    page, markdown = report.write(report.build([from_somebody(name), full()]), tmp_path / "a" / "b" / "page.html")
    files = sorted(str(path.relative_to(page.parent)) for path in tmp_path.rglob("*") if path.is_file())
    pictures = [*(f"task-1-{i}" for i in (1, 2, "colors")), *(f"passkey-{i}" for i in (1, 2, "colors"))]
    assert files == sorted(["page.html", "page.md", *(f"page_files/{picture}.svg" for picture in pictures)])
    html, plain = (Page(page.read_text()) for _ in range(2))
    assert not html.tags & {"script", "svg", "a"}
    assert html.tags == Page(report.to_html(report.build([full(), full(task="other")]))).tags | {"ul", "li"}
    assert all(address.startswith("data:image/svg+xml;base64,") for address in html.loaded)
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(markdown.read_text())
    shown = Page(rendered)
    assert shown.tags <= {
        "h1",
        "h2",
        "p",
        "strong",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "img",
        "ul",
        "li",
        "hr",
    }
    assert shown.loaded == [f"page_files/{picture}.svg" for picture in pictures]
    for path in tmp_path.rglob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(path).getroot().iter()}
        assert tags <= {"svg", "g", "path", "use", "defs", "style", "metadata", "rect", "clipPath", "RDF", "Work",
                        "type", "format", "creator", "Agent", "title"}  # fmt: skip
    for path in (page, markdown):
        assert all(one.isprintable() or one == "\n" for one in path.read_text())
    for text in (plain.text, shown.text):
        assert " ".join(text.split()).count(printable(name)) >= 10


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
        read(tmp_path / "none")
    with pytest.raises(ResultsError, match="holds no results"):
        read(tmp_path)
    results = Results(tmp_path, config())
    assert read(tmp_path).rows == ()
    with pytest.raises(ResultsError, match="has no rows yet"):
        report.build([read(tmp_path)])
    for one in (row("unmodified", "ValueError: no"), row("unmodified", 1.0), row(SELFEXTEND, 0.0)):
        results.add(one)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"task": "pass')  # a run that still goes on, or was killed
    there = read(tmp_path)
    assert [(one.method, one.error) for one in there.rows] == [("unmodified", None), (SELFEXTEND, None)]
