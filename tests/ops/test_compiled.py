from __future__ import annotations

import pytest
import torch
from conftest import random_rotary, random_tensors

from ropewalk.maps import SelfExtend
from ropewalk.ops import Layout, attention
from ropewalk.ops.compiled import Settings, compiled_attention, register, release


@pytest.fixture
def handle():
    handle = register(Settings(SelfExtend(3, 8), random_rotary(16)))
    yield handle
    release(handle)


def test_operator_follows_the_rules(handle):
    """torch's own checks of schema, fake kernel and aliasing."""
    for query_start, keys in ((None, 20), (torch.tensor(15), 40)):
        q, k, v = random_tensors(2, 4, 2, 20 if query_start is None else 5, keys, 16)
        mask = torch.ones(2, keys).bool()
        mask[0, :3] = False
        arguments = (q, k, v, query_start, mask, None, None, None, handle)
        torch.library.opcheck(compiled_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiled_equals_eager(handle):
    q, k, v = random_tensors(2, 4, 2, 20, 20, 16)

    @torch.compile(backend="eager", fullgraph=True)
    def call(q, k, v):
        return 2 * compiled_attention(q, k, v, None, None, None, None, None, handle)

    expected = 2 * attention(q, k, v, SelfExtend(3, 8), random_rotary(16), layout=Layout(20, 20))
    torch.testing.assert_close(call(q, k, v), expected)
