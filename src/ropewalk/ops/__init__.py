# SPDX-License-Identifier: Apache-2.0
"""Attention under a position map. Knows tensors and maps, no framework."""

from ropewalk.ops.api import attention
from ropewalk.ops.call import Pages, Positions
from ropewalk.ops.implementations import Implementation
from ropewalk.ops.layout import Layout
from ropewalk.ops.rotary import Rotary

__all__ = ["Implementation", "Layout", "Pages", "Positions", "Rotary", "attention"]
