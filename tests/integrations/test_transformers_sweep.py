# SPDX-License-Identifier: Apache-2.0
"""What is made for a map goes when the map goes."""

import gc

import pytest
import torch
from torch import Tensor

import ropewalk
from ropewalk import SELF, SelfExtend
from ropewalk.testing import tiny_model


def held() -> tuple[int, int]:
    """Tensors alive, and their bytes."""
    gc.collect()
    # By type: to ask some objects of torch for their class is to use what it deprecates, and what is left of another
    # test's compilation has no bytes.
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return len(tensors), sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("impl", ["auto", "blocks"])
def test_a_hundred_maps_swept_over_one_model_leave_nothing_behind(impl):
    model, ids = tiny_model("llama"), torch.ones(1, 40, dtype=torch.long)

    def sweep(maps):
        with torch.no_grad():
            for position_map in maps:
                with ropewalk.extend(model, position_map, impl=impl, enforce_limit=False):
                    model(ids)

    sweep([SelfExtend(2, 4), SELF(5, 0.5, 3, "distance")])
    before = held()
    sweep([SelfExtend(2 + i, 4 + i % 8) for i in range(80)])
    sweep([SELF(5 + i % 4, 0.5 + 0.01 * i, 3, "distance") for i in range(20)])
    assert held() == before
