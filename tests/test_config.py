"""The config: what is good is completed, what is bad is one line that names it."""

import copy
import json
import re
import string
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnlib import patterns
from cnnlib.config import Config, load_config, parse_config
from cnnlib.config_files import check_keys, merge
from cnnlib.errors import ConfigError
from cnnlib.network import Network
from cnnlib.paths import ROOT
from tests.support.networks import ANY_FUNCTION

pytestmark = pytest.mark.quick


GOOD: dict[str, Any] = {
    "datasets": {
        "toy": {
            "kind": "synthetic",
            "shape": [1, 8, 8],
            "classes": 3,
            "train_images": 40,
            "test_images": 10,
        }
    },
    "networks": {
        "small": [
            {"conv": {"maps": 2, "kernel": 3}},
            {"activation": "relu"},
            {"subsample": 2},
            {"dense": 3},
        ]
    },
    "training": {"learning_rate": 0.1, "epochs": 2},
    "sweep": {
        "datasets": ["toy"],
        "networks": ["small"],
        "stages": ["gemm"],
        "batch_sizes": [4],
        "repeats": 1,
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one setting changed; `path` is keys and indices joined by points."""
    config = copy.deepcopy(GOOD)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = config
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[last] = value
    return config


def without(path: str) -> dict[str, Any]:
    """GOOD with one setting taken away."""
    config = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place: Any = config
    for key in parents:
        place = place[key]
    del place[last]
    return config


def test_defaults_are_filled_in() -> None:
    config = parse_config(GOOD)
    assert config.results == "results"
    assert config.training.momentum == 0
    assert config.training.seed == 1
    assert config.sweep.device == "auto"
    assert config.figures is None
    assert not config.measuring.full


def test_networks_are_built_for_a_data_set() -> None:
    network = parse_config(GOOD).network("small", "toy", "here")
    assert isinstance(network, Network)
    assert network.input_shape == (1, 8, 8)
    assert network.shapes[-1] == (3,)


def test_what_is_parsed_says_all_there_is() -> None:
    """Dumped and parsed again, it is the same: results/config.yaml holds the whole experiment."""
    config = parse_config(GOOD)
    assert parse_config(config.model_dump(mode="json")) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_the_shipped_config_is_good() -> None:
    config = load_config([ROOT / "config.yaml"])
    for name in config.networks:
        config.network(name, "mnist", "networks")


def test_differences_alone_are_answered_by_how_to_give_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.yaml").write_text("sweep: {networks: [simard]}")
    with pytest.raises(ConfigError, match=r"field required; a file .* --config few\.yaml$"):
        load_config(["few.yaml"])
    assert load_config([ROOT / "config.yaml", "few.yaml"]).sweep.networks == ["simard"]


def race(**changes: Any) -> dict[str, Any]:
    """GOOD with a race, some of whose settings are others."""
    settings = {
        "dataset": "toy",
        "network": "small",
        "stages": ["gemm"],
        "batch_size": 4,
        "training": {"learning_rate": 0.1, "epochs": 1},
    }
    return changed("race", settings | changes)


def digits(**changes: Any) -> dict[str, Any]:
    """MNIST, as the shipped config has it, with other settings."""
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text())["datasets"]["mnist"]
    return dict(shipped | changes)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        # unknown keys, everywhere
        (changed("sweeep", {}), r"unknown key 'sweeep' in config; known: results, datasets"),
        (changed("sweep.batchsizes", [1]), r"unknown key 'batchsizes' in config\.sweep; known: "),
        (changed("sweep.a\nb", [1]), r"unknown key 'a\\nb' in config\.sweep"),
        (changed("training.lr", 0.1), r"unknown key 'lr' in config\.training; known: lear"),
        (changed("measuring.warmup", 1), r"unknown key 'warmup' in config\.measuring"),
        (changed("networks.small.0.conv.size", 1), r"networks\.small\[0\]\.conv.*kernel"),
        (changed("datasets.toy.colour", 1), r"unknown key 'colour'.*datasets.*toy"),
        # missing ones
        (without("training"), r"training: field required"),
        (without("training.epochs"), r"training\.epochs: field required"),
        (without("networks"), r"networks: field required"),
        # names that are not there
        (changed("sweep.datasets", ["toi"]), r"unknown data set 'toi' in sweep.datasets; kno"),
        (changed("sweep.networks", ["lenet"]), r"unknown network 'lenet' in sweep.networks; kno"),
        (changed("networks.small.0", {"convolution": 1}), r"unknown layer kind 'convolution' in"),
        (changed("networks.small.1", {"activation": "elu"}), rf"{ANY_FUNCTION}.*'elu'"),
        (changed("sweep.device", "tpu"), r"sweep\.device: .*'cuda'.*not 'tpu'"),
        # wrong types and numbers
        (changed("training", []), r"config\.training"),
        (changed("training.learning_rate", "fast"), r"training\.learning_rate: .*not 'fast'"),
        (changed("training.learning_rate", 0), r"training\.learning_rate: .*greater than 0"),
        (changed("training.learning_rate", float("nan")), r"training\.learning_rate: "),
        (changed("training.learning_rate", float("inf")), r"training\.learning_rate: .*finite"),
        (changed("training.momentum", 1), r"training\.momentum: .*less than 1"),
        (changed("training.schedule", "cosine"), r"training\.schedule: .*'one_cycle'"),
        (changed("training.warmup", 1.5), r"training\.warmup: .*less than or equal to 1"),
        (changed("training.epochs", 1.5), r"training\.epochs: .*integer"),
        (changed("training.epochs", True), r"training\.epochs: .*integer"),
        (changed("training.epochs", "3"), r"training\.epochs: .*integer.*'3'"),
        (changed("training.seed", -1), r"training\.seed"),
        (changed("training.seed", 2**64), r"training\.seed"),
        (changed("training.epochs", 16**9000), r"training\.epochs: .*so long a int"),
        (changed("training.learning_rate", 16**9000), r"training\.learning_rate"),
        (changed("sweep.batch_sizes", [0]), r"sweep\.batch_sizes\[0\]: .*greater than 0, not 0"),
        (changed("sweep.batch_sizes", [4, -4]), r"sweep\.batch_sizes\[1\]: .* than 0, not -4"),
        (changed("sweep.batch_sizes", 4), r"sweep\.batch_sizes: .*list"),
        (changed("sweep.batch_sizes", []), r"sweep\.batch_sizes: .*at least 1"),
        (changed("sweep.batch_sizes", [2**40]), r"sweep\.batch_sizes\[0\]"),
        (changed("sweep.repeats", 0), r"sweep\.repeats"),
        (changed("sweep.stages", ["-stage"]), r"sweep\.stages\[0\]: "),
        (changed("networks.a/b", GOOD["networks"]["small"]), r"networks"),
        # names, and what YAML makes of them without quotes
        (
            changed("networks.a b", GOOD["networks"]["small"]),
            r"config\.networks: each name in it must be made of letters, digits, .*, not 'a b'",
        ),
        (
            changed("networks." + "a" * 101, GOOD["networks"]["small"]),
            r"config\.networks: each name in it must have at most 100 characters",
        ),
        (
            GOOD | {"networks": {7: GOOD["networks"]["small"]}},
            r"config\.networks: each name in it must be text, but YAML reads it as 7; "
            "put it in quotes",
        ),
        (
            GOOD | {"datasets": {None: GOOD["datasets"]["toy"]}},
            r"config\.datasets: each name in it must be text, but YAML reads it as None",
        ),
        (changed("sweep.networks", [7]), r"sweep\.networks\[0\]: must be text, but YAML reads it"),
        (changed("sweep.networks", ["a b"]), r"sweep\.networks\[0\]: must be made of letters, .*"),
        (changed("results", "my results"), r"config\.results: must be made of letters, .*'my res"),
        (changed("results", ["a"]), r"config\.results: must be text, not \['a'\]"),
        (changed("measuring.warmup_seconds", float("inf")), r"warmup_seconds: .*finite"),
        (changed("measuring.full", "yes"), r"measuring\.full"),
        (changed("datasets.toy", None), r"datasets\.toy"),
        (changed("datasets.toy.kind", "tfds"), r"unknown kind 'tfds' in .*; known: idx"),
        # twice
        (changed("sweep.batch_sizes", [4, 8, 4]), r"4 is listed twice in sweep.batch_sizes"),
        (changed("sweep.stages", ["gemm", "gemm"]), r"'gemm' is listed twice in sweep.stages"),
        (changed("figures", ["race", "race"]), r"'race' is listed twice in figures"),
        (race(stages=["gemm", "naive", "gemm"]), r"'gemm' is listed twice in race.stages"),
        # settings that contradict each other
        (
            changed("datasets.toy.hard_images", [3, 10]),
            r"^datasets\.toy\.hard_images: there is no "
            r"test image 10, since the data set has 10, by datasets\.toy\.test_images$",
        ),
        (
            changed("datasets.digits", digits(test_limit=500, hard_images=[115, 582])),
            r"datasets\.digits\.hard_images: .* image 582, .* 500, by datasets\.digits\.test_limit",
        ),
        (
            changed("measuring.limit_seconds", 30),
            r"^measuring\.budget_seconds, 60 s, is not below "
            r"measuring\.limit_seconds, 30 s",
        ),
        (changed("measuring.warmup_seconds", 1800), r"measuring\.warmup_seconds, 1800 s, is not "),
        (changed("measuring.sample_seconds", 2e3), r"measuring\.sample_seconds, 2000 s, is not "),
        (changed("measuring.energy_seconds", 2e3), r"measuring\.energy_seconds, 2000 s, is not "),
        (
            changed("measuring.resident_images", 3),
            r"batch size 4 in sweep\.batch_sizes is larger "
            r"than measuring\.resident_images, 3",
        ),
        (race(batch_size=41), r"race\.batch_size 41 is larger .* by datasets\.toy\.train_images"),
        (race(dataset="toi"), r"unknown data set 'toi' in race"),
        (race(network="lenet"), r"unknown network 'lenet' in race\.network"),
        # impossible experiments
        (changed("sweep.batch_sizes", [41]), r"batch size 41 .* set 'toy' \(40 training images"),
        (changed("networks.small.0.conv.kernel", 9), r"conv1 .*9x9 kernel is larger than the 8x8"),
        (changed("networks.small.2.subsample", 7), r"subsample1 .*7x7 is larger than the 6x6 map"),
        (
            changed("networks.small.3.dense", 4),
            r"ends in shape \(4,\), but the data set has 3 "
            r"classes: networks\.small and datasets\.toy, together in sweep\.networks",
        ),
        (changed("networks.small.2", {"dense": 5, "conv": 3}), r"small\[2\] must be one"),
        (changed("networks.small", []), r"networks\.small must be a list of layers"),
        (changed("networks.small", "dense"), r"networks\.small"),
        (changed("networks.unused", [{"dense": 0}]), r"networks\.unused\[0\]\.dense"),
        ([], r"config must be a mapping"),
        (None, r"config must be a mapping"),
    ],
)
def test_bad_settings_are_named(config: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as raised:
        parse_config(config)
    assert "\n" not in str(raised.value)
    assert "^[" not in str(raised.value), "a regular expression"


def test_every_pattern_has_its_words() -> None:
    """Else a message would say no more than that something is not allowed."""
    schema = json.dumps(Config.model_json_schema())
    found = set(re.findall(r'"pattern": "((?:[^"\\]|\\.)*)"', schema))
    assert {json.loads(f'"{pattern}"') for pattern in found} == set(patterns.WORDS)


@pytest.mark.parametrize("name", ["007", "1e5", "nan", "None", "true", "1_000", "null", "inf"])
def test_names_that_look_like_something_else(tmp_path: Path, name: str) -> None:
    settings = copy.deepcopy(GOOD)
    settings["networks"][name] = settings["networks"].pop("small")
    settings["sweep"]["networks"] = [name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    config = load_config([tmp_path / "config.yaml"])
    assert config.sweep.networks == list(config.networks) == [name]


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.5E2", 150.0), ("1e-3 ", None)])
def test_numbers_that_yaml_takes_for_texts(text: str, value: float | None) -> None:
    config = changed("training.learning_rate", text)
    if value is None:
        with pytest.raises(ConfigError, match="learning_rate"):
            parse_config(config)
    else:
        assert parse_config(config).training.learning_rate == value


# files ------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


Write = Callable[[str | bytes], Path]


def test_later_files_change_single_settings(write: Write) -> None:
    base = write(yaml.safe_dump(GOOD))
    overlay = write("training: {epochs: 7}\nsweep: {batch_sizes: [1, 2]}\nresults: elsewhere\n")
    config = load_config([base, overlay])
    assert config.training.epochs == 7
    assert config.training.learning_rate == 0.1
    assert config.sweep.batch_sizes == [1, 2]
    assert config.results == "elsewhere"


def test_old_names_of_the_emulated_device_are_accepted(write: Write) -> None:
    """Laid over a config with the new names, they are what the user has asked for."""
    base = write(yaml.safe_dump(GOOD | {"measuring": {"emulated_seconds": 5.0}}))
    config = load_config([base, write("sweep: {device: host}\nmeasuring: {host_seconds: 2.0}\n")])
    assert config.sweep.device == "emulated"
    assert config.measuring.emulated_seconds == 2.0
    assert "host" not in yaml.safe_dump(config.model_dump(mode="json"))


def test_aliases_do_not_change_together(write: Write) -> None:
    base = copy.deepcopy(GOOD)
    base["datasets"]["copy"] = base["datasets"]["toy"]
    text = yaml.safe_dump(base)
    assert "&id001" in text
    config = load_config([write(text), write("datasets: {copy: {train_images: 30}}")])
    assert config.datasets["copy"].train_count == 30
    assert config.datasets["toy"].train_count == 40


@given(
    st.recursive(
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("abc"), st.integers())),
)
def test_merge_leaves_both_alone(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    before = copy.deepcopy((settings, changes))
    merged = merge(settings, changes)
    assert (settings, changes) == before
    assert merge(merged, changes) == merged
    assert merge(settings, {}) == settings
    assert set(merged) == set(settings) | set(changes)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"must hold a mapping"),
        (b"- a\n- b\n", r"must hold a mapping"),
        (b"just text", r"must hold a mapping"),
        (b"a: [1, 2", r"is not YAML"),
        (b"a: b: c", r"is not YAML"),
        (b"\tsweep: 1", r"is not YAML"),
        (b"a: 1\n\x00", r"is not YAML"),
        (b"\xff\xfe\x00\x01", r"is not YAML"),
        (b"name: M\xfcller", r"is not YAML"),
        (b"a: !!python/object/apply:os.mkdir [MADE]", r"is not YAML"),
        (b"a: !!python/name:os.system", r"is not YAML"),
        (b"!!python/object/new:os.mkdir [MADE]", r"is not YAML"),
        (b"[" * 500, r"is not YAML"),
        (b"{a: " * 500 + b"1" + b"}" * 500, r"is not YAML"),
        (b"a: &a [*a]", r"unknown key 'a'"),
        (b"sweep: &a {b: *a}", r"unknown key 'b' in .*sweep"),
        (b"? [1, 2]\n: 3", r"is not YAML|unknown key|keys"),
        (b"1: 2", r"keys should be strings|unknown key|field required"),
        (b"training: {epochs: 1" + b"0" * 9000 + b"}", r"is not YAML"),
        (b"seed: 2020-13-45", r"is not YAML"),
    ],
)
def test_files_that_are_no_config(
    write: Write, tmp_path: Path, content: bytes, problem: str
) -> None:
    made = tmp_path / "made"
    path = write(content.replace(b"MADE", str(made).encode()))
    with pytest.raises(ConfigError, match=problem) as raised:
        load_config([path])
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert not made.exists()


@pytest.mark.timeout(20)
def test_a_billion_laughs(write: Write) -> None:
    """Aliases of aliases: a few lines that expand to more than any memory holds."""
    text = "l0: &l0 [ha, ha]\n" + "".join(
        f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    for place in ("results: *l29", "networks: {big: *l29}", "training: {epochs: *l29}"):
        content = yaml.safe_dump(GOOD) + text + place + "\n"
        with pytest.raises(ConfigError) as raised:
            load_config([write(content)])
        assert len(str(raised.value)) < 2000
    laughs = yaml.safe_load(text)["l29"]
    for path in ("networks.small", "training.epochs", "sweep.batch_sizes", "results"):
        with pytest.raises(ConfigError) as raised:
            parse_config(changed(path, laughs))
        assert len(str(raised.value)) < 2000


@pytest.mark.timeout(20)
def test_recursive_files_laid_over_each_other(write: Write) -> None:
    path = write("datasets: &a {b: *a}")
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config([path, path])


def test_a_network_that_holds_itself() -> None:
    layers: list[Any] = []
    layers.append(layers)
    with pytest.raises(ConfigError, match=r"networks\.small\[0\] must be one"):
        parse_config(changed("networks.small", layers))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml: No such file"):
        load_config([tmp_path / "nothing.yaml"])
    with pytest.raises(ConfigError, match="cannot read .*Is a directory"):
        load_config([tmp_path])
    with pytest.raises(ConfigError, match="no config file"):
        load_config([])


def test_a_byte_order_mark_is_no_harm(write: Write) -> None:
    load_config([write(b"\xef\xbb\xbf" + yaml.safe_dump(GOOD).encode())])


# anything at all --------------------------------------------------------------------------------

KEYS = st.one_of(
    st.sampled_from(
        [*Config.model_fields, "toy", "small", "conv", "dense", "kernel", "epochs", "kind", "shape"]
    ),
    st.text(string.printable, max_size=5),
)
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["toy", "small", "gemm", "relu", "idx", "synthetic", 1, 0, -1, 3]),
)
ANYTHING = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(KEYS, st.integers(), st.none()), inner, max_size=4),
    ),
    max_leaves=12,
)


def is_config_or_one_line(value: Any) -> None:
    try:
        found: object = parse_config(value)
    except ConfigError as error:
        found = str(error)
    assert isinstance(found, Config) or (found and "\n" not in found)


@settings(max_examples=80, deadline=None)
@given(ANYTHING)
def test_anything_is_a_config_or_an_error(value: Any) -> None:
    is_config_or_one_line(value)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dicts and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inner if isinstance(value, dict | list) else ():
        found.append((*path, key))
        if isinstance(part, dict | list):
            found += paths(part, (*path, key))
    return found


@settings(max_examples=200, deadline=None)
@given(where=st.sampled_from(paths(GOOD)), value=ANYTHING)
def test_anything_in_a_good_config_is_good_or_an_error(where: tuple[Any, ...], value: Any) -> None:
    config = copy.deepcopy(GOOD)
    place: Any = config
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    is_config_or_one_line(config)


def test_indentation_in_the_readme_style(write: Write) -> None:
    """A config as a user writes it, comments and all."""
    overlay = """
        # only what differs
        sweep:
          batch_sizes: [1, 2, 4]   # small
          repeats: 5
    """
    config = load_config([write(yaml.safe_dump(GOOD)), write(textwrap.dedent(overlay))])
    assert config.sweep.repeats == 5


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("sweep: {repeats: 1}\nsweep: {repeats: 2}\n", "line 2: the key 'sweep'"),
        ("training:\n  epochs: 1\n  seed: 1\n  epochs: 2\n", "line 4: the key 'epochs'"),
        ("networks: {a: [{dense: 1}, {dense: 1, dense: 2}]}", "line 1: the key 'dense'"),
    ],
)
def test_a_key_that_is_given_twice(write: Write, text: str, where: str) -> None:
    """YAML itself takes the second without a word."""
    path = write(text)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{path}, {where} is given twice')}$"):
        load_config([path])
    with pytest.raises(ConfigError, match=re.escape(where)):
        check_keys([path])


def test_merged_keys_are_not_twice(write: Write) -> None:
    """What `<<` brings may be said otherwise beside it, also in a mapping that is used again."""
    good = yaml.safe_dump({key: GOOD[key] for key in ("datasets", "networks", "sweep")})
    path = write(
        good + "training: &t {<<: &s {learning_rate: 1.0, epochs: 3}, learning_rate: 0.5}\n"
        "race: {<<: {dataset: toy, network: small, stages: [gemm], batch_size: 4},\n"
        "  training: {<<: *t, epochs: 1}}\n"
    )
    config = load_config([path])
    assert (config.training.learning_rate, config.training.epochs) == (0.5, 3)
    assert config.race is not None
    assert (config.race.training.learning_rate, config.race.training.epochs) == (0.5, 1)
    check_keys([path])


def test_what_is_at_most_is_no_contradiction() -> None:
    """More images than there are: those that there are."""
    parse_config(changed("measuring.learning_images", 10_000))
    parse_config(changed("measuring.resident_images", 10_000))
    full = changed("measuring.limit_seconds", 1)
    full["measuring"]["full"] = True
    assert parse_config(full).measuring.full, "no limit applies where everything is run in full"


def test_a_network_is_trained_on_images_of_its_shape() -> None:
    """Where it says which, a sweep leaves out data sets of another shape."""
    settings = copy.deepcopy(GOOD)
    layers = settings["networks"]["small"]
    settings["datasets"]["colour"] = settings["datasets"]["toy"] | {"shape": [3, 8, 8]}
    settings["networks"]["coloured"] = {"layers": layers, "input_shape": [3, 8, 8]}
    settings["sweep"] |= {"datasets": ["toy", "colour"], "networks": ["small", "coloured"]}
    pairs = parse_config(settings).pairs()
    assert pairs == [("toy", "small"), ("colour", "small"), ("colour", "coloured")]
    settings["networks"]["coloured"]["input_shape"] = [3, 9, 9]
    with pytest.raises(ConfigError, match=r"coloured is made for images of shape \[3, 9, 9\], whi"):
        parse_config(settings)
