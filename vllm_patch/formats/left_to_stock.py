# SPDX-License-Identifier: Apache-2.0
"""vLLM's errors about cut layers that were left to it say why, and what to do.

Nothing else changes for such a layer, and nothing at all for one that is not cut.
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from vllm_patch.wrappers import OFF, VARIABLE

SMALLER_TP = "Use a tensor-parallel size that keeps quant blocks whole"
IS_OFF = f"{VARIABLE}={OFF}. Unset it."
# Its errors about sizes that cut a quant block or a group.
_FAMILY = re.compile(
    r"not divisible by|requires \S+ divisible by|Unsupported FP8 MoE backend"
    r"|supports? the deployment configuration"
    r"|start \(\d+\) \+ length \(\d+\) exceeds dimension size"
)


@contextmanager
def explained(layer: str, why: str | None) -> Iterator[None]:
    """Let an error of vLLM about cut sizes end with a line on the layer.

    The text is changed and no note is added: Python 3.10 has none, and servers
    print texts.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text, line = str(error), f"vllm_patch left {layer} to stock vLLM: {why}"
        if why and _FAMILY.search(text) and line not in text:
            error.args = (f"{text}\n{line}",)
        raise


def explain(method, layer: str, why: str) -> None:
    """Explain errors of one layer while it makes, loads and processes its weights.

    Args:
        method: vLLM's, of this layer alone.
        layer: Its name.
        why: Why it was left, and the remedy.

    """
    for name in ("create_weights", "process_weights_after_loading"):
        # Another plugin's plain function on the instance is left as it is.
        if isinstance(function := getattr(method, name), MethodType):
            setattr(method, name, _explaining(function, layer, why))


def _explaining(function: MethodType, layer: str, why: str) -> MethodType:
    """Return a method that does the same, as do loaders that it is given."""

    @functools.wraps(function.__func__)
    def explaining(*args, **kwargs):
        if isinstance(loader := kwargs.get("weight_loader"), MethodType):
            kwargs["weight_loader"] = _explaining(loader, layer, why)
        with explained(layer, why):
            return function.__func__(*args, **kwargs)

    return MethodType(explaining, function.__self__)
