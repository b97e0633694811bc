# SPDX-License-Identifier: Apache-2.0
"""FP8 operators for vLLM's CPU engine on CPUs where vLLM itself has none.

Only ``parity`` and the tests ask for them, by ``environment``; nothing that serves
does. Each Python process that starts with it chooses by itself (``operators.py``).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_patch.cli.errors import UsageError

ON_START = Path(__file__).parent / "on_start"


def environment() -> dict[str, str]:
    """Return the variable that brings the operators to all processes of an engine."""
    paths = [str(ON_START), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def checked(timeout: float) -> str:
    """Compare this CPU's operators with an fp32 reference; return what they are.

    Args:
        timeout: Seconds that it may take.

    Raises:
        UsageError: They are wrong, or do not run, or not in time.

    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, "-m", f"{__name__}.check", file.name]
        env = {**os.environ, **environment()}
        try:
            subprocess.run(
                command,
                env=env,
                check=True,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise UsageError(f"{error}. Give a larger --timeout.") from error
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            raise UsageError(
                f"vLLM's FP8 operators do not run on this CPU: {_cause(error)}. Run "
                "parity on another machine, if what is above is about this one."
            ) from error
        found = json.load(file)
    for name, error in found["errors"].items():
        if not error <= found["limit"]:
            raise UsageError(
                f"{name} is wrong on this CPU ({found['operators']}): a row is "
                f"{error:.1e} from an fp32 reference, and {found['limit']:.1e} is "
                "allowed. Run parity on another machine."
            )
    return found["operators"]


def _cause(error: subprocess.CalledProcessError) -> str:
    """Return the last line that names an error: others may come after it."""
    named = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", error.stderr, re.MULTILINE)
    return named[-1] if named else f"exit code {error.returncode}"
