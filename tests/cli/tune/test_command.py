"""The command as a whole, with a clock of its own: what it writes, and when not."""

import itertools
import json
import os
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from tests.cli.test_interrupts import interrupted
from vllm_patch.cli.main import main
from vllm_patch.cli.tune import command, experts
from vllm_patch.cli.tune.cases import Case
from vllm_patch.cli.tune.command import TOKENS
from vllm_patch.fp8_tp_padding.kernels import tuned_tiles
from vllm_patch.fp8_tp_padding.kernels.tiles import SortedTiles, Tile

CASE = Case(4, 2, 128, 384, 2)
NAME = "E=4,N=192,device_name=NVIDIA_H200,dtype=fp8_w8a8_masked,block_shape=[128,128]"
# 32 pairs of an expert: blocks of 32 or 64. What is fastest here differs from the
# rule's in most of its fields.
FASTEST = SortedTiles(
    32, Tile(64, 4, 2, swap=True), Tile(128, 4, 2, swap=True), 1, True
)


def differing(tiles) -> int:
    """Count the fields that are not the fastest ones."""
    wrong = tiles.block_m != FASTEST.block_m
    for name in ("gate_up", "down"):
        tile, best = getattr(tiles, name), getattr(FASTEST, name)
        wrong += sum(vars(tile)[field] != vars(best)[field] for field in vars(tile))
    return wrong


def slower_by_difference(tiles) -> float:
    return 50.0 + differing(tiles)


def tuned(model, folder, *arguments) -> int:
    options = ["--tokens", "64", "--output", str(folder), *arguments]
    return main(["tune", model, "--tp", "2", *options])


def present(tokens: int):
    return experts.present(CASE, tokens)


def test_what_is_fastest_is_written_and_found(
    gpu, model, tmp_path, capsys, monkeypatch
):
    """And other numbers of tokens keep what they have."""
    before = {tokens: present(tokens) for tokens in TOKENS}
    assert before[64] != FASTEST
    gpu.clock = slower_by_difference
    folder = tmp_path / "new" / "tuned"
    assert tuned(model, folder) == 0
    (file,) = folder.iterdir()
    assert file.name == f"{NAME}.json"
    said = capsys.readouterr().out
    assert "4 experts x 192 columns, top-2, hidden 128, as rank 0 of 2" in said
    row = f"    64 {50 + differing(before[64]):7.1f} us    50.0 us"
    assert said.partition(row)[2].startswith("   1.12x  blocks of 32\n")
    assert f"Wrote {file}" in said
    assert f"export VLLM_TUNED_CONFIG_FOLDER={folder}" in said
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(folder))
    tuned_tiles.tuned_tiles.cache_clear()
    after = {tokens: present(tokens) for tokens in TOKENS}
    # Hidden 128 is one quant block, which cannot be split.
    assert after[64] == FASTEST
    assert {n: after[n] for n in TOKENS if n != 64} == {
        n: before[n] for n in TOKENS if n != 64
    }
    assert json.loads(file.read_text())["triton_version"]


def test_what_was_tuned_before_is_kept(gpu, model, tmp_path):
    """Other numbers of tokens, in the file that is there."""
    gpu.clock = slower_by_difference
    file = tmp_path / f"{NAME}.json"
    before = {tokens: present(tokens) for tokens in TOKENS}
    before[1] = replace(before[1], pdl=not before[1].pdl)
    before[24] = before[32]
    file.write_text(json.dumps({n: asdict(tiles) for n, tiles in before.items()}))
    tuned_tiles.tuned_tiles.cache_clear()
    assert tuned(model, tmp_path) == 0
    assert tuned_tiles.read_config(file) == {**before, 64: FASTEST}


def test_present_tiles_that_do_not_run(gpu, model, tmp_path, capsys, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from vllm_patch.cli.tune import experts

    def refuse(self, tiles):
        raise OutOfResources(999, 1, "shared memory")

    monkeypatch.setattr(experts.Batch, "output", refuse)
    assert tuned(model, tmp_path) == 2
    said = capsys.readouterr().err
    assert (
        "the tiles that are in use now do not run on this GPU: out of resource" in said
    )
    assert not [*tmp_path.glob("E=*")]


def test_where_vllm_looks_nothing_needs_to_be_told(
    gpu, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path / "tuned"))
    gpu.clock = slower_by_difference
    assert main(["tune", model, "--tp", "2", "--tokens", "64"]) == 0
    assert (tmp_path / "tuned" / f"{NAME}.json").is_file()
    assert "export" not in capsys.readouterr().out


@pytest.mark.parametrize("jitter", [0.0, 0.1], ids=["of the clock", "of the GPU"])
def test_what_may_be_noise_is_not_taken(gpu, model, tmp_path, capsys, jitter):
    """Half a percent; or five, where present tiles differ from themselves by ten."""
    faster = 0.95 if jitter else 0.995
    now, times = present(64), itertools.cycle([100.0 * (1 + jitter), 100.0])
    gpu.clock = lambda tiles: next(times) if tiles == now else 100.0 * faster
    folder = tmp_path / "tuned"
    assert tuned(model, folder) == 0
    said = capsys.readouterr().out
    assert "Nothing is faster: no file." in said and "kept" in said
    assert not [*folder.iterdir()]


def test_what_computes_something_else_is_not_taken(
    gpu, model, tmp_path, capsys, monkeypatch
):
    """However fast it is: the next one is taken."""
    gpu.clock, real = slower_by_difference, experts.Batch.output

    def output(self, tiles):
        out = real(self, tiles)
        if tiles.down == FASTEST.down and tiles.gate_up == FASTEST.gate_up:
            out[:, 17] = 0.0
        return out

    monkeypatch.setattr(experts.Batch, "output", output)
    assert tuned(model, tmp_path / "tuned") == 0
    (file,) = (tmp_path / "tuned").iterdir()
    taken = tuned_tiles.read_config(file)[64]
    assert differing(taken) == 1
    assert "left out, for 64 tokens: 128 columns are" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["the last bit", "NaN"])
def test_bits_count_where_sums_are_the_same(monkeypatch, wrong):
    """More loads in flight change no bit; wider tiles may, and NaN is never right."""
    layer = experts.Layer(CASE, torch.device("cpu"), gpu=None)
    down, real = present(64).down, experts.Batch.output
    more_loads, wider = (
        replace(present(64), down=replace(down, **changes))
        for changes in ({"num_stages": 5}, {"block_n": 128})
    )
    batch = experts.Batch(layer, 64)
    assert batch.difference(more_loads) is batch.difference(wider) is None

    def output(self, tiles):
        out = real(self, tiles)
        if tiles != self.present:
            nan = torch.full_like(out[0, :1], float("nan"))
            away = torch.nextafter(out[0, :1], 2 * out[0, :1])
            out[0, :1] = nan if wrong == "NaN" else away
        return out

    monkeypatch.setattr(experts.Batch, "output", output)
    batch = experts.Batch(layer, 64)
    assert batch.difference(more_loads) == "not the same bits, of the same sums"
    assert (batch.difference(wider) is None) == (wrong != "NaN")


@pytest.mark.parametrize("moment", [1, 15, 30])
def test_an_interrupt_leaves_what_was_there(gpu, model, tmp_path, capsys, moment):
    """While candidates are timed."""
    file = tmp_path / "tuned" / f"{NAME}.json"
    file.parent.mkdir()
    file.write_text("earlier")
    count = itertools.count(1)

    def clock(tiles):
        if next(count) == moment:
            raise KeyboardInterrupt
        return slower_by_difference(tiles)

    gpu.clock = clock
    assert tuned(model, file.parent) == 130
    assert [*file.parent.iterdir()] == [file] and file.read_text() == "earlier"


def test_an_interrupt_while_the_file_is_written(tmp_path):
    for moment in itertools.count():
        file = tmp_path / str(moment) / "file"
        file.parent.mkdir()
        file.write_text("earlier")
        came = interrupted(moment, partial(command._write, file, "new"))
        assert [*file.parent.iterdir()] == [file]
        assert file.read_text() in ("earlier", "new"), moment
        if not came:
            break
    assert file.read_text() == "new" and moment > 5


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def replace(*_places):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    file = tmp_path / "file"
    file.write_text("earlier")
    with pytest.raises(OSError, match="No space left"):
        command._write(file, "new")
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "earlier"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "2", "--tokens", "0"], "--tokens 0: give numbers from 1 to 65536"),
        (["--tp", "0", "--output", "tuned"], "--tp 0: give a number from 1 to 1024"),
        (["--tp", "2"], "Give --output DIR, or set VLLM_TUNED_CONFIG_FOLDER"),
        (["--tp", "1", "--output", "tuned"], "experts: no quant block is cut"),
        (
            ["--tp", "4", "--output", "tuned"],
            "(2) must be divisible by tensor parallel",
        ),
        (["--tp", "2", "--output", "config.json"], "Give a folder that can be written"),
    ],
)
def test_wrong_usage(gpu, model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", model, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_without_a_gpu(model, tmp_path, capsys):
    """As on this machine; and nothing is left behind."""
    assert tuned(model, tmp_path / "tuned") == 2
    said = capsys.readouterr().err
    assert "tune times kernels on a CUDA GPU" in said and "see none" in said
    assert "Run it on the kind of machine that serves the model" in said
    assert not (tmp_path / "tuned").exists()


def test_on_a_gpu_without_fp8(model, tmp_path, monkeypatch, capsys):
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        type(current_platform),
        "get_device_capability",
        lambda *_: DeviceCapability(8, 0),
    )
    assert tuned(model, tmp_path / "tuned") == 2
    assert "compute capability 8.0, and FP8 needs 8.9" in capsys.readouterr().err
