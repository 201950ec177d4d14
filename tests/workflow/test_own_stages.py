"""The workflow measures a stage in a file of its own, and only that again when it changes."""

import json

import pytest
import yaml

from tests.support.own_stages import SOUND
from tests.workflow.conftest import Checkout

pytestmark = pytest.mark.slow

RUNS = [f"results/runs/blobs/tiny/{name}/b4/r1/run.json" for name in ("mine", "other")]


def test_a_stage_in_a_file(mine: Checkout) -> None:
    folder = mine.folder / "my stages"
    folder.mkdir()
    (folder / "mine.py").write_text(SOUND + "import my_helper\n")
    (folder / "my_helper.py").write_text("X = 1\n")
    (folder / "other.py").write_text(SOUND.replace("mine", "other"))
    settings = yaml.safe_load((mine.folder / "tests/tiny.yaml").read_text())
    settings["sweep"]["stages"] += ["./my stages/mine.py", "my stages/other.py"]
    (mine.folder / "mine.yaml").write_text(yaml.safe_dump(settings))

    mine.snakemake(*RUNS, config="mine.yaml")
    facts = [json.loads((mine.folder / run).read_text()) for run in RUNS]
    assert [fact["status"] for fact in facts] == ["ok", "ok"]
    assert facts[0]["stage_file"] == str(folder / "mine.py")
    sources = (mine.folder / "results/sources/mine.sha256").read_text()
    assert "  my stages/my_helper.py\n" in sources
    described = json.loads((mine.folder / "results/tables/stages.json").read_text())
    assert [entry["name"] for entry in described] == ["mine", "other"]
    assert mine.planned(*RUNS, config="mine.yaml") == {}

    (folder / "my_helper.py").write_text("X = 2\n")
    again = mine.planned(*RUNS, config="mine.yaml")
    assert {name: again[name] for name in ("sources", "measure")} == {"sources": 1, "measure": 1}
    said = mine.snakemake("--dry-run", *RUNS, config="mine.yaml")
    assert "tiny/mine/b4/r1 was measured with another version of" in said
    assert "tiny/other/b4/r1 was measured" not in said


def test_a_broken_file_ends_the_call_in_one_line(mine: Checkout) -> None:
    (mine.folder / "broken.py").write_text("\nSTAGE = 1 / 0\n")
    settings = yaml.safe_load((mine.folder / "tests/tiny.yaml").read_text())
    settings["sweep"]["stages"].append("./broken.py")
    (mine.folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    said = mine.snakemake("--dry-run", "all", config="mine.yaml", code=2)
    assert (
        "error: stage ./broken.py in sweep.stages cannot be used: ZeroDivisionError: division by "
        "zero (./broken.py, line 2)\n" in said
    )
    assert "Traceback" not in said
