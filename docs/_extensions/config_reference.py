"""The directives `{config-reference}`, a table of one section's settings, and `{layer-reference}`.

    ```{config-reference} cnnlib.config.Training
    :prefix: training
    ```

Names, kinds, defaults and explanations come from the pydantic model, so that the page cannot say
anything else than the program does.
"""

import ast
import importlib
import inspect
import textwrap
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cnnlib.layers import KINDS


def load(path: str) -> type[BaseModel]:
    """The model that `package.module.Name` means."""
    module, _, name = path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise TypeError(f"{path} is not a pydantic model")
    return model


def documented(model: type[BaseModel]) -> dict[str, str]:
    """The text below each field in the source of the model and of those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return found


def kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a JSON schema allows, in words: `one of constant, one_cycle`, `number > 0`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        referred = definitions[name]
        return kind(referred, definitions) if "properties" not in referred else "section, see below"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return "one of " + ", ".join(f"`{value}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(kind(each, definitions) for each in schema[key]))
    name = schema.get("type", "anything")
    words = {
        "null": "null",
        "string": "text",
        "integer": "whole number",
        "boolean": "true or false",
    }
    if name == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}"
        inner = schema.get("items") or {}
        if inner.get("type") == "integer":
            return f"list, each a {kind(inner, definitions)}"
        return "list of names" if inner.get("type") == "string" else "list"
    if name == "object":
        return "mapping of names to sections"
    text = words.get(name, name)
    limits = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    bounds = [sign + number(schema[key]) for key, sign in limits.items() if key in schema]
    return " ".join([text, ", ".join(bounds)]).strip()


def number(value: float) -> str:
    """A bound as people write it; the limits of integers as powers."""
    return {2**31: "2^31", 2**32: "2^32"}.get(value, f"{value:g}")


def default(field: FieldInfo) -> str:
    """The value that a setting has if it is not given."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or isinstance(value, bool):
        value = {True: "true", False: "false", None: "null"}[value]
    return f"`{value}`"


def table(model: type[BaseModel], prefix: str) -> list[str]:
    """The lines of a Markdown table with one line for each setting of `model`."""
    schema = model.model_json_schema()
    texts = documented(model)
    lines = ["| setting | kind | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        allowed = kind(schema["properties"][name], schema.get("$defs", {}))
        cells = [
            f"`{prefix}{'.' if prefix else ''}{name}`",
            allowed,
            default(field),
            " ".join(filter(None, [texts.get(name), field.description])),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def section(model: type[BaseModel], prefix: str) -> list[str]:
    """The model's docstring, then its table."""
    text = inspect.cleandoc(model.__doc__ or "")
    return [*text.splitlines(), "", *table(model, prefix), ""]


class ConfigReference(SphinxDirective):
    """Puts the table of the model that its argument names in the page."""

    required_arguments = 1
    option_spec = {"prefix": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """The nodes of the section."""
        return self.parsed(section(load(self.arguments[0]), self.options.get("prefix", "")))

    def parsed(self, lines: list[str]) -> list[nodes.Node]:
        """Markdown lines as nodes; the page is built again when a module of cnnlib changes."""
        for name in ("config", "datasets.base", "datasets.sources", "datasets.specs", "layers"):
            source = importlib.import_module(f"cnnlib.{name}").__file__
            self.env.note_dependency(str(source))
        container = nodes.container()
        self.state.nested_parse(StringList(lines, "cnnlib"), 0, container)
        return container.children


class LayerReference(ConfigReference):
    """Puts a table for each kind of layer in the page."""

    required_arguments = 0

    def run(self) -> list[nodes.Node]:
        """The nodes of all kinds, each under its name."""
        lines: list[str] = []
        for kind, layer in KINDS.items():
            lines += [f"**{kind}**; a bare value sets `{layer.shorthand}`.", ""]
            lines += section(layer, kind)
        return self.parsed(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("config-reference", ConfigReference)
    app.add_directive("layer-reference", LayerReference)
    return {"parallel_read_safe": True}
