"""The commands of `python -m cnnlib`, a module for each group.

Whatever takes long to import is imported inside the commands: `--help` and mistyped options answer
at once.
"""
