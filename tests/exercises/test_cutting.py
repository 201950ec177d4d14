"""Functions are found by their names and cut out of Python and CUDA files."""

import pytest

from cnnlib.exercises.cutting import NotFound, filled, find_body, lines_of, source_of

PYTHON = '''\
class A:
    @staticmethod
    def first(x):
        """A docstring.

        Of two paragraphs.
        """
        # a comment of the body
        return x

    def second(self): return 1


def first():
    pass
'''
CUDA = """\
// a comment of first(int x) {
template <class T>
struct S {
  __device__ int call(int x) { return first(x); }
  static __device__ __forceinline__ int first(int x,
                                              const char* text) {
    const char* odd = "}{";  // a brace }
    if (x) {
      x++;
    }
    return x;
  }
  __device__ void last(int (&a)[3]) {
    int kept = 0;
    if (kept) {
      kept--;  // here
      kept++;
    }
  }
};
"""


def test_a_body_of_python_begins_after_the_docstring() -> None:
    body = find_body(PYTHON, "a.py", "A.first")
    assert lines_of(PYTHON, body) == "# a comment of the body\nreturn x\n"
    assert filled(PYTHON, body, "return 2\n") == PYTHON.replace(
        "        # a comment of the body\n        return x\n", "        return 2\n"
    )
    assert source_of(PYTHON, "a.py", "A.first").startswith("@staticmethod\ndef first(x):\n")
    assert lines_of(PYTHON, find_body(PYTHON, "a.py", "first")) == "pass\n"


def test_a_body_of_cuda_ends_with_its_bracket() -> None:
    body = find_body(CUDA, "a.cuh", "first")
    assert lines_of(CUDA, body).splitlines()[0] == 'const char* odd = "}{";  // a brace }'
    assert lines_of(CUDA, body).splitlines()[-1] == "return x;"
    assert body.returns
    assert body.indent == 4
    assert not find_body(CUDA, "a.cuh", "last").returns


def test_a_part_of_a_block_goes_to_the_blocks_end() -> None:
    body = find_body(CUDA, "a.cuh", "last", "kept--;")
    assert lines_of(CUDA, body) == "kept++;\n"
    body = find_body(CUDA, "a.cuh", "last", "int kept")
    assert lines_of(CUDA, body).endswith("  kept++;\n}\n")


@pytest.mark.parametrize(
    ("file", "function", "after"),
    [
        ("a.py", "A.third", ""),
        ("a.py", "B.first", ""),
        ("a.py", "A.first", "no such line"),
        ("a.cuh", "third", ""),
        ("a.cuh", "last", "no such line"),
    ],
)
def test_what_is_not_there_is_named(file: str, function: str, after: str) -> None:
    with pytest.raises(NotFound, match=rf"{file}.*{function}"):
        find_body(PYTHON if file.endswith(".py") else CUDA, file, function, after)


def test_a_bracket_that_stays_open_is_named() -> None:
    with pytest.raises(NotFound, match="the bracket that opens in line 13 stays open"):
        find_body(CUDA[: CUDA.index("kept--")], "a.cuh", "last")
    with pytest.raises(NotFound, match=r"a\.py, line 1: "):
        find_body("def f(:\n", "a.py", "f")
