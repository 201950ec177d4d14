"""A checkout whose experiment asks for a GPU, for schedulers to run."""

from pathlib import Path

import pytest

from cnnlib.paths import ROOT
from tests.workflow.conftest import Checkout, make_checkout

CONFIG = ("tests/tiny.yaml", "tests/cluster/cluster.yaml")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """One in which nothing has been run."""
    made = make_checkout(tmp_path / "checkout")
    overlay = ROOT / CONFIG[1]
    (made.folder / "tests/cluster").mkdir()
    (made.folder / CONFIG[1]).write_bytes(overlay.read_bytes())
    return made
