"""The JSON schema of config.yaml, for editors.

python -m workflow.glue.config_schema [FILE] writes it.
"""

import argparse
import json
from pathlib import Path

from cnnlib.config import Config
from cnnlib.files import write_whole
from workflow.glue.program import exit_on_user_error

FILE = Path(__file__).resolve().parents[1] / "schemas" / "config.schema.json"


def schema() -> str:
    """The schema of config.yaml as JSON text."""
    return json.dumps(Config.model_json_schema(), indent=1, sort_keys=True) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Read the arguments and write the schema."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.glue.config_schema", description=__doc__
    )
    parser.add_argument("file", type=Path, nargs="?", default=FILE, metavar="FILE")
    given = parser.parse_args(arguments)
    with write_whole(given.file) as temporary:
        temporary.write_text(schema(), encoding="utf-8")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
