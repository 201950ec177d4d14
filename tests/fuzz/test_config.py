"""Configs that want to get out: of their line, of their folder, into a shell."""

import copy

import pytest

from cnnlib.config import parse_config
from cnnlib.errors import ConfigError
from tests.support.toys import SETTINGS


@pytest.mark.parametrize(
    "results", ["x; touch made", "$(id)", "a b", "-rf", "x\ny", "{stage}", "a|b", "`id`", "'", ""]
)
def test_results_are_no_shell_command(results: str) -> None:
    with pytest.raises(ConfigError, match="results"):
        parse_config(SETTINGS | {"results": results})


@pytest.mark.parametrize("name", ["../../x", "/x", "a;b", "$(id)", ".", "", "a b", "-x", "a\n"])
def test_names_are_no_paths_and_no_commands(name: str) -> None:
    for section, known in (("networks", "small"), ("datasets", "toy")):
        settings = copy.deepcopy(SETTINGS)
        settings[section][name] = settings[section][known]
        with pytest.raises(ConfigError, match=section):
            parse_config(settings)


@pytest.mark.parametrize("key", ["\x1e", "\r.", "a\nb", "\u2028"])
def test_keys_that_end_a_line_do_not_end_it(key: str) -> None:
    for settings in ({key: None}, SETTINGS | {"datasets": {key: None}}):
        with pytest.raises(ConfigError) as raised:
            parse_config(settings)
        assert len(str(raised.value).splitlines()) == 1


def test_a_wrong_kind_of_data_set_is_one_short_line() -> None:
    settings = copy.deepcopy(SETTINGS)
    settings["datasets"]["toy"]["kind"] = "ipx"
    with pytest.raises(ConfigError) as raised:
        parse_config(settings)
    assert str(raised.value) == (
        "unknown kind 'ipx' in config.datasets.toy; known: idx, npz, cifar, folder, synthetic"
    )


@pytest.mark.parametrize("layer", [{"dense": 16**5000}, {"conv": {"maps": 2**31, "kernel": 3}}])
def test_sizes_of_layers_are_counts(layer: dict[str, object]) -> None:
    """Beyond 4300 digits Python does not even write a number into an error."""
    with pytest.raises(ConfigError, match=r"networks\.small\[0\]"):
        parse_config(SETTINGS | {"networks": {"small": [layer, {"dense": 3}]}})


def test_a_sweep_has_an_end() -> None:
    """Two billion runs would be a list of them before anything is said."""
    sweep = SETTINGS["sweep"] | {"repeats": 2**31 - 1}
    with pytest.raises(ConfigError, match="2,147,483,647 runs; at most"):
        parse_config(SETTINGS | {"sweep": sweep})
