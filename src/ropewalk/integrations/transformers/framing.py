# SPDX-License-Identifier: Apache-2.0
"""A user's text as a model takes it: with its chat template or its own special tokens around it, and nothing but text
inside.

A document may hold what looks like a control token, `<|im_end|>` or `</s>`. Tokenizers read it as that token, and so
the document would end the user's turn. Here it stays the characters it is written in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for the text while the template is asked what it puts around one. Letters only: no template strips them.
_ANY_TEXT = "ropewalkreadshere"
# Between a document and a question about it.
_SEPARATOR = "\n\n"


class ControlTokenError(ValueError):
    """A text holds a control token of the tokenizer that cannot be written in any other tokens."""


@dataclass(frozen=True)
class Frame:
    """What stands around a user's text.

    Attributes:
        head: what a chat template writes before it.
        tail: what a chat template writes behind it, up to where the answer begins.
        chat: whether there is a template; without one the tokenizer's own special tokens (BOS, EOS) stand around.
    """

    head: str
    tail: str
    chat: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> Frame:
        """The frame of one message of a user.

        Args:
            tokenizer: the model's.
            chat: whether to apply its chat template; None where it has one.

        Raises:
            ValueError: `chat` is True and there is no template, or the template does not write a message as it is.
        """
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise ValueError("the tokenizer has no chat template: leave chat out, or pass chat=False")
        if chat is False or not has_template:
            return cls("", "", chat=False)
        turn = [{"role": "user", "content": _ANY_TEXT}]
        rendered: Any = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        parts = str(rendered).split(_ANY_TEXT)
        if len(parts) != 2:
            raise ValueError(
                f"the chat template writes a user's message {len(parts) - 1} times instead of once: pass chat=False"
            )
        head, tail = parts
        return cls(head, tail, chat=True)


@dataclass(frozen=True)
class Document:
    """A text that questions are asked about, as tokens.

    Attributes:
        tokenizer: the model's.
        text: may be empty.
        frame: what stands around the text and a question.
        allow_control_tokens: whether control tokens that the text or a question writes out are control tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    text: str
    frame: Frame
    allow_control_tokens: bool = False

    def prompt(self, question: str = "") -> list[int]:
        """Token ids of the text and a question behind it.

        Raises:
            ControlTokenError: a control token is in it that cannot be written in other tokens.
        """
        parts = [part for part in (self.text, question) if part.strip()]
        return encode(self.tokenizer, self.frame, _SEPARATOR.join(parts), self.allow_control_tokens)

    @cached_property
    def token_ids(self) -> list[int]:
        """Those that every prompt begins with and goes on from: the text, but for what the tokenizer may merge with a
        question."""
        alone, asked = self.prompt(), self.prompt("A")
        return alone[: min(shared(alone, asked), max(0, len(alone) - 1))]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    count = min(len(one), len(other))
    return next((i for i in range(count) if one[i] != other[i]), count)


@dataclass(frozen=True)
class ControlTokens:
    """Tokens that mean something to the model which their characters do not.

    Those are the special ones, and added ones that the chat template writes, such as `<think>`.

    Attributes:
        texts: how they are written; also the unknown token, which a text is not to write out either.
        ids: of those that no text may give.
        unknown: the token for characters that the tokenizer does not know and its id, unless it has another meaning
            too.
    """

    texts: frozenset[str]
    ids: frozenset[int]
    unknown: tuple[str, int] | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        roles: Mapping[str, Any] = tokenizer.special_tokens_map
        convert: Any = tokenizer.convert_tokens_to_ids
        found = {str(token): int(convert(token)) for token in tokenizer.all_special_tokens}
        template = str(getattr(tokenizer, "chat_template", None) or "")
        for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
            if token.special or (token.content.strip() and token.content in template):
                found[token.content] = id
        unknown = roles.get("unk_token")
        meant = [token for role, token in roles.items() if role not in ("unk_token", "pad_token")]
        only_unknown = None if unknown is None or unknown in meant else (str(unknown), found[unknown])
        ids = {id for token, id in found.items() if only_unknown is None or token != unknown}
        return cls(frozenset(filter(None, found)), frozenset(ids), only_unknown)

    def arise(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a text was read as one of them."""
        if not self.ids.isdisjoint(ids):
            return True
        # Anything unknown gives the unknown token; only where it is written out is it not text.
        return self.unknown is not None and self.unknown[0] in text and self.unknown[1] in ids


def encode(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, text: str, allow_control_tokens: bool = False
) -> list[int]:
    """Token ids of a text in its frame.

    Args:
        tokenizer: the model's.
        frame: its control tokens are control tokens.
        text: none of its tokens is one, whatever it writes.
        allow_control_tokens: those that the text writes out are.

    Raises:
        ControlTokenError: the text holds a control token that cannot be written in other tokens.
    """

    def plainly(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    before, after = ([], []) if frame.chat else _own_special_tokens(tokenizer)
    if allow_control_tokens:
        return [*before, *plainly(frame.head + text + frame.tail), *after]
    control = ControlTokens.of(tokenizer)
    allowed = [id for id in plainly(frame.head) + plainly(frame.tail) if id in control.ids]
    # Everything but the control tokens it writes out is read in one piece with what is around it: where one piece ends
    # and the next begins, some tokenizers would put a space.
    longest_first = sorted(control.texts, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})", text)
    pieces[0] = frame.head + pieces[0]
    pieces[-1] += frame.tail
    ids: list[int] = plainly(pieces[0])
    for number, piece in enumerate(pieces[1:], 1):
        if number % 2:
            ids += _as_text(tokenizer, piece, control, inside=True)
        elif piece:
            ids += _continued(tokenizer, piece, plainly)
    if [id for id in ids if id in control.ids] != allowed:
        # Other characters became a control token, as full-width ones do in some normalisations.
        ids = [*plainly(frame.head), *_as_text(tokenizer, text, control, inside=bool(frame.head)), *plainly(frame.tail)]
    return [*before, *ids, *after]


def _own_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Those that the tokenizer puts before and behind every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return whole[:begin], whole[begin + len(bare) :]
    return [], []


def _continued(tokenizer: PreTrainedTokenizerBase, piece: str, read: Callable[[str], list[int]]) -> list[int]:
    """A piece from within a text, without the space that SentencePiece puts where a text begins."""
    newline = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    ids = read("\n" + piece)
    return ids[len(newline) :] if ids[: len(newline)] == newline else read(piece)


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str, control: ControlTokens, inside: bool) -> list[int]:
    """Token ids of a text, none of them a control token: read in two pieces wherever one would come out.

    Args:
        tokenizer: the model's.
        text: one character or more.
        control: tokens that it must not give.
        inside: whether something stands before the text.
    """

    def plainly(piece: str) -> list[int]:
        try:
            return list(tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        except ValueError:  # a tokenizer that has no such option makes no control tokens from text
            return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    ids = _continued(tokenizer, text, plainly) if inside else plainly(text)
    if not control.arise(text, ids):
        return ids
    if len(text) == 1:
        raise ControlTokenError(
            f"{text!r} is a control token of this tokenizer and cannot be written in other tokens: take it out of the "
            "text, or allow control tokens"
        )
    # In the middle: a control token that has another one in it is cut too, sooner or later.
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    return _as_text(tokenizer, first, control, inside) + _as_text(tokenizer, second, control, inside=True)
