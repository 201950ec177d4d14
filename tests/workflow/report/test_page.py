"""The report: one file, whole, that a browser shows without a network, also on a phone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cnnlib.errors import DataError
from cnnlib.paths import ROOT
from workflow.glue import modules
from workflow.report import browser, page

pytestmark = pytest.mark.quick

REFERENCE = ROOT / "results/reference/nvidia-h100"
BROWSER = next(filter(None, map(shutil.which, browser.BROWSERS)), "")
# A question to the page itself, once everything is loaded; the answer goes into the title.
PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push(String(event.message || event.type)), true);
addEventListener("load", () => setTimeout(() => {
  const images = [...document.images];
  document.title = JSON.stringify({
    problems, images: images.length,
    shown: images.filter(image => image.complete && image.naturalWidth > 0).length,
    width: document.documentElement.scrollWidth, window: innerWidth,
    outside: performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:")),
  });
}, 0));
</script>"""


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
        if tag not in ("meta", "img", "br"):
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
    assert not re.search(r"url\(|@import|<script|<link", text)
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
    markdown = "**A & B**\n\n| x | y |\n| --- | ---: |\n| 1 | <2 \\* |\n\nNote.\n"
    assert page.blocks(markdown) == [
        ("text", "A & B"),
        ("table", [["x", "y"], ["1", "<2 *"]]),
        ("text", "Note."),
    ]


def test_nothing_of_a_name_is_taken_for_markup(tmp_path: Path) -> None:
    (tmp_path / "ladder.md").write_text("| a |\n| --- |\n| <script>1</script> |\n")
    (tmp_path / "run.json").write_text(json.dumps({"device": "<b>GPU</b>"}))
    written = page.render([], [tmp_path / "ladder.md"], tmp_path / "run.json")
    assert "<script>" not in written
    assert "<b>" not in written


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is not JSON"):
        page.render([], [], tmp_path / "run.json")
    with pytest.raises(DataError, match=r"cannot read .*none\.md"):
        page.render([], [tmp_path / "none.md"], tmp_path / "run.json")


@pytest.mark.skipif(not BROWSER, reason="no browser here: install Chromium")
@pytest.mark.parametrize("width", [1200, 360], ids=["desktop", "phone"])
def test_a_browser_shows_it_without_a_network(text: str, width: int) -> None:
    # A window cannot be as narrow as a phone: the page is shown in a frame that is.
    frame = (
        f'<iframe id="frame" src="report.html" style="width:{width}px;height:800px"></iframe>'
        "<p></p><script>addEventListener('load', () => setTimeout(() => {"
        "document.querySelector('p').textContent ="
        " document.getElementById('frame').contentDocument.title; }, 500));</script>"
    )
    with browser.scratch(BROWSER) as folder:
        (folder / "report.html").write_text(text.replace("<head>", "<head>" + PROBE))
        (folder / "frame.html").write_text(frame)
        out, errors = browser.run(
            BROWSER,
            folder,
            [
                "--allow-file-access-from-files",
                "--virtual-time-budget=20000",
                "--dump-dom",
                (folder / "frame.html").as_uri(),
            ],
        )
    found = re.search(r"<p>(\{.*\})</p>", out)
    assert found, out[-500:] + errors[-500:]
    seen = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert seen["window"] == width
    assert seen["images"] == len(list((REFERENCE / "figures").glob("*.svg")))
    assert seen["shown"] == seen["images"]
    assert seen["width"] <= width
    assert seen["problems"] == []
    assert seen["outside"] == []
