"""`log.txt` of a run: what happened, and when. Imports no torch."""

from datetime import UTC, datetime
from pathlib import Path

from norm_matters.core.faults import fault_point
from norm_matters.record.files import append_file, storing


class RunLog:
    """Appends lines with the time (UTC) before them.

    Args:
        path: the file; made at the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        """Append a text; each of its lines gets the time.

        Raises:
            StorageError: it could not be written.
        """
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines = [f"{time} {printable_line(line)}\n" for line in text.splitlines()]
        with storing(self.path):
            fault_point("log")
        append_file(self.path, "".join(lines).encode())


def printable_line(line: str) -> str:
    """The text on one line, with control characters escaped.

    Names of files and classes may hold anything: nothing in a log, or on a terminal, may move the reader's cursor.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
