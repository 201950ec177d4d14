"""Where the project's own files lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: the folder of cnnlib/, kernels/ and workflow/."""
KERNELS = ROOT / "kernels"
"""The folder of the CUDA sources."""
