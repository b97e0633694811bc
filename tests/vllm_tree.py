"""Fetches a vLLM release's source tree, which is enough to import it.

``python -m tests.vllm_tree RELEASE...`` fills the cache; a package index is all it
needs. The cache is ``$XDG_CACHE_HOME/vllm-patch``, by default below ``~/.cache``.
"""

import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from pypi_simple import PyPISimple

# The package, the metadata that vLLM reads its version from, and what the series touch
# or their tests import. Not tests/__init__.py: it would take our tests' name.
WANTED = (
    "vllm/",
    "vllm.egg-info/",
    "tests/kernels/",
    "setup.py",
    "pyproject.toml",
    "PKG-INFO",
)


def fetch(release: str) -> Path:
    """Return the folder that holds ``vllm/`` of a release, fetched if need be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # What an earlier commit wanted may be less.
    kind = f"{zlib.crc32(repr(WANTED).encode()):08x}"
    tree = cache / "vllm-patch" / kind / f"vllm-{release}"
    if (tree / WANTED[-1]).is_file():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as work:
        archive = Path(work) / "vllm.tar.gz"
        _download(release, archive)
        with tarfile.open(archive) as tar:
            wanted = tuple(f"vllm-{release}/{path}" for path in WANTED)
            members = [member for member in tar if member.name.startswith(wanted)]
            tar.extractall(work, members, filter="data")
        shutil.rmtree(tree, ignore_errors=True)
        shutil.move(Path(work) / f"vllm-{release}", tree)
    return tree


def _download(release: str, target: Path) -> None:
    print(f"fetching the source of vLLM {release}", file=sys.stderr, flush=True)
    endpoint = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    with PyPISimple(endpoint) as index:
        for package in index.get_project_page("vllm").packages:
            if package.version == release and package.package_type == "sdist":
                index.download_package(package, target)
                return
    raise SystemExit(f"{endpoint} has no source distribution of vLLM {release}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(fetch(name))
