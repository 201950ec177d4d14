"""Settings with anything anywhere: refused in one line, or taken and the same once written."""

import copy
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from cnnlib.config import load_config, parse_config
from cnnlib.measuring.runs import parse_experiment, runs
from tests.fuzz.support import CHANGES, damaged, inputs, refusal
from tests.support.toys import SETTINGS

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["1e-5", "auto", "true", "null", "nan", ".inf", "0x10", "1_0", "gemm", "../x"]),
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-3, 40), st.floats(), st.sampled_from([10**400, -0.0])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, NUMBERS), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in the settings, as the keys and indices that lead there."""
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    found = [path] if path else []
    for key, part in inner:
        found += places(part, (*path, key))
    return found


CHANGE = st.tuples(
    st.sampled_from(["set", "add", "remove"]), st.sampled_from(places(SETTINGS)), TEXTS, VALUES
)


def changed(changes: list[tuple[str, tuple[Any, ...], str, Any]]) -> Any:
    """The toy's settings with values set, keys added and places removed."""
    settings = copy.deepcopy(SETTINGS)
    for what, path, key, value in changes:
        at: Any = settings
        try:
            for step in path[:-1]:
                at = at[step]
            if what == "set":
                at[path[-1]] = value
            elif what == "remove":
                del at[path[-1]]
            elif isinstance(at[path[-1]], dict):
                at[path[-1]][key] = value
            else:
                at[path[-1]].append(value)
        except (LookupError, TypeError, AttributeError):
            continue  # an earlier change has taken the place away
    return settings


@inputs(1500)
@given(st.lists(CHANGE, min_size=1, max_size=3))
def test_settings_with_anything_in_them(changes: list[Any]) -> None:
    settings = changed(changes)
    config, _ = refusal(lambda: parse_experiment(settings))
    if config is not None:
        assert runs(config)
        written = yaml.safe_dump(config.model_dump(mode="json"))
        assert parse_config(yaml.safe_load(written)) == config


@inputs(500)
@given(VALUES)
def test_something_else_than_settings(value: Any) -> None:
    config, _ = refusal(lambda: parse_experiment(value))
    assert config is None


GOOD = yaml.safe_dump(SETTINGS).encode()


@inputs(1000)
@given(CHANGES)
def test_files_that_are_damaged(tmp_path_factory: Any, changes: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(damaged(GOOD, changes))
    refusal(lambda: load_config([path]))
