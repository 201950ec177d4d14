"""Figures, tables and what the rules of the workflow call."""

import os

# Notebooks name a backend of their own in the environment of the programs that they start, and
# matplotlib refuses to be imported where it cannot find that one. Figures are drawn into files.
os.environ["MPLBACKEND"] = "agg"
