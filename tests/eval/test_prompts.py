# SPDX-License-Identifier: Apache-2.0
import pytest

from ropewalk.eval.prompts import answered, chats, encode_apart, longest_part
from ropewalk.eval.subjects import Dummy

WORDS = " ".join(f"word{i}" for i in range(1000))


class Chatting(Dummy):
    """Tokens are letters; texts begin with 1, and end with 2 if `ends`; messages are between 3 and 4."""

    def __init__(self, template=True, ends=False):
        super().__init__()
        self.__dict__.update(template=template, ends=ends)

    def encode(self, text, chat=False):
        letters = [ord(letter) for letter in text]
        if chat and self.template:
            return [1, 3, *letters, 4]
        return [1, *letters, *[2] * self.ends]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("tokens_a_word", [0.4, 1, 1.3, 7])
@pytest.mark.parametrize("limit", [10, 11, 99, 500, 1000, 100_000])
def test_the_longest_part(limit, tokens_a_word, tail):
    asked = []

    def count(part):
        asked.append(part)
        return 10 + int(tokens_a_word * len(part.split()))

    part = longest_part(WORDS, count, limit, tail)
    words, all_words = part.split(), WORDS.split()
    number = len(words)
    assert words == (all_words[1000 - number :] if tail else all_words[:number])
    assert count(part) <= limit
    assert number == 1000 or 10 + int(tokens_a_word * (number + 1)) > limit or count(part) == limit
    assert len(asked) < 15


def test_uneven_text_is_filled():
    """Where a word's tokens are of very different number, there is at most a word to add."""
    text = " ".join("x" * (1 + i**3 % 97) for i in range(2000))
    for limit in range(50, 5000, 371):
        part = longest_part(text, len, limit)
        assert len(part) <= limit
        following = text[len(part) + 1 :].partition(" ")[0]
        assert len(part) + 1 + len(following) > limit or len(part) == limit


def test_a_text_that_fits_stays_as_it_is():
    text = "  two\n\n words \n"
    assert longest_part(text, len, len(text)) == text
    assert longest_part(text, len, len(text) - 1) == "  two"
    assert longest_part(text, len, len(text) - 1, tail=True) == "words \n"
    assert longest_part("", len, 0) == ""


def test_no_room():
    with pytest.raises(ValueError, match="5 tokens are too few: the prompt has 7 without any of its text"):
        longest_part("text", lambda part: 7 + len(part), 5)


def test_who_chats():
    assert chats(Chatting())
    assert not chats(Chatting(template=False))
    assert not chats(Dummy())


@pytest.mark.parametrize("ends", [False, True])
def test_special_tokens_apart(ends):
    assert encode_apart(Chatting(ends=ends), "ab") == ([1], [97, 98])
    assert encode_apart(Dummy(), "a bc") == ([], [1, 2])


@pytest.mark.parametrize("ends", [False, True])
def test_the_answer_alone_is_scored(ends):
    text = answered(Chatting(ends=ends), "Q:", "Yes", chat=False)
    assert (text.token_ids, text.first) == ([1, *map(ord, "Q: Yes")], 3)
    message = answered(Chatting(ends=ends), "Q:", "Yes", chat=True)
    assert (message.token_ids, message.first) == ([1, 3, *map(ord, "Q:"), 4, *map(ord, "Yes")], 5)
