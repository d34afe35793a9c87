"""The user's mistakes, and the exit status each kind ends with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell has it."""

LONGEST = 1200
"""Characters of the longest problem that is told."""


class UserError(Exception):
    """Wrong input: shown as one line on stderr (several problems: one line each), exit status 2.

    Args:
        problems: one sentence, or several; each names the key, the value and the nearest valid one.
    """

    exit_status = 2
    # Of a run on many ranks: whether all of them raise it, so that the first tells for all; whose fault it is; and
    # whether an earlier attempt has told it.
    shared = False
    rank: int | None = None
    told = False

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(_shortened, problems))
        super().__init__("\n".join(self.problems))


def _shortened(problem: str) -> str:
    """Without its middle, where a value of a megabyte is in it."""
    return problem if len(problem) <= LONGEST else f"{problem[: LONGEST * 2 // 3]} ... {problem[-LONGEST // 4 :]}"


class StorageError(UserError):
    """A file could not be written or read back: disk full, read-only, damaged. Exit status 74."""

    exit_status = 74


class RunInUseError(UserError):
    """Another process writes the run folder; the message names it. Exit status 73."""

    exit_status = 73


class NumericalError(UserError):
    """Training cannot go on: the loss is not finite. Exit status 76."""

    exit_status = 76


class LostRankError(UserError):
    """Another rank of the run is gone or does not answer; the run can be continued. Exit status 75."""

    exit_status = 75


class LostWorkerError(UserError):
    """A process that reads images died or got stuck; the run can be continued. Exit status 75."""

    exit_status = 75


class PreemptedError(UserError):
    """The run was asked to make room, or its time is over; it can be continued. Exit status 75."""

    exit_status = 75


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside, whatever a malformed value makes Python or torch raise is a UserError that names `what`.

    For values out of a file whose form nobody else has checked, where each is taken as it is needed.
    """
    try:
        yield
    except UserError as error:
        # Of the same kind, and says where.
        raise type(error)(*(f"{what}: {problem}" for problem in error.problems)) from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} is damaged: {reason[:200]}") from error


def nearest(value: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the candidate closest to `value`, or `""` where none is near."""
    if len(value) > 200:
        return ""  # nobody meant a name, and looking for one would take its time
    lowered = {candidate.lower(): candidate for candidate in candidates}
    matches = get_close_matches(value.lower(), lowered, n=1, cutoff=0.55)
    return f"; did you mean '{lowered[matches[0]]}'?" if matches else ""
