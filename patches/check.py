# SPDX-License-Identifier: Apache-2.0
"""Proves the series of each release on the release's own source.

python -m patches.check [RELEASE...]   make check-patches
"""

import argparse
import contextlib
import filecmp
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vllm_tree import fetch
from vllm_patch.cli.main import main as vllm_patch
from vllm_patch.series.commits import COMMITS, LIBRARY, TESTS, Commit
from vllm_patch.series.diffs import STOCK, blob_hash, hooks_of, new_files

REPOSITORY = Path(__file__).parents[1]
# Newest release, whose series is in git, for review.
COMMITTED = [*STOCK][-1]
FP8 = "vllm.model_executor.layers.quantization.fp8"
# vLLM's tests of what the hooks replace; these of them want vLLM's conftest.py.
STOCK_TESTS = "tests/kernels/moe/test_fp8_tp_loading.py"
NEEDS_CONFTEST = "flashinfer or skipped_layer"


class CheckError(Exception):
    """A series is not what it should be."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m patches.check")
    known = " ".join(STOCK)
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=known)
    imports = "import after each commit, and not only after the last"
    parser.add_argument("--every-commit", action="store_true", help=imports)
    tests = "run each commit's tests, which must fail without the hooks"
    parser.add_argument("--run-tests", action="store_true", help=tests)
    args = parser.parse_intermixed_args()
    if unknown := set(args.releases) - set(STOCK):
        parser.error(f"no series for {sorted(unknown)}; there are {known}")
    for release in args.releases or STOCK:
        try:
            said = check(release, args.every_commit, args.run_tests)
        except (CheckError, subprocess.CalledProcessError) as error:
            text = getattr(error, "stderr", "")
            print(f"vLLM {release}: {error}\n{text}", file=sys.stderr)
            return 1
        print(f"vLLM {release}: {said}", flush=True)
    return 0


def check(release: str, every_commit: bool = False, run_tests: bool = False) -> str:
    """Check a release's series and return what was seen.

    Raises:
        CheckError: The series does not apply to the pristine release, differs from the
            committed one, brings other bytes than the package has, or a patched tree
            does not import or pass its tests.

    """
    said = [f"{len(COMMITS)} commits: git am, imports, apply and --reverse work"]
    with tempfile.TemporaryDirectory() as scratch:
        series, tree = Path(scratch) / "series", Path(scratch) / "vllm"
        check_stock(release)
        run_command("series", release, str(series))
        if release == COMMITTED:
            check_bytes(REPOSITORY / "patches" / f"v{release}", series)
            said.append("the same bytes as in git")
        pristine(release, tree)
        for commit, patch in zip(COMMITS, sorted(series.iterdir()), strict=True):
            is_last = commit is COMMITS[-1]
            apply_patch(tree, patch)
            check_sources(tree, commit)
            if every_commit or is_last:
                check_imports(tree)
            if run_tests:
                own = [p for p in new_files(commit) if Path(p).name.startswith("test_")]
                done = check_tests(tree, commit.name, [TESTS] if is_last else own)
                said.append(f"{commit.name}: {done}")
        check_command(tree)
        if run_tests:
            said += check_hooks_are_needed(release, tree)
    return "; ".join(said)


def check_stock(release: str) -> None:
    """Compare the table of vLLM's own files with the release, and with the hooks."""
    hooked = sorted({path for c in COMMITS for path in hooks_of(c, release)})
    tree = fetch(release)
    blobs = {path: blob_hash((tree / path).read_bytes()) for path in hooked}
    if blobs != STOCK[release]:
        raise CheckError(f"hooks/stock.json must say {blobs} of this release")


def check_bytes(committed: Path, written: Path) -> None:
    """Compare the series in git with the one that the package writes."""
    names = {path.name for folder in (committed, written) for path in folder.iterdir()}
    _, differ, missing = filecmp.cmpfiles(committed, written, names, shallow=False)
    if wrong := sorted(differ + missing):
        raise CheckError(
            f"{', '.join(wrong)} in {committed} differ from what is written. Patches "
            "are not edited: change the package or a hook, then run make patches."
        )


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


def check_sources(tree: Path, commit: Commit) -> None:
    """Compare what a commit brought with the files that it was made from."""
    for path, file in new_files(commit).items():
        if not filecmp.cmp(file, tree / path, shallow=False):
            raise CheckError(f"{path} is not the same as {file}")


def check_imports(tree: Path) -> None:
    """Import vLLM's FP8 module and each module of the new folder in the tree."""
    files = [path.relative_to(tree) for path in (tree / LIBRARY).rglob("*.py")]
    modules = [".".join(path.with_suffix("").parts) for path in files]
    names = [module.removesuffix(".__init__") for module in modules]
    done = _in_tree(tree, stdin="\n".join([FP8, *sorted(names)]))
    if done.returncode:
        raise CheckError(f"the patched tree does not import:\n{done.stderr[-2000:]}")


def check_command(tree: Path) -> None:
    """``vllm-patch apply`` does what git am did, and takes both out again."""
    git(tree, "clean", "--quiet", "-xdf")  # What imports and tests left.
    patched = git(tree, "rev-parse", "HEAD^{tree}")
    base = git(tree, "rev-parse", f"HEAD~{len(COMMITS)}^{{tree}}")
    run_command("apply", str(tree), "--check")
    for options, expected in (
        (["--reverse"], base),
        ([], patched),
        (["--reverse"], base),
    ):
        run_command("apply", str(tree), *options)
        git(tree, "add", "--all", "--force")
        if git(tree, "write-tree") != expected:
            raise CheckError(f"apply {options} leaves other files than git am or vLLM")
    git(tree, "reset", "--quiet", "--hard")


def check_tests(tree: Path, commit: str, tests: list[str]) -> str:
    """Run tests of the series in the tree; return pytest's last line."""
    done = _in_tree(tree, *tests)
    if done.returncode:
        raise CheckError(f"tests of {commit!r} fail:\n{done.stdout[-3000:]}")
    return done.stdout.strip().splitlines()[-1]


def check_hooks_are_needed(release: str, tree: Path) -> list[str]:
    """Run vLLM's own tests of what hooks replace; then ours, without the hooks."""
    said = []
    if STOCK_TESTS in STOCK[release]:
        (tree / "tests" / "__init__.py").touch()  # Which tests/vllm_tree.py leaves out.
        own = [STOCK_TESTS, "-k", f"not ({NEEDS_CONFTEST})"]
        said.append(f"vLLM's: {check_tests(tree, 'experts', own)}")
    # Takes back what is changed in vLLM's own files; the new ones stay.
    git(tree, "checkout", "--quiet", f"HEAD~{len(COMMITS)}", "--", *STOCK[release])
    without = _in_tree(tree, TESTS)
    if not without.returncode:
        raise CheckError("the tests pass without the hooks, too")
    return [*said, f"without the hooks: {without.stdout.strip().splitlines()[-1]}"]


def run_command(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = vllm_patch([*arguments])
    if code:
        raise CheckError(f"vllm-patch {' '.join(arguments)}: {printed.getvalue()}")


def git(repository: Path, *arguments: str | Path) -> str:
    """Run git in ``repository``, whatever the user has configured; return stdout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    # A tree inside another repository must not be taken for a part of it.
    environment["GIT_CEILING_DIRECTORIES"] = str(repository.resolve().parent)
    who = ["-c", "user.name=vllm-patch", "-c", "user.email=vllm-patch@example.com"]
    command = ["git", *who, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _in_tree(tree: Path, *arguments: str, stdin: str = ""):
    return subprocess.run(
        [sys.executable, "-m", "tests.vllm_on_cpu.in_tree", str(tree), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        input=stdin,
        capture_output=True,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
