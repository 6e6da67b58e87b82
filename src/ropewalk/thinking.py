# SPDX-License-Identifier: Apache-2.0
"""Models that think before they answer: where a thought ends, and the answer begins.

A thought stands between <think> and </think>, as of DeepSeek-R1 and Qwen 3. Some chat templates write <think> at the
end of the prompt, so that the output begins inside a thought and holds nothing but its end.
"""

from __future__ import annotations

BEGIN, END = "<think>", "</think>"


def begun(prompt: str) -> bool:
    """Whether a prompt ends where a thought has begun."""
    return prompt.rstrip().endswith(BEGIN)


def answer_begins(output: str, inside: bool = False) -> int | None:
    """Where what is said behind the last thought begins: 0 without a thought, None where the thought has no end (yet).

    Args:
        inside: whether the output begins inside a thought, as its prompt does where it has `begun` one.
    """
    end = output.rfind(END)
    at = 0 if end < 0 else end + len(END)
    answer = output[at:].lstrip()
    # Named in the middle of a line it is a word, unless the model is known to think.
    begun_again = BEGIN in answer if at else any(line.lstrip().startswith(BEGIN) for line in answer.splitlines())
    if begun_again or (inside and not at):
        return None
    return len(output) - len(answer) if at else 0
