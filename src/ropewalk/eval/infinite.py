"""The baseline "Infinite" of SelfExtend (appendix B): a query sees only its own block of `window` tokens.

Position m counts as m mod window, so the blocks know nothing of each other: the unmodified model, run on each block as
a text of its own, computes exactly this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

# Continues a text by at most so many tokens; also says whether the model ended it before that, or just then.
Continue = Callable[[Sequence[int], int], tuple[Sequence[int], bool]]


@dataclass(frozen=True)
class Infinite:
    """Blocks of so many tokens.

    Args:
        window: tokens of a block.
    """

    name: ClassVar[str] = "infinite"
    window: int

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"window of {self.name} must be a whole number of 1 or more, got {self.window!r}")

    @classmethod
    def for_length(cls, target_length: int, trained_window: int) -> Self:
        """The trained window, whatever the length."""
        return cls(trained_window)


def blocks(token_ids: Sequence[int], first: int, window: int) -> list[tuple[Sequence[int], int]]:
    """Texts that give the scores of a text's tokens from `first`, 1 or more, each with the first that it scores.

    A token is predicted from inside the block of the token before it. So each text is a block and the token after it,
    which is scored and not read.
    """
    begins = range((first - 1) // window * window, len(token_ids) - 1, window)
    return [(token_ids[begin : begin + window + 1], max(1, first - begin)) for begin in begins]


def continued(token_ids: Sequence[int], new_tokens: int, window: int, generate: Continue) -> list[int]:
    """At most so many new tokens, each from the block of the token before it alone: where a block ends, `generate`
    starts anew, from the one token that begins the next."""
    tokens = list(token_ids)
    ended = False
    while (left := len(token_ids) + new_tokens - len(tokens)) > 0 and not ended:
        begin = (len(tokens) - 1) // window * window
        # The block's last token still predicts one.
        room = begin + window + 1 - len(tokens)
        written, ended = generate(tokens[begin:], min(room, left))
        tokens += written
    return tokens[len(token_ids) :]
