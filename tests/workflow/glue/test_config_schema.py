"""The schema of config.yaml that editors read."""

import pytest

from workflow.glue import config_schema

pytestmark = pytest.mark.quick


def test_the_schema_is_that_of_the_config() -> None:
    assert config_schema.FILE.read_text(encoding="utf-8") == config_schema.schema(), (
        "workflow/schemas/config.schema.json is out of date: python -m workflow.glue.config_schema"
    )
