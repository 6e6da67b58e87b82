# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.longeval_lines import LongEvalLines, last_number


class Chatting(Dummy):
    """Has a template of two words, and knows what it read last."""

    def encode(self, text, chat=False):
        self.__dict__["read"] = text
        return super().encode(f"user: {text} reply:" if chat else text)


def record(place=1, number=345, lines=3, **more):
    text = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name in "abcdefghij"[:lines])
    asked = {"prompt": f"{text}\nWhich? ", "expected_number": number, "random_idx": ["abcdefghij"[place], place]}
    return {**asked, "num_lines": lines, "correct_line": "", "token_size": 9, **more}


def task(folder, *records, at="longeval/lines", **settings):
    path = folder / at / "3_lines.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return LongEvalLines(data_dir=folder, **{"lines": "3", **settings})


def test_the_sets_of_longeval():
    assert LongEvalLines().lines == (200, 300, 400, 500, 600, 680)


def test_examples_and_their_cells(tmp_path):
    one = task(tmp_path, record(0), record(1), record(6, lines=8))
    # Until somebody is asked, characters.
    assert {example.tokens for example in one.examples()} == {len(record(6, lines=8)["prompt"])}
    one.measure(Chatting())
    longest = 8 * 5 + 1 + 2
    assert [(example.name, example.tokens, example.cell) for example in one.examples()] == [
        ("3-0", longest, {"length": longest, "depth": 0.0}),
        ("3-1", longest, {"length": longest, "depth": 0.5}),
        ("3-2", longest, {"length": longest, "depth": 0.9}),
    ]
    assert one.longest == longest + 100
    assert task(tmp_path, record(), new_tokens=7).longest == len(record()["prompt"]) + 7


@pytest.mark.parametrize(
    ("subject", "settings", "asked", "new_tokens"),
    [
        (Chatting(), {}, "", 100),
        (Chatting(), {"chat": False}, "Line <b>: <REGISTER_CONTENT> is", 15),
        (Dummy(), {}, "Line <b>: <REGISTER_CONTENT> is", 15),
        (Chatting(), {"new_tokens": 9}, "", 9),
        (Dummy(), {"new_tokens": 9}, "Line <b>: <REGISTER_CONTENT> is", 9),
    ],
)
def test_what_is_asked(tmp_path, subject, settings, asked, new_tokens):
    [example] = (one := task(tmp_path, record(), **settings)).examples()
    generation = one.prepare(example, subject)
    text = record()["prompt"] + asked
    assert list(generation.prompt.token_ids) == subject.encode(text, chat=not asked)
    assert (generation.prompt.new_tokens, generation.prompt.stop, generation.target) == (new_tokens, None, "345")
    assert generation.scores("It is <345>.") == {"accuracy": 1.0}
    assert generation.scores("345, not 34") == {"accuracy": 0.0}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("<345>", 345),
        ("line 2 is <7>.", 7),
        ("41,869", 869),
        ("0345", 345),
        ("3.0", 0),
        ("none", None),
        ("", None),
        ("9" * 9999, None),
    ],
)
def test_the_last_number_counts(answer, number):
    assert last_number(answer) == number


def test_a_copy_of_the_repository_will_do(tmp_path):
    one = task(tmp_path, record(), at="longeval/evaluation/lines/testcases")
    assert len(list(one.examples())) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (record(place=1) | {"random_idx": ["d", 3]}, "line 3 of 3 is asked for"),
        (
            record() | {"expected_number": 346},
            "'line b: REGISTER_CONTENT is <346>' is asked for and is not in the prompt",
        ),
        ({"prompt": "no number"}, "3_lines.jsonl, line 1, is not what it should be"),
    ],
)
def test_files_that_hold_something_else(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        list(task(tmp_path, wrong).examples())
