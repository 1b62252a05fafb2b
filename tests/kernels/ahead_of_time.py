"""Compiles every launch of kernels in Triton for a GPU that need not be there; run as a program of its own.

What would be launched is compiled to PTX and to machine code of sm_90 instead, with the types, alignments and constants
that the launch would have. Prints a line of JSON per launch: the kernel, the bytes of shared memory, and how often
instructions of interest occur.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_SEEN = re.compile(
    r"(ld\.global\.v\d\.b\d+|ld\.global\.b\d+|cp\.async\.c[ag]|mma\.sync\.aligned\.m\d+n\d+k\d+|bar\.sync"
    r"|fma\.rn\.b?f16)"
)


def compiled(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Compile what a launch would run; return what is printed of it."""
    options = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
    given = dict(zip(kernel.arg_names, arguments)) | keywords
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], aligned = _POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = "i32", value % 16 == 0
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    made = triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=options)
    found = Counter(_SEEN.findall(made.asm["ptx"]))
    return {"kernel": kernel.fn.__module__.rpartition(".")[2] + "." + kernel.fn.__name__,
            "shared": made.metadata.shared, "machine code": len(made.asm["cubin"]), **found}  # fmt: skip


def instead_of_launching(self: JITFunction, *arguments: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
    print(json.dumps(compiled(self, arguments, keywords)), flush=True)


def main() -> None:
    from launches import every_launch

    JITFunction.run = instead_of_launching
    every_launch()


if __name__ == "__main__":
    main()
