"""That the tests which FEATURES.md names are there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\|.*\|$", (TESTS / "FEATURES.md").read_text(), re.MULTILINE)[2:]


def test_each_feature_has_a_test_that_exists():
    assert len(ROWS) > 15, "the table is read"
    for row in ROWS:
        feature, _, held_by = (cell.strip() for cell in row.strip("|").split(" | "))
        named = re.findall(r"`([^`]+\.py)::(\w+)`", held_by)
        assert named, f"{feature}: no test"
        for path, name in named:
            tree = ast.parse((TESTS / path).read_text())
            functions = {f.name for f in ast.walk(tree) if hasattr(f, "name")}
            assert name in functions, f"{feature}: {path} has no {name}"
