# SPDX-License-Identifier: Apache-2.0
"""Proves that a release's committed series is what it should be, and works."""

import contextlib
import filecmp
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from patches.generator.commits import COMMITS, LIBRARY, TESTS
from patches.generator.generate import (
    REPOSITORY,
    assign_files,
    git,
    in_tree,
    write_series,
)
from tests.vllm_tree import fetch
from vllm_patch.cli.main import main as vllm_patch

HOOKED = "vllm.model_executor.layers.quantization.fp8"


class CheckError(Exception):
    """A committed series is not what it should be."""


def check(
    release: str, patches: Path, every_commit: bool = False, run_tests: bool = False
) -> None:
    """Check the series ``patches/vRELEASE`` and print what was seen.

    Args:
        release: The vLLM release.
        patches: Folder that holds the series of all releases.
        every_commit: Import the tree after each commit, and not the last one only.
        run_tests: Run the tests in the patches, which must fail without the hooks.

    Raises:
        CheckError: The series differs from what is generated, does not apply to the
            pristine release, brings other bytes than the package has, or a patched
            tree does not import or pass its tests.

    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, tree = patches / f"v{release}", Path(scratch) / "vllm"
        names = check_bytes(release, folder, Path(scratch) / "series")
        pristine(release, tree)
        sources = assign_files()
        for commit, name in zip(COMMITS, names, strict=True):
            apply_patch(tree, folder / name)
            check_sources(tree, sources[commit.name])
            if every_commit or commit is COMMITS[-1]:
                check_imports(tree)
        check_command(tree)
        said = "as generated; git am, imports, apply and --reverse work"
        if run_tests:
            said += f"; {check_tests(tree)}"
    print(f"vLLM {release}: {len(names)} patches, {said}", flush=True)


def check_bytes(release: str, committed: Path, scratch: Path) -> list[str]:
    """Generate the series again, compare each byte, and return the patches' names."""
    names = write_series(release, fetch(release), scratch)
    found = {path.name for path in committed.glob("*")}
    wanted = {*names, "series"}
    _, differ, missing = filecmp.cmpfiles(committed, scratch, wanted, shallow=False)
    if wrong := sorted({*differ, *missing, *(found - wanted)}):
        raise CheckError(
            f"{', '.join(wrong)} in {committed} differ from what is generated. Patches "
            "are not edited: change the package or a hook, then run make patches."
        )
    return names


def pristine(release: str, tree: Path) -> None:
    """Make a git repository of the release's source distribution."""
    shutil.copytree(fetch(release), tree, ignore=shutil.ignore_patterns("__pycache__"))
    git(tree, "init", "--quiet")
    git(tree, "add", "--all", "--force")
    git(tree, "commit", "--quiet", "--message", f"vLLM {release}")


def apply_patch(tree: Path, patch: Path) -> None:
    try:
        git(tree, "am", "--quiet", "--keep-non-patch", patch.resolve())
    except subprocess.CalledProcessError as error:
        raise CheckError(f"git am {patch.name}: {error.stderr.strip()}") from error
    if dirty := git(tree, "status", "--porcelain"):
        raise CheckError(f"git am {patch.name} leaves changes behind:\n{dirty}")


def check_sources(tree: Path, sources: list[str]) -> None:
    """Compare what a commit brought with the files that it was made from."""
    for source in sources:
        if not filecmp.cmp(REPOSITORY / source, tree / in_tree(source), shallow=False):
            raise CheckError(f"{in_tree(source)} is not the same as {source}")


def check_imports(tree: Path) -> None:
    """Import vLLM's FP8 module and each module of the new folder in the tree."""
    files = [path.relative_to(tree) for path in (tree / LIBRARY).rglob("*.py")]
    modules = [".".join(path.with_suffix("").parts) for path in files]
    names = [module.removesuffix(".__init__") for module in modules]
    done = _in_tree(tree, stdin="\n".join([HOOKED, *sorted(names)]))
    if done.returncode:
        raise CheckError(f"the patched tree does not import:\n{done.stderr[-2000:]}")


def check_command(tree: Path) -> None:
    """``vllm-patch apply`` does what git am did, and ``--reverse`` undoes it."""
    patched = git(tree, "rev-parse", "HEAD^{tree}")
    git(tree, "checkout", "--quiet", f"HEAD~{len(COMMITS)}")
    base = git(tree, "rev-parse", "HEAD^{tree}")
    for expected, options in ((patched, []), (base, ["--reverse"])):
        with contextlib.redirect_stdout(io.StringIO()):
            code = vllm_patch(["apply", str(tree), *options])
        git(tree, "add", "--all", "--force")
        if code or git(tree, "write-tree") != expected:
            command = " ".join(["vllm-patch apply", *options])
            raise CheckError(f"{command} leaves other files than git am or vLLM")
    git(tree, "checkout", "--quiet", "-")


def check_tests(tree: Path) -> str:
    """Run the tests of the series, with the hooks and without; say how they went."""
    with_hooks = _in_tree(tree, TESTS)
    if with_hooks.returncode:
        raise CheckError(f"tests fail:\n{with_hooks.stdout[-3000:]}")
    # Takes back what is changed in vLLM's own files; the new ones stay.
    git(tree, "checkout", "--quiet", f"HEAD~{len(COMMITS)}", "--", "vllm")
    without = _in_tree(tree, TESTS)
    if not without.returncode:
        raise CheckError("the tests pass without the hooks, too")
    results = [done.stdout.strip().splitlines()[-1] for done in (with_hooks, without)]
    return f"tests: {results[0]}; without the hooks: {results[1]}"


def _in_tree(tree: Path, *arguments: str, stdin: str = ""):
    return subprocess.run(
        [sys.executable, "-m", "tests.vllm_on_cpu.in_tree", str(tree), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        input=stdin,
        capture_output=True,
        text=True,
    )
