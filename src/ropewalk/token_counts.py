# SPDX-License-Identifier: Apache-2.0
"""Numbers of tokens as people write them."""

from __future__ import annotations

import re

_K = 1024
# Far past any text that a model has been asked about; one of so many takes minutes to write out.
MOST_TOKENS = 1 << 24


def tokens(text: str) -> int:
    """4096 of "4096", 16384 of "16k".

    Raises:
        ValueError: it is something else.
    """
    found = re.fullmatch(r"(-?[0-9]{1,20})(k?)", text.strip().lower())
    if found is None:
        raise ValueError(f"must be a whole number such as 4096 or 16k, got {text!r}")
    return int(found[1]) * (_K if found[2] else 1)
