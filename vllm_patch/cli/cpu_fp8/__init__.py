# SPDX-License-Identifier: Apache-2.0
"""FP8 operators for vLLM's CPU engine on CPUs where vLLM itself has none.

Only ``parity`` and the tests ask for them, by ``environment``; nothing that serves
does. Each Python process that starts with it chooses by itself (``operators.py``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from vllm_patch.cli.errors import UsageError

ON_START = Path(__file__).parent / "on_start"


def environment() -> dict[str, str]:
    """Return the variable that brings the operators to all processes of an engine."""
    paths = [str(ON_START), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def checked() -> str:
    """Compare this CPU's operators with an fp32 reference; return what they are.

    Raises:
        UsageError: They are wrong, or do not run.

    """
    done = subprocess.run(
        [sys.executable, "-m", f"{__name__}.check"],
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UsageError(
            f"vLLM's FP8 operators do not run on this CPU: {last[0]}. Run parity on "
            "another machine."
        )
    found = json.loads(done.stdout.splitlines()[-1])
    for name, error in found["errors"].items():
        if not error <= found["limit"]:
            raise UsageError(
                f"{name} is wrong on this CPU ({found['operators']}): a row is "
                f"{error:.1e} from an fp32 reference, and {found['limit']:.1e} is "
                "allowed. Run parity on another machine."
            )
    return found["operators"]
