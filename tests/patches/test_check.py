"""``make check-patches`` sees what it is there to see."""

import shutil

import pytest

from patches import check
from patches.check import CheckError, git
from vllm_patch.cli.main import main
from vllm_patch.series.commits import COMMITS, LIBRARY
from vllm_patch.series.diffs import STOCK, new_files


@pytest.fixture
def series(release, tmp_path):
    folder = tmp_path / f"v{release}"
    assert main(["series", release, str(folder)]) == 0
    return folder


def test_the_series_in_git_is_what_the_package_writes(tmp_path):
    committed = check.REPOSITORY / "patches" / f"v{check.COMMITTED}"
    assert main(["series", check.COMMITTED, str(tmp_path / "series")]) == 0
    check.check_bytes(committed, tmp_path / "series")


@pytest.mark.parametrize("change", ["a byte", "a patch too few", "a patch too many"])
def test_other_bytes(series, tmp_path, change):
    committed = tmp_path / "committed"
    shutil.copytree(series, committed)
    patch = sorted(committed.iterdir())[1]
    if change == "a patch too few":
        patch.unlink()
    elif change == "a patch too many":
        patch = committed / "0009-mine.patch"
        patch.write_text("")
    else:
        patch.write_bytes(patch.read_bytes().replace(b"shard", b"Shard", 1))
    with pytest.raises(CheckError, match=f"^{patch.name} in .* differ from what is"):
        check.check_bytes(committed, series)


def test_a_release_that_is_not_as_the_table_says(release, monkeypatch):
    check.check_stock(release)
    monkeypatch.setitem(STOCK, release, {**STOCK[release], "vllm/envs.py": "0" * 40})
    with pytest.raises(CheckError, match="stock.json must say"):
        check.check_stock(release)


def test_a_patch_that_does_not_apply(series, tmp_path):
    tree = tmp_path / "tree"
    (tree / "vllm").mkdir(parents=True)
    (tree / "vllm" / "envs.py").write_text("")
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "vLLM")
    patch = sorted(series.iterdir())[0]
    with pytest.raises(CheckError, match=f"git am {patch.name}: .*"):
        check.apply_patch(tree, patch)


def test_a_tree_with_other_bytes(tmp_path):
    for path, file in new_files(COMMITS[0]).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, tmp_path / path)
    check.check_sources(tmp_path, COMMITS[0])
    with (tmp_path / LIBRARY / "slices" / "shard.py").open("a") as file:
        file.write("# mine\n")
    with pytest.raises(CheckError, match="is not the same as"):
        check.check_sources(tmp_path, COMMITS[0])


def test_a_tree_that_does_not_import(tmp_path):
    tree = tmp_path / "tree"
    (tree / LIBRARY).mkdir(parents=True)
    (tree / LIBRARY / "experts.py").write_text("import no_such_module")
    (tree / "vllm" / "__init__.py").write_text("")
    with pytest.raises(CheckError, match="does not import"):
        check.check_imports(tree)
