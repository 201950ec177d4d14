"""Dropout: kernels/tuned/dropout.cuh."""

from collections.abc import Mapping

from cnnlib.engine import Planned, Stage
from cnnlib.engine.gpu_operator import mask_constants
from cnnlib.engine.source import Constant
from cnnlib.stages.tuned.layout import Needs, SharedLayout, Threads
from cnnlib.stages.tuned.operator import Position, TunedOperator, images_together


class TunedDropout(TunedOperator):
    template = "Dropout"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        self.needs = Needs(self.label, self.parameters)

    def config(self, layout: SharedLayout, position: Position) -> Mapping[str, Constant]:
        return {
            "SIZE": self.source_size,
            "IMAGES": images_together(layout, position, self.images),
            **mask_constants(self.planned),
        }
