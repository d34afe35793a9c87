"""LP-3: L1 with a constant a quarter and four times as large, and whether gamma could have learned it away."""

import math

from norm_matters.experiments.claims.decide import compare, is_as_good, is_worse, together
from norm_matters.experiments.claims.recipe import Arm, Claim, Evidence, PaperCurve, Recipe, Verdict, Word
from norm_matters.experiments.claims.sizes import norm_scales, norm_setting

_C = math.sqrt(math.pi / 2)
_FIGURE = "l1_constant_imagenet_error"


def _matters(evidence: Evidence) -> Verdict:
    found = [compare(evidence, arm, "l1") for arm in ("quarter", "four")]
    return together("LP-3", found, words=[is_worse(each) for each in found])


def _start(evidence: Evidence) -> Verdict:
    alone = {arm: compare(evidence, arm, "l1") for arm in ("quarter", "four")}
    undone = {arm: compare(evidence, f"{arm}-undone", "l1") for arm in alone}
    # Where a constant alone costs nothing, there is nothing that gamma could undo.
    costly = [arm for arm in alone if is_worse(alone[arm]) == "holds"]
    further = [
        compare(evidence, arm, other)
        for arm, other in (
            ("gamma-four", "l1"),
            ("gamma-quarter", "l1"),
            ("quarter", "gamma-four"),
            ("four", "gamma-quarter"),
        )
        if evidence.ended(arm, other)
    ]
    decisive = [undone[arm] for arm in costly] or list(alone.values())
    words: list[Word] = [is_as_good(finding) if costly else "undecided" for finding in decisive]
    # Of a constant whose runs stopped it is not known what it costs: whether gamma undoes that is open.
    for finding in alone.values():
        if finding.lost and finding not in decisive:
            decisive.append(finding)
            words.append("undecided")
    others = [finding for finding in (*alone.values(), *undone.values(), *further) if finding not in decisive]
    return together("Q-GAMMA", [*decisive, *others], words=words)


RECIPE = Recipe(
    id="constant",
    question="Does the constant of L1 batch norm matter, although gamma can learn any factor?",
    claims=(
        Claim(
            "LP-3",
            "The constant matters: a quarter of it and four times it both cost accuracy.",
            "ResNet-18 on ImageNet, top-1 error with C x 1/4, 1, 4: 36.1, 33.9, 35.5.",
            "the 90% intervals of both differences from C lie below 0; it fails where either arm is as good",
            ("quarter", "l1", "four"),
            _matters,
        ),
        Claim(
            "Q-GAMMA",
            "What matters of the constant is the scale it gives the network at its start.",
            "",
            "each of the two constants that is worse than C for certain loses no more than the margin once gamma's "
            "start is scaled so that the output is as with C; open where neither is worse, or runs of either stopped",
            ("quarter", "four", "quarter-undone", "four-undone", "l1"),
            _start,
        ),
    ),
    arms=(
        Arm("l1", "L1 with its constant C = sqrt(pi / 2).", norm_setting("l1")),
        Arm("quarter", "C / 4: outputs four times as large.", norm_setting(f"l1:constant={_C / 4:.6f}")),
        Arm("four", "4 C: outputs a quarter as large.", norm_setting(f"l1:constant={4 * _C:.6f}")),
        Arm(
            "quarter-undone",
            "C / 4, and gamma starts at 1/4: outputs as with C.",
            norm_setting(f"l1:constant={_C / 4:.6f},gamma=0.25"),
        ),
        Arm(
            "four-undone",
            "4 C, and gamma starts at 4: outputs as with C.",
            norm_setting(f"l1:constant={4 * _C:.6f},gamma=4"),
        ),
        Arm("gamma-four", "C, and gamma starts at 4: outputs as with C / 4.", norm_setting("l1:gamma=4")),
        Arm("gamma-quarter", "C, and gamma starts at 1/4: outputs as with 4 C.", norm_setting("l1:gamma=0.25")),
    ),
    baseline="l1",
    diverged=20.0,
    differs="Pairs of seeds in place of single runs. The controls with gamma's start scaled are not in the paper.",
    paper_curves={
        "l1": PaperCurve(_FIGURE, "one", "C"),
        "quarter": PaperCurve(_FIGURE, "quarter", "C / 4"),
        "four": PaperCurve(_FIGURE, "four", "4 C"),
    },
    scales=norm_scales(small_about="80. 35 runs, about an hour and a quarter on 2 cores.", paper_epochs=81),
)
