"""What each of L-Eval's exams asks, word for word (LEval_config.py, llama2-chat-test.py), and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ropewalk.eval.tasks.leval import scores

_SEVERAL = (
    "Now you are given a very long document. Please follow the instruction based on this document. For multi-choice "
    "questions, there could be a sinlge correct option or multiple correct options. Please only provide the letter "
    "corresponding to the answer (like A or AB) when answering."
)
_SINGLE = (
    "Now you are given a very long document. Please follow the instruction based on this document. For multi-choice "
    "questions, there is only a sinlge correct option. Please only provide the letter corresponding to the answer "
    "(like A or B) when answering. For other questions, please directly give the concise and accurate answer."
)
_EXAMPLES = (
    "Given several question answer pairs, you need to follow a similar format to answer the last question. Make sure "
    "the response is end with The answer is _ ."
)
_FICTION = (
    "Now you are given a scientific fiction. I will ask you some questions and the answer should be "
    '"True" or "False". Notice that you should answer the question based on the evidence in the document instead of '
    "your background knowledge."
)
_CODE = (
    "Now you are given a code base consisting of a large amount of functions and the corresponding comments. In the "
    "end, I will call some functions defined in the code base. Please carefully read these codes and comments and "
    "answer the question."
)
_ASKED = (
    "Document is as follows. {document} \nQuestion: {question}.  Please directly give the answer without any "
    "additional output or explanation \nAnswer:"
)
_CONTINUED = "{document}\n\n{question}"

_IN_THE_DOCUMENT = "based on the world described in the document."
_IN_THE_WORLD = "based on the real-world knowledge and facts up until your last training"
_WITHOUT_DOCUMENT = (
    "{question}\nPlease directly give answer without any additional output or explanation \nAnswer:"  # turbo16k-test.py
)


@dataclass(frozen=True)
class Exam:
    """An exam.

    Attributes:
        system: what the model is told first.
        layout: of the document and a question.
        score: of an answer and what is right.
        options: answers to choose from; none where there are none.
        keep_tail: of a document that is too long its end is kept, not its beginning.
        stop: ends an answer.
    """

    system: str
    layout: str
    score: Callable[[str, str], float]
    options: tuple[str, ...] = ()
    keep_tail: bool = False
    stop: str | None = None

    def prompt(self, document: str, question: str) -> str:
        return f"{self.system}\n\n{self.layout.format(document=document, question=question)}"


# By the names of L-Eval's files.
EXAMS: dict[str, Exam] = {
    "coursera": Exam(_SEVERAL, _ASKED, scores.several_letters, tuple(scores.LETTERS)),
    # A model that continues texts goes on with questions of its own.
    "gsm100": Exam(_EXAMPLES, _CONTINUED, scores.number, stop="\n\nQuestion:"),
    "quality": Exam(_SINGLE, _ASKED, scores.one_letter, tuple(scores.LETTERS)),
    "tpo": Exam(_SINGLE, _ASKED, scores.one_letter, tuple(scores.LETTERS)),
    "sci_fi": Exam(_FICTION, _ASKED, scores.truth, ("True", "False")),
    "codeU": Exam(_CODE, _CONTINUED, scores.code, keep_tail=True),
}


def fact_prompt(question: str) -> str:
    """A question about a fiction, asked about the real world and without the fiction."""
    return _WITHOUT_DOCUMENT.format(question=question.replace(_IN_THE_DOCUMENT, _IN_THE_WORLD))


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
