# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints' cut layers get methods of ours: a module for each config of vLLM.

A format says which of vLLM's methods it takes over, and names the ones of ours that
extend them. What they do with a slice is in ``fp8_tp_padding/methods/``. Here are the
replacements of ``get_quant_method`` that the patch table names.
"""

import functools
import importlib
from collections.abc import Callable


def with_cut_layers(name: str) -> Callable:
    """Return what replaces a config's ``get_quant_method`` by that of a format.

    The format is imported with the first layer: it imports what vLLM may still be
    importing when it is patched.
    """

    def wrapper(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def get_quant_method(self, layer, prefix):
            module = importlib.import_module(f"{__name__}.{name}")
            return module.FORMAT.quant_method(stock, self, layer, prefix)

        return get_quant_method

    return wrapper


def with_reasons(since: str) -> Callable:
    """Return what replaces it in releases before ``since``.

    Layers are stock there, and errors about cut ones say since when they are not.
    """

    def wrapper(stock: Callable) -> Callable:
        @functools.wraps(stock)
        def get_quant_method(self, layer, prefix):
            from vllm_patch.formats import earlier

            return earlier.quant_method(stock, since, self, layer, prefix)

        return get_quant_method

    return wrapper
