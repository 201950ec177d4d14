"""Tensors of others are paired with parameters by name, by order or by shape."""

import re

import pytest

from cnnlib.errors import DataError
from cnnlib.named_tensors import match

pytestmark = pytest.mark.quick

WANTED = {
    "conv1.weight": (4, 1, 3, 3),
    "conv1.bias": (4,),
    "conv2.weight": (4, 4, 3, 3),
    "conv2.bias": (4,),
    "dense1.weight": (3, 16),
    "dense1.bias": (3,),
}


def renamed(**names: str) -> dict[str, tuple[int, ...]]:
    """WANTED with other names for layers."""
    parts = {name: name.split(".") for name in WANTED}
    return {f"{names.get(p[0], p[0])}.{p[1]}": WANTED[name] for name, p in parts.items()}


@pytest.mark.parametrize("ordered", [True, False])
def test_by_name(ordered: bool) -> None:
    found = dict(reversed(WANTED.items()))
    assert match(WANTED, found, "here", ordered) == {name: name for name in WANTED}


@pytest.mark.parametrize("ordered", [True, False])
def test_some_by_name_and_the_others_in_order(ordered: bool) -> None:
    pairs = match(WANTED, renamed(dense1="fc"), "here", ordered)
    assert pairs["conv2.bias"] == "conv2.bias"
    assert pairs["dense1.weight"] == "fc.weight"
    assert pairs["dense1.bias"] == "fc.bias"


def test_in_order() -> None:
    found = renamed(conv1="z", conv2="m", dense1="a")
    assert list(match(WANTED, found, "here").values()) == list(found)


def test_by_shape_and_number_where_the_order_means_nothing() -> None:
    names = {"conv1": "features.9", "conv2": "features.10", "dense1": "classifier.0"}
    found = dict(sorted(renamed(**names).items()))
    pairs = match(WANTED, found, "here", ordered=False)
    assert pairs == {name: name.replace(*_first(name, names)) for name in WANTED}


def _first(name: str, names: dict[str, str]) -> tuple[str, str]:
    return next((old, new) for old, new in names.items() if name.startswith(old))


def test_names_that_do_not_say_which_is_first() -> None:
    found = dict(sorted(renamed(conv1="stem", conv2="body", dense1="head").items()))
    said = "here: tensors body.bias and stem.bias have the same shape, (4,), and nothing says which"
    with pytest.raises(DataError, match=re.escape(said)):
        match(WANTED, found, "here", ordered=False)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_shape_that_differs(ordered: bool) -> None:
    found = renamed(conv1="l1", conv2="l2", dense1="l3") | {"l3.weight": (16, 3)}
    said = "tensor l3.weight has shape (16, 3), expected (3, 16) as dense1.weight"
    with pytest.raises(DataError, match=re.escape(said)):
        match(WANTED, found, "here", ordered)


def test_wrong_numbers_of_tensors() -> None:
    with pytest.raises(DataError, match=re.escape("no tensor for dense1.bias of shape (3,); it")):
        match(WANTED, {k: v for k, v in WANTED.items() if k != "dense1.bias"}, "here")
    with pytest.raises(DataError, match=re.escape("tensor n of shape () belongs to no layer")):
        match(WANTED, WANTED | {"n": ()}, "here")
