"""Patches come from the package, with bytes that do not move, or not at all."""

import shutil
from pathlib import Path

import pytest

from patches.generator import generate
from patches.generator.commits import COMMITS, LIBRARY, RELEASES
from patches.generator.generate import GenerateError, hooks_of, write_series
from tests.vllm_tree import fetch
from vllm_patch.cli import patch_series

OURS = "vllm_patch/fp8_tp_padding"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_do_not_depend_on_who_writes_them(release, tmp_path, monkeypatch):
    write_series(release, fetch(release), tmp_path / "first")
    (tmp_path / ".gitconfig").write_text(
        "[user]\nname = me\nemail = me@here\n[diff]\nnoprefix = true\ncontext = 9\n"
        "[format]\nsignOff = true\nsignature = mine\n[core]\nautocrlf = true\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2020-02-02T02:02:02+0200")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    write_series(release, fetch(release), tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_series_is_what_a_reviewer_expects(release, tmp_path):
    names = write_series(release, fetch(release), tmp_path)
    assert (tmp_path / "series").read_text().split() == names
    assert len(names) == len(COMMITS)
    for commit, name in zip(COMMITS, names, strict=True):
        patch = (tmp_path / name).read_text()
        assert patch.startswith("From " + "0" * 40)
        assert f"\nSigned-off-by: {generate.AUTHOR} <{generate.EMAIL}>\n" in patch
        assert commit.message.splitlines()[-1] in patch
        head, *files = patch.split("\ndiff --git ")
        new = [file for file in files if "\nnew file mode 100644\n" in file]
        for file in (file for file in new if file.split()[0].endswith(".py")):
            assert "\n+# SPDX-License-Identifier: Apache-2.0\n" in file
            assert "\n+# SPDX-FileCopyrightText: Copyright contributors to" in file
        assert len(files) - len(new) <= 3, "a commit changes few of vLLM's own files"


@pytest.mark.parametrize("each", RELEASES)
def test_hooks_are_small(each):
    lines = [
        line
        for commit in COMMITS
        for hook in hooks_of(commit, each)
        for line in hook.read_text().splitlines()
    ]
    changed = [x for x in lines if x[:1] in "+-" and x[:3] not in ("+++", "---")]
    assert 10 < len(changed) <= 36


def test_every_release_has_a_series_and_no_other():
    assert tuple(patch_series.read_all()) == RELEASES


def fails(sources, tmp_path, message: str, tree=None, release="0.33.0"):
    target = tmp_path / "series"
    with pytest.raises(GenerateError, match=message):
        write_series(release, tree or fetch(release), target)
    assert not target.exists()


def test_a_file_that_is_in_no_commit(sources, tmp_path):
    (sources / OURS / "kernels").mkdir()
    (sources / OURS / "kernels" / "gemm.py").write_text("")
    fails(sources, tmp_path, f"{OURS}/kernels/gemm.py is in 0 commits")


def test_a_file_that_is_in_two_commits(sources, tmp_path, monkeypatch):
    twice = generate.Commit("twice", "Twice\n", (f"{OURS}/moe.py",))
    monkeypatch.setattr(generate, "COMMITS", (*COMMITS, twice))
    fails(sources, tmp_path, r"moe.py is in 2 commits \['moe', 'twice'\]")


def test_a_row_that_names_no_file(sources, tmp_path):
    (sources / OURS / "window.py").unlink()
    fails(sources, tmp_path, f"commit 'moe' names {OURS}/window.py, which is no file")


@pytest.mark.parametrize(
    "line",
    [
        "from .linear import padded_layout",
        "from . import linear",
        "def late():\n    from .linear import padded_layout",
        f"import {LIBRARY.replace('/', '.')}.linear",
        f"from {LIBRARY.replace('/', '.')} import linear",
        f"from {LIBRARY.replace('/', '.')}.linear import padded_layout",
    ],
)
def test_an_import_from_a_later_commit(sources, tmp_path, line):
    with (sources / OURS / "moe.py").open("a") as file:
        file.write(f"{line}\n")
    fails(sources, tmp_path, f"moe.py of commit 'moe' imports {OURS}/linear.py, which")


@pytest.mark.parametrize(
    "line",
    ["from vllm_patch import plugin", "import tests.vllm_on_cpu", "import vllm_patch"],
)
def test_an_import_that_no_vllm_tree_has(sources, tmp_path, line):
    with (sources / "tests/fp8_tp_padding/test_shard.py").open("a") as file:
        file.write(f"{line}\n")
    fails(sources, tmp_path, "test_shard.py imports .*, which no vLLM tree has")


def test_data_that_vllm_would_not_install(sources, tmp_path, monkeypatch):
    (sources / OURS / "tiles.json").write_text("{}")
    data = generate.Commit("data", "Data\n", (f"{OURS}/tiles.json",))
    monkeypatch.setattr(generate, "COMMITS", (*COMMITS, data))
    fails(sources, tmp_path, f"{LIBRARY}/tiles.json matches no pattern of package_data")


def test_data_that_a_hook_has_vllm_install(sources, tmp_path, monkeypatch):
    (sources / OURS / "tiles.json").write_text("{}")
    data = generate.Commit("data", "Data\n", (f"{OURS}/tiles.json",))
    monkeypatch.setattr(generate, "COMMITS", (*COMMITS, data))
    monkeypatch.setattr(generate, "HOOKS", tmp_path / "hooks")
    shutil.copytree(Path(generate.__file__).parent / "hooks", tmp_path / "hooks")
    (tmp_path / "hooks/0.26.0-0.33.0/data.diff").write_text(
        "--- a/setup.py\n+++ b/setup.py\n@@ -1183,4 +1183,5 @@\n"
        ' package_data = {\n     "vllm": [\n         "py.typed",\n'
        '+        "model_executor/layers/quantization/fp8_tp_padding/*.json",\n'
        '         "libs/*.so*",\n'
    )
    names = write_series("0.33.0", fetch("0.33.0"), tmp_path / "series")
    assert "tiles.json" in (tmp_path / "series" / names[-1]).read_text()


def test_a_hook_that_does_not_fit(sources, tmp_path):
    tree = tmp_path / "vllm"
    hooked = "vllm/model_executor/layers/quantization/fp8.py"
    others = "setup.py", "vllm/envs.py", "tests/kernels/moe/test_fp8_tp_loading.py"
    for path in (hooked, *others):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fetch("0.33.0") / path, tree / path)
    text = (tree / hooked).read_text()
    (tree / hooked).write_text(text.replace("return Fp8MoEMethod(self, layer)", "..."))
    fails(
        sources,
        tmp_path,
        f"0.31.0-0.33.0/moe.diff does not fit vLLM 0.33.0: .*{hooked}:",
        tree,
    )
