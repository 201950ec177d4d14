"""YAML files of settings: read without running anything, and laid over each other."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cnnlib.config_errors import short
from cnnlib.errors import ConfigError


def read_settings(paths: Iterable[Path | str]) -> dict[str, Any]:
    """The settings of YAML files, later ones over earlier ones key by key.

    Snakemake's --configfile does the same. Raises ConfigError for a file that cannot be read or
    holds no mapping.
    """
    settings: dict[str, Any] = {}
    for path in paths:
        try:
            part = yaml.load(Path(path).read_text(encoding="utf-8"), _OnceLoader)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except _KeyTwice as error:
            raise ConfigError(f"{path}, {error}") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(part, dict):
            raise ConfigError(f"{path} must hold a mapping of settings")
        try:
            settings = merge(settings, part)
        except RecursionError:
            raise ConfigError(f"{path} is nested too deeply") from None
    return settings


def check_keys(paths: Iterable[Path | str]) -> None:
    """ConfigError for a key that is given twice in one of these files, which others read too."""
    for path in paths:
        try:
            yaml.load(Path(path).read_text(encoding="utf-8"), _OnceLoader)
        except _KeyTwice as error:
            raise ConfigError(f"{path}, {error}") from None
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue  # whoever reads it will complain


def merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` in them, mappings merged and anything else replaced.

    The result is a new dict: parts of `settings` may be one object by a YAML alias, and must not
    change together.
    """
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class _KeyTwice(Exception):
    """A key is given twice in one mapping, and YAML would silently take the second."""


class _OnceLoader(yaml.SafeLoader):
    """YAML without tags that run code, in which each key of a mapping is given once."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.flat: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Fill in merge keys (<<), which the keys beside them may well override."""
        # A mapping with an alias comes here again, filled in already.
        if id(node) not in self.flat:
            self.flat.add(id(node))
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise _KeyTwice(f"line {line}: the key {short(key.value)} is given twice")
                seen.add(key.value)
