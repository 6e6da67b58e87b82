# SPDX-License-Identifier: Apache-2.0
"""Compiles every portable kernel for a GPU that is not there: `python compile_for.py CAPABILITY HEAD_DIM DTYPE`.

Prints a line of JSON a kernel: its name, and the shared memory that it takes and that such a GPU has for a program. In
a process of its own, without the interpreter.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ropewalk.maps import SELF, SelfExtend
from ropewalk.ops import Rotary
from ropewalk.ops.call import Call
from ropewalk.ops.layout import Step
from ropewalk.ops.triton import decode, launch, narrow, prefill, rerotate, tuned
from ropewalk.ops.triton.banded import Banded
from ropewalk.ops.triton.narrow_keys import Narrow

# Bytes that a program may have, by compute capability: table "Technical Specifications per Compute Capability" of the
# CUDA C++ Programming Guide.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches(head_dim: int, dtype: torch.dtype) -> list[tuple[launch.Launch, tuple[object, ...]]]:
    """What prefill, decode and narrow bands launch, with the arguments; nothing runs."""
    caught = []

    def catch(self, grid):
        return lambda *arguments: caught.append((self, arguments[: len(arguments) - len(self.constants)]))

    launch.Launch.__getitem__ = catch
    query = torch.zeros(1, 4, 300, head_dim, dtype=dtype)
    key = torch.zeros(1, 2, 300, head_dim, dtype=dtype)
    rotary = Rotary(torch.rand(head_dim // 2))
    position_map = SelfExtend(8, 64)
    near, far = position_map.bands
    decode.attend(Call(query[:, :, :1], key, key, position_map, rotary, None, 0.1), Step(None, None, 300))
    rerotate.rerotate(key, far.key_positions, 0, rotary)
    prefill.attend(Banded(query, key, key, 0.1, near.low, near.high, query, key, far.high))
    strips = SELF(9, 0.05, 32, "distance").bands[1:-1]
    narrow.attend(Narrow(query, key, key, strips, rotary, torch.zeros_like(query), torch.zeros(1, 4, 300), 0.1))
    return caught


def compiled(one: launch.Launch, arguments: tuple[object, ...], capability: int) -> object:
    """The kernel for a GPU of that compute capability."""
    kernel = one._kernel
    names = kernel.arg_names
    constants = {name: value for name, value in one._named.items() if name in names}
    options = {name: value for name, value in one._named.items() if name not in names and value is not None}
    signature, attributes = {}, {}
    for position, (name, argument) in enumerate(zip(names, arguments, strict=False)):
        if argument is None:
            constants[name] = None
        elif isinstance(argument, torch.Tensor):
            signature[name] = _POINTERS[argument.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(argument, float) else kernel.params[position].annotation_type
    signature |= dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int, head_dim: int, dtype: torch.dtype) -> None:
    tuned._shared_memory = lambda device: SHARED_MEMORY[capability]
    for one, arguments in launches(head_dim, dtype):
        made = compiled(one, arguments, capability)
        name = one._kernel.__name__
        print(json.dumps({"kernel": name, "takes": made.metadata.shared, "has": SHARED_MEMORY[capability]}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]))
