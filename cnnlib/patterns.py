"""What names and paths in a config may look like: as patterns for programs, in words for people."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
"""Names of networks, data sets and stages: they become folders and wildcards of the workflow."""
LONGEST_NAME = 100
"""Characters of a name. File systems allow 255 bytes, and files add more to the name."""
STAGE = (
    r"^([A-Za-z0-9][A-Za-z0-9_-]{0,99}|[^\x00-\x1f\x7f]*/[^\x00-\x1f\x7f]*|[^\x00-\x1f\x7f]+\.py)$"
)
"""A stage of a list: its name, or the path of a Python file or of a package's folder."""
LONGEST_PATH = 4096
"""Characters of a path, which is what Linux allows."""
FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of files that are downloaded."""
MEMBER = r"^[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*$"
"""Names of files, in an archive perhaps, where they may lie in folders."""
SHA256 = r"^[0-9a-f]{64}$"
MD5 = r"^[0-9a-f]{32}$"
FOLDER = r"^[\w./][\w./+@,-]*$"
"""Folders; the rules' commands contain them, so that nothing in them may mean something to a shell
or to a rule's wildcards."""

ADDRESS = r"^https?://\S+$"
"""Where a page is found."""
WORDS = {
    NAME: "letters, digits, '_' and '-', the first a letter or a digit",
    STAGE: "letters, digits, '_' and '-', the first a letter or a digit, or be the path of a "
    "Python file, such as ./my_stage.py",
    FILE: "letters, digits, '.', '_' and '-', the first a letter or a digit",
    MEMBER: "letters, digits, '.', '_', '+' and '-', and '/' between folders, whose names and the "
    "file's begin with a letter or a digit",
    SHA256: "64 hexadecimal digits in lower case",
    MD5: "32 hexadecimal digits in lower case",
    ADDRESS: "'http://' or 'https://' and what follows, without spaces",
    FOLDER: "letters, digits, '_', '.', '/', '+', '@', ',' and '-', the first not one of '+@,-'",
}
