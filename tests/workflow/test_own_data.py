"""The whole workflow on a user's own data: settings alone, no line of code."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.support import formats
from tests.workflow.conftest import Checkout

pytestmark = pytest.mark.slow

NETWORK = [
    {"conv": {"maps": 3, "kernel": 3}},
    {"activation": "relu"},
    {"subsample": {"size": 2}},
    {"dense": 3},
]
FIGURES = ["discern", "discern_images", "filters", "learning", "parting", "speedup"]
"""Of the pictures and what was learned from them, and of the times; others are of stages alone."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a web server of the folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def experiment(checkout: Checkout, **datasets: dict[str, Any]) -> str:
    """A config of these data sets, laid over the tiny one; its name."""
    tiny = yaml.safe_load((checkout.folder / "tests/tiny.yaml").read_text())
    settings = {
        "datasets": datasets,
        "networks": {"tiny": NETWORK},
        "training": {"epochs": 1},
        "sweep": {
            "datasets": list(datasets),
            "networks": ["tiny"],
            "stages": ["naive", "gemm", "tuned"],
            "batch_sizes": [8],
            "repeats": 1,
            "device": "emulated",
        },
        "measuring": tiny["measuring"],
        "figures": FIGURES,
    }
    (checkout.folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    return "mine.yaml"


def facts(checkout: Checkout) -> list[dict[str, Any]]:
    files = sorted(checkout.folder.glob("results/runs/**/run.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow(80)
def test_pictures_and_an_archive_from_a_mirror(
    fresh: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    checkout = fresh.copy(tmp_path / "checkout")
    birds = formats.pictures(checkout.folder / "birds") | {
        "path": "birds",
        "shape": [3, 10, 8],  # neither square nor the pictures' own size
        "resize": "stretch",
        "validation": 3,
    }
    batches = formats.cifar(tmp_path / "web", shape=(3, 8, 8))
    with serving(tmp_path / "web") as address:
        batches["mirrors"] = [{"url": f"{address}/{{name}}"}]
        batches["class_names"] = ["bird", "cat", "dog"]
        config = experiment(checkout, birds=birds, batches=batches)
        checkout.snakemake("all", config=config)
    summary = pd.read_csv(checkout.folder / "results/tables/summary.csv")
    assert len(summary) == 6
    assert set(summary["status"]) == {"ok"}
    assert summary["validated"].all()
    runs = facts(checkout)
    assert {
        (run["run"]["dataset"], run["epoch_images"], run["dropped_images"]) for run in runs
    } == {
        ("birds", 8, 7),
        ("batches", 16, 2),
    }
    results = checkout.folder / "results"
    for name in FIGURES:
        assert (results / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = (results / "figures/discern_images.svg").read_text()
    assert any(name in drawn for name in formats.CLASS_NAMES)
    pictures = pd.read_csv(results / "tables/pictures.csv")
    assert set(pictures["class_name"]) == set(formats.CLASS_NAMES)
    assert "Nothing to be done" in checkout.snakemake("all", config=config)
    # Another picture is noticed, and only what depends on it is made again.
    random = np.random.default_rng(9)
    pixels = random.integers(0, 255, (10, 8, 3), np.uint8)
    Image.fromarray(pixels).save(checkout.folder / "birds/train/dog/new.png")
    planned = checkout.planned("all", config=config)
    assert planned["prepare"] == 1
    assert planned["measure"] == 3
    # A broken one is named.
    (checkout.folder / "birds/train/dog/new.png").write_bytes(b"x")
    said = checkout.snakemake("all", config=config, code=None)
    assert "error: birds/train/dog/new.png is not a PNG or JPEG" in said
    assert "Traceback" not in said
