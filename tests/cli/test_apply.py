"""``vllm-patch apply`` on the files of a real release: all of the change or nothing."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm_tree import fetch
from vllm_patch.cli import apply
from vllm_patch.cli.main import main
from vllm_patch.series.commits import LIBRARY, TESTS
from vllm_patch.series.diffs import STOCK

FP8 = "vllm/model_executor/layers/quantization/fp8.py"
OURS = f"{LIBRARY}/methods/experts.py"


@pytest.fixture
def tree(release, tmp_path) -> Path:
    """What the change touches of an unpacked source distribution, and its marks."""
    return copy_of_release(release, tmp_path / "vllm-src")


def copy_of_release(release: str, target: Path) -> Path:
    for path in ("vllm/__init__.py", "setup.py", *STOCK[release]):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fetch(release) / path, target / path)
    return target


def snapshot(tree: Path) -> dict[str, bytes | None]:
    """Everything in a folder, folders too; git's own files aside."""
    return {
        str(path.relative_to(tree)): path.read_bytes() if path.is_file() else None
        for path in tree.rglob("*")
        if ".git" not in path.parts
    }


def refused(capsys, *arguments) -> str:
    """Run ``apply``, which must refuse; return what it says."""
    assert main(["apply", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("vllm-patch apply: ")
    return message


def git(folder: Path, *arguments: str | Path) -> None:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", *map(str, arguments)]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)


def test_apply_and_back(tree, release, capsys):
    before = snapshot(tree)
    assert main(["apply", str(tree), "--check"]) == 1
    assert main(["apply", str(tree)]) == 0
    assert f"Patched vLLM {release} in {tree}" in capsys.readouterr().out
    assert main(["apply", str(tree), "--check"]) == 0
    patched = snapshot(tree)
    assert main(["apply", str(tree)]) == 0
    assert snapshot(tree) == patched != before
    assert "is patched: nothing to do" in capsys.readouterr().out
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before


def test_the_new_files_are_the_packages(tree):
    main(["apply", str(tree)])
    package = Path(apply.__file__).parents[1] / "fp8_tp_padding"
    brought, ours = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.py")}
        for folder in (tree / LIBRARY, package)
    )
    assert brought == ours


@pytest.mark.parametrize("stated", [None, "0.33.1.dev3+g0123456"])
def test_what_git_am_did_is_known_and_taken_out(tree, release, stated):
    """A build of such a tree states another version; its files say what it is."""
    before = snapshot(tree)
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "vLLM")
    main(["series", release, str(tree.parent / "series")])
    git(tree, "am", "--keep-non-patch", *sorted((tree.parent / "series").iterdir()))
    if stated:
        (tree / "vllm/_version.py").write_text(f"__version__ = version = '{stated}'\n")
    assert main(["apply", str(tree), "--check"]) == 0
    patched = snapshot(tree)
    assert main(["apply", str(tree), "--reverse"]) == 0
    (tree / "vllm/_version.py").unlink(missing_ok=True)
    assert snapshot(tree) == before
    assert main(["apply", str(tree)]) == 0
    (tree / "vllm/_version.py").unlink(missing_ok=True)
    patched.pop("vllm/_version.py", None)
    assert snapshot(tree) == patched


def test_reverse_also_removes_what_python_compiled(tree):
    before = snapshot(tree)
    main(["apply", str(tree)])
    for folder in (LIBRARY, f"{LIBRARY}/slices", TESTS):
        (tree / folder / "__pycache__").mkdir()
        (tree / folder / "__pycache__" / "__init__.cpython-311.pyc").touch()
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
    assert f"would remove {OURS}\n" in capsys.readouterr().out
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


def test_site_packages_get_no_tests(tree):
    (tree / "setup.py").unlink()
    shutil.rmtree(tree / "tests", ignore_errors=True)
    (tree / "tests").mkdir()
    before = snapshot(tree)
    assert main(["apply", str(tree)]) == 0
    assert (tree / OURS).is_file() and not any((tree / "tests").iterdir())
    assert main(["apply", str(tree), "--check"]) == 0
    assert main(["apply", str(tree), "--reverse"]) == 0
    assert snapshot(tree) == before


def test_a_tree_inside_another_repository(release, tmp_path):
    """Where plain ``git apply`` says yes and does nothing."""
    git(tmp_path, "init", "-q")
    tree = copy_of_release(release, tmp_path / "third_party" / "vllm")
    assert main(["apply", str(tree)]) == 0
    assert main(["apply", str(tree), "--check"]) == 0


def test_without_git(tree, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["apply", str(tree)]) == 0
    assert main(["apply", str(tree), "--check"]) == 0


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


@pytest.mark.parametrize("name", ["missing", "empty", "vllm-src/vllm"])
def test_not_a_vllm_tree(tree, capsys, name):
    (tree.parent / "empty").mkdir()
    message = refused(capsys, tree.parent / name)
    assert "is no vLLM tree. Give the folder that holds vllm/." in message


def test_another_release(tree, capsys):
    for path in [path for path in snapshot(tree) if path.endswith(".py")]:
        with (tree / path).open("a") as file:
            file.write("# of tomorrow\n")
    before = snapshot(tree)
    message = refused(capsys, tree)
    assert f"another release than {', '.join(STOCK)}." in message
    assert snapshot(tree) == before


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("path", ["vllm/envs.py", FP8, OURS])
def test_local_edits_in_a_touched_file(tree, release, capsys, applied, reverse, path):
    if applied:
        main(["apply", str(tree)])
    (tree / path).parent.mkdir(exist_ok=True, parents=True)
    with (tree / path).open("a") as file:
        file.write("# mine\n")
    before = snapshot(tree)
    for extra in ([], ["--dry-run"], ["--check"]) if not reverse else (["--reverse"],):
        message = refused(capsys, tree, *extra)
        assert "has local edits, a part of the change" in message
        if path != OURS or not applied:
            assert f"Nearest is {release}, but not in {path}. " in message
    assert snapshot(tree) == before


@pytest.mark.parametrize("options", [[], ["--reverse"], ["--check"]])
def test_half_applied(tree, release, capsys, options):
    git(tree, "init", "-q")
    main(["series", release, str(tree.parent / "series")])
    git(tree, "apply", sorted((tree.parent / "series").iterdir())[0])
    before = snapshot(tree)
    assert "Restore vLLM's own files" in refused(capsys, tree, *options)
    assert snapshot(tree) == before


def test_one_file_is_missing(tree, capsys):
    main(["apply", str(tree)])
    (tree / OURS).unlink()
    assert "a part of the change" in refused(capsys, tree)


def test_a_folder_left_over_by_an_upgrade(tree, release, capsys):
    """Pip removes what it installed, and so leaves our files when vLLM goes."""
    main(["apply", str(tree)])
    for path in STOCK[release]:
        shutil.copyfile(fetch(release) / path, tree / path)
    message = refused(capsys, tree)
    assert "remove fp8_tp_padding/ where it is left over" in message
    assert f"Nearest is {release}, but not in {TESTS}/__init__.py, " in message
    assert " and more. Restore" in message


@pytest.mark.parametrize("place", [FP8, str(Path(FP8).parent), "vllm/envs.py"])
def test_read_only(tree, capsys, place):
    before = snapshot(tree)
    mode = (tree / place).stat().st_mode
    (tree / place).chmod(mode & ~0o222)
    message = refused(capsys, tree)
    (tree / place).chmod(mode)
    assert f"{tree / place} is read-only" in message
    assert snapshot(tree) == before


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("reverse", [[], ["--reverse"]])
@pytest.mark.parametrize("failing", ["first", "last"])
@pytest.mark.parametrize("how", [FULL, KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_failure_while_writing_changes_nothing(
    tree, release, capsys, monkeypatch, how, failing, reverse
):
    """With a part of a file written, or all of it under another name."""
    if reverse:
        main(["apply", str(tree)])
    before = snapshot(tree)
    replace, calls = os.replace, []
    fails_at = 1 if failing == "first" else len(STOCK[release])

    def fail_once(source, target):
        if Path(target).is_relative_to(tree):
            calls.append(target)
            if len(calls) == fails_at:
                raise how
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    code = main(["apply", str(tree), *reverse])
    assert code == (2 if how is FULL else 130)
    assert snapshot(tree) == before
    if how is FULL:
        assert f"on device. {tree} is as it was before." in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["old", "new"])
def test_a_disk_that_stays_full_changes_nothing(tree, capsys, monkeypatch, suffix):
    """With a part of a file written; putting things back takes no space."""
    before = snapshot(tree)
    write, failed = Path.write_bytes, []

    def full(file, content):
        if file.is_relative_to(tree) and (failed or file.name.endswith(suffix)):
            failed.append(file)
            write(file, content[:10])
            raise FULL
        return write(file, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert f"{tree} is as it was before." in refused(capsys, tree)
    assert failed and snapshot(tree) == before


@pytest.mark.parametrize("suffix", ["old", "new"])
@pytest.mark.parametrize("patched", [False, True])
def test_what_a_killed_run_left_is_named_and_kept(tree, capsys, suffix, patched):
    if patched:
        main(["apply", str(tree)])
    left = tree / f"{FP8}.vllm-patch-{suffix}"
    left.write_text("of another release")
    before = snapshot(tree)
    message = refused(capsys, tree, *(["--reverse"] if patched else []))
    assert f"{left} was left by a run that was killed" in message
    assert snapshot(tree) == before


def test_a_file_in_place_of_the_folder(tree, capsys):
    (tree / LIBRARY).write_text("")
    before = snapshot(tree)
    refused(capsys, tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize("stated", ["0.34.0", "0.27.0"])
def test_a_tree_that_states_an_unknown_release(tree, capsys, stated):
    """Whatever its files are: others than those that are compared differ."""
    (tree / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nVersion: {stated}\n")
    before = snapshot(tree)
    assert f"is vLLM {stated}; known are 0.26.0" in refused(capsys, tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize("made", [0, 1])
def test_an_interruption_between_folders_changes_nothing(tree, monkeypatch, made):
    """Right after one is there, too."""
    before = snapshot(tree)
    make, calls = Path.mkdir, []

    def interrupted(folder, *args, **kwargs):
        is_new = folder.is_relative_to(tree) and not folder.exists()
        make(folder, *args, **kwargs)
        if is_new:
            calls.append(folder)
            if len(calls) > made:
                raise SystemExit(143)

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(SystemExit):
        main(["apply", str(tree)])
    assert snapshot(tree) == before


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
apply._check_writable = wait
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
            assert f"{tree / 'vllm'} is in use by another vllm-patch apply." in message
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
    assert "Function not implemented" in refused(capsys, tree, *option)
    assert snapshot(tree) == before
