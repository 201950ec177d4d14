"""`cnnlib submit`: what is packed, what is taken out, and what is refused."""

import getpass
import json
import socket
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnnlib.comparing.comparison import compare
from cnnlib.config import Config
from cnnlib.measuring import schema
from cnnlib.measuring.rows import RunRows
from cnnlib.measuring.runs import runs
from cnnlib.publishing.privacy import Scrubber
from cnnlib.publishing.published import check, machines
from tests.support.command_line import Home
from tests.support.toys import toy_config, write_config

SUBMIT = ("submit", "--machine", "my-box")
REASON = "cannot load /home/ann/secret/libfoo.so on gpu-node7 for Ann: see http://a.b/c/d"
FACTS = {
    "status": "ok",
    "started": "2026-11-27T19:35:47+00:00",
    "stage_file": "/home/ann/my_stage.py",
    "disturbed": [],
    "built": "nvcc -I/home/ann/include -I/data/x/y -I/usr/local/cuda/include",
    "cuda_visible_devices": "GPU-8d3f0c12-77aa-4b5c-9d11-0123456789ab",
    "cpu": "A CPU",
    "cores": 8,
    "driver": "570.1",
    "commit": "a" * 40,
    "libraries": {"numpy": "2.0"},
}


class Finished:
    """Results as a finished workflow leaves them, which a test may damage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = toy_config(
            sweep={"stages": ["naive", "gemm"], "repeats": 2, "batch_sizes": [8, 16]},
            networks={"small": [{"subsample": {"size": 2, "method": "max"}}, {"dense": 3}]},
        )
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in schema.TABLES}
        for number, run in enumerate(runs(self.config)):
            rows = RunRows(run, run.repeat, "A CPU, 8 threads", validated=True)
            for epoch in (1, 2):
                rows.add_epoch(images=64, epoch_seconds=1.0 + 0.01 * number + 0.001 * epoch)
            if run.stage == "gemm" and run.batch_size == self.config.sweep.batch_sizes[0]:
                rows.discard("unavailable", REASON)
                sampled = RunRows(run, run.repeat, "A CPU, 8 threads")  # until it gave up
                rows.tables["samples"] = [sampled.blank("samples", "ok", "", phase="open")]
            for name, own in rows.tables.items():
                self.tables[name] += own

    def write(self) -> None:
        (self.folder / "tables").mkdir(parents=True)
        for name, rows in self.tables.items():
            if name != "race":  # the config has none
                schema.write(self.folder / f"tables/{name}.csv", name, rows)
        write_config(self.folder / "config.yaml", self.config)
        (self.folder / "provenance").mkdir()
        for run in runs(self.config)[:2]:
            facts = json.dumps({"run": vars(run), **FACTS})
            (self.folder / f"provenance/{run.stage}.json").write_text(facts)


@pytest.fixture
def finished(home: Home) -> Finished:
    return Finished(home.folder / "results")


@pytest.fixture(autouse=True)
def ann(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user and the host, whose names are not to be published."""
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-node7.cluster.example")
    monkeypatch.setenv("HOME", "/home/ann")
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "max")


def test_a_submission_is_whole_and_has_nothing_private(home: Home, finished: Finished) -> None:
    finished.write()
    said = home(*SUBMIT, "--note", "in ann's office, 250 W")
    assert "written: my-box.tar.gz" in said
    assert "unavailable: gemm, batch 8, repeat 2 (small on toy)" in said
    for what in ("path of this machine", "id of a card", "host name", "user name"):
        assert f"removed: {what}, " in said
    home(*SUBMIT, "--note", "in ann's office, 250 W", "--out", "again.tar.gz")
    assert Path("again.tar.gz").read_bytes() == Path("my-box.tar.gz").read_bytes()
    with tarfile.open("my-box.tar.gz") as archive:
        assert {(each.uname, each.uid, each.mtime) for each in archive} == {("", 0, 0)}
        archive.extractall("unpacked", filter="data")
    folder = Path("unpacked/my-box")
    for path in folder.rglob("*.*"):
        text = path.read_text().lower()
        for private in ("ann'", "/ann", "for ann", "gpu-node7", "cluster.example", "8d3f0c12"):
            assert private not in text, path
    check(folder)
    assert len(schema.read_columns(folder / "tables/samples.csv", "samples")["stage"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "provenance", "tables"]
    facts = json.loads((folder / "provenance/naive.json").read_text())
    assert facts["built"] == "nvcc -Iinclude -Iy -I/usr/local/cuda/include"
    assert facts["cuda_visible_devices"] == "CARD"
    assert {"stage_file", "disturbed"} & facts.keys() == set()
    machine = json.loads((folder / "provenance/machine.json").read_text())
    assert (machine["machine"], machine["note"]) == ("my-box", "in USER's office, 250 W")
    assert machine["devices"] == {"cpu": ["A CPU, 8 threads"]}
    assert (machine["driver"], machine["measured"]) == (["570.1"], ["2026-11-27"])
    reasons = schema.read_columns(folder / "tables/epochs.csv", "epochs")["reason"]
    clean = "cannot load libfoo.so on HOST for USER: see http://a.b/c/d"
    assert set(reasons) == {"", clean}
    # a user called max changes no setting
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    expected = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert settings == expected | {"results": "results/reference/my-box"}
    assert "max" in str(expected["networks"])


def test_a_folder_that_is_dropped_in_is_listed_and_the_same(home: Home, finished: Finished) -> None:
    finished.write()
    home(*SUBMIT, "--into", "reference")
    (machine,) = machines(Path("reference"))
    assert (machine.name, machine.dates) == ("my-box", ["2026-11-27"])
    assert machine.best("toy", finished.config.sweep.networks[0], 0) is None
    found = compare(finished.folder, Path("reference/my-box"))
    assert {run.effect.word for run in found.runs} == {"same"}
    assert [each.what for each in found.differences] == ["built"]
    assert "my-box is there already" in home.fails(*SUBMIT, "--into", "reference")
    assert sorted(path.name for path in Path("reference").iterdir()) == ["my-box"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("missing", "not complete: naive, batch 8, repeat 2 (small on toy) is missing; naive,"),
        ("failed", "naive, batch 8, repeat 1 (small on toy) is failed. Measure again"),
        ("disturbed", "is disturbed"),
        ("not validated", "is not validated"),
        ("steps", "steps.csv, row 2: naive, batch 8, is ok but not validated"),
        ("table", "tables lacks pictures.csv, probes.csv: these results are not"),
        ("damaged", "epochs.csv, row 8: 10 cells, not 18: cut off?"),
        ("settings", "config.yaml is not there"),
        ("facts", "has no run.json"),
        ("again", "epochs.csv has other times of naive, batch 8, than results/runs"),
        ("name", "the network 'ann-net' has the user name in its name"),
        ("machine", "--machine 'my/box' must be made of letters"),
        ("folder", "elsewhere is no folder of results"),
        ("both", "--out and --into exclude each other"),
    ],
)
def test_half_and_wrong_results_are_refused_by_name(
    home: Home, finished: Finished, wrong: str, named: str
) -> None:
    epochs, arguments = finished.tables["epochs"], SUBMIT
    if wrong == "missing":
        epochs[:] = [row for row in epochs if (row["stage"], row["repeat"]) != ("naive", 2)]
    elif wrong in ("failed", "disturbed"):
        epochs[0]["status"] = wrong
    elif wrong == "not validated":
        epochs[0]["validated"] = False
    elif wrong == "steps":
        run = runs(finished.config)[0]
        finished.tables["steps"] = [RunRows(run, 1, "A CPU").row(step=1, step_seconds=1.0)]
    elif wrong == "name":
        for row in (*epochs, *finished.tables["samples"]):
            row["network"] = "ann-net"
        network = finished.config.networks
        finished.config.networks["ann-net"] = next(iter(network.values()))
        finished.config.sweep.networks[:] = ["ann-net"]
    finished.write()
    if wrong == "table":
        for name in ("probes", "pictures"):
            (finished.folder / f"tables/{name}.csv").unlink()
    elif wrong == "damaged":
        path = finished.folder / "tables/epochs.csv"
        path.write_text(path.read_text()[:800].rpartition(",")[0])
    elif wrong == "settings":
        (finished.folder / "config.yaml").unlink()
    elif wrong == "again":
        folder = finished.folder / runs(finished.config)[0].folder
        for name in schema.RUN_TABLES:
            schema.write(folder / f"{name}.csv", name, [])
        (folder / "run.json").write_text(json.dumps(FACTS))
    elif wrong == "facts":
        for path in (finished.folder / "provenance").iterdir():
            path.unlink()
    elif wrong == "machine":
        arguments = ("submit", "--machine", "my/box")
    elif wrong == "folder":
        arguments = (*SUBMIT, "elsewhere")
    elif wrong == "both":
        arguments = (*SUBMIT, "--out", "a", "--into", "b")
    before = home.names()
    assert named in home.fails(*arguments)
    assert home.names() == before


def test_what_is_private_and_what_is_not() -> None:
    scrubber = Scrubber({"ann", "root", "io"}, {"node7"}, {"/home/ann"})
    for text, clean in (
        ("/home/ann", ""),
        ("/home/anna/x.py", "x.py"),
        ("file:///data/ann/x", "file://x"),
        ("planned for ann, by anna", "planned for USER, by anna"),
        ("NODE7: root, io", "HOST: root, io"),
        ("forward/backward 3/4, TFLOP/s, ../x/y, a /usr/lib/x", None),
        ("https://example.org/a/b.gz", None),
        ("MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f", "CARD"),
    ):
        assert scrubber.text(text) == (text if clean is None else clean)
