"""The command as a whole."""

import subprocess
import sys

MISSING = "vllm", "torch", "psutil", "transformers"


def test_apply_needs_nothing_of_vllm():
    """README: ``pip install .`` in a clone does not need vLLM."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING}))\n"
        "from vllm_patch.cli.main import main; main(['apply', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: vllm-patch apply" in done.stdout
