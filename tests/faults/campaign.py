"""Kill runs at random moments, resume them until they are done, and compare with a run that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oracle import Watch, fingerprint, read_on
from zygote import MODEL, RANK_TIMEOUT, Child, settings, start, wait

from norm_matters.record.folder import is_run

EPOCHS = 4
LONGEST = 60.0
"""Seconds after which a process that should have ended counts as one that hangs."""


def kills(
    folder: str,
    *,
    count: int,
    seed: int,
    ranks: int = 1,
    more: Sequence[str] = (),
    mutation: str | None = None,
    epochs: int = EPOCHS,
    part: Sequence[float] = (0.0, 1.0),
) -> dict[str, Any]:
    """Kill that many times.

    Args:
        folder: an empty one.
        ranks: processes of a run; one of them is killed, the others have to end by themselves.
        more: further settings of the runs.
        mutation: what is broken in the runs that are killed, not in the one that is not.
        part: of a whole run's life in which it is killed.

    Returns:
        `kills`, `runs`, `problems`; `life`: seconds of a whole run; `survivors`: seconds until those that were not
        killed had ended; `reads`: how often the reader beside them has read a whole run; `early`: kills before the run
        had a folder; `seconds`.
    """
    place, begun, draw = Path(folder), time.monotonic(), random.Random(seed)
    (place / "own.py").write_text(MODEL)
    whole = _Killed(place, "whole", ranks=ranks, more=more, epochs=epochs)
    life = whole.undisturbed()
    expected = fingerprint(whole.run)
    pointer, outcome = place / "current", place / "reader.json"
    _point(pointer, whole.run)
    reader = _fork(lambda: read_on(pointer, outcome))
    found: dict[str, Any] = {"kills": 0, "early": 0, "runs": 0, "problems": [], "survivors": [], "life": life}
    try:
        while found["kills"] < count:
            case = _Killed(place, f"run-{found['runs']}", ranks=ranks, more=more, epochs=epochs, mutation=mutation)
            _point(pointer, case.run)
            case.kill_until_done(found, draw, life, part, count)
            try:
                different = [name for name, value in fingerprint(case.run).items() if expected[name] != value]
                case.watch.at_the_end()
            except Exception as error:
                different = [f"{type(error).__name__}: {error}"]
            case.watch.problems += [f"at the end: other {', '.join(different)}"] if different else []
            found["problems"] += [f"{case.run.parent.name}: {problem}" for problem in case.watch.problems]
            found["runs"] += 1
            if not case.watch.problems:
                _point(pointer, whole.run)  # nobody reads what is being removed
                shutil.rmtree(case.run.parent, ignore_errors=True)
    finally:
        os.kill(reader, signal.SIGTERM)
        os.waitpid(reader, 0)
    read = json.loads(outcome.read_text())
    found["problems"] += read["problems"]
    return {**found, "reads": read["reads"], "seconds": time.monotonic() - begun}


class _Killed:
    """One run and its attempts."""

    def __init__(
        self, place: Path, name: str, *, ranks: int, more: Sequence[str], epochs: int, mutation: str | None = None
    ) -> None:
        self.run = place / name / "run"
        self.watch = Watch(self.run)
        self._text = place / f"{name}.txt"
        self._ranks = ranks
        self.mutation = mutation
        # Nobody ends a rank that waits for another which was killed before they met.
        self._waiting = [f"train.rank_timeout={RANK_TIMEOUT}"] if ranks > 1 else []
        self._settings = ["train", *settings(place, place / name, epochs=epochs), *more, *self._waiting]
        self._attempts = 0

    def start(self) -> list[Child]:
        """Begin the run, or continue it: by the same command, or by naming it, in turns."""
        self._attempts += 1
        named = self._attempts % 2 == 0 and is_run(self.run)
        arguments = ["train", "--resume", str(self.run), *self._waiting] if named else self._settings
        environment = {} if named else {"NORM_MATTERS_LAUNCH": self.run.parent.name}
        return start(arguments, self._text, ranks=self._ranks, environment=environment, mutation=self.mutation)

    def undisturbed(self) -> float:
        """Let it come to its end; the seconds that took."""
        begun = time.monotonic()
        children = self.start()
        wait(children, 300)
        assert [child.poll() for child in children] == [0] * self._ranks, self._text.read_text()
        return time.monotonic() - begun

    def kill_until_done(
        self, found: dict[str, Any], draw: random.Random, life: float, part: Sequence[float], count: int
    ) -> None:
        """Start it, kill it, and so on, until it is done or something is wrong."""
        while not self.watch.problems:
            children = self.start()
            # From the last kill on nobody is in its way.
            last = found["kills"] >= count
            if wait(children, LONGEST if last else draw.uniform(*part) * life):
                if any(child.status for child in children):
                    statuses = [child.status for child in children]
                    self.watch.problems.append(f"it ended with {statuses}: {self._text.read_text()[-1500:]}")
                return
            victim = draw.randrange(self._ranks)
            children[victim].send(signal.SIGKILL)
            killed = time.monotonic()
            if not wait(children, LONGEST):
                self.watch.problems.append("it hung")
                for child in children:
                    child.send(signal.SIGKILL)
                wait(children, LONGEST)
            if children[victim].status == -signal.SIGKILL:
                found["kills"] += 1
                found["early"] += not is_run(self.run)
                others = [child for child in children if child is not children[victim]]
                found["survivors"] += [round(max(child.ended - killed, 0.0), 3) for child in others]
                if any((child.status or 75) != 75 for child in others):
                    statuses = [child.status for child in children]
                    self.watch.problems.append(f"after a kill: {statuses}: {self._text.read_text()[-1500:]}")
            self.watch.after_a_kill()
            if self._attempts > 200:
                self.watch.problems.append("it makes no headway")


def each_call(
    folder: str, *, more: Sequence[str] = (), epochs: int = 1, every: int = 1, mutation: str | None = None
) -> dict[str, Any]:
    """Kill a run before each call that touches the disk, until one comes to its end; resume it; compare.

    Args:
        every: of how many calls one is taken.
        mutation: what is broken in the runs that are killed, not in the one that is not.

    Returns:
        `kills`, `problems`, `seconds`.
    """
    place, begun = Path(folder), time.monotonic()
    (place / "own.py").write_text(MODEL)
    whole = _Killed(place, "whole", ranks=1, more=more, epochs=epochs)
    whole.undisturbed()
    expected = fingerprint(whole.run)
    problems, kills, n = list[str](), 0, 1
    while True:
        killed = _Killed(place, f"call-{n}", ranks=1, more=more, epochs=epochs)
        killed.mutation = ",".join(filter(None, [mutation, f"die-at:{n}"]))
        children = killed.start()
        wait(children, LONGEST)
        if children[0].status == 0:
            break
        if children[0].status != -signal.SIGKILL:
            problems.append(f"call {n}: status {children[0].status} instead of a kill")
        kills += 1
        killed.watch.after_a_kill()
        killed.mutation = mutation
        problems += [f"call {n}: {problem}" for problem in _resumed(killed, expected)]
        shutil.rmtree(killed.run.parent)
        n += every
    return {"kills": kills, "problems": problems, "seconds": time.monotonic() - begun}


def _resumed(killed: _Killed, expected: dict[str, str]) -> list[str]:
    """Resume a killed run to its end; what is wrong then."""
    try:
        killed.undisturbed()
    except AssertionError as error:
        return [*killed.watch.problems, f"it did not come to its end: {error}"]
    killed.watch.at_the_end()
    different = [name for name, value in fingerprint(killed.run).items() if expected[name] != value]
    return killed.watch.problems + ([f"other {', '.join(different)}"] if different else [])


def _point(pointer: Path, run: Path) -> None:
    new = pointer.with_suffix(".new")
    new.write_text(str(run))
    new.replace(pointer)


def _fork(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    finally:
        os._exit(1)
