# SPDX-License-Identifier: Apache-2.0
import gc
import json
import math
import weakref

import pytest

from ropewalk.eval.methods import Method, parse_all
from ropewalk.eval.results import Results, read
from ropewalk.eval.runner import check, config_of, facts_of, run
from ropewalk.eval.share import Share
from ropewalk.eval.subjects import Dummy, Hashes, Model
from ropewalk.eval.tasks.base import Outcome, spread
from ropewalk.eval.tasks.passkey import Passkey
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.sources import Source
from ropewalk.testing import tiny_model

METHODS = (Method("unmodified"), Method("other"))


def task(**settings):
    return Passkey(**{"lengths": (300, 100), "depths": (0.0, 1.0), "samples": 2, **settings})


def one_outcome(one, example, subject):
    return one.outcomes([example], subject)[0]


def start(folder, subject, **options):
    one = task()
    return one, Results(folder, config_of(one, METHODS, subject, 0), **options), facts_of(one, subject, 0)


def test_every_example_under_every_method(tmp_path):
    subject = Dummy()
    one, results, facts = start(tmp_path, subject)
    seen = []
    counts = run(one, METHODS, subject, results, facts, on_row=lambda row, done, total: seen.append((done, total)))
    assert (counts.done_before, counts.done, counts.failed) == (0, 16, 0)
    assert seen == [(i, 16) for i in range(1, 17)]
    rows = list(read(tmp_path).rows)
    assert len({row.key for row in rows}) == 16
    assert [row.cell["length"] for row in rows[:8]] == [100] * 4 + [300] * 4
    assert all(row.output == "12345" and row.scores == {"exact_match": 0.0} for row in rows)
    # The same examples for every method.
    assert [row.target for row in rows[:8]] == [row.target for row in rows[8:]]


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    class Stopped(Dummy):
        def answers(self, prompts):
            if len(list(read(tmp_path).rows)) == 5:
                raise KeyboardInterrupt
            return ["no"] * len(prompts)

    one, results, facts = start(tmp_path, Stopped())
    with pytest.raises(KeyboardInterrupt):
        run(one, METHODS, Stopped(), results, facts)
    results.close()
    before = (tmp_path / "results.jsonl").read_text()
    subject = Dummy()
    one, results, facts = start(tmp_path, subject)
    counts = run(one, METHODS, subject, results, facts)
    assert (counts.done_before, counts.done) == (5, 11)
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert len(list(read(tmp_path).rows)) == 16
    assert run(one, METHODS, subject, results, facts).done == 0


def test_an_example_that_fails_is_recorded(tmp_path):
    class Failing(Dummy):
        def answers(self, prompts):
            if any(len(one.token_ids) > 200 for one in prompts):
                raise RuntimeError("out of\nmemory")
            return ["no"] * len(prompts)

    subject = Failing()
    one, results, facts = start(tmp_path, subject)
    counts = run(one, METHODS, subject, results, facts)
    assert (counts.done, counts.failed) == (8, 8)
    errors = {row.cell["length"]: row.error for row in read(tmp_path).rows}
    assert errors == {100: None, 300: "RuntimeError: out of memory"}


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e60])
def test_a_score_that_is_no_number_is_a_failure(tmp_path, score):
    class Odd(Passkey):
        def outcomes(self, examples, subject):
            return [Outcome(1, {"exact_match": score if one.tokens == 100 else 1.0}) for one in examples]

    one, subject = Odd(**task().model_dump()), Dummy(batch_size=3)
    with Results(tmp_path, config_of(one, METHODS, subject, 0)) as results:
        counts = run(one, METHODS, subject, results, facts_of(one, subject, 0))
    assert (counts.done, counts.failed) == (8, 8)
    assert {row.error is None: row.cell["length"] for row in read(tmp_path).rows} == {True: 300, False: 100}
    assert read(tmp_path).damaged == ()


def test_what_a_failed_example_held_is_let_go(tmp_path):
    """At once, and not when Python next looks for circles: on a GPU the next example needs that memory."""

    class Large:
        pass

    held = []

    class Failing(Dummy):
        def answers(self, prompts):
            assert not any(one() for one in held)
            mine = Large()
            held.append(weakref.ref(mine))
            try:
                raise MemoryError
            except MemoryError as error:
                first = error  # a circle: the error knows this frame
                raise RuntimeError("out of memory") from first

    one, results, facts = start(tmp_path, Failing())
    gc.disable()
    try:
        assert run(one, METHODS, Failing(), results, facts).failed == 16
    finally:
        gc.enable()
    assert len(held) == 16


def test_a_limit_is_spread_over_all():
    assert list(spread(range(10), None)) == list(spread(range(10), 10)) == list(range(10))
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread(list(range(10)), 1) == [0]


def test_examples_do_not_depend_on_what_else_is_asked(tmp_path):
    subject = Dummy()
    few, many = task(lengths=(300,)), task(lengths=(100, 200, 300), samples=5)
    wanted = {example.name: example for example in many.examples()}
    for example in few.examples():
        assert one_outcome(few, example, subject).target == one_outcome(many, wanted[example.name], subject).target


def test_right_answers_score(tmp_path):
    def find(token_ids):
        return "yes"

    one = task(lengths=(120,), samples=1)
    [example, *_] = one.examples()
    target = one_outcome(one, example, Dummy(find)).target
    assert one_outcome(one, example, Dummy(lambda ids: f" {target}.")).scores == {"exact_match": 1.0}
    assert one_outcome(one, example, Dummy(lambda ids: f" {target}0")).scores == {"exact_match": 0.0}


@pytest.mark.parametrize("digits", [1, 8, 100])
def test_digits_of_the_key(digits):
    one = task(lengths=(2000,), samples=1, digits=digits)
    [example, *_] = one.examples()
    outcome = one_outcome(one, example, Dummy())
    assert len(outcome.target) == digits
    assert outcome.prompt_tokens <= 2000


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_place_is_drawn_from_the_span(depth):
    prompts = []

    class Reading(Dummy):
        def encode(self, text, chat=False):
            prompts.append(text)
            return super().encode(text)

    one = task(lengths=(4000,), depths=(depth,), samples=8)
    places = []
    for example in one.examples():
        one_outcome(one, example, Reading())
        places.append(len(prompts[-1].partition("The pass key is")[0].split()))
    low = depth * (4000 - 400)
    assert len(set(places)) > 3
    # A line of filler is 19 words, the beginning and the question about 30 more.
    assert all(low - 60 <= place <= low + 460 for place in places), places


class Counting(Dummy):
    """Remembers how many prompts it was asked at a time, and fails on those of some lengths."""

    def __init__(self, batch_size, fails=lambda tokens: False):
        super().__init__(batch_size=batch_size)
        self.__dict__.update(asked=[], fails=fails)

    def answers(self, prompts):
        self.asked.append(len(prompts))
        if any(self.fails(len(prompt.token_ids)) for prompt in prompts):
            raise RuntimeError("out of memory")
        return [str(len(prompt.token_ids)) for prompt in prompts]


def test_a_batch_has_the_rows_of_its_examples(tmp_path):
    alone, together = Counting(1), Counting(3)
    for subject, folder in ((alone, "alone"), (together, "together")):
        one, results, facts = start(tmp_path / folder, subject)
        run(one, METHODS, subject, results, facts)
    assert alone.asked == [1] * 16
    assert together.asked == [3, 3, 2] * 2

    def facts_aside(folder):
        return [row.model_copy(update={"facts": None, "seconds": 0}) for row in read(tmp_path / folder).rows]

    assert facts_aside("together") == facts_aside("alone")
    assert {row.facts.batch_size for row in read(tmp_path / "together").rows} == {3}


def test_a_batch_that_fails_is_asked_one_by_one(tmp_path):
    subject = Counting(8, fails=lambda tokens: tokens > 200)
    one, results, facts = start(tmp_path, subject)
    counts = run(one, METHODS, subject, results, facts)
    assert (counts.done, counts.failed) == (8, 8)
    assert subject.asked == [8, *[1] * 8] * 2
    errors = {row.cell["length"]: row.error for row in read(tmp_path).rows}
    assert errors == {100: None, 300: "RuntimeError: out of memory"}


def test_shares_are_all_and_each_has_all_lengths(tmp_path):
    subject = Dummy()
    for index in range(3):
        one, results, facts = start(tmp_path, subject, share=Share(index, 3))
        run(one, METHODS, subject, results, facts)
    rows = list(read(tmp_path).rows)
    assert len({row.key for row in rows}) == len(rows) == 16
    for name in ("results.jsonl", "results-1.jsonl", "results-2.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert {100, 300} == {json.loads(line)["cell"]["length"] for line in lines}


def test_the_commit_can_be_named(monkeypatch):
    monkeypatch.setenv("ROPEWALK_COMMIT", "abc1234")
    assert facts_of(task(), Dummy(), 0).commit == "abc1234"
    monkeypatch.delenv("ROPEWALK_COMMIT")
    assert facts_of(task(), Dummy(), 0).commit != "abc1234"


def tried(*texts, longest=160, model="llama", window=64):
    subject = Model(LoadedModel(Source("tiny", ""), tiny_model(model), None), window, Hashes("hash"))
    return check(parse_all(texts, longest or window, window), subject, longest, window)


def test_methods_are_tried_before_any_is_asked():
    model = tiny_model("llama")
    before = model.config.to_dict()
    assert tried("unmodified", "selfextend", "rerope(window=16, query_scaling='log-n')", "yarn", "infinite") == []
    assert model.config.to_dict() == before
    with pytest.raises(ValueError, match=r"^method linear\(factor=2.5\): LlamaForCausalLM is scaled already"):
        tried("unmodified", "linear", model="llama-yarn")
    sliding = r"^method selfextend\(group_size=8, window=8\): every layer .* sliding window .*sliding_window='disable'"
    with pytest.raises(ValueError, match=sliding):
        tried("unmodified", "selfextend(group_size=8, window=8)", model="mistral-sliding")
    assert tried("selfextend(sliding_window='disable', query_scaling='log-n')", model="mistral-sliding") == []


def test_methods_that_change_nothing_are_told_before_any_is_asked():
    """As of a model whose trained window holds all prompts: what is recommended for them is groups of 1."""
    [note] = tried("unmodified", "selfextend", "yarn", "selfextend(group_size=8, window=8)", longest=20, window=64)
    assert note == (
        "no text has more than 20 tokens, and on a trained window of 64 nothing is changed in those by "
        "selfextend(group_size=1, window=8), yarn(factor=1.0): expect what unmodified gives"
    )
    assert len(tried("rerope(window=64)", longest=None)) == 1
    assert tried("unmodified", "selfextend(group_size=8, window=8)", longest=20) == []


def test_a_method_that_does_not_reach_is_told_before_any_is_asked():
    short = "selfextend(group_size=2, window=8)"
    with pytest.raises(
        ValueError, match=r"^method selfextend\(group_size=2, window=8\) reaches 120 tokens on a train.*4"
    ):
        tried("unmodified", short)
    assert tried(short, longest=120) == tried(short, longest=None) == []
    # Of a sweep it is a finding: the page shows where that is.
    [note] = tried("selfextend(group_size={2, 3, 8}, window=8)", longest=200)
    assert note.startswith("method selfextend(group_size=2, window=8) reaches 120 tokens")
    assert "has 200, and 1 more of a sweep like it: what they do not reach fails" in note
    assert len(tried("selfextend(group_size={2}, window=8)")) == 1
