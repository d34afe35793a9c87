"""From a recipe to runs: each arm with each seed as a cell of a sweep, everything checked, nothing run or written."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from norm_matters.core.config import RunConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.claims.recipe import Arm, Choice, Recipe, Scale, window_accuracy
from norm_matters.experiments.executors import ON_THIS_MACHINE, Placement
from norm_matters.experiments.standing import Standing, conflicts, find_standing
from norm_matters.experiments.statistics import scipy_special

RUNS = "runs"
FIRST_OWN_SEED = 1000
"""From here on seeds are those of pilots and choices, which no comparison uses."""
DIVERGED = "stopped: NumericalError"
"""How the log of a run ends whose numbers were not finite."""


@dataclass(frozen=True)
class Member:
    """A run of an experiment.

    Attributes:
        arm: its name.
        cell: the run.
        after: names of the runs that must be done before.
        candidate: of the arm's choice, for a run that helps to choose; None for those that are compared.
    """

    arm: str
    cell: Cell
    after: tuple[str, ...] = ()
    candidate: Any = None

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.cell.config.seed


@dataclass(frozen=True)
class ExperimentPlan:
    """An experiment with everything checked.

    Attributes:
        recipe, scale: what is asked, and how large (the scale's name).
        arms: those that are run.
        seeds: of each arm.
        output: folder of the pages; verdicts and runs lie below.
        given: settings of the user's: dataset, device and the like.
        placement: where the runs are processes.
    """

    recipe: Recipe
    scale: str
    arms: Sequence[Arm]
    seeds: Sequence[int]
    output: Path
    given: Mapping[str, Any] = field(default_factory=dict)
    placement: Placement = field(default_factory=Placement)

    @property
    def name(self) -> str:
        """`wd-small`: of its page, of the folder of its verdicts and of that of its runs."""
        return f"{self.recipe.id}-{self.scale}"

    @property
    def folder(self) -> Path:
        """Where verdicts and tables lie."""
        return self.output / self.name

    @property
    def runs(self) -> Path:
        """Where the run folders lie."""
        return self.output / RUNS / self.name

    @property
    def size(self) -> Scale:
        """The scale itself."""
        return self.recipe.scale(self.scale)

    def settings_of(self, arm: Arm) -> dict[str, Any]:
        """Dotted key -> value: all that its runs share, but for what is chosen and the folders of other arms."""
        return {**self.size.config, "data.name": self.size.dataset, **arm.settings(self.scale), **self.given}

    def whole(self) -> "ExperimentPlan":
        """The same with all arms and seeds: verdicts are about whatever has been run, in this sitting or before."""
        arms = self.recipe.arms_at(self.scale)
        there = {
            int(seed)
            for arm in arms
            for folder in self.runs.glob(f"{arm.name}-s*")
            if (seed := folder.name.removeprefix(f"{arm.name}-s")).isdecimal() and int(seed) < FIRST_OWN_SEED
        }
        return replace(self, arms=arms, seeds=sorted(there.union(self.seeds)))

    def choosing(self) -> list[Member]:
        """The runs by which arms choose a setting; none where nothing is to be chosen."""
        choice = self.size.choice
        if choice is None:
            return []
        return [
            self._member(arm, seed, f"choice-{arm.name}-{index}", choice.of(arm.name, value), choice, value)
            for arm in self.arms
            for index, value in enumerate(choice.values)
            for seed in choice.seeds
        ]

    def comparing(self, chosen: Mapping[str, Any] | None = None) -> list[Member]:
        """The runs that are compared, all seeds of the first arm first.

        Args:
            chosen: arm -> value of the setting that it chose; unknown values are the first candidates.
        """
        choice = self.size.choice
        members = []
        for arm in self.arms:
            own = {} if choice is None else choice.of(arm.name, (chosen or {}).get(arm.name, choice.values[0]))
            members += [self._member(arm, seed, arm.name, own) for seed in self.seeds]
        return members

    def chosen(self) -> dict[str, Any]:
        """Arm -> the value it chose, of arms all of whose candidates have been run to their end."""
        found: dict[str, dict[int, list[float]]] = {}
        choice = self.size.choice
        for member in self.choosing():
            assert choice is not None
            accuracy = self.candidate_accuracy(member)
            if accuracy is not None:
                index = choice.values.index(member.candidate)
                found.setdefault(member.arm, {}).setdefault(index, []).append(accuracy)
        if choice is None:
            return {}
        whole = {
            arm: values
            for arm, values in found.items()
            if sum(map(len, values.values())) == len(choice.values) * len(choice.seeds)
        }
        return {
            arm: choice.values[max(values, key=lambda index: (math.fsum(values[index]), -index))]
            for arm, values in whole.items()
        }

    def candidate_accuracy(self, member: Member) -> float | None:
        """The held-out accuracy of a run that helps to choose, 0 where it diverged; None before its end."""
        standing = find_standing(member.cell, self.runs)
        if standing.status == "done":
            accuracy = window_accuracy(standing.rows, (0.75, 1.0))
            return accuracy if math.isfinite(accuracy) else 0.0
        return 0.0 if has_diverged(self.runs / member.cell.name) else None

    def check(self, members: Sequence[Member]) -> None:
        """Raise UserError where a folder is in the way, or holds a run with other settings."""
        from norm_matters.run import FREE_TO_CHANGE

        free = FREE_TO_CHANGE - {"train.epochs", "data.dir"}
        problems = [problem for member in members for problem in conflicts(member.cell, self.runs, free)]
        if problems:
            raise UserError(*dict.fromkeys(problems[:20]))

    def standings(self, members: Sequence[Member]) -> list[Standing]:
        """Where each run stands; what diverged has come to its end, and is not begun again."""
        found = []
        for member in members:
            standing = find_standing(member.cell, self.runs)
            if standing.status == "cut off" and has_diverged(self.runs / member.cell.name):
                standing = Standing(standing.cell, "failed", standing.rows)
            found.append(standing)
        return found

    def _member(
        self,
        arm: Arm,
        seed: int,
        stem: str,
        further: Mapping[str, Any],
        choice: Choice | None = None,
        candidate: Any = None,
    ) -> Member:
        """The run of an arm with a seed, its configuration complete."""
        folders = {other: str((self.runs / f"{other}-s{seed}").resolve()) for other in arm.after}
        settings = {
            **with_folders(self.settings_of(arm), folders),
            **further,
            **({"data.holdout": choice.holdout} if choice else {}),
            **self.given,
            "seed": seed,
        }
        config = checked(settings, local=self.placement.executor in ON_THIS_MACHINE)
        after = () if choice else tuple(f"{other}-s{seed}" for other in arm.after)
        return Member(arm.name, Cell(f"{stem}-s{seed}", config, {}), after, candidate)


def plan_experiment(
    recipe: Recipe,
    scale: str = "small",
    *,
    output: Path,
    arms: Sequence[str] = (),
    seeds: int | None = None,
    given: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
) -> ExperimentPlan:
    """Check everything; nothing is run or written.

    Args:
        arms: names; all of the scale unless given.
        seeds: how many; the recipe's unless given.
        given: dotted key -> value, of the settings that a user may choose: where the images are, the device.

    Raises:
        UserError: with what is wrong.
    """
    placement = placement or Placement()
    placement.check()
    if recipe.arms or recipe.compute:
        scipy_special()  # what decides in the end is looked for at the beginning
    if seeds is not None and seeds < 2:
        raise UserError(f"--seeds: value {seeds} is not valid; it takes a whole number from 2: one has no spread")
    if arms and not recipe.arms:
        raise UserError(f"--arms: {recipe.id} has none: it computes, and trains nothing")
    chosen = recipe.arms_at(scale, arms)
    count = seeds or recipe.scale(scale).seeds
    plan = ExperimentPlan(recipe, scale, chosen, range(count), output, dict(given or {}), placement)
    whole = plan.whole()
    whole.check([*whole.choosing(), *whole.comparing(whole.chosen())])
    return plan


def checked(settings: Mapping[str, Any], *, local: bool = True) -> RunConfig:
    """The complete configuration of these settings; UserError with what is wrong."""
    from norm_matters.run import CHECKS, complete

    checks = {key: check for key, check in CHECKS.items() if key != "device" or local}
    config = load_config(options=copy.deepcopy(dict(settings)), checks=checks)
    assert config.train.epochs is not None, "a recipe says how long it trains"
    return complete(config, epochs=config.train.epochs)


def with_folders(value: Any, folders: Mapping[str, str]) -> Any:
    """The value with `{ARM}` in its texts, however deep, replaced by the folder of that arm's run."""
    if isinstance(value, str):
        for arm, folder in folders.items():
            value = value.replace(f"{{{arm}}}", folder)
        return value
    if isinstance(value, Mapping):
        return {key: with_folders(item, folders) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_folders(item, folders) for item in value]
    return value


def has_diverged(folder: Path) -> bool:
    """Whether a run has stopped because its numbers were not finite, as the last line of its log tells."""
    try:
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()
    except OSError:
        return False
    # Where the page could not be written either, a warning stands behind it.
    said = [line for line in lines if "warning: no report" not in line]
    return bool(said) and DIVERGED in said[-1]
