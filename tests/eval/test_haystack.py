# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from ropewalk.data import alice
from ropewalk.eval.haystack import FACTS, gives, passkey


def words(text):
    return len(text.split())


@pytest.mark.parametrize("tokens", [80, 333, 5000])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.9, 1])
def test_length_and_depth(tokens, depth):
    hidden = passkey(tokens, depth, words)
    assert tokens - 21 < hidden.tokens == words(hidden.prompt) <= tokens
    assert hidden.prompt.count(hidden.needle) == 1
    if tokens == 5000:  # in short texts a line is a large part
        assert hidden.prompt.index(hidden.needle) / len(hidden.prompt) == pytest.approx(depth, abs=0.03)
    assert hidden.tokens_back == hidden.tokens - words(hidden.prompt.partition(hidden.answer)[0])


def test_the_prompt():
    hidden = passkey(300, 0.5, words, seed=3)
    assert re.fullmatch(r"\d{5}", hidden.answer)
    assert hidden.prompt.endswith("\nWhat is the pass key? The pass key is")
    assert hidden.prompt.count(hidden.answer) == 2
    assert "\n" + hidden.needle + "\n" in hidden.prompt


def test_seeds():
    prompts = {passkey(200, 0.5, words, seed).prompt for seed in range(8)}
    assert len(prompts) > 3
    assert passkey(200, 0.5, words, 5) == passkey(200, 0.5, words, 5)


def test_no_answer_is_in_the_book():
    answers = {answer for *_, answers in FACTS for answer in answers}
    assert not re.search(rf"\b(?:{'|'.join(answers)})\b", alice(), re.IGNORECASE)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" {}.", True),
        ("{}", True),
        (" the number {}, which", True),
        (" 1{}", False),
        (" {}7", False),
        ("", False),
        ("\n \n", False),
        (" 12\n{}", False),
    ],
)
def test_is_right(reply, right):
    hidden = passkey(100, 0.5, words)
    assert hidden.is_right(reply.format(hidden.answer)) is right


def test_case_does_not_matter():
    assert gives(" The Pumpkin.", "pumpkin")
    assert gives("pumpkin", "Pumpkin")


def test_errors():
    with pytest.raises(ValueError, match=r"depth must be from 0 to 1, got 1\.5"):
        passkey(1000, 1.5, words)
    with pytest.raises(ValueError, match="a prompt of 5 tokens is too short: the question alone has"):
        passkey(5, 0.5, words)
