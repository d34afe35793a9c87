"""The user's mistakes, and the exit status each kind ends with."""

from collections.abc import Iterable
from difflib import get_close_matches


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
        super().__init__("\n".join(problems))
        self.problems = problems


class StorageError(UserError):
    """A file could not be written or read back: disk full, read-only, damaged. Exit status 74."""

    exit_status = 74


class NumericalError(UserError):
    """Training cannot go on: the loss is not finite. Exit status 76."""

    exit_status = 76


class LostRankError(UserError):
    """Another rank of the run is gone or does not answer; the run can be continued. Exit status 75."""

    exit_status = 75


def nearest(value: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the candidate closest to `value`, or `""` where none is near."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    matches = get_close_matches(value.lower(), lowered, n=1, cutoff=0.55)
    return f"; did you mean '{lowered[matches[0]]}'?" if matches else ""
