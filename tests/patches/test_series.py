"""The series come from the package, with bytes that do not move."""

import ast
import subprocess
from email import message_from_bytes
from pathlib import Path

import pytest

import vllm_patch
from vllm_patch.cli.main import main
from vllm_patch.cli.series import PLACEHOLDER
from vllm_patch.releases import SUPPORTED
from vllm_patch.series.commits import COMMITS, CONFIGS
from vllm_patch.series.diffs import OUR_TESTS, PACKAGE, STOCK, hooks_of, new_file
from vllm_patch.series.diffs import new_files as files_of

# Tests that do not go upstream, and why.
KEPT_HERE = {
    "conftest.py": "runs the tests against the plugin",
    "test_linear_engagement.py": "compares with an unpatched vLLM",
    "test_moe_engagement.py": "compares with an unpatched vLLM, reads the log",
}


@pytest.fixture
def series(release, tmp_path) -> list[Path]:
    assert main(["series", release, str(tmp_path / "series")]) == 0
    return sorted((tmp_path / "series").iterdir())


def test_bytes_do_not_depend_on_who_writes_them(series, release, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2020-02-02T02:02:02+0200")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.chdir(tmp_path)
    assert main(["series", release, "again"]) == 0
    again = sorted((tmp_path / "again").iterdir())
    for first, second in zip(series, again, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes()


def test_the_mails_are_what_a_reviewer_expects(series):
    for number, (commit, file) in enumerate(zip(COMMITS, series, strict=True), 1):
        mail = message_from_bytes(file.read_bytes())
        subject, *body = commit.message.splitlines()
        assert mail["Subject"] == f"[PATCH {number}/{len(COMMITS)}] {subject}"
        assert mail["From"] == PLACEHOLDER
        text, _, diff = mail.get_payload().partition("\n---\n")
        assert text.splitlines()[-1] == f"Signed-off-by: {PLACEHOLDER}"
        assert "https://github.com/vllm-project/vllm/issues/" in text
        assert all(len(line) <= 79 for line in body)
        new = [f for f in diff.split("\ndiff --git ") if "\nnew file mode 100644" in f]
        for file in (file for file in new if file.split()[0].endswith(".py")):
            assert "\n+# SPDX-License-Identifier: Apache-2.0\n" in file
            assert "\n+# SPDX-FileCopyrightText: Copyright contributors to" in file


def test_each_commit_brings_tests():
    for commit in COMMITS:
        names = {Path(path).name.partition("_")[0] for path in files_of(commit)}
        assert "test" in names, commit.name


def test_the_author_signs_off(release, tmp_path):
    author = "Jörg Müller <jm@example.org>"
    main(["series", release, str(tmp_path / "series"), "--author", author])
    repository = tmp_path / "vllm"
    repository.mkdir()
    text = sorted((tmp_path / "series").iterdir())[1].read_text()
    head, _, diff = text.partition("\ndiff --git ")
    new = next(d for d in diff.split("\ndiff --git ") if "\nnew file mode" in d)
    (tmp_path / "one.patch").write_text(f"{head}\ndiff --git {new}\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], cwd=repository, check=True)
    applied = [*git, "am", "-q", "--keep-non-patch", "../one.patch"]
    subprocess.run(applied, cwd=repository, check=True)
    shown = [*git, "log", "--format=%an <%ae>%n%s%n%(trailers)"]
    done = subprocess.run(shown, cwd=repository, check=True, capture_output=True)
    subject = COMMITS[1].message.splitlines()[0]
    expected = f"{author}\n{subject}\nSigned-off-by: {author}"
    assert done.stdout.decode().strip() == expected


@pytest.mark.parametrize("author", ["me", "me@example.org", "Me <me>", "Me\n <m@e.x>"])
def test_an_author_that_git_would_not_take(release, tmp_path, capsys, author):
    assert main(["series", release, str(tmp_path / "s"), "--author", author]) == 2
    assert "must be 'Name <mail@host>'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_folder_that_holds_something(release, tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert main(["series", release, str(tmp_path)]) == 2
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", ["", "a\n", "a", "a\nb\n", "a\nb\n\n", "a\n\nb"])
def test_a_new_file_is_written_as_git_does(tmp_path, content):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "file").write_text(content)
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    command = ["git", "diff", "--cached", "--full-index"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert new_file("file", content) == done.stdout.decode()


def test_each_file_is_in_one_commit():
    """Or stays here, with a reason."""
    library = PACKAGE / "fp8_tp_padding"
    files = [*library.rglob("*.py"), *library.rglob("*.json"), *OUR_TESTS.glob("*.py")]
    upstream = [file for commit in COMMITS for file in files_of(commit).values()]
    kept = [OUR_TESTS / name for name in KEPT_HERE]
    assert sorted(files) == sorted(upstream + kept)


def test_each_row_names_a_file():
    for commit in COMMITS:
        for folder, names in (
            (PACKAGE / "fp8_tp_padding", commit.sources),
            (OUR_TESTS, commit.tests),
        ):
            for name in names:
                assert [*folder.glob(name)], name


def test_what_goes_upstream_imports_nothing_of_ours():
    for file in (f for commit in COMMITS for f in files_of(commit).values()):
        nodes = ast.walk(ast.parse(file.read_text())) if file.suffix == ".py" else ()
        for node in nodes:
            names = [name.name for name in getattr(node, "names", ())]
            modules = [getattr(node, "module", None) or "", *names]
            roots = {str(module).split(".")[0] for module in modules}
            assert not roots & {"vllm_patch", "tests"}, file


def test_configs_lie_where_vllm_packages_them():
    paths = [p for c in COMMITS for p in files_of(c) if p.endswith(".json")]
    ours = Path(vllm_patch.__file__).parent / "fp8_tp_padding/kernels/configs"
    assert {Path(path).name for path in paths} == {path.name for path in ours.iterdir()}
    assert all(path.startswith(f"{CONFIGS}/") for path in paths)


@pytest.mark.parametrize("release", STOCK)
def test_hooks_are_few_and_small(release):
    """In 0.33.0 the change takes the place of vLLM's own, whose lines go."""
    for commit in COMMITS:
        hooks = "".join(hooks_of(commit, release).values()).splitlines()
        added = [x for x in hooks if x[0] == "+" and x[:3] != "+++"]
        removed = [x for x in hooks if x[0] == "-" and x[:3] != "---"]
        small = commit.name != "experts" or release != "0.33.0"
        assert 0 < len(added) <= (27 if small else 80)
        assert len(removed) <= 3 or not small and len(removed) > len(added)


def test_each_supported_release_has_a_series():
    # 0.27.0 was replaced by 0.27.1 within days.
    assert [*STOCK] == [release for release in SUPPORTED if release != "0.27.0"]
