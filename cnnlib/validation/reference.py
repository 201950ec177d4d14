"""The float64 reference, at parameters and on images where near-ties do not blur the comparison.

The reference is the layers' own loops in float64 (stage `naive`). They are slow, so batches are
compared with stage `gemm` in float64, which is itself compared with the loops first, on a few
images, once for each network in a process.
"""

from cnnlib.engine import Bytes, Setup
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.layers import Array
from cnnlib.validation.kinks import KinkDetector
from cnnlib.validation.loops import reference_stage

FAST_REFERENCE = reference_stage("gemm in float64")


class Referee:
    """The reference and the kink detector, which always have the same parameters."""

    def __init__(self, setup: Setup) -> None:
        self.detector = KinkDetector(setup)
        self.reference = MicroBatchEngine(FAST_REFERENCE, setup)

    def __enter__(self) -> "Referee":
        return self

    def __exit__(self, *exception: object) -> None:
        self.reference.close()
        self.detector.close()

    @property
    def parameters(self) -> Array:
        return self.detector.parameters

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self.detector.parameters = self.reference.parameters = vector

    @property
    def steps(self) -> int:
        """The number of the step whose masks of dropout are used."""
        return self.reference.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self.detector.steps = self.reference.steps = count

    def avoid_near_ties(self, images: Bytes) -> tuple[Bytes, Array]:
        """`KinkDetector.avoid_near_ties`, after which the reference has the moved biases too."""
        images, tied = self.detector.avoid_near_ties(images)
        self.reference.parameters = self.detector.parameters
        return images, tied
