import re

import pytest

from ropewalk.data import alice
from ropewalk.eval.haystack import _FACTS, book, passkey


def words(text):
    return len(text.split())


KINDS = [passkey, book]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [80, 333, 5000])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.9, 1])
def test_length_and_depth(kind, tokens, depth):
    hidden = kind(tokens, depth, words)
    assert hidden.tokens == words(hidden.prompt) <= tokens
    paragraph = max(map(words, alice().split("\n\n"))) if kind is book else 20
    assert hidden.tokens > tokens - paragraph - 1
    assert hidden.prompt.count(hidden.needle) == 1
    if tokens == 5000:  # in short texts a paragraph is a large part
        assert hidden.prompt.index(hidden.needle) / len(hidden.prompt) == pytest.approx(depth, abs=0.03)
    assert hidden.tokens_back == hidden.tokens - words(hidden.prompt.partition(hidden.answer)[0])


def test_passkey_prompt():
    hidden = passkey(300, 0.5, words, seed=3)
    assert re.fullmatch(r"\d{5}", hidden.answer)
    assert hidden.prompt.endswith("\nWhat is the pass key? The pass key is")
    assert hidden.prompt.count(hidden.answer) == 2
    assert "\n" + hidden.needle + "\n" in hidden.prompt


def test_book_prompt():
    hidden = book(2000, 0.25, words)
    assert hidden.prompt.startswith(alice()[:500])
    assert f"\n\n{hidden.needle}\n\n" in hidden.prompt
    assert f"\n\nQuestion: {hidden.question}\nAnswer: " in hidden.prompt
    assert hidden.answer not in alice()
    assert hidden.prompt.count(hidden.answer) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind):
    prompts = {kind(200, 0.5, words, seed).prompt for seed in range(8)}
    assert len(prompts) > 3
    assert kind(200, 0.5, words, 5) == kind(200, 0.5, words, 5)


def test_no_answer_is_in_the_book():
    answers = {answer for *_, answers in _FACTS for answer in answers}
    assert not re.search(rf"\b(?:{'|'.join(answers)})\b", alice(), re.IGNORECASE)


def test_book_ends_where_it_ends():
    hidden = book(10**6, 0.5, words)
    assert hidden.tokens < 30_000
    assert alice().strip()[-200:] in hidden.prompt


def test_own_text():
    hidden = book(60, 0.5, words, text="One two three.\n\nFour five six.")
    assert hidden.prompt.startswith(f"One two three.\n\n{hidden.needle}\n\nFour five six.\n\nQuestion:")


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
    hidden = book(100, 0.5, words)
    assert hidden.is_right(hidden.answer.upper())


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind):
    with pytest.raises(ValueError, match=r"depth must be from 0 to 1, got 1\.5"):
        kind(1000, 1.5, words)
    with pytest.raises(ValueError, match="a prompt of 5 tokens is too short: the question alone has"):
        kind(5, 0.5, words)
