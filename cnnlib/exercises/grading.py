"""Grades what is handed in: each part by itself, with the shipped lines in the place of the others.

A submission is a folder as `start` writes it, or single files of it; what is missing is taken from
the solution. The whole is tried first. If it is right, so are all parts; if not, each part is tried
with the other parts solved, so that one mistake does not hide what is right.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cnnlib.device.watched import Watched
from cnnlib.errors import ConfigError, DataError, DeviceError, one_line
from cnnlib.exercises import trial, writing
from cnnlib.exercises.catalogue import Exercise, Part, find_exercise
from cnnlib.exercises.cutting import NotFound, Unreadable
from cnnlib.exercises.diagnosis import RIGHT, Verdict, judge, of_bytes, of_exception
from cnnlib.judging.remote import Worker
from cnnlib.validation.reference import FAST_REFERENCE

MOST_BYTES = 2**20
"""Size of a file that is handed in."""
NOTHING = (
    "no file of an exercise; each begins with a line such as "
    "'# cnnlib exercise naive, file my_naive.py'"
)
PARTIAL = {"bytes": 0.5}
"""Share of a part's points for a result that is right but for this word."""


@dataclass(frozen=True)
class Grade:
    """What became of a part."""

    part: Part
    verdict: Verdict

    @property
    def points(self) -> float:
        if self.verdict.word == RIGHT.word:
            return self.part.points
        return self.part.points * PARTIAL.get(self.verdict.word, 0.0)


@dataclass(frozen=True)
class Submission:
    """The files of one exercise that were handed in."""

    name: str
    """What tables call it: the name of its folder or file."""
    exercise: Exercise
    files: dict[str, str]
    """Name -> text, with the shipped file for one that is missing."""
    beside: tuple[Path, ...]
    """Further files of its folder, such as modules that it imports."""


def entries(path: Path) -> list[Path]:
    """What was handed in at a path: itself, or all that lies in a folder, by their names.

    A folder is one submission if its files can be one, and no folder in it is another. Raises
    ConfigError where there is nothing.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    marked = _marked_files(path)
    inside = sorted(path.iterdir()) if path.is_dir() else []
    folders = [each for each in inside if each.is_dir() and each.name[:1] not in "._"]
    marks = list(marked.values())
    one = len({exercise for exercise, _ in marks}) == 1 and len(set(marks)) == len(marks)
    if one and not any(map(_marked_files, folders)):
        return [path]
    found = sorted([*folders, *marked])
    if not any(_marked_files(each) for each in found):
        raise ConfigError(f"{path}: {NOTHING}")
    return found


def read(path: Path) -> Submission:
    """The submission at a path.

    Raises ConfigError for files of no exercise, of two, or for the same file twice.
    """
    marked = _marked_files(path)
    if not marked:
        raise ConfigError(f"{path}: {NOTHING}")
    names = sorted({exercise for exercise, _ in marked.values()})
    if len(names) > 1:
        raise ConfigError(f"{path} has files of exercises {' and '.join(names)}; hand in one each")
    exercise = find_exercise(names[0])
    files = exercise.solution()
    given: dict[str, Path] = {}
    for file, (_, name) in marked.items():
        if name not in files:
            raise ConfigError(f"{file}: exercise {exercise.name} has no file {name}")
        if name in given:
            raise ConfigError(f"{given[name]} and {file} are both file {name} of the exercise")
        given[name] = file
        files[name] = _text(file)
    beside = _others(path, set(marked), set(files)) if path.is_dir() else ()
    return Submission(name_of(path), exercise, files, beside)


def name_of(path: Path) -> str:
    """What tables call the submission at a path."""
    return path.resolve().name if path.is_dir() else path.stem


def _marked_files(path: Path) -> dict[Path, tuple[str, str]]:
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    found = {file: mark for file in inside if file.is_file() and (mark := writing.marked(file))}
    return found


def _others(path: Path, marked: set[Path], names: set[str]) -> tuple[Path, ...]:
    """Files of a folder that code of the exercise may need."""
    kinds = {".py", ".cuh", ".h"}
    files = [file for file in sorted(path.iterdir()) if file.is_file() and file.suffix in kinds]
    return tuple(file for file in files if file not in marked and file.name not in names)


def _text(file: Path) -> str:
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file} has more than {MOST_BYTES} bytes")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text in UTF-8") from None


def grade(submission: Submission) -> list[Grade]:
    """The grade of each part."""
    exercise = submission.exercise
    with Bench(submission) as bench:
        verdicts = {part.name: _unread(submission, part) for part in exercise.parts}
        if not any(verdicts.values()):
            whole = bench.try_out(submission.files)
            if whole is RIGHT:
                return [Grade(part, RIGHT) for part in exercise.parts]
        return [
            Grade(part, verdicts[part.name] or bench.try_out(_alone(submission, part)))
            for part in exercise.parts
        ]


def _unread(submission: Submission, part: Part) -> Verdict | None:
    """What can be said of a part by its text alone; None if it has to be tried."""
    try:
        lines = part.lines(submission.files[part.file])
    except NotFound as error:
        return Verdict("file" if isinstance(error, Unreadable) else "gone", str(error))
    return Verdict("open") if writing.is_open(submission.exercise, part, lines) else None


def _alone(submission: Submission, part: Part) -> dict[str, str]:
    """The files with the shipped lines in all other parts."""
    solution = submission.exercise.solution()
    files = dict(submission.files)
    for other in submission.exercise.parts:
        if other is not part:
            with contextlib.suppress(NotFound):
                lines = other.lines(solution[other.file])
                files[other.file] = other.put(lines, files[other.file])
    return files


class Bench:
    """A folder and a process in which versions of a submission are tried, one after the other."""

    def __init__(self, submission: Submission) -> None:
        self.submission, self.exercise = submission, submission.exercise
        self._opened = contextlib.ExitStack()
        self._worker: Worker | None = None

    def __enter__(self) -> "Bench":
        made = tempfile.TemporaryDirectory(prefix="exercise-")
        self.folder = Path(self._opened.enter_context(made))
        for file in self.submission.beside:
            shutil.copy(file, self.folder / file.name)
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()
        self._opened.close()

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.__exit__()
        self._worker = None

    def try_out(self, files: dict[str, str]) -> Verdict:
        """What is wrong with these files."""
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        try:
            return self._judged(files == self.exercise.solution())
        except trial.PROBLEMS as error:
            self._close()
            if type(error) is DeviceError:
                raise
            return self._readable(of_exception(one_line(error), type(error).__name__))

    def _judged(self, is_solution: bool) -> Verdict:
        worker = self._ready()
        found = trial.attempt(worker, self.exercise)
        if found.kind in ("StageFailed", "MemoryError"):
            self._close()  # it may have ended, or still be busy
        verdict = judge(self.exercise, found)
        if verdict.word == "errors" and self._worker is not None:
            verdict = self._looked_at_pixels(found)
        if is_solution:
            _shipped[self.exercise.name] = found.kernels
        if verdict is RIGHT and self.exercise.sources:
            verdict = of_bytes(found.kernels, shipped(self.exercise.name))
            if verdict is RIGHT:
                verdict = self._reversed(found)
        return self._readable(verdict)

    def _ready(self) -> Worker:
        """The process with the present version of the file imported."""
        if self._worker is None:
            self._worker = trial.worker_for(self.folder / self.exercise.main)
            self._worker.__enter__()
        else:
            trial.describe_again(self._worker)
        return self._worker

    def _looked_at_pixels(self, found: trial.Trial) -> Verdict:
        """The verdict once more, with errors sent back to each pixel."""
        assert self._worker is not None
        references = trial.expected(self.exercise.name)
        network = self.exercise.networks[0]
        references[0].pixels = trial.pixels_of(FAST_REFERENCE, network)
        found.found[0].pixels = trial.pixels_of(self._worker.stage, network)
        return judge(self.exercise, found)

    def _reversed(self, found: trial.Trial) -> Verdict:
        """The same with threads and blocks in reverse order, which must give the same bits."""
        with trial.worker_for(self.folder / self.exercise.main, "reverse") as worker:
            other = trial.attempt(worker, self.exercise)
        for one, two in zip(found.found, other.found, strict=True):
            for name in ("logits", "gradient", "parameters"):
                before, after = getattr(one, name), getattr(two, name)
                if after is None or before.tobytes() != after.tobytes():
                    return Verdict("order", f"{name} differ in reverse order")
        return RIGHT

    def _readable(self, verdict: Verdict) -> Verdict:
        """The verdict with file names as the student knows them."""
        seen = verdict.seen.replace(f"{self.folder}/", "").replace(str(self.folder), "")
        return Verdict(verdict.word, seen) if seen != verdict.seen else verdict


_shipped: dict[str, dict[str, Watched]] = {}


def shipped(name: str) -> dict[str, Watched]:
    """What the kernels of the solution read and write; it is tried once in a process."""
    if name in _shipped:
        return _shipped[name]
    exercise = find_exercise(name)
    submission = Submission("solution", exercise, exercise.solution(), ())
    with Bench(submission) as bench:
        for file, text in submission.files.items():
            (bench.folder / file).write_text(text, encoding="utf-8")
        with trial.worker_for(bench.folder / exercise.main) as worker:
            _shipped[name] = trial.attempt(worker, exercise).kernels
    return _shipped[name]


def total(grades: Sequence[Grade]) -> float:
    """The points of all parts."""
    return sum(grade.points for grade in grades)
