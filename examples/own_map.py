# SPDX-License-Identifier: Apache-2.0
"""A map of one's own: groups of 4 tokens up to `reach` tokens back, and of 16 beyond.

python examples/own_map.py [MODEL]
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

from transformers import pipeline

import ropewalk
from ropewalk.maps import Band
from ropewalk.maps.positions import Grouped


@dataclass(frozen=True)
class TwoSizes(ropewalk.PositionMap):
    name: ClassVar[str] = "two-sizes"
    window: int
    reach: int

    @property
    def bands(self) -> tuple[Band, ...]:
        shift = self.window - self.window // 4
        farther = shift + self.reach // 4 - self.reach // 16  # goes on where the middle band ends
        return (
            Band.at_distances(0, self.window),
            Band.at_distances(self.window, self.reach, Grouped(4, shift), Grouped(4)),
            Band.at_distances(self.reach, None, Grouped(16, farther), Grouped(16)),
        )

    @classmethod
    def _for_length(cls, target_length: int, trained_window: int) -> "TwoSizes":
        window = trained_window // 8
        return cls(window, reach=4 * window)


print(TwoSizes(window=4, reach=8).relative_positions(12))
chat = pipeline("text-generation", sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
text = "The pass key is 71432. " + "The grass is green. The sky is blue. Here we go. " * 700 + "What is the pass key?"
with ropewalk.extend(chat.model, TwoSizes, target_length=12_000) as handle:
    reply = chat([{"role": "user", "content": text}], max_new_tokens=12, do_sample=False)
    print(handle.position_map, reply[0]["generated_text"][-1]["content"], sep="\n")
