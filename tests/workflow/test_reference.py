"""Published figures are drawn again from their tables, byte for byte, on any machine."""

import shutil
from pathlib import Path

import pytest

from cnnlib.paths import ROOT
from tests.workflow.conftest import Checkout, digest

pytestmark = pytest.mark.slow

MACHINES = sorted(path.parent for path in (ROOT / "results/reference").glob("*/tables"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in sorted(folder.iterdir())}


def test_something_is_published() -> None:
    assert "nvidia-h100" in [machine.name for machine in MACHINES]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_figures_are_the_same_bytes(fresh: Checkout, tmp_path: Path, machine: Path) -> None:
    checkout = fresh.copy(tmp_path / "checkout")
    results = Path("results/reference", machine.name)
    shutil.copytree(machine / "tables", checkout.folder / results / "tables")
    # Summaries too are made again, not only the pictures of them.
    for made in (checkout.folder / results / "tables").glob("*.md"):
        made.unlink()
        made.with_suffix(".csv").unlink()
    checkout.snakemake("figures", "tables", "--config", f"results={results}", config=None)
    assert digests(checkout.folder / results / "figures") == digests(machine / "figures")
    assert digests(checkout.folder / results / "tables") == digests(machine / "tables")
