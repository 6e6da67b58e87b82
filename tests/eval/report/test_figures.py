# SPDX-License-Identifier: Apache-2.0
import math
import re

import pytest
from made_up import SELFEXTEND, full, grid, row, run

from ropewalk.eval.methods import parse_all
from ropewalk.eval.report.curves import MOST_LINES
from ropewalk.eval.report.drawing import MARK, shade
from ropewalk.eval.report.figures import figures_of
from ropewalk.eval.report.heat_maps import Colors, colors_of
from ropewalk.eval.report.scores import Score
from ropewalk.eval.report.series import together
from ropewalk.eval.report.sweeps import sweeps_of, value, verdict
from ropewalk.eval.tasks import about

WINDOW = 4096


def figures(*all_runs, task="passkey"):
    return figures_of(task, together(all_runs), about(task))


def words(picture):
    """The texts in a picture: matplotlib draws their glyphs, and says in comments what they are."""
    return re.findall(r"<!-- (.*?) -->", picture.svg.decode())


def marked(picture):
    """How many lines are drawn in the color of marks."""
    return picture.svg.decode().count(f"stroke: {MARK}")


def names(figure):
    return [picture.name for picture in figure.pictures]


def test_a_picture_for_each_method_and_one_scale():
    [figure] = figures(full())
    assert names(figure) == ["passkey-1", "passkey-2", "passkey-colors"]
    assert figure.pictures[0].alt.endswith("for unmodified: exact match 0.75 over 8 texts")
    assert figures(full()) == [figure]  # byte for byte
    assert figures(run([row("unmodified", 1.0, cell={"size": 3})])) == []


@pytest.mark.parametrize(("window", "lines"), [(None, 0), (2048, 0), (4096, 1), (5000, 1), (8192, 0)])
def test_the_trained_window_is_marked_where_there_are_lengths_on_both_sides(window, lines):
    [figure] = figures(full(trained_window=window))
    assert marked(figure.pictures[0]) == lines
    assert ("dashed vertical line" in figure.caption) == bool(lines)
    assert any(text.startswith("dashed: trained window") for text in words(figure.pictures[0])) == bool(lines)


@pytest.mark.parametrize(("task", "words"), [("passkey", "downwards the key"), ("new", "the darker the better")])
def test_captions_say_what_to_look_at(task, words):
    [figure] = figures(full(task=task), task=task)
    assert words in figure.caption


def by_length(methods, lengths=(2048, 4096, 8192), task="new", metric="accuracy", score=0.5):
    return [
        row(method, score, length, cell={"length": length}, task=task, metric=metric)
        for method in methods
        for length in lengths
    ]


def test_curves_over_the_only_number_that_varies():
    [figure] = figures(run(by_length(["unmodified", SELFEXTEND]), task="new", trained_window=WINDOW), task="new")
    [picture] = figure.pictures
    assert picture.alt == "accuracy by length, a line for each of 2 methods"
    assert {"2k", "4k", "8k", "trained window, 4k", "unmodified", SELFEXTEND} <= set(words(picture))
    one_length = by_length(["unmodified"], [4096])
    assert figures(run(one_length, task="new"), task="new") == []


def test_one_length_has_curves_over_the_depths():
    [figure] = figures(
        run([row(method, 1.0, depth=at) for method in ("unmodified", SELFEXTEND) for at in (0.0, 0.5, 1.0)])
    )
    assert (figure.title, len(figure.pictures)) == ("By depth", 1)
    assert figure.caption.startswith("One line for each method: the exact match by depth.")
    assert {"start", "50%", "end"} <= set(words(figure.pictures[0]))


def test_no_more_lines_in_a_picture_than_can_be_told_apart():
    methods = ["unmodified", *(f"method {i}" for i in range(MOST_LINES + 1))]
    found = figures(run(by_length(methods), task="new", methods=tuple(methods)), task="new")
    figure = found[-1]
    assert names(figure) == ["new-1", "new-2"]
    assert all("unmodified" in words(picture) for picture in figure.pictures)
    assert methods[-1] in words(figure.pictures[1])


def test_a_method_may_look_like_a_formula():
    found = figures(run(by_length(["unmodified", "$a$"]), task="new", methods=("unmodified", "$a$")), task="new")
    assert "$a$" in words(found[0].pictures[0])


def test_more_is_darker_in_grey_too():
    grey = [sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), shade(i / 50), strict=True)) for i in range(51)]
    assert grey == sorted(grey, reverse=True)
    assert grey[0] > 0.9
    assert grey[-1] < 0.3


def test_better_is_darker_whichever_way_that_is():
    share = Score(title="x", name="x", is_share=True)
    assert [colors_of(share, []).goodness(value) for value in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]
    perplexity = Colors(Score(title="x", name="x", higher_is_better=False), worst=1000.0, best=10.0)
    assert [perplexity.goodness(value) for value in (10, 100, 1000)] == pytest.approx([1.0, 0.5, 0.0])
    assert perplexity.goodness(math.inf) == 0.0


GRID = "selfextend(group_size={2, 4, 8, 16}, window={512, 1024, 1536})"


def sweep(*texts, lengths=(8192, 16384), beyond=True, **changes):
    """All combinations, with a score that says which; those beyond eq. 4 failed."""
    methods = parse_all(["unmodified", *texts], 1, WINDOW)
    rows = []
    for method in methods:
        for length in lengths:
            reaches = method.change is None or not beyond or method.change.max_length(WINDOW) >= length
            rows += [row(method.name, 0.5 if reaches else "no", length, sample=i, depth=0.0) for i in range(2)]
    return run(rows, methods=tuple(method.name for method in methods), **{"trained_window": WINDOW} | changes)


def test_a_sweep_has_heat_maps_and_curves_for_each_length():
    figure = figures(sweep(GRID))[0]
    assert figure.title == "Parameters of selfextend"
    assert names(figure) == [
        *(f"passkey-sweep-1-{what}" for what in ("map-1", "map-2", "colors", "curve-1", "curve-2"))
    ]  # fmt: skip
    for map_, length in zip(figure.pictures[:2], ("8k tokens", "16k tokens"), strict=True):
        assert {"2", "4", "8", "16", "512", "1024", "1536", "group_size", "window", length} <= set(words(map_))
    # The parameter with the most values is across; the others have a line each, like the unmodified model.
    assert {"window=512", "window=1024", "window=1536", "unmodified"} <= set(words(figure.pictures[3]))
    assert "eq. 5" in figure.caption


def test_the_rules_of_the_paper_are_those_that_are_marked():
    """Eq. 5 as the paper has it, W + (N - W) / G < L / 2, and eq. 4, (L - W) G + W; both but for rounding."""
    length = 16384
    [found] = sweeps_of(together([sweep(GRID)]))
    assert len(found.settings) == 12
    for one in found.settings:
        size, window = value(one, "group_size"), value(one, "window")
        assert (verdict(one, length) == "recommended") == (window + (length - window) / size < WINDOW / 2)
        assert (verdict(one, length) == "beyond") == ((WINDOW - window) * size + window < length)
    assert {verdict(one, length) for one in found.settings} == {"recommended", "within", "beyond"}


def test_marks_in_a_sweep_need_the_trained_window():
    with_rules, without = (figures(sweep(GRID, trained_window=window))[0] for window in (WINDOW, None))
    assert marked(with_rules.pictures[1]) > 0
    assert "url(#h" in with_rules.pictures[1].svg.decode()  # hatches
    assert marked(without.pictures[1]) == 0
    assert "url(#h" not in without.pictures[1].svg.decode()
    assert "eq." not in without.caption


def test_the_rules_go_by_the_tokens_of_the_prompts():
    """16 k tokens were asked for; a group of four just reaches the prompts, which are shorter."""
    asked = sweep(GRID, lengths=(16384,), beyond=False)
    shorter = [one.model_copy(update={"prompt_tokens": 11000}) for one in asked.rows]
    hatched = [
        "url(#h" in figures(run(rows, methods=asked.config.methods, trained_window=WINDOW))[0].pictures[0].svg.decode()
        for rows in (asked.rows, [one for one in shorter if "group_size=2" not in one.method])
    ]
    assert hatched == [True, False]


def test_failed_settings_say_so():
    assert "2 failed" in words(figures(sweep(GRID))[0].pictures[1])


def test_one_parameter_has_curves_alone():
    figure = figures(sweep("selfextend(group_size={2, 4, 8}, window=512)"))[0]
    assert names(figure) == ["passkey-sweep-1-curve-1"]
    assert {"8k tokens", "16k tokens", "unmodified, 8k tokens"} <= set(words(figure.pictures[0]))


def test_other_parameters_are_fixed_in_each_heat_map():
    figure = figures(sweep("self(capacity={9, 17}, rate={0.02, 0.04}, window={512, 1024})", lengths=(8192,)))[0]
    maps = [picture for picture in figure.pictures if "-map-" in picture.name]
    assert [picture.alt.rpartition(": ")[2] for picture in maps] == ["8k tokens, window=512", "8k tokens, window=1024"]


def test_baselines_sweep_too():
    figure = figures(sweep("yarn(factor={2, 4, 8})", beyond=False))[0]
    assert figure.title == "Parameters of yarn"
    assert "eq." not in figure.caption


def test_what_is_no_sweep():
    two = ("selfextend(group_size=2, window=512)", "selfextend(group_size=4, window=1024)")
    titles = [figure.title for figure in figures(sweep(*two, "yarn(factor=2)", beyond=False))]
    assert titles == ["By length"]
    assert sweeps_of(together([full(("unmodified", "no method", SELFEXTEND))])) == []


def test_a_sweep_over_tasks_shows_them_and_their_average():
    methods = ("unmodified", *(one.name for one in parse_all([GRID], 1, WINDOW)))
    rows = [
        row(method, 0.5, cell={"task": name}, length=name, task="longbench", metric="score")
        for method in methods
        for name in ("qasper", "lcc")
    ]
    figure = figures(run(rows, task="longbench", methods=methods), task="longbench")[0]
    maps = [picture for picture in figure.pictures if "-map-" in picture.name]
    assert [picture.alt.rpartition(": ")[2] for picture in maps] == ["average", "lcc", "qasper"]
    assert "50.0" in words(maps[0])


def by_position(books, methods=("unmodified", SELFEXTEND), buckets=16):
    rows = []
    for method in methods:
        for length in (8192, 1024 * buckets):
            for book in range(books):
                made = row(method, 0.0, length, cell={"length": length}, sample=book, task="perplexity")
                sums = {"nll": 5.0, "tokens": 2.0, "perplexity": 12.2}
                for begin in range(0, length, 1024):
                    sums |= {f"nll_{begin}": 2.0 + book, f"tokens_{begin}": 1.0}
                rows.append(made.model_copy(update={"scores": sums}))
    return run(rows, task="perplexity", methods=methods, trained_window=WINDOW)


@pytest.mark.parametrize(("books", "bands"), [(2, 0), (3, 2)])
def test_perplexity_by_position(books, bands):
    figure = figures(by_position(books), task="perplexity")[-1]
    assert (figure.title, names(figure)) == ("By position", ["perplexity-positions"])
    [picture] = figure.pictures
    # Of the longest texts.
    assert {"0", "2k", "14k", "trained window, 4k"} <= set(words(picture))
    assert picture.svg.decode().count("fill-opacity: 0.18") == bands


def test_two_folders_have_a_sweep_each():
    one, other = (sweep(GRID, folder=folder, settings={"length": length}) for folder, length in (("a", 8), ("b", 16)))
    titles = [figure.title for figure in figures(one, other)]
    assert titles[:2] == ["Parameters of selfextend at length 8", "Parameters of selfextend at length 16"]


def test_failed_rows_have_no_figures():
    assert figures(run([row("unmodified", "ValueError: no")])) == []
    assert figures(run(grid("unmodified", lambda *_: "no"))) == []


def test_one_method_far_above_does_not_flatten_the_others():
    rows = by_length(["unmodified", SELFEXTEND, "other"], metric="perplexity", score=20.0)
    for one in rows:
        if one.method == "unmodified" and one.cell["length"] == 8192:
            one.scores["perplexity"] = 28724.0
    [figure] = figures(run(rows, task="new"), task="new")
    assert "what goes beyond the top reaches 28,724" in words(figure.pictures[0])
    assert not any("(beyond the top)" in word for word in words(figure.pictures[0]))
    for one in rows:
        if one.method == "other":
            one.scores["perplexity"] = 500.0
    # Nothing of it is to be seen, and the legend says so.
    [figure] = figures(run(rows, task="new"), task="new")
    assert "other (beyond the top)" in words(figure.pictures[0])
    [figure] = figures(run([row for row in rows if row.method == SELFEXTEND], task="new"), task="new")
    assert not any("beyond the top" in word for word in words(figure.pictures[0]))


def test_methods_of_a_large_sweep_are_in_its_own_figure_alone():
    methods = [f"selfextend(group_size={g}, window={w})" for g in (2, 4, 8) for w in (256, 512, 1024)]
    rows = by_length(["unmodified", "yarn(factor=2.0)", *methods])
    found = figures(run(rows, task="new", methods=("unmodified", "yarn(factor=2.0)", *methods)), task="new")
    assert [figure.title for figure in found] == ["Parameters of selfextend", "By length"]
    assert "a line for each of 2 methods" in found[1].pictures[0].alt
    rows = by_length(["unmodified", *methods])
    found = figures(run(rows, task="new", methods=("unmodified", *methods)), task="new")
    assert [figure.title for figure in found] == ["Parameters of selfextend"]
