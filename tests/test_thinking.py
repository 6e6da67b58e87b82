# SPDX-License-Identifier: Apache-2.0
import pytest

from ropewalk.thinking import answer_begins, begun


@pytest.mark.parametrize(
    ("output", "inside", "answer"),
    [
        # Without a thought all is the answer, whatever it looks like.
        ("12345", False, "12345"),
        ("  12345\n", False, "  12345\n"),
        ("", False, ""),
        ("if a < think > b", False, "if a < think > b"),
        ("It says <think> there.", False, "It says <think> there."),
        # The model begins its thought itself.
        ("<think>\nIs it 1? No.\n</think>\n\n12345", False, "12345"),
        ("\n<think></think>12345\n", False, "12345\n"),
        ("<think>\nIs it 1? Is it", False, None),
        (" <think>", False, None),
        ("Sure.\n<think>12345", False, None),
        ("<think>a</think>x <think>12345", False, None),
        # The prompt has begun it: only its end is there, or nothing.
        ("Is it 1? No.\n</think>\n\n12345", True, "12345"),
        ("Is it 1? Is it", True, None),
        ("", True, None),
        ("Is it 1?</think>", True, ""),
        ("<think>Is it 1?</think> 2", True, "2"),
        # An end alone ends a thought, whoever began it.
        ("Is it 1? No.</think>12345", False, "12345"),
        # The last thought counts, as in the models' own templates.
        ("<think>1?</think>1. <think>2?</think>2", False, "2"),
        ("<think>1?</think><think>2?", False, None),
    ],
)
def test_where_the_answer_begins(output, inside, answer):
    at = answer_begins(output, inside)
    assert (None if at is None else output[at:]) == answer


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("<|User|>Why?<|Assistant|><think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),  # Qwen 3, asked not to think
        ("<|User|>What does <think> mean?<|Assistant|>", False),
        ("", False),
    ],
)
def test_what_a_prompt_has_begun(prompt, found):
    assert begun(prompt) is found
