"""Mutations keep up with the code that they break."""

import compileall
import shutil
import sys
from pathlib import Path

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_compiles(tmp_path, mutant):
    source = mutants.REPOSITORY / mutants.PACKAGE / mutant.file
    copy = shutil.copy(source, tmp_path)
    mutants.mutate(Path(copy), mutant)
    assert compileall.compile_file(copy, quiet=2)


def test_a_mistake_is_made_in_one_place(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\na = 1\n")
    for old in "a = 1", "b = 1":
        with pytest.raises(ValueError, match="has not one"):
            mutants.mutate(tmp_path / "file.py", mutants.Mutant("", "", old, "c = 1"))


LOOKS = """
import pathlib, sys, vllm_patch
shard = pathlib.Path(vllm_patch.__file__).parent / "fp8_tp_padding/slices/shard.py"
sys.exit("lead=0" in shard.read_text())
"""


def test_each_mistake_has_to_be_noticed_and_only_those(tmp_path, capsys):
    (tmp_path / "gate.py").write_text(LOOKS)
    gate = f"gate=cd / && {sys.executable} {tmp_path / 'gate.py'}"
    mistake = ["--only", "lead is 0"]
    assert mutants.main([*mistake, gate]) == 0
    _, none, _, one = capsys.readouterr().out.splitlines()
    assert "gate passes" in none and "gate notices" in one
    assert mutants.main([*mistake, gate, "sleeps=true"]) == 1
    assert mutants.main([*mistake, "always=false"]) == 1
