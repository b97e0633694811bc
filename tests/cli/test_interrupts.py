"""A signal at any moment leaves a command's files as they were, or all written."""

import itertools
import json
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from tests.cli.test_apply import snapshot
from tests.cli.test_parity import engine, model
from vllm_patch.cli import apply
from vllm_patch.cli.main import main

__all__ = ["engine", "model"]
MODULES = str(Path(apply.__file__).parent)


def interrupted(moment: int, command, modules=MODULES) -> bool:
    """Send this process a SIGINT before the nth line that a command's modules run.

    Returns:
        False if it ended before that.

    """
    lines = itertools.count()

    def trace(frame, event, _argument):
        if not frame.f_code.co_filename.startswith(modules):
            return None
        if event == "line" and next(lines) == moment:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    # A process in the background may have been told to ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(trace)
    try:
        command()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, handler)
    return next(lines) > moment


def test_apply(tmp_path):
    """One file that changes, one that comes with its folder, one that goes."""
    files = {"old": b"new", "folder/new": b"new", "gone/file": None}
    after = {"old": b"new", "folder": None, "folder/new": b"new"}
    for moment in itertools.count():
        tree = tmp_path / str(moment)
        (tree / "gone").mkdir(parents=True)
        for name in ("old", "gone/file"):
            (tree / name).write_bytes(b"old")
        before = snapshot(tree)
        came = interrupted(moment, partial(apply._write_all, tree, files))
        assert snapshot(tree) in (before, after), moment
        if not came:
            break
    assert moment > 50


@pytest.mark.parametrize("exists", [False, True])
def test_series(tmp_path, release, exists):
    main(["series", release, str(tmp_path / "whole")])
    whole, found = snapshot(tmp_path / "whole"), []
    for moment in itertools.count():
        folder = tmp_path / "new" / str(moment)
        if exists:
            folder.mkdir(parents=True)
        command = ["series", release, str(folder)]
        came = interrupted(moment, partial(main, command))
        found.append(snapshot(folder) if folder.exists() else None)
        if not came:
            break
    nothing = {} if exists else None
    assert all(left in (nothing, whole) for left in found)
    assert found[0] == nothing and found[-1] == whole and moment > 20


def test_parity(engine, model, tmp_path, monkeypatch, capsys):
    """Around engines, of which ``test_parity`` has those that are interrupted."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    out = tmp_path / "out.json"
    command = ["parity", "--model", str(model), "--tp", "8", "--json", str(out)]
    for moment in itertools.count():
        out.unlink(missing_ok=True)
        came = interrupted(moment, partial(main, command), f"{MODULES}/parity.py")
        assert not [*tmp_path.glob("vllm-patch-parity-*")]
        assert not out.exists() or json.loads(out.read_text())["parity"], moment
        if not came:
            break
    assert out.exists() and moment > 100
