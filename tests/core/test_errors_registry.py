"""Errors carry their exit status; registries import late and name what is near."""

import pytest

from norm_matters.core.errors import NumericalError, StorageError, UserError, nearest
from norm_matters.core.registry import Registry


@pytest.fixture
def planets() -> Registry:
    registry: Registry = Registry("planet")
    registry.register("venus", 2, summary="the second")
    registry.register("mars", "math:pi")
    return registry


def test_exit_status_and_problems() -> None:
    assert [kind.exit_status for kind in (UserError, StorageError, NumericalError)] == [2, 74, 76]
    error = UserError("one", "two")
    assert error.problems == ("one", "two")
    assert str(error) == "one\ntwo"
    assert issubclass(StorageError, UserError)


@pytest.mark.parametrize(
    ("value", "hint"),
    [("resnt20", "; did you mean 'resnet20'?"), ("RESNET20", "; did you mean 'resnet20'?"), ("xyz", ""), ("", "")],
)
def test_nearest(value: str, hint: str) -> None:
    assert nearest(value, ["resnet20", "VGG11"]) == hint


def test_a_target_is_imported_when_it_is_asked_for(planets: Registry) -> None:
    import math

    assert planets.get("venus") == 2
    assert planets.get("mars") == planets.get("mars") == math.pi
    assert planets.names() == ["venus", "mars"]
    assert planets.summary("venus") == "the second"
    assert "mars" in planets
    assert "pluto" not in planets


def test_a_broken_target_is_no_problem_until_it_is_asked_for(planets: Registry) -> None:
    planets.register("pluto", "no_such_module:planet")
    planets.check("pluto")
    with pytest.raises(ModuleNotFoundError):
        planets.get("pluto")


@pytest.mark.parametrize("ask", ["get", "check"])
def test_unknown_names(planets: Registry, ask: str) -> None:
    with pytest.raises(UserError, match="unknown planet 'venuz'; did you mean 'venus'\\?"):
        getattr(planets, ask)("venuz")
    with pytest.raises(UserError, match="unknown planet 'x'; there are: venus, mars"):
        getattr(planets, ask)("x")


def test_a_name_is_given_once(planets: Registry) -> None:
    with pytest.raises(ValueError, match="planet 'mars' is registered already"):
        planets.register("mars", 4)
