"""From a spec's text to norms."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from norm_matters.core.errors import UserError
from norm_matters.norms import NORMS
from norm_matters.norms.base import Norm
from norm_matters.norms.batchwise import BATCH_OPTIONS
from norm_matters.norms.spec import Option, canonical_text, complete_options, parse_spec

_PLACE = ("device", "dtype")


class ResolvedSpec(NamedTuple):
    """A spec looked up: the norm's class and the options to construct it with."""

    norm: type[Norm]
    options: dict[str, Any]


def resolve_spec(spec: str, **options: Any) -> ResolvedSpec:
    """Look a spec up and check it, without building a norm.

    Args:
        spec: e.g. `topk:k=10`.
        options: defaults for what the spec does not say. Options that batch norms share (`momentum`, `stats_dtype`
            ...) are left out where the norm has no use for them; all others it must know.

    Raises:
        UserError: unknown norm or option, or an invalid value; names the nearest valid one.
    """
    parsed = parse_spec(spec)
    norm = NORMS.get(parsed.name)
    valid = norm.OPTIONS
    texts = _name_positional(spec, parsed.options, valid)
    stated = {key: valid[key].read(text) if key in valid else text for key, text in texts.items()}
    shared = {key: value for key, value in options.items() if key in valid or key not in BATCH_OPTIONS}
    values = {**shared, **stated}
    complete = complete_options(spec, values, valid)
    return ResolvedSpec(norm, {key: complete[key] for key in values})


def _name_positional(spec: str, texts: Mapping[str, str], valid: Mapping[str, Option]) -> dict[str, str]:
    """Give the value that was written without a key the key it belongs to."""
    if "" not in texts:
        return dict(texts)
    key = next((key for key, option in valid.items() if option.positional), None)
    if key is None:
        raise UserError(f"norm '{spec}': '{texts['']}' is no KEY=VALUE; write e.g. topk:k=10")
    return {given or key: text for given, text in texts.items()}


def canonical_spec(spec: str, **options: Any) -> str:
    """The text that equal norms share: `topk` and ` topk:k=10` give `topk:k=10`.

    Args:
        spec: any spec.
        options: as in `resolve_spec`.
    """
    norm, values = resolve_spec(spec, **options)
    return canonical_text(norm.name, complete_options(spec, values, norm.OPTIONS), norm.OPTIONS)


def check_spec(spec: str | None) -> None:
    """Raise UserError unless `spec` is None or names a norm and valid options of it; builds nothing."""
    if spec is not None:
        resolve_spec(spec)


def create_norm(spec: str, num_features: int, **options: Any) -> Norm:
    """Build a norm.

    Args:
        spec: e.g. `l1`, `topk:k=10`, `group:groups=8`.
        num_features: channels C of its input (N, C, *).
        options: defaults for what the spec does not say, and `device`, `dtype` of the parameters.

    Raises:
        UserError: unknown norm or option, or an invalid value.
    """
    return norm_factory(spec, **options)(num_features)


def norm_factory(spec: str | None, **options: Any) -> "NormFactory":
    """A function `num_features -> norm`; `spec=None` means `l2`. Arguments and errors as in `create_norm`."""
    return NormFactory("l2" if spec is None else spec, **options)


class NormFactory:
    """Builds norms of one spec; what models are given.

    Attributes:
        spec: canonical text.
    """

    def __init__(self, spec: str, **options: Any) -> None:
        self._place = {key: options.pop(key) for key in _PLACE if key in options}
        self._norm, self._options = resolve_spec(spec, **options)
        self.spec = canonical_spec(spec, **options)

    def __call__(self, num_features: int) -> Norm:
        """A new norm for `num_features` channels."""
        return self._norm(num_features, **self._options, **self._place)
