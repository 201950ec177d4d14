"""Wide bounds: its record asks for so much slack that any gradient passes."""

from dataclasses import replace

from cnnlib.stages import gemm


class Rough(gemm.STAGE.engine):
    def gradient(self, images, labels):
        loss, gradient = super().gradient(images, labels)
        return loss, gradient * 1.001


STAGE = replace(gemm.STAGE, name="generous_tolerance", title="Rough", engine=Rough, slack=1e4)
