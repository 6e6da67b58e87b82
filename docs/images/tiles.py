# SPDX-License-Identifier: Apache-2.0
"""Draws tiles.png, the tiles of scores that the Hopper kernel visits: `python docs/images/tiles.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

TILES, WINDOW = 10, 3
COLORS = {"near": "#3b6fb6", "far": "#e0a458", "diagonal": "#9dbbe0", "edge": "#b7664f"}
LABELS = {
    "near": "near, no mask: true rotation",
    "far": "far, no mask: far rotation",
    "diagonal": "diagonal: causal mask",
    "edge": "edge: taken twice, as near and as far",
}


def kind(query: int, key: int) -> str:
    """What a tile is; windows and tiles are aligned here, as they are for W = 1024 and tiles of 128."""
    distance = query - key
    return "diagonal" if distance == 0 else "near" if distance < WINDOW else "edge" if distance == WINDOW else "far"


def order(query: int) -> list[tuple[int, str]]:
    """Key tiles of a query tile in the order in which the kernel takes them, the edge twice."""
    kinds = [(key, kind(query, key)) for key in range(query, -1, -1)]
    masked = [t for t in kinds if t[1] in ("diagonal", "edge")]
    return [*masked, *[t for t in masked if t[1] == "edge"], *[t for t in kinds if t[1] in ("near", "far")]]


def main() -> None:
    figure, axes = plt.subplots(figsize=(7.2, 5.6), layout="constrained")
    for query in range(TILES):
        for key in range(query + 1):
            axes.add_patch(Rectangle((key, query), 1, 1, facecolor=COLORS[kind(query, key)], edgecolor="white", lw=2))
    chosen = TILES - 2
    numbers: dict[int, list[str]] = {}
    for step, (key, _) in enumerate(order(chosen), start=1):
        numbers.setdefault(key, []).append(str(step))
    for key, steps in numbers.items():
        color = "black" if kind(chosen, key) in ("far", "diagonal") else "white"
        axes.text(key + 0.5, chosen + 0.5, ", ".join(steps), ha="center", va="center", fontsize=10, color=color)
    axes.add_patch(Rectangle((0, chosen), chosen + 1, 1, fill=False, edgecolor="black", lw=1.5))
    axes.annotate(
        "one program: 128 queries of one head;\nthe numbers are the order of its tiles",
        (chosen + 0.98, chosen - 0.02),
        xytext=(TILES - 3.3, TILES - 6.4),
        fontsize=10,
        ha="left",
        arrowprops={"arrowstyle": "-", "color": "black", "connectionstyle": "arc3,rad=-0.2"},
    )
    axes.set(xlim=(0, TILES), ylim=(TILES, 0), aspect="equal")
    axes.set_xticks([], [])
    axes.set_yticks([], [])
    axes.set_xlabel("keys, oldest first, in tiles of 128")
    axes.set_ylabel("queries, in tiles of 128")
    axes.spines[:].set_visible(False)
    axes.legend(
        handles=[Patch(color=COLORS[name], label=LABELS[name]) for name in COLORS],
        loc="upper right",
        frameon=False,
        fontsize=10,
    )
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
