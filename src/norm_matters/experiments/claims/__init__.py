"""The paper's experiments as code, and the project's own questions: one file each, with a `Recipe`.

A new one is one file and one `register` line below. Importing this package imports no torch.
"""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.experiments.claims.performing import Result, reproduce
    from norm_matters.experiments.claims.planning import ExperimentPlan, plan_experiment
    from norm_matters.experiments.claims.recipe import Recipe

_ROOM = "norm_matters.experiments.claims"

RECIPES: "Registry[Recipe]" = Registry("experiment")
for _id, _summary in {
    "invariance": "the identities behind the paper, in float64",
    "wd": "weight decay acts through the effective step size (WD-1, WD-2, WD-3)",
    "lp": "L1, Linf and Top(k) in place of L2 (LP-1, LP-2)",
    "constant": "what the constant of L1 is for (LP-3)",
    "half": "statistics in few bits: L1 trains, L2 diverges (HP-1, HP-2)",
    "bounded": "bounded weight norm beside batch norm and weight norm (BW-1)",
    "cost": "bytes, passes and time of each norm",
    "l1-l2": "is L1 within 0.2 points of L2?",
    "batch-size": "L1, L2, Top(k) and group norm from small batches to large",
    "resnet18": "timm's resnet18 with L1 and with L2",
}.items():
    RECIPES.register(_id, f"{_ROOM}.{_id.replace('-', '_')}:RECIPE", summary=_summary)

__all__ = ["RECIPES", "ExperimentPlan", "Recipe", "Result", "plan_experiment", "reproduce"]

__getattr__ = lazy_attributes(
    __name__,
    {
        "performing": ("Result", "reproduce"),
        "planning": ("ExperimentPlan", "plan_experiment"),
        "recipe": ("Recipe",),
    },
)
