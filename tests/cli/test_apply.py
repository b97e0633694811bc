"""``vllm-patch apply`` on the files of a real release: all of the series or nothing."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm_tree import fetch
from vllm_patch.cli import apply, patch_series, tree_change
from vllm_patch.cli.main import main
from vllm_patch.cli.patch_series import NO_FILE, Series, blob_hash

LIBRARY = "vllm/model_executor/layers/quantization/fp8_tp_padding"
FP8 = "vllm/model_executor/layers/quantization/fp8.py"
STATES_RELEASE = ("vllm/_version.py", "PKG-INFO")


@pytest.fixture
def series(request) -> Series:
    """The series of the release under test, or of the newest if it has none."""
    known = patch_series.read_all()
    return known.get(request.config.getoption("--vllm"), known["0.33.0"])


@pytest.fixture
def tree(series, tmp_path) -> Path:
    """What the series touches of an unpacked source distribution, and its marks."""
    return copy_of_release(series, tmp_path / "vllm-src")


def copy_of_release(series: Series, target: Path) -> Path:
    release = fetch(series.release)
    for path in (
        *STATES_RELEASE,
        "vllm/__init__.py",
        "pyproject.toml",
        *series.contents,
    ):
        if (release / path).is_file():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(release / path, target / path)
    return target


def snapshot(tree: Path) -> dict[str, bytes | None]:
    """Everything in a folder, folders too; git's own files aside."""
    return {
        str(path.relative_to(tree)): path.read_bytes() if path.is_file() else None
        for path in tree.rglob("*")
        if ".git" not in path.parts
    }


def hashes(tree: Path, series: Series) -> dict[str, str]:
    files = {path: tree / path for path in series.contents}
    return {
        path: blob_hash(file.read_bytes()) if file.exists() else NO_FILE
        for path, file in files.items()
    }


def after(series: Series) -> dict[str, str]:
    return {path: contents[-1] for path, contents in series.contents.items()}


def refused(capsys, *arguments) -> str:
    """Run ``apply``, which must refuse; return what it says."""
    assert main(["apply", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("vllm-patch apply: ")
    return message


def test_apply_and_back(tree, series, capsys):
    before = snapshot(tree)
    assert main(["apply", str(tree), "--check"]) == 1
    assert main(["apply", str(tree)]) == 0
    assert hashes(tree, series) == after(series)
    assert main(["apply", str(tree), "--check"]) == 0
    patched = snapshot(tree)
    assert main(["apply", str(tree)]) == 0
    assert snapshot(tree) == patched
    assert "is patched: nothing to do" in capsys.readouterr().out
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before


def test_the_new_files_are_the_packages(tree):
    main(["apply", str(tree)])
    package = Path(apply.__file__).parents[1] / "fp8_tp_padding"
    brought = {p.name: p.read_bytes() for p in (tree / LIBRARY).rglob("*.py")}
    assert brought == {p.name: p.read_bytes() for p in package.rglob("*.py")}


def test_reverse_also_removes_what_python_compiled(tree):
    before = snapshot(tree)
    main(["apply", str(tree)])
    for folder in (LIBRARY, "tests/kernels/quantization/fp8_tp_padding"):
        cache = tree / folder / "__pycache__"
        cache.mkdir()
        (cache / "__init__.cpython-311.pyc").touch()
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before


def test_dry_run_writes_nothing(tree, capsys):
    before = snapshot(tree)
    assert main(["apply", str(tree), "--dry-run"]) == 0
    assert f"would write {FP8}\n" in capsys.readouterr().out
    assert snapshot(tree) == before
    main(["apply", str(tree)])
    patched = snapshot(tree)
    assert main(["apply", str(tree), "--reverse", "--dry-run"]) == 0
    assert f"would remove {LIBRARY}/moe.py\n" in capsys.readouterr().out
    assert snapshot(tree) == patched


def test_a_reader_that_has_read_enough(tree):
    """Such as `head`: no traceback."""
    script = "import sys; from vllm_patch.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "apply", str(tree), "--dry-run"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_git_checkout(tree, series):
    """A clone has no files that state the version; its content says it."""
    for name in STATES_RELEASE:
        (tree / name).unlink()
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "vLLM")
    assert main(["apply", str(tree)]) == 0
    assert hashes(tree, series) == after(series)
    git(tree, "add", "-A")
    changed = git(tree, "diff", "--cached", "--name-only").split()
    assert sorted(changed) == sorted(series.contents)


def test_site_packages_get_no_tests(tree, series):
    (tree / "pyproject.toml").unlink()
    (tree / "PKG-INFO").unlink()
    others = tree / "tests"
    shutil.rmtree(others, ignore_errors=True)
    others.mkdir()
    before = snapshot(tree)
    assert main(["apply", str(tree)]) == 0
    assert list(others.iterdir()) == []
    here = {p: h for p, h in hashes(tree, series).items() if p.startswith("vllm/")}
    assert here == {p: h for p, h in after(series).items() if p.startswith("vllm/")}
    assert main(["apply", str(tree), "--check"]) == 0
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before


def test_a_tree_inside_another_repository(series, tmp_path, monkeypatch):
    """Where plain ``git apply`` says yes and does nothing."""
    git(tmp_path, "init", "-q")
    tree = copy_of_release(series, tmp_path / "third_party" / "vllm")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    done = git(tree, "apply", str(series.patches[0]))
    assert done == "" and hashes(tree, series) != after(series)
    assert main(["apply", str(tree)]) == 0
    assert hashes(tree, series) == after(series)


def test_hard_links_keep_their_content(tree):
    """Uv links site-packages to its cache."""
    cached = tree.parent / "cached.py"
    os.link(tree / FP8, cached)
    original = cached.read_bytes()
    assert main(["apply", str(tree)]) == 0
    assert cached.read_bytes() == original != (tree / FP8).read_bytes()


def test_permissions_stay(tree):
    (tree / FP8).chmod(0o755)
    main(["apply", str(tree)])
    assert (tree / FP8).stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "is no folder"),
        (lambda path: path.mkdir(), "is not a vLLM tree: no vllm/__init__.py"),
        (lambda path: path.write_text(""), "is no folder"),
    ],
    ids=["missing", "empty", "file"],
)
def test_not_a_vllm_tree(tmp_path, capsys, make, says):
    make(tmp_path / "tree")
    assert says in refused(capsys, tmp_path / "tree")


def test_the_package_instead_of_its_folder(tree, capsys):
    message = refused(capsys, tree / "vllm")
    assert f"Give {tree}, which holds it" in message


def state_release(tree: Path, release: str) -> None:
    (tree / "vllm/_version.py").write_text(f"__version__ = version = '{release}'\n")


def test_release_without_a_series(tree, series, capsys):
    state_release(tree, f"{series.release}.post1")
    before = snapshot(tree)
    message = refused(capsys, tree)
    assert f"is vLLM {series.release}.post1, and there are patches for" in message
    assert f"The nearest, for {series.release}, has no conflicts." in message
    assert f"git am --keep-non-patch {series.patches[0].parent}/*.patch" in message
    assert snapshot(tree) == before


def test_commits_on_top_of_a_release(tree, series, capsys):
    """As git am and a build leave it: setuptools_scm counts the commits."""
    before = snapshot(tree)
    main(["apply", str(tree)])
    stated = tree / "vllm/_version.py"
    content = stated.read_bytes() if stated.exists() else None
    state_release(tree, "99.0.1.dev4+g0123456")
    capsys.readouterr()
    assert main(["apply", str(tree), "--check"]) == 0
    assert f"vLLM {series.release} in {tree} is patched." in capsys.readouterr().out
    assert main(["apply", str(tree)]) == 0
    assert main(["apply", str(tree), "--reverse"]) == 0
    if content is None:
        stated.unlink()
    else:
        stated.write_bytes(content)
    assert snapshot(tree) == before


def test_release_whose_files_conflict(tree, series, capsys):
    state_release(tree, "99.0")
    text = (tree / FP8).read_text()
    (tree / FP8).write_text(text.replace("return Fp8MoEMethod(self, layer)", "..."))
    before = snapshot(tree)
    assert f"for 0.33.0, conflicts in {FP8}:" in refused(capsys, tree)
    assert snapshot(tree) == before


def test_release_that_lacks_a_file(tree, capsys):
    state_release(tree, "99.0")
    (tree / FP8).unlink()
    message = refused(capsys, tree)
    assert "The nearest, for 0.33.0, conflicts in" in message
    assert f" {FP8}" in message


def test_files_of_another_release(tree, series, capsys):
    other = "0.28.0" if series.release != "0.28.0" else "0.33.0"
    state_release(tree, other)
    before = snapshot(tree)
    message = refused(capsys, tree)
    assert f"says that it is vLLM {other}, but its files are those of" in message
    stating = next(tree / name for name in STATES_RELEASE if (tree / name).exists())
    assert f"{stating} is stale" in message
    assert snapshot(tree) == before


def test_what_is_no_version(tree, capsys):
    state_release(tree, "main")
    assert "states the version 'main'" in refused(capsys, tree)


def test_no_version_and_unknown_files(tree, capsys):
    for name in STATES_RELEASE:
        (tree / name).unlink()
    (tree / FP8).write_text("")
    assert "does not say which release of vLLM it is" in refused(capsys, tree)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("path", ["vllm/envs.py", FP8, f"{LIBRARY}/moe.py"])
def test_local_edits_in_a_touched_file(tree, capsys, applied, reverse, path):
    if applied:
        main(["apply", str(tree)])
    (tree / path).parent.mkdir(exist_ok=True)
    with (tree / path).open("a") as file:
        file.write("# mine\n")
    before = snapshot(tree)
    for extra in ((), ("--dry-run",)) if not reverse else (("--reverse",),):
        assert f"has local edits in {path}:" in refused(capsys, tree, *extra)
    assert snapshot(tree) == before


@pytest.mark.parametrize("reverse", [[], ["--reverse"]])
def test_half_applied(tree, series, capsys, reverse):
    git(tree, "init", "-q")
    git(tree, "apply", str(series.patches[0]))
    before = snapshot(tree)
    message = refused(capsys, tree, *reverse)
    assert "has a part of the patches, only " in message
    assert f" setup.py, {LIBRARY}/__init__.py" in message
    assert "Restore vLLM's own files" in message
    assert snapshot(tree) == before


def test_one_file_is_missing(tree, capsys):
    main(["apply", str(tree)])
    (tree / LIBRARY / "moe.py").unlink()
    message = refused(capsys, tree)
    assert f"has a part of the patches, all but {LIBRARY}/moe.py. " in message


def test_a_folder_left_over_by_an_upgrade(tree, capsys):
    """Pip removes what it installed, and so leaves our files when vLLM goes."""
    vllms_own = (tree / FP8).read_bytes(), (tree / "vllm/envs.py").read_bytes()
    main(["apply", str(tree)])
    (tree / FP8).write_bytes(vllms_own[0])
    (tree / "vllm/envs.py").write_bytes(vllms_own[1])
    assert "remove fp8_tp_padding/ where it is left over" in refused(capsys, tree)


@pytest.mark.parametrize("place", [FP8, str(Path(FP8).parent), "vllm/envs.py"])
def test_read_only(tree, capsys, place):
    before = snapshot(tree)
    mode = (tree / place).stat().st_mode
    (tree / place).chmod(mode & ~0o222)
    message = refused(capsys, tree)
    (tree / place).chmod(mode)
    assert f"{tree / place} is read-only" in message
    assert snapshot(tree) == before


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("failing", [0, 1, 5, 11])
def test_a_failure_while_writing_changes_nothing(
    tree, capsys, monkeypatch, failing, reverse
):
    if reverse:
        main(["apply", str(tree)])
    before = snapshot(tree)
    put, calls = tree_change._put, []

    def fail_later(file, content):
        calls.append(file)
        if len(calls) > failing:
            raise OSError("no space left on device")
        put(file, content)

    monkeypatch.setattr(tree_change, "_put", fail_later)
    message = refused(capsys, tree, *(["--reverse"] if reverse else []))
    assert f"no space left on device. {tree} is as it was before." in message
    assert len(calls) == failing + 1
    assert snapshot(tree) == before


@pytest.mark.parametrize("made", [0, 1])
def test_an_interruption_between_folders_changes_nothing(tree, monkeypatch, made):
    """Right after one is there, too."""
    before = snapshot(tree)
    folders = {path for path in tree.rglob("*") if path.is_dir()}
    make, calls = Path.mkdir, []

    def interrupted(folder, *args, **kwargs):
        make(folder, *args, **kwargs)
        if folder.is_relative_to(tree):
            calls.append(folder)
            if len(calls) > made:
                raise SystemExit(143)

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(SystemExit):
        main(["apply", str(tree)])
    assert len(calls) == made + 1
    assert snapshot(tree) == before
    assert {path for path in tree.rglob("*") if path.is_dir()} == folders


@pytest.mark.parametrize(
    ("first", "second", "beside"),
    [([], [], False), ([], ["--check"], False), (["--dry-run"], ["--check"], True)],
    ids=["apply, apply", "apply, check", "dry run, check"],
)
def test_two_at_once(tree, capsys, first, second, beside):
    """One that is at work in a process of its own, stopped before it changes files."""
    script = f"""
import sys
from vllm_patch.cli import apply, main
def wait(*args):
    print("here", flush=True)
    sys.stdin.read()
    raise KeyboardInterrupt
apply.patched_files = wait
sys.exit(main.main(["apply", {str(tree)!r}, *{first}]))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    before = snapshot(tree)
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as job:
        assert job.stdout.readline() == b"here\n"
        if beside:
            assert main(["apply", str(tree), *second]) == 1  # Not patched.
        else:
            message = refused(capsys, tree, *second)
            assert f"{tree} is in use by another vllm-patch apply. Wait" in message
        job.kill()
    assert snapshot(tree) == before
    # The lock went with the process.
    assert main(["apply", str(tree)]) == 0


@pytest.mark.parametrize("option", [[], ["--check"]])
def test_a_file_system_without_locks(tree, capsys, monkeypatch, option):
    before = snapshot(tree)

    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    message = refused(capsys, tree, *option)
    assert f"{tree} cannot be locked: [Errno {errno.ENOSYS}] Function not" in message
    assert "Apply the patches to a copy of the tree, on another file system." in message
    assert snapshot(tree) == before


def test_no_room_for_the_copy(tree, capsys, monkeypatch):
    before = snapshot(tree)

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(tree_change, "_copy_of", full)
    assert f"no space left on device. {tree} is as it was" in refused(capsys, tree)
    assert snapshot(tree) == before


def test_a_git_that_does_nothing_is_noticed(tree, capsys, monkeypatch):
    before = snapshot(tree)
    monkeypatch.setattr(tree_change, "_git_apply", lambda *args: "")
    assert "git apply left" in refused(capsys, tree)
    assert snapshot(tree) == before


def test_without_git(tree, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "git is not installed" in refused(capsys, tree)


def test_check_only_looks(tree, capsys):
    assert "--reverse has no meaning" in refused(capsys, tree, "--check", "--reverse")
