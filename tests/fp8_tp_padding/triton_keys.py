# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What Triton would compile for launches, without a GPU."""

from collections.abc import Hashable
from types import ModuleType

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

HOPPER = GPUTarget("cuda", 90, 32)


class Recorded:
    """A kernel that is not run: each launch adds its name and key to a set.

    The key is Triton's own: types, constants, options, which integers are 1 or
    multiples of 16, and which pointers are.

    Args:
        name: Of the kernel.
        kernel: What ``triton.jit`` makes for its interpreter, or ``gluon.jit``.
        keys: Where keys go.

    """

    def __init__(self, name: str, kernel, keys: set[Hashable]):
        compiled = kernel
        if isinstance(kernel, InterpretedFunction):
            compiled = JITFunction(kernel.fn, **kernel.kwargs)
        self.name, self.keys = name, keys
        self.bind = create_function_from_signature(
            compiled.signature, compiled.params, make_backend(HOPPER)
        )

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        _, specialized, options = self.bind(*args, **kwargs)
        key = self.name, tuple(specialized), tuple(sorted(options.items()))
        self.keys.add(key)


def record(monkeypatch, *modules: ModuleType) -> set[Hashable]:
    """Return the keys of all kernels of modules that are launched from here on."""
    keys: set[Hashable] = set()
    for module in modules:
        for name, kernel in vars(module).copy().items():
            is_kernel = isinstance(kernel, (InterpretedFunction, JITFunction))
            if is_kernel and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorded(name, kernel, keys))
    return keys
