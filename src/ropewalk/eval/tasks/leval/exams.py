# SPDX-License-Identifier: Apache-2.0
"""L-Eval's exams: what each asks, word for word (LEval_config.py, llama2-chat-test.py), is in prompts.json."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from ropewalk.eval.data_files import beside

_IN_THE_DOCUMENT = "based on the world described in the document."
_IN_THE_WORLD = "based on the real-world knowledge and facts up until your last training"
_WITHOUT_DOCUMENT = (
    "{question}\nPlease directly give answer without any additional output or explanation \nAnswer:"  # turbo16k-test.py
)


class Exam(BaseModel):
    """An exam.

    Attributes:
        system: what the model is told first.
        layout: of the document and a question.
        options: answers to choose from; none where there are none.
        keep_tail: of a document that is too long its end is kept, not its beginning.
        stop: ends an answer. A model that continues texts goes on with questions of its own.
        fixed_document: it is a part of the prompt, the same for all questions: they were sampled, and it was not.
    """

    system: str
    layout: str
    options: tuple[str, ...] = ()
    keep_tail: bool = False
    stop: str | None = None
    fixed_document: bool = False


EXAMS = beside(__file__, Exam)


@dataclass(frozen=True)
class Question:
    """A question of an exam.

    Attributes:
        document: that it is about; None for a question about a fiction that is asked about the real world.
        right: what L-Eval gives as right.
    """

    exam: str
    document: str | None
    text: str
    right: str

    def prompt(self, document: str) -> str:
        """With what is left of the document."""
        if self.document is None:
            return _WITHOUT_DOCUMENT.format(question=self.text.replace(_IN_THE_DOCUMENT, _IN_THE_WORLD))
        exam = EXAMS[self.exam]
        return f"{exam.system}\n\n{exam.layout.format(document=document, question=self.text)}"


def loyal_and_fact(target: str) -> tuple[str, str]:
    """What is right by the fiction and what by the real world, of "True [fact: False]".

    Raises:
        ValueError: it is not written like that.
    """
    loyal, there, fact = target.partition("[fact:")
    pair = loyal.strip(), fact.strip().removesuffix("]").strip()
    if not there or not {*pair} <= {"True", "False"}:
        raise ValueError(f"an answer about a fiction must be like 'True [fact: False]', got {target!r}")
    return pair
