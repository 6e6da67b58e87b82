# SPDX-License-Identifier: Apache-2.0
"""The parts of the GPU benchmark that need no GPU: cases, rows, masks, the check of outputs, the picture, tiny runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import attention_gpu
import drawing
import peers
import pytest
import rows
import timing
import torch
from attention_gpu import CASES, QUICK, TINY, TINY_MAPS, Case, Reference, Settings
from rows import Row, Samples

from ropewalk.maps import Band, Identity, SelfExtend

CPU = torch.device("cpu")
# FlexAttention says that it is not compiled here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def _settings(**changes):
    settings = Settings(CPU, torch.float32, ("auto",), (), rounds=2, turn_ms=0.1, case_seconds=60, maps=TINY_MAPS)
    return dataclasses.replace(settings, **changes)


def _row(**changes):
    shape = {"batch": 1, "heads": 32, "key_heads": 8, "head_dim": 128, "queries": 1024, "keys": 1024}
    fields = {"case": "prefill", "work": "prefill", **shape, "dtype": "bfloat16", "map": "m", "impl": "i"}
    return Row(**{**fields, "kind": "ropewalk", **changes})


def test_cases_cover_the_targets_and_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
    for pattern, count in (
        ("prefill-h32x8", 4),
        ("prefill-h32x32", 4),
        ("prefill-h9x3-d64-32k", 1),
        ("chunk-2k-on-64k", 1),
        ("decode-b1", 4),
        ("decode-b8-128k", 1),
    ):
        assert len(attention_gpu.selected(CASES, [pattern])) == count, pattern
    assert len(attention_gpu.selected(CASES, QUICK)) == len(QUICK)
    assert attention_gpu.selected(CASES, ["32"]) == []


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (1, 7)])
def test_visible_keys_are_counted(queries, keys):
    seen = torch.ones(queries, keys).tril(keys - queries)
    assert Case("prefill", queries, keys).visible_keys == seen.sum()


def test_a_decode_goes_through_more_keys_than_the_cache_holds():
    case = Case("decode", 1, 1024)
    sets = attention_gpu.input_sets(case, 2, cache_bytes=10 * 2**20)
    assert sets * case.key_bytes(2) >= 4 * 10 * 2**20
    assert attention_gpu.input_sets(Case("prefill", 8, 8), 2, cache_bytes=2**20) == 1


@pytest.mark.parametrize(
    "band",
    [Band.at_distances(0, None), Band.at_distances(0, 200), Band.at_distances(200, None), Band.at_distances(130, 300)],
    ids=str,
)
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (128, 640), (300, 500)])
def test_band_mask_is_the_band(band, queries, keys):
    query, key = torch.empty(1, 1, queries, 8), torch.empty(1, 1, keys, 8)
    mask = peers.band_mask(band, query, key)
    m, n = torch.arange(queries)[:, None], torch.arange(keys)
    distance = m + keys - queries - n
    first, stop = band.distances
    inside = (distance >= first) & (distance < (stop or keys))
    assert torch.equal(mask.mask_mod(None, None, m, n), inside)
    dense = torch.zeros_like(inside)
    for number, columns, whole in (
        (mask.kv_num_blocks, mask.kv_indices, False),
        (mask.full_kv_num_blocks, mask.full_kv_indices, True),
    ):
        for row, count in enumerate(number[0, 0].tolist()):
            for column in columns[0, 0, row, :count].tolist():
                block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                dense[block] = inside[block]
                assert inside[block].any()
                assert bool(inside[block].all()) == whole
    assert torch.equal(dense, inside)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_case_runs_and_says_what_does_not(case):
    # A last implementation that there is none of.
    found = attention_gpu.measure(case, _settings(impls=("auto", "none")), log=lambda text: None)
    timed = {(row.impl, row.map) for row in found if not row.error}
    for name in case.maps:
        position_map = TINY_MAPS[name]
        assert ("auto", str(position_map)) in timed
        assert (("two FlexAttention passes", str(position_map)) in timed) == (len(position_map.bands) == 2)
    assert ("FlexAttention", peers.TRUE_POSITIONS) in timed
    expected = len(peers.plain(case.work)) + 3 * len(case.maps)
    assert len(found) == expected
    for row in found:
        assert (row.ms_p50 is None) == bool(row.error), row
        if row.impl == "none" or row.impl.startswith(("cuDNN", "FlashAttention 4")):
            assert row.error
    plain = [row for row in found if row.kind == "plain" and not row.error]
    assert max(row.ratio for row in plain) == 1.0
    assert all(row.relative_error < 1e-5 for row in found if not row.error)


def test_what_is_left_out_has_a_row():
    case = dataclasses.replace(TINY[2], flex=False)
    left_out = [row for row in attention_gpu.measure(case, _settings(), log=lambda text: None) if "Flex" in row.impl]
    assert len(left_out) == 2
    assert all("--all-flex" in row.error for row in left_out)


def test_wrong_output_is_refused(monkeypatch):
    case = TINY[0]
    real = attention_gpu.ours
    monkeypatch.setattr(attention_gpu, "ours", lambda impl, position_map: real(impl, SelfExtend(4, 65)))
    found = attention_gpu.measure(case, _settings(maps=TINY_MAPS, peers=("nothing",)), log=lambda text: None)
    assert all(row.error.startswith("WrongOutputError") and row.ms_p50 is None for row in found if row.impl == "auto")
    assert any(row.impl == "auto" for row in found)


def test_nan_and_other_shapes_are_wrong():
    case = dataclasses.replace(TINY[0], queries=64, keys=64)
    inputs = attention_gpu.tensors(case, _settings(), 0)
    reference = Reference(*inputs, attention_gpu.rotary(case.head_dim, CPU), 64)
    query = inputs[0]
    assert not reference.error(torch.full_like(query, torch.nan), Identity()) <= 1
    assert reference.error(query[:, :, :1], Identity()) == float("inf")


@pytest.mark.parametrize(("queries", "keys", "window"), [(1, 640, 64), (5, 5, 64), (512, 512, 64), (128, 640, 1024)])
def test_sampled_blocks_lie_inside(queries, keys, window):
    blocks = attention_gpu.sampled_blocks(queries, keys, window)
    assert blocks[0].start == 0
    assert blocks[-1].stop == queries
    assert all(0 <= block.start < block.stop <= queries for block in blocks)
    if queries == keys == 512:
        assert any(block.start < window < block.stop for block in blocks)


def test_ratios_are_to_the_fastest_plain_of_the_run():
    timed = [
        (_row(impl="cuDNN", kind="plain", ships_with_torch=True), Samples(((4.0, 4.0), (4.0, 4.0)))),
        (_row(impl="FlashAttention 4", kind="plain"), Samples(((2.0, 2.0), (3.0, 3.0)))),
        (_row(impl="auto"), Samples(((4.0, 4.0), (5.0, 5.0)))),
        (_row(impl="passes", kind="composition"), Samples(((1.0, 1.0), (1.0, 1.0)))),
    ]
    ours = rows.with_ratios([(rows.with_times(row, s, 9.0, "TFLOP/s"), s) for row, s in timed])[2]
    assert ours.fastest_plain == "FlashAttention 4"
    assert ours.ratio == pytest.approx(2.5 / 4.5)
    assert (ours.ratio_low, ours.ratio_high) == pytest.approx((0.5, 0.6))
    assert (ours.fastest_in_torch, ours.ratio_to_torch) == ("cuDNN", pytest.approx(4 / 4.5))
    assert ours.rate == pytest.approx(9.0 / 4.5e-3)
    assert (ours.ms_p20, ours.ms_p50, ours.ms_p80, ours.samples) == (4.0, 4.5, 5.0, 4)


def test_rows_come_back_from_their_file_the_last_of_each(tmp_path):
    path = tmp_path / "results" / "rows.jsonl"
    facts = rows.facts(CPU, "abc")
    old, new, other = _row(ratio=0.5), _row(ratio=0.9, facts=facts), _row(timing="graph")
    rows.append([old], path)
    rows.append([new, other], path)
    assert rows.read(path) == [new, other]


def test_contestants_take_turns_and_errors_stay_with_who_made_them():
    order = []

    def broken():
        raise ValueError("no such kernel")

    contestants = [
        timing.Contestant("a", lambda: order.append("a"), calls=2),
        timing.Contestant("broken", broken),
        timing.Contestant("b", lambda: order.append("b")),
    ]
    timing.race(contestants, CPU, rounds=2, turn_ms=0.0, least_repeats=2)
    assert [len(one.samples.rounds) for one in contestants] == [2, 0, 2]
    assert contestants[1].error == "ValueError: no such kernel"
    # An estimate each, then rounds of a turn of two calls each, in any order.
    rounds = "".join(order).removeprefix("ab")
    assert {rounds[:4], rounds[4:]} <= {"aabb", "bbaa"}


def test_repeats_fill_a_turn():
    assert timing.repeats_for(1.0, 10.0, least=2, most=50) == 10
    assert timing.repeats_for(100.0, 10.0, least=2, most=50) == 2
    assert timing.repeats_for(0.0, 10.0, least=2, most=50) == 50


def test_a_slow_case_has_fewer_rounds():
    assert timing.rounds_within(30, 1, rounds=5) == 5
    assert timing.rounds_within(30, 10, rounds=5) == 3
    assert timing.rounds_within(30, 100, rounds=5) == 2
    assert timing.rounds_within(30, 0, rounds=1) == 1


def test_labels_do_not_lie_on_each_other():
    placed = drawing.spread([0.9, 0.5, 0.91, 0.905], gap=0.1)
    assert placed[1] == 0.5
    assert sorted(placed)[1:] == pytest.approx([0.805, 0.905, 1.005])
    assert placed[0] < placed[3] < placed[2]
    assert drawing.spread([], 0.1) == []


def test_picture_from_rows_alone(tmp_path):
    drawn = [
        _row(case=f"{work} {keys}", work=work, keys=keys, map=f"SelfExtend(group_size={group}, window=4)", ratio=ratio)
        for work in ("prefill", "decode")
        for group, ratio in ((8, 0.93), (4, 0.91))
        for keys in (16384, 32768)
    ]
    alone = _row(case="other", map="ReRoPE(window=4)", ratio=0.95)
    for rows_ in (drawn, [alone], [*drawn, alone]):
        path = tmp_path / "pictures" / "ratio.png"
        drawing.draw(rows_, path)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        drawing.draw([_row(kind="plain", ratio=1.0)], path)


def test_a_graph_is_drawn_where_there_is_one():
    eager, graph = _row(work="decode", ratio=0.5), _row(work="decode", timing="graph", ratio=0.9)
    [line] = drawing.grouped([eager, graph])
    assert line == [graph]


@pytest.mark.parametrize("name", ["attention_gpu", "model_gpu"])
def test_the_docs_show_the_committed_rows(name):
    root = Path(__file__).parents[2]
    table = rows.markdown(rows.read(root / "benchmarks" / "results" / f"{name}.jsonl"))
    assert table in (root / "docs" / "gpu.md").read_text(), "run: python benchmarks/attention_gpu.py --table ROWS"
