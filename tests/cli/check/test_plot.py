"""The pictures: that of the README is up to date, and they hold what they should."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vllm_patch.cli import UsageError
from vllm_patch.cli.check import plot

from .known_models import verdict

# What the README shows; ``make tables`` draws it.
PICTURE = Path(__file__).parents[3] / "benchmarks" / "results" / "cut_1536_tp_8.svg"


def drawn(tmp_path, name, tp) -> ElementTree.Element:
    file = tmp_path / "cut.svg"
    plot.write([verdict(name, tp)], file)
    return ElementTree.fromstring(file.read_text())


def count(image: ElementTree.Element, kind: str) -> int:
    return sum(each.get("class") == kind for each in image.iter())


def test_the_picture_of_the_readme(tmp_path):
    plot.write([verdict("Qwen3-235B-A22B", 8)], tmp_path / "cut.svg")
    assert (tmp_path / "cut.svg").read_text() == PICTURE.read_text()


def test_what_it_shows(tmp_path):
    """12 blocks, four of them on two ranks; each rank has a whole one and a half."""
    image = drawn(tmp_path, "Qwen3-235B-A22B", 8)
    legend = 1
    assert count(image, "shared") == 4 + 8 + legend
    assert count(image, "own") == 8 + 8 + legend
    assert count(image, "padding") == 8 + legend
    texts = " ".join(each.text or "" for each in image.iter())
    assert "192 columns, 1.5 quant blocks: 4 of 12 blocks" in texts


def test_columns_lie_where_they_are(tmp_path):
    """Real and padded columns of a rank fill its blocks, without a gap."""
    image = drawn(tmp_path, "GLM-4.5-Air *", 8)
    rows = {}
    for each in image.iter():
        if each.get("height") == str(plot.BAR) and each.get("class"):
            place = float(each.get("x")), float(each.get("width"))
            rows.setdefault(each.get("y"), []).append(place)
    assert len(rows) == 8
    for places in rows.values():
        for (x, width), (next_x, _) in zip(places, places[1:], strict=False):
            assert x + width == pytest.approx(next_x, abs=0.15)


@pytest.mark.parametrize(("name", "tp"), [("DeepSeek-V3", 32), ("Qwen3-30B-A3B", 32)])
def test_many_ranks_are_not_all_drawn(tmp_path, name, tp):
    image = drawn(tmp_path, name, tp)
    texts = [each.text for each in image.iter() if each.text]
    assert f"{tp - plot.MOST_RANKS} more ranks likewise" in texts


def test_a_png_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    remedy = r"pip install 'vllm-patch\[png\]', or give a .svg"
    with pytest.raises(UsageError, match=remedy):
        plot.write([verdict("Qwen3-235B-A22B", 8)], tmp_path / "cut.png")
    assert not list(tmp_path.iterdir())


def test_a_png(tmp_path):
    """Its pixels: blocks in the colours of the drawing, twice as large."""
    try:
        import cairosvg  # noqa: F401
    except OSError as error:
        pytest.skip(f"the system has no cairo library: {error}")
    from PIL import Image

    plot.write([verdict("Qwen3-235B-A22B", 8)], tmp_path / "cut.png")
    image = Image.open(tmp_path / "cut.png").convert("RGB")
    assert image.width == 2 * plot.WIDTH
    colours = {colour: n for n, colour in image.getcolors(1 << 20)}
    shared, own = colours[0xE6, 0x9F, 0x00], colours[0x56, 0xB4, 0xE9]
    # Of twelve blocks four are shared, and of a rank's 192 columns 64.
    assert own == pytest.approx(2 * shared, rel=0.05)
