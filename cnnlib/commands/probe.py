"""The command that measures the machine's own limits."""

from pathlib import Path
from typing import Annotated

import typer

from cnnlib.commands.options import CONFIG, ConfigFiles


def probe(
    out: Annotated[Path, typer.Option(help="The CSV file to write.")],
    config: ConfigFiles = CONFIG,
) -> None:
    """Measure the machine's own limits.

    They are latencies, bandwidths and the peak arithmetic of GPU and CPU.
    """
    from tqdm import tqdm

    from cnnlib.config import load_config
    from cnnlib.files import check_writable
    from cnnlib.measuring import schema
    from cnnlib.probes import measure_limits

    settings = load_config(config)
    check_writable(out)
    with tqdm(unit="probe", leave=False, disable=None) as bar:

        def report(probe: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(probe, refresh=False)
            bar.update(done - bar.n)

        rows = measure_limits(settings, report)
    schema.write(out, "probes", rows)
    devices = ", ".join(dict.fromkeys(str(row["device"]) for row in rows))
    typer.echo(f"{out}: {len(rows)} rows on {devices}")
