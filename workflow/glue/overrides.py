"""Settings of Snakemake's `--config`, whose nested values arrive as texts.

From `--config 'training={"epochs": 1}'` Snakemake makes {"training": {"epochs": "1"}}. The meaning
of the text depends on its place: here it is the number 1, in a list of networks the name "1".
"""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from cnnlib.config import Config
from cnnlib.config_files import merge
from cnnlib.errors import ConfigError


def laid_over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with those that `--config` has given, read as what the config has there."""
    folder = given.get("results", "")
    if isinstance(folder, int | float):
        # Whether it was written 7, 007 or 7.0 is not known any more.
        raise ConfigError(f"results: Snakemake reads this name as {folder!r}; put ./ before it")
    return merge(settings, typed(given, Config))


def typed(value: Any, kind: Any) -> Any:
    """`value` with its texts read as YAML, except where `kind`, a type of the config, is text."""
    kinds = list(alternatives(kind))
    if isinstance(value, Mapping):
        return {
            key: typed(inner, Union[*(below(kinds, key) or [Any])]) for key, inner in value.items()
        }
    if isinstance(value, list):
        elements = [get_args(each)[0] for each in kinds if get_origin(each) in (list, tuple)]
        return [typed(inner, Union[*(elements or [Any])]) for inner in value]
    if isinstance(value, str) and str not in kinds:
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            return value
    return value


def alternatives(kind: Any) -> Iterator[Any]:
    """The types that an annotation allows, without its constraints."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from alternatives(arguments[0])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from alternatives(argument)
    elif origin is not Literal:
        yield kind


def below(kinds: list[Any], key: str) -> list[Any]:
    """The types that a value at `key` of a mapping of one of these kinds may have."""
    found = []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [kind.model_fields[key].annotation] if key in kind.model_fields else []
        elif get_origin(kind) is dict:
            found.append(get_args(kind)[1])
    return found
