"""The directives `{served-layers}` and `{served-networks}`: what each stage can train.

Both tables ask the stages, for an H100, when the page is built. What a stage declines is listed
below the table with the reason that the stage gives. Of a stage with plans the one that serves is
named.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cnnlib.config import load_config
from cnnlib.device.architecture import H100
from cnnlib.engine import Setup, Stage
from cnnlib.engine.plans import answers
from cnnlib.errors import Unsupported
from cnnlib.network import Network
from cnnlib.paths import ROOT
from cnnlib.stages import LADDER

BATCH = 64
"""Batch size for which stages are asked."""
CONV: dict[str, Any] = {"conv": {"maps": 4, "kernel": 3}}
LAYERS: dict[str, list[object]] = {
    "conv": [CONV],
    "conv, stride": [{"conv": {"maps": 4, "kernel": 3, "stride": 2}}],
    "conv, padding of the images": [{"conv": {"maps": 4, "kernel": 3, "padding": 1}}],
    "conv, padding of other maps": [CONV, {"conv": {"maps": 4, "kernel": 3, "padding": 1}}],
    "conv, kernel or stride of [rows, columns]": [{"conv": {"maps": 4, "kernel": [3, 5]}}],
    "subsample, max or mean": [CONV, {"subsample": {"size": 2, "method": "mean"}}],
    "subsample, windows that do not divide the map": [CONV, {"subsample": 4}],
    "subsample, windows that overlap": [CONV, {"subsample": {"size": 3, "stride": 2}}],
    "subsample, padding": [CONV, {"subsample": {"size": 2, "padding": 1}}],
    "relu, leaky_relu, tanh, scaled_tanh, sigmoid": [CONV, {"activation": "relu"}],
    "gelu": [CONV, {"activation": "gelu"}],
    "dense": [],
    "dropout": [CONV, {"activation": "relu"}, {"dropout": 0.25}],
}
"""What is asked of the stages -> layers of a network that needs it, but for its last one."""
TRAININGS: dict[str, dict[str, Any]] = {
    "mean squared error": {"loss": "mean_squared_error"},
    "weight decay": {"weight_decay": 0.0005},
}
"""What is asked of the stages -> settings of a training that needs it."""


class Row(NamedTuple):
    """One line of a table: what is asked for, and what each stage says."""

    what: str
    reasons: Mapping[str, str]
    """Why a stage cannot train so; "" if it can."""
    plans: Mapping[str, str]
    """The plan by which a stage can; "yes" where it has no plans."""


def reason(stage: Stage, setup: Setup) -> str:
    """Why the stage cannot train so; "" if it can."""
    try:
        stage.engine.operators_on(stage, setup, H100.limits)
    except Unsupported as declined:
        return str(declined)
    return ""


def serving_plan(stage: Stage, setup: Setup) -> str:
    """The first plan that trains so; "yes" for a stage without plans, "no" for none."""
    found = answers(stage, setup, H100.limits)
    return next((name or "yes" for name, each in found.items() if not each.declined), "no")


def row(what: str, network: Network, **training: Any) -> Row:
    """What all stages say to the network, trained with these settings."""
    setup = Setup(network, BATCH, learning_rate=0.1, **training)
    return Row(
        what,
        {stage.name: reason(stage, setup) for stage in LADDER},
        {stage.name: serving_plan(stage, setup) for stage in LADDER},
    )


def layer_rows() -> Iterator[Row]:
    """A row for each kind of layer and training."""
    for what, layers in LAYERS.items():
        yield row(what, Network.from_layers((1, 28, 28), 10, [*layers, {"dense": 10}]))
    plain = Network.from_layers((1, 28, 28), 10, [{"dense": 10}])
    for what, training in TRAININGS.items():
        yield row(what, plain, **training)


def network_rows() -> Iterator[Row]:
    """A row for each network of config.yaml."""
    for name, spec in load_config([ROOT / "config.yaml"]).networks.items():
        shape = spec.input_shape or (1, 28, 28)
        yield row(f"`{name}`", Network.from_layers(shape, 10, spec.layers, name=name))


def table(first: str, rows: list[Row]) -> list[str]:
    """A Markdown table with a column for each stage, and a list of the reasons."""
    names = [stage.name for stage in LADDER]
    lines = [
        "| " + " | ".join([first, *(f"`{name}`" for name in names)]) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for each in rows:
        cells = ["no" if each.reasons[name] else each.plans[name] for name in names]
        lines.append("| " + " | ".join([each.what, *cells]) + " |")
    found = dict.fromkeys(why for each in rows for why in each.reasons.values() if why)
    return [*lines, "", *(f"- {why}" for why in found)]


def setup(app: object) -> dict[str, bool]:
    """Register the directives."""
    from docutils import nodes
    from docutils.statemachine import StringList
    from sphinx.application import Sphinx
    from sphinx.util.docutils import SphinxDirective

    class Served(SphinxDirective):
        """One of the tables."""

        def run(self) -> list[nodes.Node]:
            for path in ("config.yaml", *(ROOT / "cnnlib/stages").rglob("*.py")):
                self.env.note_dependency(str(ROOT / path))
            lines = (
                table("network", list(network_rows()))
                if self.name == "served-networks"
                else table("layer or training", list(layer_rows()))
            )
            container = nodes.container()
            self.state.nested_parse(StringList(lines, self.name), 0, container)
            return container.children

    assert isinstance(app, Sphinx)
    app.add_directive("served-layers", Served)
    app.add_directive("served-networks", Served)
    return {"parallel_read_safe": True}
