"""How far the model of communication was off, by two files of rows."""

import csv

import pytest

from benchmarks import communication

STEP = {
    **{"model": "M", "tp_size": "8", "layers": "10", "mode": "graphs", "way": "this"},
    **{"measure": "decode_ms", "tokens": "4", "context": "1024"},
}


@pytest.fixture
def compare(tmp_path):
    def run(alone, real):
        files = []
        for index, rows in enumerate((alone, real)):
            path = tmp_path / f"{index}.csv"
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(
                    file, [*STEP, "routing", "value", "communication_ms"]
                )
                writer.writeheader()
                writer.writerows(
                    [{**STEP, "routing": "simulated", **row} for row in rows]
                )
            files.append(str(path))
        return communication.main(files)

    return run


def test_each_step_of_both_and_their_mean(compare, capsys):
    alone = [
        {"value": "9", "communication_ms": "1"},
        {"tokens": "16", "value": "10", "communication_ms": "2"},
        {"tokens": "64", "value": "30", "communication_ms": "3"},  # One rank's alone.
        {"measure": "load_s", "tokens": "", "context": "", "value": "50"},
    ]
    real = [
        {"value": "8"},
        {"tokens": "16", "value": "15"},
        {"measure": "load_s", "tokens": "", "context": "", "value": "90"},
        {"way": "ep", "value": "7"},
    ]
    assert compare(alone, real) == 0
    _, four, sixteen, mean = capsys.readouterr().out.splitlines()
    assert four.split() == [
        *("graphs", "this", "decode_ms", "4", "1024"),
        *("9", "10", "8", "25.0%", "-50.0"),
    ]
    # 5 ms more than one rank in twenty all-reduces.
    assert sixteen.split()[5:] == ["10", "12", "15", "-20.0%", "250.0"]
    assert mean == "M, graphs, this, decode_ms: +0.0%, at most +25.0%"


@pytest.mark.parametrize("other", [{"layers": "2"}, {"routing": "router"}])
def test_files_with_nothing_in_common(compare, capsys, other):
    with pytest.raises(SystemExit):
        compare([{"value": "9", "communication_ms": "1"}], [{"value": "8", **other}])
    assert "no step in common" in capsys.readouterr().err
