"""What is wrong with settings, in one line: where, what, and what would be right."""

import reprlib
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cnnlib import patterns


def short(value: object) -> str:
    """repr for an error's one line: a YAML file of a kilobyte can hold a list of billions."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # more digits than Python writes
        return f"so long a {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def first_problem(error: ValidationError, where: str, model: type[BaseModel] | None = None) -> str:
    """One line for the first thing that pydantic found wrong in the settings at `where`.

    With `model` an unknown key is answered by the names of its fields.
    """
    problem = worst_problem(error)
    loc, key = problem["loc"], ""
    if loc and loc[-1] == "[key]":
        loc, key = loc[:-2], "each name in it "
    if len(loc) > 2 and loc[0] == "datasets":
        loc = (*loc[:2], *loc[3:])  # without the kind, which is no key
    # pydantic puts tags of unions and "function-..." steps into the path: only keys help a reader
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)
    if problem["type"] == "extra_forbidden":
        fields = f"; known: {', '.join(model.model_fields)}" if model else ""
        unknown = short(loc[-1])
        return f"unknown key {unknown} in {where}{path.rpartition('.')[0]}{fields}"
    if problem["type"] == "union_tag_invalid":
        tags = problem["ctx"]
        tag, choices = (tags[k].replace("'", "") for k in ("discriminator", "expected_tags"))
        return f"unknown {tag} {short(tags['tag'])} in {where}{path}; known: {choices}"
    return f"{where}{path}: {key}{_in_words(problem)}"


def _in_words(problem: ErrorDetails) -> str:
    """What should be there and what is, without terms of pydantic's or regular expressions."""
    message, given = problem["msg"], short(problem["input"])
    match problem["type"]:
        case "value_error" if isinstance(problem["input"], Mapping):
            return str(problem["ctx"]["error"])
        case "value_error":
            return f"{problem['ctx']['error']}, not {given}"
        case "missing":
            return f"{message[0].lower()}{message[1:]}"
        case "string_pattern_mismatch":
            words = patterns.WORDS.get(problem["ctx"]["pattern"])
            allowed = f"must be made of {words}" if words else "has characters that are not allowed"
            return f"{allowed}, not {given}"
        case "string_too_long":
            return f"must have at most {problem['ctx']['max_length']} characters, not {given}"
        case "string_type" if not isinstance(problem["input"], Sequence | Mapping):
            return f"must be text, but YAML reads it as {given}; put it in quotes"
        case "string_type":
            return f"must be text, not {given}"
        case "model_type" | "dict_type":
            return f"must be a mapping of settings, not {given}"
    return f"{message[0].lower()}{message[1:]}, not {given}"


def worst_problem(error: ValidationError) -> ErrorDetails:
    """The problem to report: a mistyped key is also a missing one, and says more."""
    return min(
        error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden"
    )
