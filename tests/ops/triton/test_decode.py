# SPDX-License-Identifier: Apache-2.0
"""The decode kernel against the specification: on a GPU where there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import threading

import pytest
import torch
import triton_interpreter  # noqa: F401
from tensors import DEVICE, random_rotary, random_tensors
from torch.testing import assert_close

from ropewalk.maps import SELF, DualChunk, Identity, LeakyReRoPE, SelfExtend, SlidingWindow, StreamingLLM
from ropewalk.ops import Rotary, attention
from ropewalk.ops.call import Call
from ropewalk.ops.layout import Step
from ropewalk.ops.triton import decode
from ropewalk.ops.triton.decode import Config, _make_table, _splits
from ropewalk.testing.budget import truth, within_budget
from ropewalk.testing.maps import example_maps, large_maps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAPS = [position_map for maps in example_maps().values() for position_map in maps]
# Small tiles, so that short texts have many edges; on the interpreter's four multiprocessors these make four splits a
# head of a row.
SMALL = Config(block_keys=16, warps=4, stages=2, programs=1)


def tensors(batch, heads, key_heads, keys, head_dim, dtype=torch.float32):
    return random_tensors(batch, heads, key_heads, 1, keys, head_dim, dtype, DEVICE)


def rotary_of(dim, **kind):
    return random_rotary(dim, device=DEVICE, **kind)


def attend(q, k, v, position_map, rotary, first_slots=None, lengths=None, config=SMALL, **options):
    options = {"scale": q.shape[-1] ** -0.5, **options}
    rotary = Rotary.none() if rotary is None else rotary
    return decode.attend(Call(q, k, v, position_map, rotary, None, **options), Step(lengths, first_slots, None), config)


def on_device(numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("position_map", MAPS, ids=str)
def test_every_map(position_map):
    rotary = rotary_of(16)
    q, k, v = tensors(1, 2, 1, 45, 16)
    expected = truth(q, k, v, position_map, rotary)
    assert_close(attend(q, k, v, position_map, rotary).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("position_map", large_maps(), ids=str)
def test_windows_larger_than_tiles(position_map, dtype):
    rotary = rotary_of(64)
    q, k, v = tensors(1, 4, 1, 641, 64, dtype)
    output = attend(q, k, v, position_map, rotary, config=Config(block_keys=64, programs=1))
    assert within_budget(output, q, k, v, position_map, rotary) is None


# Every head dimension with every dtype, and every number of heads that share keys.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "groups"), [(64, 1), (80, 3), (96, 4), (128, 8)])
def test_shapes(dtype, groups, head_dim):
    position_map, rotary = SelfExtend(3, 8), rotary_of(head_dim)
    q, k, v = tensors(1, 2 * groups, 2, 37, head_dim, dtype)
    assert within_budget(attend(q, k, v, position_map, rotary), q, k, v, position_map, rotary) is None


@pytest.mark.parametrize(("groups", "head_dim", "dim"), [(17, 64, 64), (2, 256, 256), (4, 80, 32), (8, 8, 4)])
def test_unusual_shapes(groups, head_dim, dim):
    position_map, rotary = SelfExtend(3, 8), rotary_of(dim)
    q, k, v = tensors(2, 2 * groups, 2, 37, head_dim, torch.bfloat16)
    assert within_budget(attend(q, k, v, position_map, rotary), q, k, v, position_map, rotary) is None


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "offset"), [(64, 0), (32, 0), (32, 24), (32, 32), (24, 6), (2, 0)])
@pytest.mark.parametrize("position_map", [SelfExtend(3, 8), LeakyReRoPE(2.5, 7)], ids=str)
def test_rotations(interleaved, dim, offset, position_map):
    rotary = rotary_of(dim, interleaved=interleaved, offset=offset)
    q, k, v = tensors(1, 2, 1, 37, 64)
    assert_close(
        attend(q, k, v, position_map, rotary).double(), truth(q, k, v, position_map, rotary), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("position_map", [Identity(), SelfExtend(3, 8), SlidingWindow(9)], ids=str)
def test_no_rotation(position_map):
    q, k, v = tensors(1, 2, 1, 37, 64)
    assert_close(attend(q, k, v, position_map, None).double(), truth(q, k, v, position_map, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "position_map",
    [
        SelfExtend(3, 8),
        SelfExtend(3, 8, start=20),
        SELF(9, 0.3, 6, "distance"),
        SlidingWindow(9),
        DualChunk(6, 4),
        StreamingLLM(3, 7),
    ],
    ids=str,
)
def test_rows_in_a_static_cache(position_map):
    """Rows that begin and end in different slots of a cache that holds NaN elsewhere; the last two see nothing."""
    first_slots, lengths = [0, 9, 35, 20, 0, 7], [33, 48, 36, 80, 0, 7]
    rotary = rotary_of(32)
    q, k, v = tensors(len(lengths), 2, 1, 80, 32)
    slots = torch.arange(80, device=DEVICE)
    for row, (first, length) in enumerate(zip(first_slots, lengths, strict=True)):
        unused = (slots < first) | (slots >= length)
        k[row, :, unused] = v[row, :, unused] = torch.nan
    output = attend(q, k, v, position_map, rotary, on_device(first_slots, torch.int32), on_device(lengths))
    for row, (first, length) in enumerate(zip(first_slots, lengths, strict=True)):
        one, seen = slice(row, row + 1), slice(first, length)
        if first == length:
            assert (output[one] == 0).all()
            continue
        expected = truth(q[one], k[one, :, seen], v[one, :, seen], position_map, rotary)
        assert_close(output[one].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_lengths_of_one_cache(length):
    """Splits share out the tokens there are, not the slots."""
    position_map, rotary = SELF(9, 0.3, 6), rotary_of(32)
    q, k, v = tensors(1, 4, 1, 200, 32, torch.bfloat16)
    output = attend(q, k, v, position_map, rotary, lengths=on_device([length]))
    k, v = k[:, :, :length], v[:, :, :length]
    assert within_budget(output, q, k, v, position_map, rotary) is None


def test_strides():
    """Caches whose slots are before their heads, and slices of a larger tensor."""
    position_map, rotary = SelfExtend(3, 8), rotary_of(32)
    q, k, v = tensors(2, 4, 2, 37, 32)
    expected = attend(q, k, v, position_map, rotary)
    q2 = torch.cat((q, q), dim=2)[:, :, 1:]
    k2 = k.transpose(1, 2).contiguous().transpose(1, 2)
    v2 = torch.cat((v, v), dim=1)[:, 2:]
    assert torch.equal(attend(q2, k2, v2, position_map, rotary), expected)


@pytest.mark.parametrize(("key_heads", "keys", "stride"), [(3, 37, (1 << 30, 32)), (1, 50, (32, 1 << 26))])
def test_offsets_past_32_bits(key_heads, keys, stride):
    """Strides that fit 32 bits, and products with heads or slots that do not."""
    position_map, rotary = SelfExtend(3, 8), rotary_of(32)
    q, k, v = tensors(1, key_heads, key_heads, keys, 32, torch.bfloat16)
    far = []
    for x in (k, v):
        # Only the pages that are written exist.
        room = torch.empty(key_heads * stride[0] + keys * stride[1], dtype=x.dtype, device=DEVICE)
        far.append(room.as_strided(x.shape, (0, *stride, 1)).copy_(x))
    assert torch.equal(attend(q, *far, position_map, rotary), attend(q, k, v, position_map, rotary))


def test_more_splits_than_are_merged_at_a_time():
    position_map, rotary = SelfExtend(8, 48), rotary_of(32)
    q, k, v = tensors(1, 2, 1, 1100, 32, torch.bfloat16)
    k[:, :, 1000:1040] *= 4  # the last splits, which find the end of the far band, outweigh the rest
    output = attend(q, k, v, position_map, rotary, config=Config(block_keys=16, programs=40))
    assert within_budget(output, q, k, v, position_map, rotary) is None


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}, {"scale": 0.5}]
)
@pytest.mark.parametrize("position_map", [SelfExtend(3, 8), SlidingWindow(9), SelfExtend(3, 8, start=50)], ids=str)
def test_options(options, position_map):
    rotary = rotary_of(32)
    q, k, v = tensors(1, 6, 2, 45, 32)
    options = {"scale": 32**-0.5, **options}
    if "sinks" in options:
        options["sinks"] = torch.linspace(-2, 4, 6, device=DEVICE)
    doubles = q.double(), k.double(), v.double()
    expected = attention(*doubles, position_map, rotary, impl="reference", **options)
    assert_close(attend(q, k, v, position_map, rotary, **options).double(), expected, rtol=0, atol=1e-5)


def test_a_sink_alone():
    q, k, v = tensors(1, 2, 1, 16, 32)
    sinks = torch.zeros(2, device=DEVICE)
    output = attend(q, k, v, Identity(), rotary_of(32), lengths=on_device([0]), sinks=sinks)
    assert (output == 0).all()


def test_far_positions_are_where_the_model_rotates():
    """Past 2^17 a float32 phase is off by hundredths of a turn; the model's own rounding is reproduced, not mended."""
    keys = (1 << 17) + 100
    position_map, rotary = SelfExtend(16, 960), Rotary(1e4 ** -(torch.arange(0, 32, 2, device=DEVICE) / 32))
    q, k, v = tensors(1, 1, 1, keys, 32)
    config = None if DEVICE.type == "cuda" else Config(block_keys=16384)
    output = attend(q, k, v, position_map, rotary, config=config)
    assert_close(output.double(), truth(q, k, v, position_map, rotary), rtol=0, atol=2e-6)


def shifted(x):
    """The same numbers at an address that is no multiple of 16."""
    moved = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("which", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_addresses(which):
    """A launch is kept for later calls, and must not take what holds for one call's addresses to hold for another's."""
    rotary, position_map = rotary_of(64), SelfExtend(8, 50)
    tensors_ = tensors(1, 3, 1, 60, 64, torch.bfloat16)
    expected = attend(*tensors_, position_map, rotary)
    moved = [shifted(x) if i in which else x for i, x in enumerate(tensors_)]
    assert torch.equal(attend(*moved, position_map, rotary), expected)


def test_a_whole_number_as_scale():
    q, k, v = tensors(1, 4, 2, 60, 16)
    rotary = rotary_of(16)
    for scale in (1, 0.5, 2):
        options = {"scale": scale, "softcap": 2}
        assert_close(
            attend(q, k, v, SelfExtend(8, 50), rotary, **options),
            attention(q, k, v, SelfExtend(8, 50), rotary, impl="reference", **options),
            rtol=0,
            atol=1e-5,
        )


@pytest.mark.parametrize("dim", [56, 64])
def test_growing_texts(dim):
    """The strides of a cache that grows are others at every step."""
    rotary, position_map = rotary_of(dim), SelfExtend(8, 50)
    q, k, v = tensors(1, 3, 1, 120, dim, torch.bfloat16)
    for keys in (97, 98, 112, 120):
        k_now, v_now = k[:, :, :keys].contiguous(), v[:, :, :keys].contiguous()
        output = attend(q, k_now, v_now, position_map, rotary)
        assert torch.equal(output, attend(q, k[:, :, :keys], v[:, :, :keys], position_map, rotary))
        assert within_budget(output, q, k_now, v_now, position_map, rotary) is None


def test_same_call_twice_is_identical():
    q, k, v = tensors(2, 6, 2, 100, 32, torch.bfloat16)
    first, second = (attend(q, k, v, SelfExtend(8, 50), rotary_of(32)) for _ in range(2))
    assert torch.equal(first, second)


def test_near_keys_are_not_turned():
    """While everything lies in the near band, the map changes no bit."""
    q, k, v = tensors(2, 6, 2, 60, 64, torch.bfloat16)
    rotary = rotary_of(64)
    assert torch.equal(attend(q, k, v, SelfExtend(8, 64), rotary), attend(q, k, v, SelfExtend(8, 5, start=60), rotary))


@pytest.mark.parametrize("programs", [4, 264, 396])
def test_splits_fill_the_device(programs):
    for rows in (1, 2, 3, 8, 24, 32, 64, 100, 200, 264, 1000, 4096):
        splits = _splits(rows, programs)
        rounds = -(-rows * splits // programs)
        assert rows * splits >= 0.9 * rounds * programs
        assert splits <= max(1, 10 * programs // rows)


def test_tables_are_not_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"tables of SelfExtend\(group_size=3, window=77\) for 4096 slots"):
        _make_table((SelfExtend(3, 77), 4096, torch.device("cuda")))


def test_tables_are_made_in_memory_of_their_own(monkeypatch):
    """Not in a CUDA graph's pool, which takes what the thread that warms it up allocates."""
    threads, make_table = [], decode.make_table

    def note(*arguments):
        threads.append(threading.get_ident())
        return make_table(*arguments)

    monkeypatch.setattr(decode, "make_table", note)
    rotary, one = rotary_of(16), tensors(1, 1, 1, 16, 16)
    for _ in range(2):
        attend(*one, SelfExtend(3, 78), rotary)
    assert len(threads) == 1
    assert threads != [threading.get_ident()]


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_one_graph_for_all_lengths():
    position_map, rotary = SelfExtend(8, 256), rotary_of(64)
    q, k, v = tensors(2, 8, 2, 4096, 64, torch.bfloat16)
    lengths, first_slots = on_device([4096, 4096]), on_device([0, 0])
    options = {"first_slots": first_slots, "lengths": lengths, "config": None}
    attend(q, k, v, position_map, rotary, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v, position_map, rotary, **options)
    for numbers in ([1, 300], [4096, 17], [255, 2048]):
        lengths.copy_(on_device(numbers))
        graph.replay()
        assert torch.equal(captured, attend(q, k, v, position_map, rotary, **options))
        for row, length in enumerate(numbers):
            one = (q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length])
            assert within_budget(captured[row : row + 1], *one, position_map, rotary) is None
