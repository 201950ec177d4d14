"""What was done for the libraries: versions, settings, number of runs, and what was tried.

Versions and choices are those that the runs themselves wrote down; what was tried is the table of
docs/tuning/peers.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cnnlib.paths import ROOT
from cnnlib.peers import PEERS
from cnnlib.validation.tolerances import COARSE
from workflow.plotting import wording
from workflow.report.rungs import DASH, rounds
from workflow.report.shown import Shown

TRIED = ROOT / "docs/tuning/peers.md"
CHOICES = {
    "cudnn_benchmark": "cudnn.benchmark, the faster of both ways",
    "layout": "layout of maps, the faster of both",
}
"""What a run may say of a choice that it made by measuring, and how the page calls it."""


@dataclass(frozen=True)
class Peer:
    """A library as it was run."""

    title: str
    how: str
    version: str
    precision: str
    choices: str
    n: str
    exact: str


def peers(shown: Shown, provenance: Mapping[str, Mapping[str, object]]) -> list[Peer]:
    """All libraries that were measured; `provenance` has the run.json of some, by name."""
    found = []
    for stage in PEERS:
        line = shown.line(stage.name, shown.size)
        if line is None:
            continue
        # a library in TF32 is the same program with another setting
        base = next(
            (name for name in (stage.name, stage.name.removesuffix("_tf32")) if name in provenance),
            None,
        )
        run = provenance.get(base, {}) if base else {}
        libraries = run.get("libraries")
        name = "jax" if "jax" in stage.name else "torch"
        version = libraries.get(name) if isinstance(libraries, Mapping) else None
        made = [f"{words}: {chosen(run[key])}" for key, words in CHOICES.items() if key in run]
        found.append(
            Peer(
                wording.title(stage.name),
                stage.change,
                f"{'JAX' if name == 'jax' else 'PyTorch'} {version}" if version else DASH,
                "TF32 products" if rounds(stage.name) else "float32",
                "; ".join(made) or DASH,
                counted(int(line["n"]), bool(line["extrapolated"]), int(line["repeats"])),
                exactness(
                    bool(line["validated"]),
                    stage.slack,
                    stage.conv_weight_slack,
                    stage.rounding,
                ),
            )
        )
    return found


def counted(times: int, scaled: bool, repeats: int) -> str:
    """`6 epochs in 3 repeats`; of what was timed on parts of an epoch, the parts."""
    what = "part of an epoch" if scaled else "epoch"
    what = what if times == 1 else what.replace("part", "parts") if scaled else f"{what}s"
    return f"{times} {what} in {repeats} repeat{'s' if repeats > 1 else ''}"


def chosen(value: object) -> str:
    """`on` or `off` for a switch, and other values as they are."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def exactness(validated: bool, slack: float, of_conv: float | None, rounding: float | None) -> str:
    """Whether the runs were within their bounds, and how wide these are."""
    if not validated:
        return "not validated"
    if rounding:
        most = f"{100 * COARSE * rounding:.2g} %"
        return (
            f"the gradient as a whole within {most} ({COARSE:g} roundings to TF32), or as far as a "
            "reference with such products is off"
        )
    bound = f"within {slack:g} times the bound of a plain sum"
    return (
        f"{bound}; gradients of convolutions' weights within {of_conv:g} times"
        if of_conv
        else bound
    )


def runs(provenance: Path) -> dict[str, dict[str, object]]:
    """The run.json of each stage, as far as there is one beside `provenance`.

    Published results have one file a stage in a folder; a sweep has them in
    DATA SET/NETWORK/STAGE/bN/rN/run.json.
    """
    found = {}
    for stage in PEERS:
        paths = [provenance.parent / f"{stage.name}.json"]
        if len(provenance.parents) > 3:
            paths += sorted(provenance.parents[2].glob(f"{stage.name}/b*/r*/run.json"))
        for path in paths:
            try:
                found[stage.name] = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
            break
    return found
