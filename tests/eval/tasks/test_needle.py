# SPDX-License-Identifier: Apache-2.0
import pytest

from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.needle import NEEDLE, NEW_TOKENS, Needle, hidden, repeated, scores, units
from ropewalk.eval.texts import Text

ESSAYS = 5


@pytest.fixture
def data_dir(tmp_path):
    """Five essays of forty short sentences, each with its number in every sentence."""
    folder = tmp_path / "needle" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    for number in range(ESSAYS):
        (folder / f"{number}.txt").write_text(" ".join(f"Essay {number} says {i}." for i in range(40)))
    return tmp_path


class Reading(Dummy):
    """Keeps what it was asked; with a chat template, messages begin with a token of their own."""

    def __init__(self, template=False, reply="Eat a sandwich."):
        super().__init__(lambda token_ids: reply)
        self.__dict__.update(template=template, prompts=[])

    def encode(self, text, chat=False):
        if len(text) > 20:
            self.prompts.append(text)
        return [-1] * (chat and self.template) + super().encode(text)


def task(data_dir=None, **settings):
    given = {"lengths": (400,), "depths": (0.5,), "samples": 1, **settings}
    return Needle(data_dir=data_dir, **given)


def asked(one, subject=None):
    """The prompts of all examples, and their outcomes."""
    subject = subject or Reading()
    prompts, outcomes = [], []
    for example in one.examples():
        outcomes += one.outcomes([example], subject)
        prompts.append(subject.prompts[-1])
    return prompts, outcomes


@pytest.mark.parametrize("length", [120, 300, 1000, 2500])
@pytest.mark.parametrize("template", [False, True])
def test_a_prompt_is_as_long_as_it_should_be(data_dir, length, template):
    """With fewer words in the essays than asked for, they are repeated."""
    prompts, outcomes = asked(task(data_dir, lengths=(length,), depths=(0.0, 0.3, 1.0)), Reading(template))
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        assert length - 1 <= outcome.prompt_tokens <= length
        assert prompt.count(NEEDLE) == 1
        assert outcome.target == NEEDLE


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_needle_is_behind_a_sentence_at_its_depth(data_dir, depth):
    [prompt], _ = asked(task(data_dir, lengths=(2000,), depths=(depth,)))
    context = prompt.partition("<context>\n")[2].partition("\n</context>")[0]
    before, after = context.split(f"\n{NEEDLE}\n")
    place = len(before) / (len(before) + len(after))
    assert depth - 0.005 < place <= depth
    assert depth in (0.0, 1.0) or before.endswith(".")


@pytest.mark.parametrize(
    ("context", "depth", "before"),
    [
        ("One. Two. Three.", 0.0, ""),
        ("One. Two. Three.", 0.2, ""),
        ("One. Two. Three.", 0.25, "One."),
        ("One. Two. Three.", 0.9, "One. Two."),
        ("One. Two. Three an", 1.0, "One. Two. Three an"),
        ('"Why?" he said!\nIt is 1.5 m.', 0.7, '"Why?" he said!'),
        ('"Why?" he said!\nIt is 1.5 m.', 0.3, '"Why?"'),
        ("nothing ends here", 0.9, ""),
        ("", 0.5, ""),
    ],
)
def test_places(context, depth, before):
    text = hidden(context, depth)
    assert text.partition(f"\n{NEEDLE}\n")[0] == before
    assert text.replace(f"\n{NEEDLE}\n", "") == context


@pytest.mark.parametrize(
    ("answer", "recall"),
    [
        (NEEDLE, 1.0),
        ("eating a SANDWICH in dolores\npark on a  sunny day", 1.0),
        ("You should sit in Dolores Park with a sandwich.", 2 / 3),
        ("sandwiches", 0.0),
        ("A sunny daydream", 0.0),
        ("", 0.0),
    ],
)
def test_scores(answer, recall):
    assert scores(answer) == {"recall": pytest.approx(recall), "exact_match": float(recall == 1)}


def test_the_answer_is_scored(data_dir):
    _, [outcome] = asked(task(data_dir), Reading(reply="A sandwich on a sunny day."))
    assert outcome.scores == {"recall": pytest.approx(2 / 3), "exact_match": 0.0}
    assert outcome.output == "A sandwich on a sunny day."


def test_messages_and_texts(data_dir):
    [text], _ = asked(task(data_dir), Reading(template=False))
    [message], _ = asked(task(data_dir), Reading(template=True))
    [other], _ = asked(task(data_dir, chat=False), Reading(template=True))
    assert text == other
    assert text.endswith("Assistant: Here is the most relevant sentence in the context:")
    assert message.endswith("Don't give information outside the document or repeat your findings")
    assert "Human:" in text
    assert "Human:" not in message
    for chat in (True, False):
        one = task(data_dir, chat=chat)
        [example] = one.examples()
        assert (one.prepare(example, Reading(template=True)).prompt.token_ids[0] == -1) == chat


def test_samples_begin_with_other_essays(data_dir):
    def first(prompt):
        return prompt.partition("Essay ")[2][0]

    one = task(data_dir, lengths=(150, 600), samples=ESSAYS)
    prompts, _ = asked(one)
    assert sorted(map(first, prompts[:ESSAYS])) == list("01234")
    assert list(map(first, prompts[ESSAYS:])) == list(map(first, prompts[:ESSAYS]))
    orders = {tuple(map(first, asked(task(data_dir, samples=ESSAYS, seed=seed))[0])) for seed in range(4)}
    assert len(orders) > 1
    # Of more samples, the first are these.
    assert asked(task(data_dir, samples=2))[0] == asked(task(data_dir, samples=4))[0][:2]


def test_units():
    assert units([Text("a", " one\n\ntwo "), Text("b", "three")]) == ["one\n\ntwo", "three"]
    assert units([Text("a", "one\n\n\n two\n\n")]) == ["one", "two"]
    assert repeated(["a b", "c", "d"], 1, words=6) == "c\n\nd\n\na b\n\nc\n\nd"


def test_alice_needs_no_folder():
    prompts, _ = asked(task(text="alice", samples=2))
    assert prompts[0] != prompts[1]
    assert all(prompt.count(NEEDLE) == 1 for prompt in prompts)


def test_what_identifies_a_run(data_dir, tmp_path_factory):
    one = task(data_dir)
    assert len(one.settings["sha256"]) == 64
    assert str(data_dir) not in str(one.settings)
    again = task(data_dir.rename(tmp_path_factory.mktemp("other") / "place"))
    assert again.settings == one.settings
    assert task(text="alice").settings["sha256"] != one.settings["sha256"]
    assert one.longest == 400 + NEW_TOKENS


def test_what_cannot_be_asked(data_dir, tmp_path_factory):
    with pytest.raises(ValueError, match="40 tokens are too few"):
        asked(task(data_dir, lengths=(40,)))
    with pytest.raises(DataError, match=r"holds no essays: --data-dir must hold needle/PaulGrahamEssays/\*\.txt"):
        task(tmp_path_factory.mktemp("empty")).read()
