"""The schema of config.yaml that editors read."""

from pathlib import Path

import pytest

from workflow.glue import config_schema

pytestmark = pytest.mark.quick


def test_the_schema_is_that_of_the_config() -> None:
    assert config_schema.FILE.read_text(encoding="utf-8") == config_schema.schema(), (
        "workflow/schemas/config.schema.json is out of date: python -m workflow.glue.config_schema"
    )


def test_the_schema_is_written_to_a_file(tmp_path: Path) -> None:
    config_schema.main([str(tmp_path / "schema.json")])
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == config_schema.schema()


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--force", 2), ("-f", 2)])
def test_an_option_is_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        config_schema.main([argument])
    assert ended.value.code == code
    assert list(tmp_path.iterdir()) == []
    if code:
        *_, last = capsys.readouterr().err.splitlines()
        assert last.endswith(f"error: unrecognized arguments: {argument}")
