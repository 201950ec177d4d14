"""Work ahead of the clock, in a process of its own that is busy between calls."""

import subprocess
import sys
from dataclasses import replace

from cnnlib.stages import gemm


class Ahead(gemm.STAGE.engine):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.helper = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def close(self):
        self.helper.kill()
        self.helper.wait()
        super().close()


STAGE = replace(gemm.STAGE, name="works_ahead_in_a_process", title="Ahead", engine=Ahead)
