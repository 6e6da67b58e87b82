"""The rotation kernel against `Rotary.rotate`: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401
from ropewalk.ops.triton.rotate import rotate
from tensors import random_rotary

from ropewalk.maps.positions import Grouped
from ropewalk.ops import Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rotary_and_tables(dim, tokens, begin=0, **kind):
    rotary = random_rotary(dim, **kind)
    rotary = Rotary(rotary.inverse_frequencies.to(DEVICE), rotary.interleaved, rotary.offset)
    return rotary, *rotary.shift(Grouped(4, 30), begin, begin + tokens, DEVICE)


def assert_rotated(output, x, rotary, cosine, sine):
    """Within half a step of the dtype of the exact product: what is left once a result is rounded a single time."""
    exact = rotary.rotate(x.double(), cosine.double(), sine.double())
    float32_error = 4 * torch.finfo(torch.float32).eps * x.double().abs().max()
    step = torch.finfo(x.dtype).eps / 2 * exact.abs()
    assert output.dtype == x.dtype
    assert ((output.double() - exact).abs() <= step + float32_error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "dim", "offset"),
    [(64, 64, 0), (128, 128, 0), (80, 80, 0), (80, 32, 0), (96, 48, 48), (72, 40, 16), (6, 2, 3), (8, 0, 0)],
)
def test_every_shape_of_head(head_dim, dim, offset, interleaved, dtype):
    rotary, cosine, sine = rotary_and_tables(dim, 37, begin=100, interleaved=interleaved, offset=offset)
    x = torch.randn(2, 3, 37, head_dim, device=DEVICE).to(dtype)
    output = rotate(x, cosine, sine, rotary)
    assert output.is_contiguous()
    assert_rotated(output, x, rotary, cosine, sine)
    rest = [i for i in range(head_dim) if not offset <= i < offset + dim]
    assert torch.equal(output[..., rest], x[..., rest])


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 7, 8, 9])
def test_tile_edges(tokens, heads, batch):
    """Sixteen tokens and eight heads are what a program takes."""
    rotary, cosine, sine = rotary_and_tables(128, tokens)
    x = torch.randn(batch, heads, tokens, 128, device=DEVICE)
    assert_rotated(rotate(x, cosine, sine, rotary), x, rotary, cosine, sine)


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides(interleaved):
    rotary, cosine, sine = rotary_and_tables(24, 21, begin=7, interleaved=interleaved, offset=4)
    buffer = torch.randn(2, 30, 9, 40, device=DEVICE)
    x = buffer.transpose(1, 2)[:, 2:7, 5:26, 4:36]
    expected = rotate(x.contiguous(), cosine, sine, rotary)
    assert torch.equal(rotate(x, cosine, sine, rotary), expected)
    # A cache with room for more tokens takes the result; the rest of it stays as it was.
    out = torch.full((2, 5, 64, 32), 7.0, device=DEVICE)
    assert rotate(x, cosine, sine, rotary, out=out[:, :, 9:30]).data_ptr() == out[:, :, 9:30].data_ptr()
    assert torch.equal(out[:, :, 9:30], expected)
    out[:, :, 9:30] = 7.0
    assert (out == 7.0).all()
    # In place.
    rotate(x, cosine, sine, rotary, out=x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
def test_nothing_to_do(shape):
    rotary, *tables = rotary_and_tables(8, 5)
    cosine, sine = (table[: shape[2]] for table in tables)
    assert rotate(torch.empty(shape, device=DEVICE), cosine, sine, rotary).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 8)}, "x must be"),
        ({"x": torch.zeros(1, 2, 5, 8).double()}, "float32, bfloat16 or float16"),
        ({"x": torch.zeros(1, 2, 6, 8)}, r"tables must be float32 \(6, 4\)"),
        ({"cosine": torch.zeros(5, 4).bfloat16()}, "tables must be float32"),
        ({"x": torch.zeros(1, 2, 5, 6)}, "does not fit 6"),
        ({"out": torch.zeros(1, 2, 5, 8).bfloat16()}, "out must be torch.float32"),
        ({"out": torch.zeros(1, 2, 6, 8)}, "out must be torch.float32"),
        ({"x": torch.zeros(1, 2, 8, 5).mT}, "last stride"),
    ],
)
def test_bad_input(change, message):
    tables = {"cosine": torch.ones(5, 4), "sine": torch.zeros(5, 4)}
    arguments = {"x": torch.zeros(1, 2, 5, 8), **tables, "rotary": random_rotary(8), **change}
    with pytest.raises(ValueError, match=message):
        rotate(**arguments)
