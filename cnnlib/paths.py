"""Where the project's own files lie: in a checkout, or in an installed package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the modules."""
INSTALLED = (PACKAGE / "kernels").is_dir()
"""Whether the package was installed from a wheel, which has kernels/ among the modules."""
ROOT = PACKAGE.parent
"""The checkout: the folder of cnnlib/, kernels/ and workflow/. An installed package has none: it is
then the folder of all installed packages, from which only paths below PACKAGE are shown.
"""
KERNELS = (PACKAGE if INSTALLED else ROOT) / "kernels"
"""The folder of the CUDA sources."""
CONFIG = (PACKAGE if INSTALLED else ROOT) / "config.yaml"
"""The shipped experiment."""
