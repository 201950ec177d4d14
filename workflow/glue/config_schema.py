"""The JSON schema of config.yaml, for editors.

python -m workflow.glue.config_schema [FILE] writes it.
"""

import json
import sys
from pathlib import Path

from cnnlib.config import Config
from cnnlib.files import write_whole

FILE = Path(__file__).resolve().parents[1] / "schemas" / "config.schema.json"


def schema() -> str:
    """The schema of config.yaml as JSON text."""
    return json.dumps(Config.model_json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    with write_whole(sys.argv[1] if len(sys.argv) > 1 else FILE) as temporary:
        temporary.write_text(schema(), encoding="utf-8")
