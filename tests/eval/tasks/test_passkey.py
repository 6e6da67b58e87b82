# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from itertools import pairwise

import pytest
from pydantic import ValidationError

from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.passkey import FILLER, Passkey
from ropewalk.eval.tasks.passkey_length import PasskeyLength


class Reading(Dummy):
    """Keeps the texts; with a chat template where it is asked to have one."""

    def __init__(self, template=False):
        super().__init__()
        self.__dict__.update(template=template, texts=[])

    def encode(self, text, chat=False):
        self.texts.append(text)
        return [-1] * (chat and self.template) + super().encode(text)


def places(one):
    """Of all keys, in words of text before them."""
    subject, found = Reading(), []
    for example in one.examples():
        one.prepare(example, subject)
        found.append(len(subject.texts[-1].partition("The pass key is")[0].split()))
    return sorted(found)


@pytest.mark.parametrize(("length", "depths", "spans"), [(6000, "5", 3), (6000, "0.5", 15), (4000, "10", 1)])
def test_tiled_spans_leave_no_place_out(length, depths, spans):
    one = Passkey(lengths=(length,), depths=depths, samples=3, tiled=True)
    counts = Counter(example.cell["depth"] for example in one.examples())
    assert counts == {round(depth, 3): 3 * spans for depth in one.depths}
    # Three in each span of 400: no two neighbors are further apart than two spans, and a line.
    far = 2 * 400 + len(FILLER.split())
    assert all(after - before <= far for before, after in pairwise([0, *places(one), length]))
    thirds = Counter(place * 3 // length for place in places(one))
    assert all(abs(thirds[third] - spans * len(one.depths)) <= 3 for third in range(3))


def test_places_by_default_are_those_of_one_span_a_depth():
    assert all(abs(place - 8192) <= 200 + 60 for place in places(Passkey(lengths=(16384,), depths=(0.5,), samples=8)))


@pytest.mark.parametrize("settings", [{"depths": (0.1, 0.5)}, {"span": 0}])
def test_what_cannot_be_tiled(settings):
    with pytest.raises(ValidationError, match="needs a --span of 1 token or more, and a number of --depths"):
        Passkey(tiled=True, **settings)


@pytest.mark.parametrize("characters", [2000, 16000])
def test_a_length_in_characters(characters):
    one, subject = PasskeyLength(characters=characters, digits=(5, 100), samples=2), Reading()
    for example in one.examples():
        one.prepare(example, subject)
        text = subject.texts[-1]
        # A line less at most.
        assert characters - len(FILLER) - 1 <= len(text) <= characters
    assert PasskeyLength(characters=characters).longest == characters // 3 + 206


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize(
    ("answer", "plain", "message"),
    [("12345", 1, 1), ("Sure:\n\n**12345**.", 0, 1), ("123456", 0, 0), ("\n12345 is it", 0, 1), ("", 0, 0)],
)
def test_a_message_may_be_answered_on_any_line(template, answer, plain, message):
    one, subject = Passkey(lengths=(300,), depths=(0.5,), samples=1, chat=True), Reading(template)
    [example] = one.examples()
    prepared = one.prepare(example, subject)
    outcome = prepared.outcome(answer.replace("12345", prepared.target), in_thought=False)
    assert outcome.scores == {"exact_match": message if template else plain}
    assert (prepared.prompt.token_ids[0] == -1, prepared.prompt.stop) == (template, None if template else "\n")


def test_room_for_answers():
    def room(one):
        [example, *_] = one.examples()
        return one.prepare(example, Reading(True)).prompt.new_tokens

    few = {"lengths": (300,), "samples": 1}
    assert [room(Passkey(**few, **more)) for more in ({}, {"chat": True}, {"new_tokens": "2k"})] == [16, 80, 2048]
    assert room(PasskeyLength(length=900, digits=(100,), new_tokens=9)) == 9
    assert Passkey(**few, new_tokens=700).longest == 1000
