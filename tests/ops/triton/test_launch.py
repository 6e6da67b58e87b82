# SPDX-License-Identifier: Apache-2.0
"""Launches: what is compiled once is launched with the same arguments from then on."""

from __future__ import annotations

import pytest

from ropewalk.ops.triton.launch import Launch, multiples_of_16


class Kernel:
    """Notes what Triton would be called with; compiles to something that notes its launches."""

    def __init__(self, interpreted):
        self.interpreted, self.compilations, self.launches = interpreted, [], []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **named):
            self.compilations.append((grid, arguments, named))
            return None if self.interpreted else self.Compiled(self.launches)

        return compile_and_run

    class Compiled:
        def __init__(self, launches):
            self.launches = launches

        def __getitem__(self, grid):
            return lambda *arguments: self.launches.append((grid, arguments))


def test_the_first_launch_compiles_and_the_others_do_not():
    kernel = Kernel(interpreted=False)
    launch = Launch(kernel, {"block": 16, "softcap": False}, {"num_warps": 4})
    assert launch.constants == (16, False)
    for grid in ((1, 1, 1), (2, 3, 4), (5, 1, 1)):
        launch[grid]("x", 7, *launch.constants)
    assert kernel.compilations == [((1, 1, 1), ("x", 7), {"block": 16, "softcap": False, "num_warps": 4})]
    assert kernel.launches == [((2, 3, 4), ("x", 7, 16, False)), ((5, 1, 1), ("x", 7, 16, False))]


def test_the_interpreter_has_nothing_compiled():
    kernel = Kernel(interpreted=True)
    launch = Launch(kernel, {"block": 16}, {})
    for grid in ((1, 1, 1), (2, 3, 4)):
        launch[grid]("x", *launch.constants)
    assert [grid for grid, *_ in kernel.compilations] == [(1, 1, 1), (2, 3, 4)]


def test_a_launch_without_constants():
    kernel = Kernel(interpreted=False)
    launch = Launch(kernel, {}, {"num_warps": 4})
    launch[1, 1, 1]("x", 7, *launch.constants)
    assert kernel.compilations == [((1, 1, 1), ("x", 7), {"num_warps": 4})]


@pytest.mark.parametrize(
    ("numbers", "expected"), [((), True), ((0,), True), ((16, 32, 0), True), ((16, 8), False), ((1,), False)]
)
def test_multiples_of_16(numbers, expected):
    assert multiples_of_16(numbers) == expected
