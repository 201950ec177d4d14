"""What names and paths in a config may look like: as patterns for programs, in words for people."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
"""Names of networks, data sets and stages: they become folders and wildcards of the workflow."""
LONGEST_NAME = 100
"""Characters; file systems allow 255 bytes, and some files have more in their names."""
FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of files that are downloaded."""
SHA256 = r"^[0-9a-f]{64}$"
FOLDER = r"^[\w./][\w./+@,-]*$"
"""Stands in the commands of the rules: nothing that a shell, or a rule's wildcards, would read."""

WORDS = {
    NAME: "letters, digits, '_' and '-', the first a letter or a digit",
    FILE: "letters, digits, '.', '_' and '-', the first a letter or a digit",
    SHA256: "64 hexadecimal digits in lower case",
    FOLDER: "letters, digits, '_', '.', '/', '+', '@', ',' and '-', the first not one of '+@,-'",
}
