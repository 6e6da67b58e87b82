"""L-Eval's exams: questions about long documents, with one right answer each. See README.md beside this file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ropewalk.eval.prompts import answered, chats, longest_part
from ropewalk.eval.subjects import Passage, Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, Outcome, PreparedTask, Scoring, Settings
from ropewalk.eval.tasks.leval.data import read
from ropewalk.eval.tasks.leval.exams import EXAMS, NAMES, Exam, ExamName, fact_prompt, loyal_and_fact
from ropewalk.eval.tasks.leval.scores import right_letters

Mode = Literal["generate", "options"]

# Of a prompt without its document, and of a token: for the order of the examples alone.
_ABOUT_TOKENS, _CHARACTERS = 200, 4


def default_tasks(mode: Mode) -> tuple[ExamName, ...]:
    """All that the mode takes but codeU, which is as long as all others together."""
    return tuple(name for name in NAMES if name != "codeU" and (mode == "generate" or EXAMS[name].options))


class LEvalSettings(Settings):
    """Of the exams.

    Args:
        mode: "generate" for answers in words, "options" for the likelihood of each option.
        tasks: the exams, by L-Eval's names.
        length: of the longest prompt, in tokens; documents are cut to fit. With "options", the option included.
        new_tokens: of an answer in words, at most (L-Eval: 512).
        chat: write the prompt as a message where the model has a chat template.
        sha256: of the exams' files; the task fills it in, so that a run does not go on with other ones.
    """

    mode: Mode = "generate"
    tasks: tuple[ExamName, ...] = Field(min_length=1)
    length: int = Field(default=16384, ge=1)
    new_tokens: int = Field(default=512, ge=1)
    chat: bool = True
    sha256: str = ""

    @field_validator("tasks")
    @classmethod
    def _take(cls, tasks: tuple[ExamName, ...], info: ValidationInfo) -> tuple[ExamName, ...]:
        without = [name for name in tasks if not EXAMS[name].options]
        if info.data.get("mode") == "options" and without:
            raise PydanticCustomError("tasks", "{name} has no options to choose from", {"name": without[0]})
        return tuple(dict.fromkeys(tasks))


@dataclass(frozen=True)
class Question:
    """A question of an exam.

    Attributes:
        document: that it is about; None for what is asked without one.
        right: what L-Eval gives as right.
    """

    exam: ExamName
    document: str | None
    text: str
    right: str


@dataclass(frozen=True)
class LEval(PreparedTask):
    """The task under its settings.

    Args:
        data_dir: folder that holds leval/closed/*.jsonl; None for the hub.

    Attributes:
        left_out: questions of each exam that the mode "options" leaves out, because several options are right.

    Raises:
        TextsError: the exams cannot be had.
    """

    settings: LEvalSettings
    data_dir: InitVar[Path | None] = None
    name: ClassVar[str] = "leval"
    version: ClassVar[int] = 1
    metrics: ClassVar[dict[str, Metric]] = {
        "exact_match": Metric("exact match"),
        "accuracy": Metric("accuracy"),
        "probability": Metric("probability of what is right"),
    }
    left_out: Counter[ExamName] = field(default_factory=Counter, init=False, repr=False)
    _questions: dict[str, Question] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self, data_dir: Path | None) -> None:
        exams = read(self.settings.tasks, data_dir)
        for name, papers in exams.papers.items():
            for number, paper in enumerate(papers):
                for place, (text, right) in enumerate(zip(paper.instructions, paper.outputs, strict=True)):
                    self._add(f"{name}-{number}-{place}", Question(name, paper.input, text, right))
        object.__setattr__(self, "settings", self.settings.model_copy(update={"sha256": exams.sha256}))

    def _add(self, name: str, question: Question) -> None:
        """The examples that a question makes."""
        if question.exam == "sci_fi":
            loyal, fact = loyal_and_fact(question.right)
            self._questions[name] = Question("sci_fi", question.document, question.text, loyal)
            self._questions[f"{name}-fact"] = Question("sci_fi", None, question.text, fact)
        elif self.settings.mode == "options" and len(right_letters(question.right)) > 1:
            self.left_out[question.exam] += 1
        else:
            self._questions[name] = question

    @property
    def longest(self) -> int:
        return self.settings.length + (self.settings.new_tokens if self.settings.mode == "generate" else 0)

    def examples(self) -> Iterator[Example]:
        for name, question in self._questions.items():
            about = _ABOUT_TOKENS + len(question.document or "") // _CHARACTERS
            yield Example(name, min(about, self.settings.length), {"task": question.exam})

    def prepare(self, example: Example, subject: Subject) -> Generation | Scoring:
        question = self._questions[example.name]
        asked = _Asked(question, subject, self.settings.chat and chats(subject))
        return self._options(asked) if self.settings.mode == "options" else self._generation(asked)

    def _generation(self, asked: _Asked) -> Generation:
        exam, right = asked.exam, asked.question.right
        ids = asked.encode(asked.cut(self.settings.length))

        def outcome(answer: str) -> Outcome:
            return Outcome(len(ids), {"exact_match": exam.score(answer, right)}, right, answer)

        return Generation(Prompt(ids, self.settings.new_tokens, exam.stop), outcome)

    def _options(self, asked: _Asked) -> Scoring:
        options = asked.exam.options
        room = max(len(one.token_ids) - one.first for one in asked.passages(""))
        passages = asked.passages(asked.cut(self.settings.length - room))
        right = next(place for place, option in enumerate(options) if asked.is_right(option))

        def outcome(scores: Sequence[Sequence[float]]) -> Outcome:
            sums = [math.fsum(score) for score in scores]
            chosen = options[sums.index(max(sums))]
            return Outcome(passages[right].first, option_scores(sums, right), options[right], chosen)

        return Scoring(passages, outcome)


@dataclass(frozen=True)
class _Asked:
    """A question put to a model; `document` is what is left of the question's own."""

    question: Question
    subject: Subject
    chat: bool

    @property
    def exam(self) -> Exam:
        return EXAMS[self.question.exam]

    def prompt(self, document: str) -> str:
        text = self.question.text
        return fact_prompt(text) if self.question.document is None else self.exam.prompt(document, text)

    def encode(self, document: str) -> list[int]:
        return self.subject.encode(self.prompt(document), self.chat)

    def passages(self, document: str) -> tuple[Passage, ...]:
        prompt = self.prompt(document)
        return tuple(answered(self.subject, prompt, option, self.chat) for option in self.exam.options)

    def cut(self, length: int) -> str:
        """As much of the document as fits into a prompt of `length` tokens."""
        document = self.question.document or ""
        return longest_part(document, lambda part: len(self.encode(part)), length, self.exam.keep_tail)

    def is_right(self, option: str) -> bool:
        return self.exam.score(option, self.question.right) == 1.0


def option_scores(sums: Sequence[float], right: int) -> dict[str, float]:
    """Of the log-likelihoods of all options: whether the right one is the likeliest, and its part of their probability.

    One that is as likely as others counts for its share: in bfloat16 options often are.

    Raises:
        ValueError: a log-likelihood is no number, as with weights that overflow.
    """
    if not all(map(math.isfinite, sums)):
        raise ValueError("the model gives probabilities that are not numbers, or 0")
    best = max(sums)
    return {
        "accuracy": (sums[right] == best) / sums.count(best),
        "probability": math.exp(sums[right] - best) / math.fsum(math.exp(one - best) for one in sums),
    }
