"""Says what is wrong with what a stage gave, in words that a student knows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cnnlib.device.watched import Watched
from cnnlib.exercises.catalogue import Exercise
from cnnlib.exercises.trial import Found, Trial, expected
from cnnlib.layers import Array, Conv
from cnnlib.network import Network, Parameter

WORDS = {
    "right": "right",
    "open": "not written yet",
    "gone": "the function is not there",
    "file": "the file cannot be used",
    "compile": "does not compile",
    "raises": "raises an exception",
    "ends": "hangs or ends its process",
    "outside": "reads or writes outside an array",
    "race": "race: two blocks or threads write the same sum",
    "barrier": "missing barrier",
    "wait": "missing wait for asynchronous copies",
    "unwritten": "uses numbers that were never written",
    "border": "wrong border",
    "bias": "the gradient of the bias is missing",
    "forward": "wrong values going forward",
    "gradient": "wrong gradient",
    "errors": "wrong errors sent back to the source",
    "update": "wrong update",
    "bytes": "too many bytes moved",
    "order": "the result depends on the order of threads or blocks",
}
"""What is said of a part, by a word for tables."""
MEETINGS = {"copy": "wait", "blocks": "race", "threads": "race", "barrier": "barrier"}
"""Kind of a finding of a watched device -> word."""
UNUSABLE = ("BrokenStage", "ConfigError", "Unsupported")
"""Exceptions of a file that has no stage for the exercise's networks."""
EXACT = 2e-4
"""Share of the largest number by which float32 may be off on these small networks."""
MORE_BYTES = 1.3
"""How many times the bytes of the shipped kernel one may read or write."""


@dataclass(frozen=True)
class Verdict:
    """A key of WORDS, and what was seen."""

    word: str
    seen: str = ""

    @property
    def text(self) -> str:
        return WORDS[self.word] + (f": {self.seen}" if self.seen else "")


RIGHT = Verdict("right")


def judge(exercise: Exercise, trial: Trial) -> Verdict:
    """What is wrong with a version of the exercise's stage, bytes and order aside."""
    problem = of_exception(trial.problem, trial.kind) if trial.problem else None
    # What lies outside its array may meet anything else: a race by that is no other mistake.
    if problem and problem.word == "outside":
        return problem
    if seen := of_kernels(trial.kernels) or problem:
        return seen
    references = expected(exercise.name)
    for network, found, right in zip(exercise.networks, trial.found, references, strict=True):
        if (verdict := of_values(network, found, right)) is not RIGHT:
            return verdict
    return RIGHT


def of_exception(problem: str, kind: str) -> Verdict:
    """What an exception means that ended a trial."""
    for text, word in (
        ("not written yet", "open"),
        ("outside every array", "outside"),
        ("SHARED_LARGE array", "outside"),
        ("divergent barrier", "barrier"),
        ("waits for lanes that do not come", "barrier"),
        ("does not compile", "compile"),
        (" raises ", "raises"),
    ):
        if text in problem:
            return Verdict(word, problem)
    if kind == "StageFailed":
        return Verdict("ends", problem)
    return Verdict("file" if kind in UNUSABLE else "raises", problem)


def of_kernels(kernels: Mapping[str, Watched]) -> Verdict | None:
    """A race or a missing barrier that was seen in one of the kernels."""
    for kind, word in MEETINGS.items():
        for name, kernel in kernels.items():
            if kind in kernel.findings:
                return Verdict(word, f"kernel {name}: {kernel.findings[kind]}")
    return None


def of_bytes(kernels: Mapping[str, Watched], shipped: Mapping[str, Watched]) -> Verdict:
    """Whether a kernel asks device memory for much more than the shipped one."""
    for name, right in shipped.items():
        found = kernels.get(name)
        if found is None:
            continue
        for verb in ("read", "written"):
            most, used = getattr(right, verb), getattr(found, verb)
            if used > MORE_BYTES * most:
                did = "reads" if verb == "read" else "writes"
                return Verdict(
                    "bytes",
                    f"kernel {name} {did} {used:,} bytes of device memory, "
                    f"{used / max(1, most):.1f} times the {most:,} of the shipped one",
                )
    return RIGHT


def of_values(network: Network, found: Found, right: Found) -> Verdict:
    """Compare what going forward, going back and taking steps gave with the reference."""
    assert found.logits is not None
    assert right.logits is not None
    if not np.isfinite(found.logits).all():
        return Verdict("unwritten", "the outputs have NaN or infinity in them")
    if (wrong := _wrong(found.logits, right.logits)).any():
        return _forward(network, found.logits, right.logits, wrong)
    assert found.gradient is not None
    assert right.gradient is not None
    if (verdict := _gradient(network, found.gradient, right.gradient, found, right)) is not RIGHT:
        return verdict
    assert found.parameters is not None
    assert right.parameters is not None
    if _wrong(found.parameters, right.parameters).any():
        return Verdict(
            "update",
            "the gradient is right, but not the parameters after two steps with momentum and "
            "weight decay",
        )
    return RIGHT


def _wrong(found: Array, right: Array) -> Array:
    """Where two arrays differ by more than rounding."""
    scale = float(np.abs(right).max()) or 1.0
    wrong: Array = ~(np.abs(found - right) <= EXACT * scale)
    return wrong


def _forward(network: Network, found: Array, right: Array, wrong: Array) -> Verdict:
    """Outputs are wrong: everywhere, or only where padding is seen?"""
    shape = network.shapes[-1]
    if len(shape) == 3:
        where: Array = np.any(wrong.reshape(-1, *shape), axis=0)
        border = sees_padding(network)
        if (~border).any() and where[border].any() and not where[~border].any():
            return Verdict(
                "border", "outputs are wrong where a window sees padding, and only there"
            )
    image, *place = (int(n) for n in np.argwhere(wrong.reshape(len(wrong), *shape))[0])
    one, other = (values.reshape(-1, *shape)[(image, *place)] for values in (found, right))
    at = ", ".join(map(str, place))
    share = f"{int(wrong.sum())} of {wrong.size} outputs"
    return Verdict(
        "forward",
        f"{share}, the first at ({at}) of image {image}: {one:.5g} instead of {other:.5g}",
    )


def sees_padding(network: Network) -> Array:
    """Which elements of the last maps depend on padding of a convolution: (C, H, W), bool."""
    maps = np.zeros(network.input_shape)
    for layer, shape in zip(network.layers, network.shapes, strict=False):
        if isinstance(layer, Conv):
            above, left = layer.padding
            wide = np.full((shape[0], shape[1] + 2 * above, shape[2] + 2 * left), np.nan)
            wide[:, above : above + shape[1], left : left + shape[2]] = maps
            inner = layer.model_copy(update={"padding": (0, 0)})
            count = shape[0]
            weights = {"weight": np.ones((layer.maps, count, *layer.kernel))}
            maps = inner.forward({**weights, "bias": np.zeros(layer.maps)}, wide)
        else:
            maps = layer.forward({}, maps)
    seen: Array = np.isnan(maps)
    return seen


def _gradient(
    network: Network, found: Array, right: Array, all_found: Found, all_right: Found
) -> Verdict:
    """Which parameters' gradients are wrong, from the last layer down to the first."""
    bad = [p for p in network.parameters if _wrong(_part(found, p), _part(right, p)).any()]
    if not bad:
        return RIGHT
    last = max(p.layer for p in bad)
    top = [p for p in bad if p.layer == last]
    p = top[0]
    if len(top) == 1 and p.key == "bias" and _absent(_part(found, p)):
        return Verdict("bias", f"that of {p.name} is {_part(found, p)[0]:g}")
    if not np.isfinite(found).all():
        names = [p.name for p in bad if not np.isfinite(_part(found, p)).all()]
        return Verdict("unwritten", f"the gradient of {', '.join(names)} has NaN or infinity in it")
    conv = [i for i, layer in enumerate(network.layers) if isinstance(layer, Conv)]
    if len(conv) > 1 and last == conv[0]:
        return _errors(network, all_found, all_right)
    ratio = _ratio(_part(found, p), _part(right, p))
    factor = f"; it is {ratio:.3g} times the right one" if ratio else ""
    of = ", ".join(each.name for each in top)
    return Verdict("gradient", f"that of {of} is off{factor}")


def _part(vector: Array, p: Parameter) -> Array:
    return vector[p.offset : p.offset + p.size]


def _absent(values: Array) -> bool:
    """Whether these are zeros, or memory that was never written."""
    return not values.any() or not np.isfinite(values).any()


def _ratio(found: Array, right: Array) -> float:
    """The factor between two arrays; 0 where there is none."""
    factor = float(found @ right) / float(right @ right)
    return 0.0 if _wrong(found, factor * right).any() else factor


def _errors(network: Network, found: Found, right: Found) -> Verdict:
    """The first layer alone has a wrong gradient: the errors that it receives are wrong."""
    if found.pixels is None or right.pixels is None:
        return Verdict("errors")
    _, rows, columns = network.input_shape
    wrong: Array = np.any(_wrong(found.pixels, right.pixels), axis=1).reshape(rows, columns)
    edge = np.ones_like(wrong)
    edge[1:-1, 1:-1] = False
    if wrong[edge].any() and not wrong[~edge].any():
        return Verdict(
            "border", "errors sent back are wrong at the edge of the map, and only there"
        )
    y, x = (int(n) for n in np.argwhere(wrong)[0]) if wrong.any() else (0, 0)
    return Verdict(
        "errors", f"at {int(wrong.sum())} of {wrong.size} positions, first at ({y}, {x})"
    )
