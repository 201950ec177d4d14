"""An activation or a subsampling that follows nothing it is fused with:
kernels/tuned/elementwise.cuh.
"""

from cnnlib.engine import Planned, Stage
from cnnlib.engine.stage import declining
from cnnlib.layers import enumerator_of
from cnnlib.stages.tuned.declined import other_than_square
from cnnlib.stages.tuned.layout import Needs, SharedBuffer, SharedLayout, Threads
from cnnlib.stages.tuned.operator import (
    Position,
    TunedOperator,
    images_together,
    window_of,
    winners,
)


@declining(other_than_square)
class TunedElementwise(TunedOperator):
    template = "Elementwise"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        shape = planned.source_shape
        self.shape = shape if len(shape) == 3 else (self.source_size, 1, 1)
        self.window, self.method = window_of(planned.layers)
        kept = winners(self.window, self.method, self.target_size)
        self.needs = Needs(self.label, self.parameters, kept=kept)

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        channels, height, width = self.shape
        return {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "FUNCTION": enumerator_of(self.planned.layers),
            "WINDOW": self.window,
            "METHOD": self.method,
            "IMAGES": images_together(layout, position, self.images),
        }

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        winners = layout.kept[self.label]["winners"]
        return {**super().buffers(layout, position), "Winners": winners}
