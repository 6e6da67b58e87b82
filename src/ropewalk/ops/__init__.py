"""Attention under a position map. Knows tensors and maps, no framework."""

from ropewalk.ops.api import Implementation, attention, choose_impl
from ropewalk.ops.layout import Layout
from ropewalk.ops.rotary import Rotary

__all__ = ["Implementation", "Layout", "Rotary", "attention", "choose_impl"]
