"""The directives `{exercises}` and `{exercise-words}`: the parts and verdicts of the course."""

from collections.abc import Iterator

from cnnlib.exercises.catalogue import NAMES, TEXTS, find_exercise
from cnnlib.exercises.diagnosis import WORDS
from cnnlib.exercises.writing import as_markdown


def page() -> Iterator[str]:
    """The lines of the page on the exercises."""
    for name in NAMES:
        exercise = find_exercise(name)
        yield from (f"## {name}: {exercise.title}", "", exercise.text, "")
        yield f"    cnnlib exercise start {name}"
        yield from ("", "| part | points | hints | where |", "|---|---|---|---|")
        for part in exercise.parts:
            where = f"`{part.function}` in `{part.file}`"
            yield f"| {part.name} | {part.points:g} | {len(part.hints)} | {where} |"
        yield ""
        for part in exercise.parts:
            yield from (part.name, f": {as_markdown(part.task)}", "")


def words() -> Iterator[str]:
    """The lines of a table of what is said about a part."""
    yield from ("| word | meaning |", "|---|---|")
    for word, meaning in WORDS.items():
        yield f"| `{word}` | {meaning} |"


def setup(app: object) -> dict[str, bool]:
    """Register the directives."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.application import Sphinx
    from sphinx.util.docutils import SphinxDirective
    from sphinx.util.nodes import nested_parse_with_titles

    class Exercises(SphinxDirective):
        """One of the two lists."""

        def run(self) -> list[nodes.Node]:
            for path in TEXTS.iterdir():
                self.env.note_dependency(str(path))
            lines = list(page() if self.name == "exercises" else words())
            section = nodes.section() if self.name == "exercises" else nodes.container()
            section.document = self.state.document
            nested_parse_with_titles(self.state, StringList(lines, self.name), section)
            return section.children

    assert isinstance(app, Sphinx)
    app.add_directive("exercises", Exercises)
    app.add_directive("exercise-words", Exercises)
    return {"parallel_read_safe": True}
