"""The report and the poster: pages made of figures and tables."""

import tomllib

from cnnlib.paths import ROOT

PAGE_TABLES = (
    "ladder",
    "epochs",
    "kernels",
    "timeline",
    "probes",
    "energy",
    "cpu_profile",
    "predictions",
    "pictures",
)
"""The tables that the report explains beside its figures; it shows less where some are missing."""
PUBLISHED = "results/reference/nvidia-h100"
"""The published results that the report shows where no GPU was measured."""
NETWORKS = "nvidia-h100-networks/tables/libraries.csv"
"""The table of all shipped networks, in the folder in which PUBLISHED lies."""
WEIGHTS = "weights/lenet5.npz"
"""The trained weights of published results, in their folder."""


def page_parts() -> list[str]:
    """The report's templates, styles, scripts and texts, and the files that it quotes; relative to
    the repository.
    """
    folder = ROOT / "workflow/report"
    own = [
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    with (folder / "excerpts.toml").open("rb") as file:
        quoted = {ROOT / each["file"] for each in tomllib.load(file)["excerpt"]}
    tried = ROOT / "docs/tuning/peers.md"
    return sorted(str(path.relative_to(ROOT)) for path in {*own, *quoted, tried} if path.exists())
