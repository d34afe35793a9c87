"""LP-1 and LP-2: L1, Linf and Top(10) in place of L2, and whether Linf's deficit is its constant or its noise."""

from norm_matters.experiments.claims.decide import WITHIN, WORSE, compare, is_worse, opposite, share, together, verdict
from norm_matters.experiments.claims.recipe import Arm, Claim, Evidence, PaperCurve, Recipe, Verdict, Word
from norm_matters.experiments.claims.sizes import norm_scales, norm_setting

_FIGURE = "lp_norms_imagenet_error"


def _as_l2(evidence: Evidence) -> Verdict:
    others = [compare(evidence, arm, "l2") for arm in ("linf", "topk") if evidence.ended(arm)]
    return verdict("LP-1", [compare(evidence, "l1", "l2"), *others], holds=WITHIN, fails=WORSE)


def _worse(evidence: Evidence) -> Verdict:
    linf = compare(evidence, "linf-paper", "l2")
    closed = share(evidence, "topk-paper", low="linf-paper", high="l2")
    topk = compare(evidence, "topk-paper", "l2")
    return together("LP-2", [linf, closed, topk], words=[is_worse(linf), closed.word])


def _noise(evidence: Evidence) -> Verdict:
    deficit = compare(evidence, "linf-paper", "l2")
    noise = share(evidence, "l2-noise-linf", low="l2", high="linf-paper")
    constant = share(evidence, "linf", low="linf-paper", high="l2")
    further = [compare(evidence, "l2-noise-linf", "l2"), compare(evidence, "linf", "linf-paper")]
    if evidence.ended("l2-noise-topk"):
        further.append(compare(evidence, "l2-noise-topk", "l2"))
    words: list[Word] = [is_worse(deficit), noise.word, opposite(constant.word)]
    return together("Q-NOISE", [deficit, noise, constant, *further], words=words)


RECIPE = Recipe(
    id="lp",
    question="Do L1, Linf and Top(10) batch norm do as well as L2, and if not, is it their constant or their noise?",
    claims=(
        Claim(
            "LP-1",
            "L1 does as well as L2.",
            "ResNet-18 on ImageNet, top-1 error of the last 10 epochs: 33.77 (L1), 33.72 (L2).",
            "the 90% interval of l1 less l2 lies inside the margin, or above it; it fails where it lies below",
            ("l1", "l2"),
            _as_l2,
        ),
        Claim(
            "LP-2",
            "Linf is worse, and Top(10) closes most of the gap.",
            "ResNet-18 on ImageNet, top-1 error: 36.17 (Linf), 34.21 (Top 10), 33.72 (L2).",
            "with the paper's constants, the interval of linf less l2 lies below 0, and that of the share that Top(10) "
            "closes above one half",
            ("linf-paper", "topk-paper", "l2"),
            _worse,
        ),
        Claim(
            "Q-NOISE",
            "Linf's deficit is the noise of its estimate of sigma, not its constant.",
            "",
            "Linf with the paper's constant is worse than L2 for certain, L2 with a sigma as noisy as Linf's loses "
            "more than half as much, and the calibrated constant makes up for less than half (Fieller's intervals)",
            ("l2", "linf", "linf-paper", "l2-noise-linf"),
            _noise,
        ),
    ),
    arms=(
        Arm("l2", "L2: plain batch norm.", norm_setting("l2")),
        Arm("l1", "L1.", norm_setting("l1")),
        Arm("linf-paper", "Linf with the paper's constant.", norm_setting("linf:constant=paper")),
        Arm("topk-paper", "Top(10) with the paper's constant.", norm_setting("topk:k=10,constant=paper")),
        Arm("linf", "Linf with the constant that makes Gaussian output of rms 1.", norm_setting("linf")),
        Arm("l2-noise-linf", "L2, sigma as noisy as Linf's.", norm_setting("noisy:base=l2,like=linf")),
        Arm("topk", "Top(10) with the calibrated constant.", norm_setting("topk:k=10")),
        Arm("l2-noise-topk", "L2, sigma as noisy as Top(10)'s.", norm_setting("noisy:base=l2,like=(topk:k=10)")),
    ),
    baseline="l2",
    diverged=20.0,
    differs="Pairs of seeds in place of single runs; each norm replaces all batch norms of the network.",
    paper_curves={
        "l2": PaperCurve(_FIGURE, "R18_L2", "L2"),
        "l1": PaperCurve(_FIGURE, "R18_L1", "L1"),
        "linf-paper": PaperCurve(_FIGURE, "R18_Linf", "Linf"),
        "topk-paper": PaperCurve(_FIGURE, "R18_Top10", "Top(10)"),
    },
    scales=norm_scales(small_about="95. 40 runs, about an hour and a half on 2 cores.", paper_epochs=95),
)
