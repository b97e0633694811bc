"""Makes Triton's interpreter faithful for bfloat16 and FP8.

As shipped it truncates float32 to bfloat16, loses the carry of float32 to FP8,
decodes the FP8 code 0x7f as 480 and multiplies bfloat16 operands as raw codes.
Here conversions go through torch, and dots are taken in float32. Nor are integers
checked for overflow, which no compiled kernel does: it takes half of the time.
"""

from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
CODES = {
    8: (np.uint8, torch.uint8),
    16: (np.uint16, torch.uint16),
    32: (np.uint32, torch.uint32),
    64: (np.uint64, torch.uint64),
}
WIDENED = ("bf16", "fp8e4nv", "fp8e5")


def install() -> None:
    stock_convert = interpreter._convert_float
    stock_dot = interpreter.InterpreterBuilder.create_dot

    def convert(values, from_dtype, to_dtype, rounding_mode):
        source = TORCH_DTYPES.get(from_dtype.name)
        target = TORCH_DTYPES.get(to_dtype.name)
        if source is None or target is None:
            return stock_convert(values, from_dtype, to_dtype, rounding_mode)
        source_code, _ = CODES[from_dtype.primitive_bitwidth]
        _, target_code = CODES[to_dtype.primitive_bitwidth]
        flat = np.ascontiguousarray(values).reshape(-1).view(source_code).copy()
        converted = torch.from_numpy(flat).view(source).to(target)
        return converted.view(target_code).numpy().reshape(values.shape)

    def widen(handle):
        dtype = handle.dtype.scalar
        if dtype.name not in WIDENED:
            return handle
        data = convert(handle.data, dtype, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return stock_dot(self, widen(a), widen(b), *rest)

    # One launch after the other: there is nothing to wait for.
    tl.extra.cuda.gdc_wait = tl.extra.cuda.gdc_launch_dependents = lambda: None
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = create_dot
