"""The report in a browser, used as a reader uses it: with a mouse, on a phone, without scripts."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot

from cnnlib.errors import DataError
from cnnlib.exchange.formats import load_weights, save_weights
from cnnlib.exercises.catalogue import NAMES
from cnnlib.layers import Array
from cnnlib.network import Network
from cnnlib.paths import ROOT
from cnnlib.peers import PEERS
from cnnlib.validation.tolerances import COARSE
from workflow.plotting import layout, style, wording
from workflow.plotting.ladder import NAMES_OF_PEERS
from workflow.report import (
    PUBLISHED,
    WEIGHTS,
    browser,
    clocks,
    excerpts,
    explain,
    fair_play,
    lessons,
    live,
    page,
    timeline,
)
from workflow.report.explain import Explained
from workflow.report.rungs import Rung

REFERENCE = ROOT / PUBLISHED
BROWSER = next(filter(None, map(shutil.which, browser.BROWSERS)), "")
NOTES_PROBLEMS = """<script>
window.problems = [];
addEventListener("error", event => problems.push(String(event.message || event.type)), true);
const say = console.error;
console.error = (...words) => { problems.push(words.join(" ")); say(...words); };
</script>"""
FRAMES = """<!doctype html><meta charset="utf-8"><pre></pre>
<iframe id="wide" src="report.html" style="width:1280px;height:900px"></iframe>
<iframe id="narrow" src="report.html" style="width:390px;height:800px"></iframe>
<iframe id="plain" src="report.html" sandbox="allow-same-origin" style="width:390px;height:800px">
</iframe><script>{script}</script>"""


@pytest.fixture(scope="module")
def explained() -> Explained:
    tables = explain.read(sorted((REFERENCE / "tables").glob("*.csv")))
    found = explain.explain(tables, REFERENCE, REFERENCE / "provenance/run.json")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def text() -> str:
    return page.render(
        sorted((REFERENCE / "figures").glob("*.svg")),
        sorted((REFERENCE / "tables").glob("*.md")),
        REFERENCE / "provenance/run.json",
        sorted((REFERENCE / "tables").glob("*.csv")),
        REFERENCE,
    )


@pytest.fixture(scope="module")
def seen(text: str) -> dict[str, Any]:
    """What tests/workflow/report/use_page.js saw; the page is opened once for all tests."""
    if not BROWSER:
        pytest.skip("no browser here: install Chromium")
    script = Path(__file__).with_name("use_page.js").read_text(encoding="utf-8")
    with browser.scratch(BROWSER) as folder:
        (folder / "report.html").write_text(text.replace("<head>", "<head>" + NOTES_PROBLEMS))
        (folder / "frames.html").write_text(FRAMES.replace("{script}", script))
        out, errors = browser.run(
            BROWSER,
            folder,
            [
                "--allow-file-access-from-files",
                "--virtual-time-budget=20000",
                "--dump-dom",
                (folder / "frames.html").as_uri(),
            ],
        )
    found = re.search(r"<pre>(\{.*\})</pre>", out)
    assert found, out[-500:] + errors[-500:]
    answer: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert "error" not in answer, answer["error"]
    return answer


def test_nothing_goes_wrong_and_nothing_is_fetched(seen: dict[str, Any]) -> None:
    for name in ("wide", "narrow"):
        assert seen[name]["problems"] == []
        assert seen[name]["outside"] == []
    count = len(list((REFERENCE / "figures").glob("*.svg")))
    assert seen["images"] == {"there": count, "shown": count}


@pytest.mark.parametrize("name", ["wide", "narrow", "plain"])
def test_it_fits_its_window_and_can_be_read(seen: dict[str, Any], name: str) -> None:
    assert seen[name]["scroll"] <= seen[name]["client"]
    assert seen[name]["pale"] == []


def test_on_a_phone_the_ladder_is_cards(seen: dict[str, Any]) -> None:
    assert seen["cards"] == "block"


def test_without_scripts_all_is_there_but_what_needs_one(
    seen: dict[str, Any], explained: Explained
) -> None:
    plain = seen["plain"]
    assert plain["controls"] == 0
    for rung in explained.opened.rungs:
        assert rung.epoch in plain["text"]
        assert rung.title in plain["text"]
    with_exercise = [lesson.stage for lesson in explained.lessons if lesson.exercise]
    assert with_exercise == list(NAMES)
    for stage in with_exercise:
        assert f"cnnlib exercise start {stage}" in plain["text"]
    assert "Drawing a digit needs JavaScript" in plain["text"]


def cells(rung: Rung) -> list[str]:
    return [rung.epoch, rung.gain, rung.library, rung.share]


def test_the_slider_changes_the_ladder(seen: dict[str, Any], explained: Explained) -> None:
    used, untrained = seen["use"], "not trained to the end"
    assert used["now"] == ["1024"] * 3
    for at, size in ((used["opened"], 64), (used["moved"], 1024)):
        rungs = next(each for each in explained.sizes if each.size == size).rungs
        right = {
            rung.title: [
                rung.epoch,
                rung.gain,
                rung.library,
                rung.share,
                rung.accuracy or untrained,
            ]
            for rung in rungs
        }
        assert at == right
    assert used["lanes"] == 4


def test_the_timeline_is_zoomed_and_leads_to_the_code(seen: dict[str, Any]) -> None:
    assert seen["use"]["zoomed"] > 10
    assert "wait_for_grid" in seen["use"]["code"]
    assert "red.release" in seen["use"]["code"]


def test_blocks_are_reached_by_keys(seen: dict[str, Any]) -> None:
    assert seen["use"]["arrow"]
    assert seen["use"]["reached"] == [1, 1, 1, 1]


def test_every_block_leads_to_code_that_is_there(explained: Explained) -> None:
    for at in explained.sizes:
        for lane in at.lanes:
            for block in lane.blocks:
                assert explain.code_of(lane, block) or block.kind == "waiting"
    for entry in excerpts.entries():
        piece = excerpts.excerpt(entry)
        lines = piece.text.splitlines()
        assert 3 < len(lines) <= excerpts.LINES + excerpts.COMMENT
        assert entry.start in lines[0] if entry.start else f"{entry.function}(" in piece.text
        source = (ROOT / entry.file).read_text(encoding="utf-8").splitlines()
        assert source[piece.line - 1].strip() == lines[0].strip()


def test_code_of_tuned_is_that_of_its_operators() -> None:
    """Each operator names its kernels' file in the first line of its module."""
    run = json.loads((REFERENCE / "provenance/tuned.json").read_text(encoding="utf-8"))
    for planned in run["plan"]:
        layers, _, operator = planned.partition(": ")
        files = [
            path.read_text(encoding="utf-8").partition("\n")[0]
            for path in (ROOT / "cnnlib/stages/tuned").glob("*.py")
            if f"class {operator}(" in path.read_text(encoding="utf-8")
        ]
        for direction in ("forward", "backward"):
            entry = excerpts.entry_of("tuned", layers.partition("+")[0], direction)
            assert entry is not None
            assert files
            assert all(entry.file in line for line in files if "kernels/" in line), planned


def test_a_function_that_is_gone_is_named() -> None:
    entry = excerpts.entries()[0]
    with pytest.raises(DataError, match=r"kernels/batch\.cuh has no function gone"):
        excerpts.excerpt(replace(entry, function="gone"))
    with pytest.raises(DataError, match=r"no line with 'not there'"):
        excerpts.excerpt(replace(entry, start="not there"))


def test_clocks_of_blocks_are_drawn_where_there_are_any(explained: Explained) -> None:
    none = {name: table for name, table in explained.shown.tables.items() if name != "timeline"}
    assert not clocks.clocks(replace(explained.shown, tables=none), 64)
    columns = {"device_kind": "cuda", "status": "ok", "batch_size": 64, "stage": "tuned"}
    place = columns | {"dataset": "mnist", "network": "lenet5"}
    rows = [
        place
        | {"step": step, "block": block, "section": name, "part": part}
        | {"begin_seconds": 1e-5 * step + begin, "end_seconds": 1e-5 * step + end}
        for step, late in ((1, 0.0), (2, 5e-6), (3, 1e-6))
        for block, work in ((0, 2e-6), (1, 3e-6))
        for name, part, begin, end in (
            ("conv1 forward", "forward", 0.0, work),
            ("wait for all blocks", "wait", work, 4e-6 + late),
        )
    ]
    tables = {**explained.shown.tables, "timeline": pd.DataFrame(rows)}
    shown = replace(explained.shown, tables=tables)
    (own,) = clocks.clocks(shown, 64)
    assert (own.step, own.blocks, len(own.sections)) == (3, 2, 4)
    assert own.length == pytest.approx(5.0)
    assert [s.start for s in own.sections] == pytest.approx([0.0, 2.0, 0.0, 3.0])
    assert own.sections[1].color == timeline.COLOURS["waiting"]
    assert own.sections[2].hint == "block 1, conv1 forward: 3.00 µs"
    # the lane, the lesson and the shares are of the block that waits least, and of nothing else
    lane = timeline.lanes(shown, 64)[-1]
    assert (lane.recorded, lane.end) == (2, pytest.approx(5.0))
    assert [block.length for block in lane.blocks[:2]] == pytest.approx([3.0, 2.0])
    assert lane.blocks[1].kind == "waiting"
    assert all(map(explain.code_of, [lane, lane], lane.blocks[:2]))
    (share,) = timeline.shares(shown, [lane], 1.0, 64)
    assert dict(part[:2] for part in share.parts)[timeline.PARTS[2]] == pytest.approx(2.0)
    lesson = lessons.lessons(shown)[-1]
    assert lesson.chart is not None
    assert [bar.text for bar in lesson.chart.bars] == ["3.00 µs", "2.00 µs"]


def test_what_is_timed_alone_is_not_said_to_be_part_of_a_step(explained: Explained) -> None:
    """A launch that was timed with the update of tuned is no part of a step, and no evidence."""
    (lesson,) = (each for each in explained.lessons if each.stage == "tuned")
    (lane,) = (each for each in explained.opened.lanes if each.stage == "tuned")
    update = sum(block.length for block in lane.blocks if block.kernel == "update")
    assert lesson.chart is not None
    alone = not lane.recorded and update <= 1.1e6 * explained.shown.limit("launch")
    assert alone == ("update" not in {bar.label for bar in lesson.chart.bars})
    assert alone == ("The update is left out" in lesson.chart.note)
    # what the lesson of gemm_cuda says of its kernels is in its chart
    (lesson,) = (each for each in explained.lessons if each.stage == "gemm_cuda")
    assert lesson.chart is not None
    assert lesson.chart.bars[0].text == lesson.facts["as_short_as_a_launch"]
    assert sum(bar.value for bar in lesson.chart.bars) == int(lesson.facts.launches("gemm_cuda"))


def test_the_parts_of_a_step_are_the_step(explained: Explained) -> None:
    for at in explained.sizes:
        assert len(at.shares) == 4
        for share in at.shares:
            assert sum(value for _, value, _ in share.parts) == pytest.approx(share.step, rel=1e-2)


def test_digits_light_up(seen: dict[str, Any]) -> None:
    began, ended = seen["use"]["race"]
    assert began < ended
    assert ended > 0.8 * 16 * 12
    assert seen["use"]["clock"].endswith(" h")


def test_words_are_explained_and_figures_enlarged(seen: dict[str, Any]) -> None:
    assert "runs on the GPU" in seen["use"]["tip"]
    assert seen["use"]["full"]


def test_a_drawn_digit_is_recognised(seen: dict[str, Any], explained: Explained) -> None:
    assert seen["use"]["drawn"] == [0, 1]
    assert seen["use"]["layers"] == 11
    digits, _ = live.recognition(explained.shown)
    labels = [digit["label"] for digit in digits["digits"]]  # type: ignore[attr-defined]
    assert seen["use"]["samples"][:10] == labels[:10]


def test_the_network_of_the_page_computes_what_cnnlib_does(
    seen: dict[str, Any], explained: Explained
) -> None:
    digits, _ = live.recognition(explained.shown)
    pixels = [bytes.fromhex(digit["pixels"]) for digit in digits["digits"]]  # type: ignore[attr-defined]
    images = np.array([np.frombuffer(each, np.uint8).reshape(1, 28, 28) for each in pixels])
    right = logits(images)
    assert np.abs(np.array(seen["use"]["logits"]) - right).max() < 1e-4 * np.abs(right).max()


def logits(images: Array) -> Array:
    """What the layers of cnnlib make of the images, with the weights rounded as the page's are."""
    weights = load_weights(REFERENCE / WEIGHTS)
    network = weights.network
    rounded = weights.parameters.astype(np.float16).astype(np.float64)
    views = network.views(rounded)
    found = []
    for image in images:
        maps = (image - weights.mean) / weights.deviation
        for layer, given in zip(network.layers, views, strict=True):
            maps = layer.forward(given, maps)
        found.append(maps.reshape(-1))
    return np.array(found)


def test_its_numbers_are_those_of_the_tables(text: str, explained: Explained) -> None:
    """The published ladder, the README and the page say the same wherever they say it."""
    by_size = {each.size: {rung.title: rung for rung in each.rungs} for each in explained.sizes}
    size, compared = 0, 0
    for kind, content in page.blocks(page.text(REFERENCE / "tables/ladder.md")):
        if kind == "text":
            found = re.search(r", batch (\d+)", content)
            size = int(found[1]) if found else 0
            continue
        for row in content[1:]:
            cells = dict(zip(content[0], row, strict=True))
            rung = by_size[size][cells["stage"]]
            assert cells["epoch"] == rung.epoch
            assert cells["test accuracy"] == rung.accuracy
            whole = f"{rung.gain} {rung.gain_range}".strip().replace(" ;", ";")
            assert cells["gain over the stage before"] == whole
            assert cells["share of peak"] == rung.share
            best = "the best library" if rung.best_library else rung.library
            assert cells["against the best library"] == best
            compared += 1
    assert compared > 30
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for rung in by_size[256].values():
        if not rung.peer:
            line = next(
                line for line in readme.splitlines() if line.startswith(f"| {rung.title} |")
            )
            assert line.endswith(f"| {rung.share} |")
            assert f"| {rung.epoch.replace('*', chr(92) + '*')} |" in line
    assert wording.duration(explained.shown.step_seconds("tuned", 64)) in text


def test_without_a_gpu_it_opens_with_published_results(tmp_path: Path) -> None:
    tables = explain.read(sorted((REFERENCE / "tables").glob("*.csv")))
    lines = tables["ladder"]
    lines = lines[~lines["stage"].isin(["ring", *NAMES_OF_PEERS])].copy()
    lines.loc[lines["device_kind"] == "cuda", "device_kind"] = "emulated"
    own = {"ladder": lines}
    found = explain.explain(own, REFERENCE, tmp_path / "run.json")
    assert found is not None
    assert found.published
    shown = {rung.stage: rung.epoch for rung in found.opened.rungs}
    checked = dict.fromkeys(("gemm_cuda", "fused", "tuned"), "checks, no times")
    assert found.opened.yours == checked | {name: shown[name] for name in ("naive", "gemm")}
    assert found.your_notes == [
        "Checked here by emulation, no times: 2 gemm_cuda, 3 fused, 5 tuned.",
        "Not measured on your machine: 4 ring.",
    ]
    assert [peer.version for peer in found.peers][:2] == ["PyTorch 2.11.0"] * 2
    assert found.beside
    other = explain.explain({"ladder": lines.assign(network="tiny")}, REFERENCE, tmp_path / "x")
    assert other is not None
    assert not other.beside
    assert other.your_notes == [
        "Your machine has not trained LeNet-5 on MNIST: its own results are further below."
    ]
    # nothing published, nothing measured: the page has its figures and tables alone
    assert explain.explain({}, REFERENCE, tmp_path / "run.json") is None
    alone = explain.explain(own, None, tmp_path / "run.json")
    assert alone is not None
    assert alone.shown.own_stages == ["naive", "gemm"]
    assert not alone.opened.lanes


def test_printed_it_is_slides(text: str, explained: Explained) -> None:
    if not BROWSER:
        pytest.skip("no browser here: install Chromium")
    without_figures = re.sub(r"<figure.*?</figure>", "", text, flags=re.DOTALL)
    printed = browser.print_page(BROWSER, without_figures)
    pages = re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", printed)
    # the ladder, the lessons, and where the rest of the limit goes
    assert len(pages) == 1 + len(explained.lessons) + 1
    assert {(round(float(wide)), round(float(high))) for wide, high in pages} == {(960, 540)}


def test_weights_that_the_page_cannot_compute_are_named(tmp_path: Path) -> None:
    weights = load_weights(REFERENCE / WEIGHTS)
    layers = [{"conv": {"maps": 2, "kernel": 5, "stride": 2}}, {"dense": 10}]
    network = Network.from_layers((1, 28, 28), 10, layers)
    other = replace(weights, network=network, parameters=network.initial_parameters(1))
    save_weights(tmp_path / "other.npz", other)
    with pytest.raises(DataError, match=r"other\.npz: .* a convolution with strides"):
        live.network(tmp_path / "other.npz")


def test_libraries_in_tf32_are_not_said_to_be_as_exact(explained: Explained) -> None:
    said = {peer.title: peer.exact for peer in explained.peers}
    (rounding,) = {peer.rounding for peer in PEERS if peer.rounding}
    coarse = f"the gradient as a whole within {100 * COARSE * rounding:.1f} %"
    assert coarse in said["PyTorch, compiled, TF32"]
    assert "times the bound of a plain sum" in said["PyTorch, compiled"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((6, False, 3), "6 epochs in 3 repeats"),
        ((1, False, 1), "1 epoch in 1 repeat"),
        ((51, True, 1), "51 parts of an epoch in 1 repeat"),
        ((1, True, 1), "1 part of an epoch in 1 repeat"),
    ],
)
def test_parts_of_epochs_are_not_counted_as_epochs(given: tuple[int, bool, int], said: str) -> None:
    assert fair_play.counted(*given) == said


def test_what_was_not_measured_is_one_line(tmp_path: Path) -> None:
    style.apply()
    drawn = layout.nothing(layout.OWN_PAGE, "Energy & power", "It takes a GPU\n(NVML).")
    drawn.figure.savefig(tmp_path / "energy.svg")
    pyplot.close(drawn.figure)
    shutil.copy(REFERENCE / "figures/memory.svg", tmp_path)
    ladder = REFERENCE / "tables/ladder.md"
    figures = sorted(tmp_path.glob("*.svg"))
    said = page.render(figures, [ladder], REFERENCE / "provenance/run.json")
    assert "<p>Energy &amp; power: It takes a GPU (NVML).</p>" in said
    assert re.findall(r'<figure id="(\w+)"', said) == ["memory"]


def test_provenance_is_of_all_runs(tmp_path: Path) -> None:
    for name, cores in (("run", 4), ("gemm", 16), ("tuned", 16), ("naive", 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"cores": cores, "python": "3.11"}))
    facts = dict(page.facts(tmp_path / "run.json"))
    assert facts["cores"] == "4 (the others); 16 (gemm, tuned)"
    assert facts["python"] == "3.11"


def test_nothing_of_a_table_ends_the_script() -> None:
    assert "</script" not in explain.as_script({"stage": "</script><script>1"})


def test_lessons_speak_of_batches_that_learn(explained: Explained) -> None:
    learn = [at.size for at in explained.sizes if at.learns]
    for lesson in explained.lessons:
        assert {lesson.facts.size, lesson.facts.large} == {64, learn[-1]}
    assert 4096 not in learn


def test_it_stays_small(text: str) -> None:
    assert len(text.encode()) < 6_000_000
