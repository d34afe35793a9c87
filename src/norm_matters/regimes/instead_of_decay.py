"""What a phase sets in the place of weight decay, for weights that a norm follows. Imports no torch.

    - {epoch: 0, lr: 0.1, momentum: 0.9, instead_of_decay: {form: lr-correction, every: epoch}}

Weight decay shortens such a weight w, and its direction turns by lr / |w|^2 per unit of gradient: the shorter, the
faster. Each form brings the same about without decay, for every output channel i of the layers that it is for. d is the
weight in a recorded run with decay:

- `lr-correction`: the LR of channel i times |w_i|^2 / |d_i|^2;
- `norm-schedule`: a constant LR; after a step channel i gets the norm |d_i| sqrt(constant LR / the phase's LR);
- `exponential-lr`: an LR that grows so that all directions are those of a run with decay, momentum included; no norms.

| key | for | meaning |
|---|---|---|
| `every` | lr-correction | `epoch`: norms that d has at the end of the same epoch; `step`: before the same step |
| `decay` | lr-correction | of d: the LR is divided by 1 - lr decay too, as is exact for plain SGD; 0 if left out |
| `shuffle` | lr-correction | a seed: channel i gets the norm of another channel of its layer, as a control |
| `lr` | norm-schedule | the constant LR |
| `decay` | exponential-lr | the weight decay that it stands for |
| `layers` | all | a regular expression that is found in their names; all but the last layer if left out |

The norms are those of the run that `regime.norms` names. A layer is a convolution or a linear layer; only its weight is
meant, which must have no decay beside it. `docs/weight_decay.md` derives the formulas.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from norm_matters.core.errors import UserError, nearest

KEY = "instead_of_decay"


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return text


class _Form(BaseModel):
    """What the forms share; the description of a field says what it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    name: ClassVar[str]
    needs_norms: ClassVar[bool] = True
    layers: Annotated[str, AfterValidator(_expression)] | None = Field(
        default=None, description="a regular expression for names of layers"
    )


class LrCorrection(_Form):
    """`lr-correction`; see above."""

    name: ClassVar[str] = "lr-correction"
    every: Literal["epoch", "step"] = Field(default="epoch", description="epoch or step")
    decay: float = Field(default=0.0, ge=0, description="a number from 0")
    shuffle: int | None = Field(default=None, ge=0, description="a whole number from 0")


class NormSchedule(_Form):
    """`norm-schedule`; see above."""

    name: ClassVar[str] = "norm-schedule"
    lr: float = Field(gt=0, description="a number above 0")


class ExponentialLr(_Form):
    """`exponential-lr`; see above."""

    name: ClassVar[str] = "exponential-lr"
    needs_norms: ClassVar[bool] = False
    decay: float = Field(ge=0, description="a number from 0")


InsteadOfDecay = LrCorrection | NormSchedule | ExponentialLr

_FORMS: Mapping[str, type[InsteadOfDecay]] = {form.name: form for form in (LrCorrection, NormSchedule, ExponentialLr)}


def parse_instead_of_decay(value: Any, where: str) -> InsteadOfDecay | None:
    """Read the mapping described above; null means none.

    Args:
        where: what messages call it, e.g. `regime.phases[0].instead_of_decay`.

    Raises:
        UserError: with all that is wrong.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where}: {value!r} is no mapping such as {{form: lr-correction, every: epoch}}")
    form, rest = value.get("form"), {key: item for key, item in value.items() if key != "form"}
    if form is None:
        raise UserError(f"{where}.form: missing; there are: {', '.join(_FORMS)}")
    if not isinstance(form, str) or form not in _FORMS:
        hint = nearest(str(form), _FORMS) or f"; there are: {', '.join(_FORMS)}"
        raise UserError(f"{where}.form: unknown form '{form}'{hint}")
    kind = _FORMS[form]
    try:
        return kind.model_validate(rest)
    except ValidationError as error:
        raise UserError(*(_line(kind, detail, where) for detail in error.errors(include_url=False))) from None


def _line(kind: type[InsteadOfDecay], detail: Any, where: str) -> str:
    """What is wrong with one key."""
    key, fields = str(detail["loc"][0]), kind.model_fields
    if detail["type"] == "extra_forbidden":
        hint = nearest(key, fields) or f"; there are: {', '.join(fields)}"
        return f"{where}.{key}: unknown key of {kind.name}{hint}"
    what = f"it takes {fields[key].description}"
    if detail["type"] == "missing":
        return f"{where}.{key}: missing; {what}"
    return f"{where}.{key}: value {detail['input']!r} is not valid; {what}"
