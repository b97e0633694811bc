"""The command as a whole."""

import re
import shlex
import subprocess
import sys

import pytest

from vllm_patch.cli.main import main, make_parser

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


def test_alone_it_says_what_it_is_for(capsys):
    assert main([]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "load block-quantized FP8 models at tensor-parallel sizes that cut a" in text
    assert "start with: vllm-patch check MODEL -tp 8" in text


def commands() -> list[str]:
    (found,) = re.findall(r"\{([\w,-]+)\}", make_parser().format_usage())
    return found.split(",")


@pytest.mark.parametrize("command", commands())
def test_each_command_shows_examples_that_it_takes(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    examples = re.split(r"examples?: ", text)[-1]
    found = re.findall(r"vllm-patch (.+?)(?= > | vllm-patch |$)", examples)
    assert found
    for example in found:
        args = make_parser().parse_args(shlex.split(example))
        assert args.command == command


@pytest.mark.parametrize("option", ["--tp", "-tp", "--tensor-parallel-size"])
def test_vllms_spellings(option):
    args = make_parser().parse_args(["parity", "--model", "model", option, "8"])
    assert args.tp == 8
