# SPDX-License-Identifier: Apache-2.0
"""CPU attention under a position map, as a ratio to plain attention in the same run.

Each case is timed in turn with plain attention, round after round, so that a machine that other work slows down slows
both. A row is a case: median milliseconds with the 20th and 80th percentile, and the median of the rounds' ratios.

For decode, "kept" are the ratios to plain and to packed heads of a caller that keeps the far keys (`far_keys=`).

    python benchmarks/attention_cpu.py --output benchmarks/results/attention_cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.table import Table
from rows import commit, processor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import ropewalk
from ropewalk.maps import SELF, PositionMap, ReRoPE, SelfExtend
from ropewalk.ops import Rotary, attention
from ropewalk.ops.rotary import far_band, rerotated

SHAPES = {"9 q / 3 kv heads, D 64": (9, 3, 64), "32 q / 8 kv heads, D 128": (32, 8, 128)}
LENGTHS = (2048, 4096, 8192, 16384)
WINDOW = 1024
MAPS: dict[str, PositionMap] = {
    "SelfExtend": SelfExtend(8, WINDOW),
    "SELF anchored": SELF(16, 0.02, WINDOW),
    "SELF distance": SELF(16, 0.02, WINDOW, "distance"),
    "ReRoPE": ReRoPE(WINDOW),
}


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain attention as transformers 5 calls it: causal with grouped heads for a prefill, no mask for one query."""
    return scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)


def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain attention of one query with the heads that share a key as its queries: the fastest call that was found."""
    batch, heads, _, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
    return scaled_dot_product_attention(grouped, key, value).reshape(query.shape)


def race(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    arguments = _arguments()
    table = Table(
        "work", "shape", "dtype", "tokens", "map", "ms", "p20-p80", "plain ms", "ratio", "to packed heads", "kept"
    )
    facts = _facts()
    rows = []
    cases = product(arguments.work, arguments.shapes, arguments.dtypes, arguments.lengths)
    for work, shape, dtype, length in cases:
        heads, key_heads, head_dim = SHAPES[shape]
        queries = length if work == "prefill" else 1
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, number, tokens, head_dim, dtype=getattr(torch, dtype))
            for number, tokens in ((heads, queries), (key_heads, length), (key_heads, length))
        )
        rotary = Rotary(1e4 ** -(torch.arange(0, head_dim, 2) / head_dim))
        for name in arguments.maps:
            calls: dict[str, Callable[[], object]] = {
                "plain": lambda q=query, k=key, v=value: plain(q, k, v),
                "ropewalk": lambda q=query, k=key, v=value, m=MAPS[name], r=rotary: attention(q, k, v, m, r),
            }
            if work == "decode":
                calls["packed"] = lambda q=query, k=key, v=value: packed(q, k, v)
                if band := far_band(MAPS[name]):
                    far = rerotated(key, band.key_positions, 0, rotary)
                    calls["kept"] = lambda q=query, k=key, v=value, m=MAPS[name], r=rotary, f=far: attention(
                        q, k, v, m, r, far_keys=f
                    )
            with torch.inference_mode():
                seconds = race(calls, arguments.rounds if work == "prefill" else 20 * arguments.rounds)
            row = _row(seconds) | {"work": work, "shape": shape, "dtype": dtype, "tokens": length, "map": name}
            rows.append(row | facts)
            table.add_row(*_cells(rows[-1]))
            print(" ".join(_cells(rows[-1])), file=sys.stderr, flush=True)
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    Console(width=150).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:1])
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=["SelfExtend"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON lines, written as the rows come")
    return parser.parse_args()


def _row(seconds: dict[str, list[float]]) -> dict[str, float | None]:
    def ratio(other: str, call: str = "ropewalk") -> float | None:
        if other not in seconds or call not in seconds:
            return None
        return median(ours / theirs for ours, theirs in zip(seconds[call], seconds[other], strict=True))

    spread = quantiles(seconds["ropewalk"], n=5)
    return {
        "ms_p20": 1e3 * spread[0],
        "ms_p50": 1e3 * median(seconds["ropewalk"]),
        "ms_p80": 1e3 * spread[-1],
        "plain_ms": 1e3 * median(seconds["plain"]),
        "ratio": ratio("plain"),
        "ratio_to_packed": ratio("packed"),
        "kept_ratio": ratio("plain", "kept"),
        "kept_ratio_to_packed": ratio("packed", "kept"),
        "rounds": len(seconds["plain"]),
    }


def _cells(row: dict[str, object]) -> list[str]:
    return [
        *(str(row[name]) for name in ("work", "shape", "dtype", "tokens", "map")),
        f"{row['ms_p50']:.2f}",
        f"{row['ms_p20']:.2f}-{row['ms_p80']:.2f}",
        f"{row['plain_ms']:.2f}",
        f"{row['ratio']:.2f}",
        "" if row["ratio_to_packed"] is None else f"{row['ratio_to_packed']:.2f}",
        "" if row["kept_ratio"] is None else f"{row['kept_ratio']:.2f}, {row['kept_ratio_to_packed']:.2f}",
    ]


def _facts() -> dict[str, object]:
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ropewalk": ropewalk.__version__,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
