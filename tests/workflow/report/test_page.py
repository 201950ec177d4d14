"""The report: one file, whole, from the same results the same bytes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cnnlib.errors import DataError
from cnnlib.paths import ROOT
from workflow.glue import modules
from workflow.report import page

pytestmark = pytest.mark.quick

REFERENCE = ROOT / "results/reference/nvidia-h100"


@pytest.fixture(scope="module")
def text() -> str:
    return page.render(
        sorted((REFERENCE / "figures").glob("*.svg")),
        sorted((REFERENCE / "tables").glob("*.md")),
        REFERENCE / "provenance/run.json",
    )


class Reader(HTMLParser):
    """Notes tags, addresses and the tags that are open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [str(given[name]) for name in ("src", "href") if name in given]
        if tag == "img":
            self.alternatives.append(str(given.get("alt")))
        if tag not in ("meta", "img", "br", "input", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_everything_is_in_it(text: str) -> None:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert all(address.startswith(("data:", "#")) for address in reader.addresses)
    names = [path.stem for path in (REFERENCE / "figures").glob("*.svg")]
    assert len(reader.alternatives) == len(names)
    for name in names:
        assert f'id="{name}"' in text
        first = " ".join(modules.docstring("figures", name).split("\n\n")[0].split())
        assert first in reader.alternatives
    assert not re.search(r"url\(|@import|<script[^>]* src|<link", text)
    for stage in ("naive", "gemm", "gemm_cuda", "fused", "ring"):
        assert f"{stage}</td>" in text
    assert "NVIDIA H100" in text


def test_the_same_results_give_the_same_bytes(text: str) -> None:
    assert text == page.render(
        sorted((REFERENCE / "figures").glob("*.svg"), reverse=True),
        sorted((REFERENCE / "tables").glob("*.md"), reverse=True),
        REFERENCE / "provenance/run.json",
    )


def test_tables_are_read_as_they_are_written() -> None:
    markdown = "**A & B**\n\n| x | y |\n| --- | ---: |\n| 1 | <2 \\* |\n\nNote [x](y.md).\n"
    assert page.blocks(markdown) == [
        ("text", "A & B"),
        ("table", [["x", "y"], ["1", "<2 *"]]),
        ("text", "Note x."),
    ]


def test_nothing_of_a_name_is_taken_for_markup(tmp_path: Path) -> None:
    (tmp_path / "ladder.md").write_text("| a |\n| --- |\n| <script>1</script> |\n")
    (tmp_path / "run.json").write_text(json.dumps({"device": "<b>GPU</b>"}))
    written = page.render([], [tmp_path / "ladder.md"], tmp_path / "run.json")
    assert "<script>1" not in written
    assert "<b>" not in written


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is not JSON"):
        page.render([], [], tmp_path / "run.json")
    with pytest.raises(DataError, match=r"cannot read .*none\.md"):
        page.render([], [tmp_path / "none.md"], tmp_path / "run.json")
