"""The command `plan`: what would train a network, asked of the stages without running any."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypedDict, cast

import typer

from cnnlib.commands.options import (
    CONFIG,
    OF_YOUR_OWN,
    USUAL_DATASET,
    ConfigFiles,
    architecture_named,
    at_least_one,
    columns,
    dataset_for,
    stage_of,
)

if TYPE_CHECKING:
    from cnnlib.config import Config
    from cnnlib.device import DeviceLimits
    from cnnlib.engine import Setup, Stage
    from cnnlib.engine.step_plan import StepPlan
    from cnnlib.network import Network


class Gpu(NamedTuple):
    """The GPU whose limits decide."""

    name: str
    limits: "DeviceLimits"
    origin: str
    """Where the limits come from, in words."""


class LayerFacts(TypedDict):
    """A layer of a network."""

    layer: str
    target: list[int]
    parameters: int
    forward_operations: int
    """For each image."""


class StageFacts(TypedDict):
    """What a stage says of a network; `unavailable` is why it cannot take it, or empty."""

    stage: str
    unavailable: str
    operators: list[dict[str, str]]
    plans: list[dict[str, object]]


def plan(
    config: ConfigFiles = CONFIG,
    dataset: Annotated[str | None, typer.Option(help=USUAL_DATASET)] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="Can be repeated; default: the sweep's networks.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help=f"{OF_YOUR_OWN} Can be repeated; default: all stages of the ladder."),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Can be repeated; default: the sweep's batch sizes.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The GPU whose limits decide, as t4; default: the one here, or else an H100."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Show which operators serve a network's layers, and by which plan a GPU would train.

    The operators are those that run.json would name. For a stage that cannot take the network the
    reason is shown. A stage with plans, as tuned has, gives each one's sizes for every batch size,
    or why it declines. Nothing is compiled, and no GPU is needed.
    """
    from cnnlib.config import load_config
    from cnnlib.stages import LADDER

    settings = load_config(config)
    sizes = batch_size or settings.sweep.batch_sizes
    for size in sizes:
        at_least_one(batch_size=size)
    built = [
        settings.network(name, dataset_for(settings, dataset, name), "--network")
        for name in network or settings.sweep.networks
    ]
    chosen = [stage_of(settings, name) for name in stage] if stage else LADDER
    asked = gpu is not None or any(each.runs_on == "cuda" for each in chosen)
    where = gpu_for(gpu, settings.sweep.device) if asked else None
    said = [(each, [served(one, settings, each, sizes, where) for one in chosen]) for each in built]
    if as_json:
        networks = [
            {
                "network": each.name,
                "source": list(each.input_shape),
                "layers": layers_of(each),
                "stages": facts,
            }
            for each, facts in said
        ]
        typer.echo(json.dumps({"gpu": where and gpu_facts(where), "networks": networks}, indent=2))
        return
    parts = [gpu_in_words(where)] if where else []
    for each, facts in said:
        parts.append(network_in_words(each))
        parts += [stage_in_words(one, where) for one in facts]
    typer.echo("\n\n".join(parts))


def gpu_for(name: str | None, device: str) -> Gpu:
    """The GPU that is asked for, else that of this machine, else an H100.

    Raises ConfigError for a name that no record has.
    """
    from cnnlib.device import limits_of
    from cnnlib.device.architecture import ARCHITECTURES, H100

    if name is not None:
        record = architecture_named(name)
        return Gpu(record.name, record.limits, "by its record")
    limits = limits_of(device)
    if limits is not None and limits.kind == "cuda":
        from cnnlib.device.driver import gpu_identity

        return Gpu(gpu_identity()[0], limits, "the one of this machine")
    others = ", ".join(ARCHITECTURES)
    origin = f"by its record, as there is no GPU to use here (--gpu: {others})"
    return Gpu(H100.name, H100.limits, origin)


def gpu_facts(gpu: Gpu) -> dict[str, object]:
    """What a GPU has, and what kernels do instead of what it cannot do."""
    from cnnlib.device.architecture import FEATURES, H100

    capability = gpu.limits.capability
    return {
        "name": gpu.name,
        "limits": gpu.origin,
        "capability": "{}.{}".format(*capability),
        "multiprocessors": gpu.limits.multiprocessors,
        "shared_bytes": gpu.limits.shared_bytes,
        "measured": capability == H100.capability,
        "instead": {each.name: each.instead for each in FEATURES if capability < each.since},
    }


def gpu_in_words(gpu: Gpu) -> str:
    """The same as lines of text."""
    from cnnlib.device.architecture import FEATURES, H100

    _, multiprocessors, shared_bytes, capability = gpu.limits
    lines = [
        f"GPU {gpu.name}, {gpu.origin}",
        f"  compute capability {capability[0]}.{capability[1]}, {multiprocessors} "
        f"multiprocessors, {shared_bytes:,} bytes of shared memory a block",
    ]
    lines += [f"  no {f.name}: {f.instead}" for f in FEATURES if capability < f.since]
    if capability != H100.capability:
        lines.append("  never measured: the published times are those of an H100")
    return "\n".join(lines)


def layers_of(network: "Network") -> list[LayerFacts]:
    """The layers of a network and their sizes."""
    return [
        {
            "layer": name,
            "target": list(network.shapes[i + 1]),
            "parameters": sum(p.size for p in network.parameters if p.layer == i),
            "forward_operations": network.forward_flops[i],
        }
        for i, name in enumerate(network.layer_names)
    ]


def network_in_words(network: "Network") -> str:
    """The same as a table."""
    rows = [["layer", "target", "parameters", "operations per image, forward"]]
    for each in layers_of(network):
        shape = "x".join(map(str, each["target"]))
        operations = f"{each['forward_operations']:,}"
        rows.append([each["layer"], shape, f"{each['parameters']:,}", operations])
    rows.append(["all", "", f"{network.parameter_count:,}", f"{sum(network.forward_flops):,}"])
    source = "x".join(map(str, network.input_shape))
    return f"network {network.name}, source {source}\n\n{columns(rows)}"


def served(
    stage: "Stage",
    settings: "Config",
    network: "Network",
    sizes: Sequence[int],
    gpu: Gpu | None,
) -> StageFacts:
    """Which operator of `stage` serves which layers, and its plans for batches of these sizes."""
    from cnnlib.engine import Setup, name_of
    from cnnlib.engine import plan as plan_of
    from cnnlib.errors import Unsupported
    from cnnlib.training.target import library_kind

    limits = gpu.limits if gpu and stage.runs_on == "cuda" else None
    kind = library_kind(settings.sweep.device) if stage.runs_on == "any" else "cpu"
    rate = settings.training.learning_rate
    setups = [Setup(network, size, rate, device_kind=kind) for size in sizes]
    facts: StageFacts = {"stage": stage.name, "unavailable": "", "operators": [], "plans": []}
    try:
        record = stage.engine.record_on(stage, setups[0], limits)
        operators = record.engine.operators_on(record, setups[0], limits)
        # An engine whose stage names no operators takes the network as a whole.
        parts = [planned.name for planned in plan_of(record, network)] if record.operators else [""]
        facts["operators"] = [
            {"operator": name_of(operator), "layers": part or "all layers"}
            for part, operator in zip(parts, operators, strict=True)
        ]
    except Unsupported as error:
        facts["unavailable"] = str(error)
    if limits is not None:
        facts["plans"] = [
            each
            for setup in setups
            for each in facts_of_plans(
                stage.engine.plans_on(stage, setup, limits), setup, compares_plans(stage)
            )
        ]
    return facts


def compares_plans(stage: "Stage") -> bool:
    """Whether a GPU measures which of the stage's plans is the fastest."""
    from cnnlib.engine.plans import Plans

    return isinstance(stage.options, Plans) and stage.options.compared


def facts_of_plans(
    plans: "Sequence[StepPlan]", setup: "Setup", compared: bool
) -> Iterator[dict[str, object]]:
    """What a stage's plans say of one batch size. Of several that can, the first `trains`, or
    where they are compared, the fastest.
    """
    able = [each for each in plans if not each.declined]
    for each in plans:
        about: dict[str, object] = {"batch_size": setup.batch_size, "plan": each.name}
        about |= {"unavailable": each.declined, "operators": list(each.operators)}
        if len(plans) > 1:
            about["trains"] = each in able[:1]
            if compared and len(able) > 1 and each in able:
                about["trains"] = "if fastest"
        yield about | dict(each.facts)


def stage_in_words(facts: StageFacts, gpu: Gpu | None) -> str:
    """The same as lines of text, with a table of each plan that serves."""
    lines = [f"stage {facts['stage']}"]
    own = any(each["operators"] for each in facts["plans"])
    if facts["unavailable"]:
        lines.append(f"  unavailable: {facts['unavailable']}")
    elif not own:
        pairs = [(each["operator"], each["layers"]) for each in facts["operators"]]
        lines += [f"  {line}" for line in columns(pairs).splitlines()]
    for name in dict.fromkeys(str(each["plan"]) for each in facts["plans"]):
        plans = [each for each in facts["plans"] if each["plan"] == name]
        if serving := [each for each in plans if not each["unavailable"]]:
            lines += [f"  plan {name}", *(f"    {line}" for line in table(serving, gpu))]
        lines += [f"  plan {name}, {line}" for line in refusals(plans, facts["unavailable"])]
    return "\n".join(lines)


def table(plans: Sequence[dict[str, object]], gpu: Gpu | None) -> list[str]:
    """One plan's operators, if it has its own, and its sizes by batch size."""
    given = [str(each).split(": ") for each in cast(list[str], plans[0]["operators"])]
    operators = columns([(operator, layers) for layers, operator in given]) if given else ""
    left_out = ("plan", "unavailable", "batch_size", "operators")
    keys = [key for key in plans[0] if key not in left_out]
    alike: dict[tuple[str, ...], list[str]] = {}
    for each in plans:
        row = tuple(cell(key, each[key], gpu) for key in keys)
        alike.setdefault(row, []).append(str(each["batch_size"]))
    head = ["batch size", *(key.replace("_", " ") for key in keys)]
    rows = [[", ".join(sizes), *row] for row, sizes in alike.items()]
    return [*operators.splitlines(), *columns([head, *rows]).splitlines()]


def refusals(plans: Sequence[dict[str, object]], known: str) -> Iterator[str]:
    """Each reason why a plan declines, with its batch sizes, except what is `known` of it."""
    reasons: dict[str, list[str]] = {}
    for each in plans:
        reasons.setdefault(str(each["unavailable"]), []).append(str(each["batch_size"]))
    for reason, sizes in reasons.items():
        if reason and reason not in known:
            yield f"batch size {', '.join(sizes)}: unavailable: {reason}"


def cell(key: str, value: object, gpu: Gpu | None) -> str:
    """A fact as a table shows it; shared memory beside what a block may have."""
    if key == "shared_bytes" and gpu:
        return f"{value:,} of {gpu.limits.shared_bytes:,}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
