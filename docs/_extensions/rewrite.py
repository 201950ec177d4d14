"""Numbers in README.md and in pages of docs/, written into them from the published tables.

A page that GitHub shows cannot compute its numbers, so this program types them. A block of a page
begins below a comment, `<!-- written: NAME -->`, and ends before the next empty line. A sentence is
a text with holes, each {} a number; where the page breaks its lines does not matter. When results
have been published anew:

    python docs/_extensions/rewrite.py

writes all of it again and says what has changed. tests/repository/test_docs.py fails where a page
and the tables disagree.
"""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import networks
import published
from published import ROOT, percent, rungs

from workflow.plotting import wording

Values = Callable[[], Iterable[str]]


class Sentence(NamedTuple):
    """A text of a page whose holes, each {}, have the values that `values` returns."""

    page: str
    text: str
    values: Values


class Block(NamedTuple):
    """Whole lines of a page, such as a table."""

    page: str
    name: str
    lines: Callable[[], str]


class Mismatch(Exception):
    """A page lacks a text that it should have, or has it twice; the message names both."""


def gain(stage: str, size: int) -> str:
    """How many times as fast a stage is as the one before, without the sign."""
    own = next(rung for rung in rungs() if rung.stage == stage)
    return wording.times(own.gain[size]).removesuffix("×")


def share(stage: str) -> str:
    """The share of the machine's limit that a stage reaches."""
    return percent(next(rung.share for rung in rungs() if rung.stage == stage))


def largest() -> str:
    """The largest batch size that learns."""
    return str(published.learning_sizes()[-1])


def over_libraries(*, learning: bool) -> list[str]:
    """The ranges of the libraries' ratios in float32 and in TF32: `6.8 to 8.9`."""
    return [
        published.libraries(tf32=tf32, learning=learning).removesuffix(" times")
        for tf32 in (False, True)
    ]


BLOCKS = (
    Block("README.md", "ladder", published.ladder),
    Block("README.md", "networks", networks.short),
)
SENTENCES = (
    Sentence(
        "README.md",
        "The best of PyTorch and JAX in float32 takes {} as long as stage 5 at batch sizes from "
        "16 to {}, and in TF32, which is less exact, {}.",
        lambda: (published.libraries(tf32=False), largest(), published.libraries(tf32=True)),
    ),
    Sentence(
        "README.md",
        "with a small network, stage 5 trains for {} (means over 30 seeds)",
        lambda: [published.race()],
    ),
    Sentence(
        "README.md",
        "measured on the same machine: {}, all in float32.",
        lambda: [published.peaks()],
    ),
    Sentence("README.md", "Stage 5 trains {}.", lambda: [published.whole_speedup()]),
    Sentence(
        "README.md",
        "Stage 1 would need {} at any batch size: extrapolated from a few images of {} runs.",
        lambda: (published.first_stage(), str(published.first_stage_runs())),
    ),
    Sentence(
        "README.md",
        "takes on the shipped networks ({}; in italics:",
        lambda: [networks.summary()],
    ),
    Sentence(
        "docs/results.md",
        "Stage 5 is {} times as fast as the best of PyTorch and JAX in float32 at batch 16 to {}, "
        "and {} times as fast as their TF32, which is less exact. Above, the ratios are {} and {}, "
        "but trainings of so few steps learn too little: {} at batch 1024, {} at 4096.",
        lambda: (
            over_libraries(learning=True)[0],
            largest(),
            over_libraries(learning=True)[1],
            *over_libraries(learning=False),
            published.accuracy(1024, digits=0),
            published.accuracy(4096, digits=0),
        ),
    ),
    Sentence(
        "docs/stages/gemm.md",
        "`gemm` trains {} times as fast as the loops at batch 64 and {} times at 256, where it "
        "reaches {} of what BLAS does on all cores. `gemm_cuda` is another {} and {} times as fast "
        "on the H100, and yet uses only {} of the GPU's float32 arithmetic.",
        lambda: (
            gain("gemm", 64),
            gain("gemm", 256),
            share("gemm"),
            gain("gemm_cuda", 64),
            gain("gemm_cuda", 256),
            share("gemm_cuda"),
        ),
    ),
    Sentence(
        "docs/stages/fused.md",
        "`fused` is {} times as fast as `gemm_cuda` at batch 64 and {} times at 256.",
        lambda: (gain("fused", 64), gain("fused", 256)),
    ),
    Sentence(
        "docs/stages/ring.md",
        "`ring` is {} times as fast at batch 64 and {} times at 256",
        lambda: (gain("ring", 64), gain("ring", 256)),
    ),
    Sentence(
        "docs/stages/tuned.md",
        "`tuned` is {} times as fast as `ring` at batch 64 and {} times at 256, where it reaches "
        "{} of the float32 peak measured on the GPU's ordinary (CUDA) cores ({} at 1024, which "
        "learns less in two epochs). At batch sizes from 16 to {} it is {} times as fast as the "
        "better of `fused` and `ring`, and {} times as fast as the best of PyTorch and JAX in "
        "float32.",
        lambda: (
            gain("tuned", 64),
            gain("tuned", 256),
            share("tuned"),
            percent(float(published.published()["tuned", 1024]["share"])),
            largest(),
            published.over_fused_and_ring(),
            over_libraries(learning=True)[0],
        ),
    ),
)
HOLE = "{}"
SPACE = r"\s+"


def written(text: str, page: str) -> str:
    """The text of `page` with all its numbers from the tables. Raises Mismatch."""
    for block in BLOCKS:
        if block.page == page:
            text = with_block(text, block)
    for sentence in SENTENCES:
        if sentence.page == page:
            text = with_sentence(text, sentence)
    return text


def with_block(text: str, block: Block) -> str:
    """The text with the lines of a block written anew."""
    begin = f"<!-- written: {block.name} -->\n"
    parts = text.split(begin)
    if len(parts) != 2 or not (empty := re.search(r"(?m)^$", parts[1])):
        raise Mismatch(f"{block.page} needs one `{begin.strip()}` with an empty line below it")
    return f"{parts[0]}{begin}{block.lines().strip()}\n{parts[1][empty.start() :]}"


def with_sentence(text: str, sentence: Sentence) -> str:
    """The text with the holes of a sentence filled; line breaks stay where they can."""
    literal = [
        SPACE.join(map(re.escape, re.split(SPACE, part))) for part in sentence.text.split(HOLE)
    ]
    pattern = "((?:.|\\n)+?)".join(f"({part})" for part in literal) + r"(?!\w)"
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise Mismatch(f"{sentence.page} has {len(found)} times: {sentence.text}")
    match = found[0]
    values = list(sentence.values())
    parts = list(match.groups())
    if len(values) != len(parts) // 2:
        raise Mismatch(f"{len(values)} values for the holes of: {sentence.text}")
    for number, value in enumerate(values):
        parts[2 * number + 1] = broken_like(parts[2 * number + 1], value)
    return text[: match.start()] + "".join(parts) + text[match.end() :]


def broken_like(old: str, new: str) -> str:
    """`new` with the white space of `old`, if both have as many words."""
    spaces, words = re.findall(SPACE, old), re.split(SPACE, new)
    if len(spaces) + 1 != len(words):
        return new
    return words[0] + "".join(space + word for space, word in zip(spaces, words[1:], strict=True))


def pages() -> list[str]:
    """All pages that have such numbers."""
    return list(dict.fromkeys(each.page for each in (*BLOCKS, *SENTENCES)))


def main() -> int:
    """Write all pages, or none where one has another text; 2 then."""
    try:
        texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
        new = {page: written(text, page) for page, text in texts.items()}
    except Mismatch as problem:
        print(problem, file=sys.stderr)
        return 2
    for page, text in new.items():
        if text != texts[page]:
            (ROOT / page).write_text(text, encoding="utf-8")
        print(f"{page}: {'written anew' if text != texts[page] else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
