"""Mutations keep up with the code that they break."""

import compileall
import shutil

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.what)
def test_a_mutant_compiles(tmp_path, mutant):
    source = mutants.REPOSITORY / mutants.PACKAGE / mutant.file
    copy = shutil.copy(source, tmp_path)
    mutants.mutate(tmp_path / mutant.file, mutant)
    assert compileall.compile_file(copy, quiet=2)
