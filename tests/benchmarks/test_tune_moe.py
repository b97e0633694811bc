"""All cases and columns that the maintainers tune, and what is asked of the command."""

import pytest

from benchmarks import moe_cases, tune_moe


def test_each_file_is_written_once():
    """Two cases have 192 columns of 128 experts, and another has 96."""
    cases = tune_moe.named()
    files = [(case.experts, case.shard.size) for case in cases.values()]
    assert len({*files}) == len(files)
    wanted = {(case.experts, case.shard.size) for case in moe_cases.CASES}
    assert {*files} == wanted | {(128, columns) for columns in tune_moe.COLUMNS}


@pytest.mark.parametrize("asked", [["--cases", "Qwen3-Next", "columns-48"], []])
def test_what_is_asked_of_the_command(monkeypatch, tmp_path, asked):
    given = []
    monkeypatch.setattr(tune_moe, "tune", lambda *values: given.extend(values))
    tune_moe.main([*asked, "--tokens", "1", "64", "--out", str(tmp_path)])
    sizes = [(case.experts, case.shard.size) for case in given[0]]
    assert sizes == [(512, 64), (128, 48)] if asked else len(sizes) > 10
    assert given[1:] == [[1, 64], tmp_path]
