"""Wheel and sdist, built as pip does, in new environments without a package index."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib import metadata
from pathlib import Path

import pytest
from readme_renderer import markdown

ROOT = Path(__file__).parent.parent
PAGES = "https://example.org/vllm-patch/blob/v9.8.7"
TAG = "v9.8.7"
PACKED = "tests/fp8_tp_padding"
# What pip would fetch. vLLM is a peer.
REQUIRED = "packaging", "wrapt"


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, check=True, text=True
    )
    return done.stdout


def copied(clone: Path, target: Path) -> Path:
    """Return another clone, without what a build left."""
    left = shutil.ignore_patterns("*.egg-info", "build")
    return Path(shutil.copytree(clone, target / "clone", ignore=left))


def built(source: Path, kind: str, target: Path, **env: str) -> Path:
    """Build an sdist or a wheel with the build backend, as ``pip`` does."""
    script = f"from setuptools import build_meta as b; b.build_{kind}({str(target)!r})"
    target.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_PATCH_PAGES"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=source, env={**environment, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The files that git knows, in a repository with a tag."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: git says what belongs to it")
    folder = tmp_path_factory.mktemp("clone")
    for name in git(ROOT, "ls-files", "-z").split("\0")[:-1]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    git(folder, "tag", TAG)
    return folder


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory) -> Path:
    return built(sources, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def environment(request, sources, sdist, tmp_path_factory) -> Path:
    """A new environment with this package and what it requires, and nothing else."""
    work = tmp_path_factory.mktemp(request.param)
    if request.param == "sdist":
        shutil.unpack_archive(sdist, work / "unpacked")
        (sources,) = (work / "unpacked").iterdir()
    wheel = built(sources, "wheel", work / "dist")
    venv.create(work / "env", symlinks=True)
    packages = next((work / "env" / "lib").glob("python*")) / "site-packages"
    for name in REQUIRED:
        for file in metadata.files(name):
            target = packages / file
            if target.is_relative_to(packages) and ".." not in file.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(work / "env" / "bin" / "python"),
    ]
    subprocess.run([*pip, "install", "-q", "--no-index", str(wheel)], check=True)
    return work / "env"


def ran(environment: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the installed command, away from the clone."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [environment / "bin" / "vllm-patch", *arguments],
        cwd=environment,
        env=env,
        capture_output=True,
        text=True,
    )


def test_the_version_is_the_tag(environment):
    done = ran(environment, "--version")
    assert done.stdout == f"{TAG[1:]}\n", done.stderr


def test_the_extra_that_check_names(environment):
    packages = environment.glob("lib/python*/site-packages")
    (info,) = next(packages).glob("vllm_patch-*.dist-info/METADATA")
    lines = [line.replace("'", '"') for line in info.read_text().splitlines()]
    assert 'Requires-Dist: cairosvg; extra == "png"' in lines


def test_status_without_vllm(environment):
    done = ran(environment, "status")
    assert done.returncode == 1, done.stderr
    assert "plugins     vllm_patch\n" in done.stdout
    assert "active      no: vLLM is not installed in this environment" in done.stdout


def test_the_series_are_the_same_bytes(environment, tmp_path):
    done = ran(environment, "series", "0.33.0", str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = ROOT / "patches" / "v0.33.0"
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "version"),
    [
        ("untagged", r"0\.1\.dev1\+g[0-9a-f]+"),
        ("a later commit", r"9\.8\.8\.dev1\+g[0-9a-f]+"),
        ("no repository", r"0\.0"),
    ],
)
def test_other_versions(sources, tmp_path, change, version):
    """Of a clone without tags, one between two, and a folder that was copied."""
    clone = copied(sources, tmp_path)
    if change == "untagged":
        git(clone, "tag", "-d", TAG)
    elif change == "a later commit":
        git(clone, "commit", "-q", "--allow-empty", "-m", "later")
    else:
        shutil.rmtree(clone / ".git")
    wheel = built(clone, "wheel", tmp_path / "dist")
    assert re.fullmatch(f"vllm_patch-{version}-py3-none-any.whl", wheel.name)


@pytest.mark.parametrize("from_git", [True, False])
def test_an_sdist_has_the_tests_that_the_wheel_has(sources, tmp_path, from_git):
    """And none without what it imports, be it built of a clone or of an archive."""
    clone = copied(sources, tmp_path)
    if not from_git:
        shutil.rmtree(clone / ".git")
    file = built(clone, "sdist", tmp_path / "dist")
    with tarfile.open(file) as opened:
        names = [Path(*Path(name).parts[1:]) for name in opened.getnames()]
    expected = {path.relative_to(clone) for path in (clone / PACKED).glob("*.py")}
    assert {n for n in names if n.parts[:1] == ("tests",) and n.suffix} == expected


@pytest.mark.parametrize("pages", ["", PAGES])
def test_the_page_on_an_index(sources, tmp_path, pages):
    """It renders, and each link and picture leads somewhere from there."""
    clone = copied(sources, tmp_path)
    wheel = built(clone, "wheel", tmp_path / "dist", VLLM_PATCH_PAGES=pages)
    shutil.unpack_archive(wheel, tmp_path / "wheel", "zip")
    (info,) = (tmp_path / "wheel").glob("*.dist-info")
    (distribution,) = metadata.distributions(path=[str(info.parent)])
    fields = distribution.metadata
    assert fields["Description-Content-Type"] == "text/markdown"
    page = markdown.render(fields.get_payload(), variant="GFM")
    assert page and "<table>" in page and "Runs block-quantized FP8 models" in page
    # The renderer's own are those of headings to themselves.
    targets = re.findall(r'(?:href|src)="(?!#user-content-)([^"]*)"', page)
    assert not [target for target in targets if not target.startswith("https://")]
    names = [t.removeprefix(f"{PAGES}/") for t in targets if t.startswith(PAGES)]
    assert bool(names) == bool(pages)
    for name in names:
        assert (ROOT / re.split("[?#]", name)[0]).exists()


# What typing has since Python 3.11; vLLM 0.26 runs on 3.10, too.
LATER = {
    *("LiteralString", "Never", "NotRequired", "Required", "Self", "TypeVarTuple"),
    *("Unpack", "assert_never", "assert_type", "dataclass_transform", "override"),
}


@pytest.mark.parametrize("package", ["vllm_patch", PACKED])
def test_the_oldest_python_has_what_is_imported_of_typing(package):
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(), feature_version=(3, 10))):
            if isinstance(node, ast.ImportFrom) and node.module == "typing":
                assert not LATER & {name.name for name in node.names}, file
