"""The command that measures the machine's own limits."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import CONFIG, ConfigFiles


def probe(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Measure the machine's own limits: latencies, bandwidths, peak arithmetic of GPU and CPU."""
    from cnnlib import records
    from cnnlib.config import load_config
    from cnnlib.probes import measure_limits

    rows = measure_limits(load_config(config))
    records.write(out, "probes", rows)
    devices = ", ".join(dict.fromkeys(str(row["device"]) for row in rows))
    typer.echo(f"{out}: {len(rows)} rows on {devices}")
