"""Published figures and tables are made again from the raw ones, byte for byte, on any machine."""

import shutil
from pathlib import Path

import pytest

from cnnlib.paths import ROOT
from tests.workflow.conftest import Checkout, digest

pytestmark = pytest.mark.slow

MACHINES = sorted(path.parent for path in (ROOT / "results/reference").glob("*/tables"))


def digests(folder: Path) -> dict[str, str]:
    """Of a submission, which has no figures yet, none."""
    return {path.name: digest(path) for path in sorted(folder.glob("*"))}


def require_all_published(published: Path, made: Path) -> None:
    """Each published file is made again, with the same bytes.

    A figure or table that is newer than the published results has no published file to be compared
    with; it becomes one when the results are next published.
    """
    found = digests(made)
    right = digests(published)
    assert {name: found[name] for name in right if name in found} == right


def test_something_is_published() -> None:
    assert "nvidia-h100" in [machine.name for machine in MACHINES]


@pytest.mark.slow(25)
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
    require_all_published(machine / "figures", checkout.folder / results / "figures")
    require_all_published(machine / "tables", checkout.folder / results / "tables")


@pytest.mark.quick
def test_a_figure_without_a_published_file_is_accepted_but_no_missing_or_other_one(
    tmp_path: Path,
) -> None:
    published, made = tmp_path / "published", tmp_path / "made"
    for folder in (published, made):
        folder.mkdir()
        for name in ("energy.png", "energy.svg"):
            (folder / name).write_text(name)
    (made / "new.png").write_text("drawn by a new module")
    require_all_published(published, made)
    (made / "energy.svg").write_text("drawn differently")
    with pytest.raises(AssertionError, match=r"energy\.svg"):
        require_all_published(published, made)
    (made / "energy.svg").unlink()
    with pytest.raises(AssertionError, match=r"energy\.svg"):
        require_all_published(published, made)
