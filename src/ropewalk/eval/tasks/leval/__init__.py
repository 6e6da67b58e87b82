# SPDX-License-Identifier: Apache-2.0
"""L-Eval's exams: questions about long documents, with one right answer each. See README.md beside this file."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from ropewalk.eval.data_files import DataError, lines_of, read
from ropewalk.eval.prompts import answered, chats, longest_part
from ropewalk.eval.subjects import Passage, Prompt, Subject
from ropewalk.eval.tasks.base import Example, Generation, Metric, Outcome, PreparedTask, Scoring
from ropewalk.eval.tasks.leval.exams import EXAMS, Question, loyal_and_fact
from ropewalk.eval.tasks.leval.scores import SCORES, right_letters
from ropewalk.eval.tasks.settings import Chat, Names, Tokens, among, folder_of_data, refused

# Of a prompt without its document, and of a token: for the order of the examples alone.
_ABOUT_TOKENS, _CHARACTERS = 200, 4


class Paper(BaseModel):
    """A document as L-Eval gives it, its questions, and to each what is right."""

    input: str
    instructions: list[str]
    outputs: list[str]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.instructions) != len(self.outputs):
            raise ValueError(f"{len(self.instructions)} questions and {len(self.outputs)} answers")
        return self


class LEval(PreparedTask):
    """L-Eval's exams, questions about long documents (SelfExtend, table 3)."""

    name = "leval"
    metrics: ClassVar = {
        "exact_match": Metric("exact match"),
        "accuracy": Metric("accuracy"),
        "probability": Metric("probability of what is right"),
    }

    mode: Literal["generate", "options"] = Field(
        "generate", description="Answers in words, or the likelihood of each option."
    )
    tasks: Annotated[Names, among(EXAMS)] = Field(
        (), description=f"Exams, comma-separated: {', '.join(EXAMS)}; if not given, all that the mode takes, but codeU."
    )
    data_dir: Path | None = folder_of_data("leval/closed/*.jsonl")
    length: Tokens = Field(
        16384, description="Tokens of the longest prompt, its option included; documents are cut. 16k is 16384."
    )
    new_tokens: Tokens = Field(
        512, description="Tokens of an answer in words, at most. A model that thinks first needs thousands."
    )
    chat: Chat = True

    @field_validator("tasks")
    @classmethod
    def _take(cls, tasks: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """By default all but codeU, which is as long as all others together."""
        without = [name for name in EXAMS if info.data.get("mode") == "options" and not EXAMS[name].options]
        for name in tasks:
            if name in without:
                raise refused("must have options to choose from, as the mode asks for", name)
        return tasks or tuple(name for name in EXAMS if name not in (*without, "codeU"))

    @property
    def version(self) -> int:
        """Version 2 scores answers in words otherwise, and nothing else."""
        return 2 if self.mode == "generate" else 1

    @property
    def without_effect(self) -> Mapping[str, str]:
        return {"new_tokens": "--mode options"} if self.mode == "options" else {}

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return {
            name: read(self.data_dir, f"leval/closed/{name}.jsonl", "L4NLP/LEval", f"LEval/Exam/{name}.jsonl")
            for name in self.tasks
        }

    @cached_property
    def _questions(self) -> dict[str, Question]:
        """All that the files have, by the names of their examples."""
        found: dict[str, Question] = {}
        for exam, content in self._files.items():
            before = len(found)
            for number, paper in enumerate(lines_of(content, Paper, f"{exam}.jsonl")):
                for place, (text, right) in enumerate(zip(paper.instructions, paper.outputs, strict=True)):
                    name = f"{exam}-{number}-{place}"
                    if exam == "sci_fi":
                        loyal, fact = loyal_and_fact(right)
                        found[name] = Question(exam, paper.input, text, loyal)
                        found[f"{name}-fact"] = Question(exam, None, text, fact)
                    else:
                        found[name] = Question(exam, paper.input, text, right)
            if len(found) == before:
                raise DataError(f"{exam}.jsonl holds no questions: load it again")
        return found

    def _is_left_out(self, question: Question) -> bool:
        """Where one option is to be chosen and several are right."""
        return self.mode == "options" and question.exam != "sci_fi" and len(right_letters(question.right)) > 1

    @property
    def found(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for name, content in self._files.items():
            digest.update(f"{name} {len(content)} ".encode() + content)
        return {"sha256": digest.hexdigest()}

    @property
    def notes(self) -> list[str]:
        counts = Counter(question.exam for question in self._questions.values() if self._is_left_out(question))
        return [f"{name}: questions left out because several options are right: {count}"
                for name, count in counts.items()]  # fmt: skip

    @classmethod
    def cluster_of(cls, example: str) -> str:
        """The document, of questions about the real world the one that they come from; or, where all questions have one
        and the same before them, the question."""
        exam, *numbers = example.split("-")  # of rows that somebody wrote, it may be any name
        is_fixed = exam in EXAMS and EXAMS[exam].fixed_document
        return example if is_fixed else "-".join([exam, *numbers[:1]])

    def _clusters(self) -> dict[str, str]:
        """Of each example; several lines of a file may have one document, which is then that of the first."""
        first: dict[tuple[str, str], str] = {}
        found: dict[str, str] = {}
        for name, question in self._questions.items():
            its = self.cluster_of(name)
            if question.document is None:  # the same question, asked before about its document
                its = found[name.removesuffix("-fact")]
            elif not EXAMS[question.exam].fixed_document:
                its = first.setdefault((question.exam, question.document), its)
            found[name] = its
        return found

    @property
    def longest(self) -> int:
        return self.length + (self.new_tokens if self.mode == "generate" else 0)

    def examples(self) -> Iterator[Example]:
        clusters = self._clusters()
        for name, question in self._questions.items():
            if not self._is_left_out(question):
                tokens = min(_ABOUT_TOKENS + len(question.document or "") // _CHARACTERS, self.length)
                yield Example(name, tokens, {"task": question.exam}, question, clusters[name])

    def prepare(self, example: Example, subject: Subject) -> Generation | Scoring:
        question: Question = example.about
        exam, score, chat = EXAMS[question.exam], SCORES[question.exam], self.chat and chats(subject)

        def encode(document: str) -> list[int]:
            return subject.encode(question.prompt(document), chat)

        def cut(length: int) -> str:
            document = question.document or ""
            return longest_part(document, lambda part: len(encode(part)), length, exam.keep_tail)

        def passages(document: str) -> tuple[Passage, ...]:
            return tuple(answered(subject, question.prompt(document), option, chat) for option in exam.options)

        if self.mode == "generate":
            prompt = Prompt(encode(cut(self.length)), self.new_tokens, exam.stop)
            return Generation(prompt, question.right, lambda answer: {"exact_match": score(answer, question.right)})
        room = max(len(one.token_ids) - one.first for one in passages(""))
        asked = passages(cut(self.length - room))
        right = next(place for place, option in enumerate(exam.options) if score(option, question.right) == 1.0)

        def outcome(scores: Sequence[Sequence[float]]) -> Outcome:
            sums = [math.fsum(score) for score in scores]
            chosen = exam.options[sums.index(max(sums))]
            return Outcome(asked[right].first, option_scores(sums, right), exam.options[right], chosen)

        return Scoring(asked, outcome)


def option_scores(sums: Sequence[float], right: int) -> dict[str, float]:
    """Of the log-likelihoods of all options: whether the right one is the likeliest, and its part of their probability.

    One that is as likely as others counts for its share: in bfloat16 options often are.
    """
    best = max(sums)
    return {
        "accuracy": (sums[right] == best) / sums.count(best),
        "probability": math.exp(sums[right] - best) / math.fsum(math.exp(one - best) for one in sums),
    }
