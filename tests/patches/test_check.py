"""``make check-patches`` sees what it is there to see."""

import pytest

from patches.generator import check
from patches.generator.check import CheckError
from patches.generator.generate import git, write_series
from tests.vllm_tree import fetch


@pytest.fixture
def committed(release, tmp_path):
    folder = tmp_path / f"v{release}"
    write_series(release, fetch(release), folder)
    return folder


def compare(release, committed, tmp_path):
    return check.check_bytes(release, committed, tmp_path / "again")


def test_same_bytes(release, committed, tmp_path):
    names = compare(release, committed, tmp_path)
    assert [(committed / name).is_file() for name in names] == [True] * len(names)


def test_one_byte(release, committed, tmp_path):
    patch = sorted(committed.glob("*.patch"))[1]
    patch.write_bytes(patch.read_bytes().replace(b"shard", b"Shard", 1))
    with pytest.raises(CheckError, match=f"^{patch.name} in .* differ from what is"):
        compare(release, committed, tmp_path)


def test_a_patch_too_few(release, committed, tmp_path):
    patch = sorted(committed.glob("*.patch"))[0]
    patch.unlink()
    with pytest.raises(CheckError, match=f"^{patch.name} in"):
        compare(release, committed, tmp_path)


def test_a_patch_too_many(release, committed, tmp_path):
    (committed / "0009-mine.patch").write_text("")
    with pytest.raises(CheckError, match="^0009-mine.patch in"):
        compare(release, committed, tmp_path)


def test_a_change_of_the_package(release, committed, sources, tmp_path):
    with (sources / "vllm_patch/fp8_tp_padding/shard.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(CheckError, match="^0001-.*.patch in .* differ"):
        compare(release, committed, tmp_path)


def test_a_patch_that_does_not_apply(release, committed, tmp_path):
    tree = tmp_path / "tree"
    (tree / "vllm").mkdir(parents=True)
    (tree / "vllm" / "envs.py").write_text("")
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "vLLM")
    (patch,) = (
        path
        for path in committed.glob("*.patch")
        if "\ndiff --git a/vllm/envs.py" in path.read_text()
    )
    with pytest.raises(CheckError, match=f"git am {patch.name}: .*"):
        check.apply_patch(tree, patch)


def test_a_tree_with_other_bytes(tmp_path):
    source = "vllm_patch/fp8_tp_padding/shard.py"
    copy = tmp_path / check.in_tree(source)
    copy.parent.mkdir(parents=True)
    text = (check.REPOSITORY / source).read_bytes()
    copy.write_bytes(text)
    check.check_sources(tmp_path, [source])
    copy.write_bytes(text.replace(b"lead", b"head", 1))
    with pytest.raises(CheckError, match="is not the same as"):
        check.check_sources(tmp_path, [source])


def test_a_tree_that_does_not_import(release, tmp_path):
    tree = tmp_path / "tree"
    (tree / check.LIBRARY).mkdir(parents=True)
    (tree / check.LIBRARY / "moe.py").write_text("import no_such_module")
    (tree / "vllm" / "__init__.py").write_text("")
    with pytest.raises(CheckError, match="does not import"):
        check.check_imports(tree)
