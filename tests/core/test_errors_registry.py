"""Errors carry their exit status; registries import late and name what is near."""

import os

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


@pytest.fixture
def plugin(tmp_path):
    """A folder with an installed package that registers a norm; returns the environment that finds it."""

    def install(code: str) -> dict[str, str]:
        (tmp_path / "their_norms.py").write_text(code)
        information = tmp_path / "their_norms-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: their-norms\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("[norm_matters]\ntheirs = their_norms\n")
        return {**os.environ, "PYTHONPATH": str(tmp_path)}

    return install


def test_an_installed_package_adds_a_norm(plugin, command):
    code = """
from norm_matters.norms import NORMS
from norm_matters.norms.l1 import L1Norm

class Theirs(L1Norm):
    name = "theirs"

NORMS.register("theirs", Theirs, summary="a norm from outside")
"""
    output, errors = command("list", "norms", env=plugin(code)).communicate()
    assert "a norm from outside" in output
    assert errors == ""


def test_a_plugin_that_fails_is_named(plugin, command):
    process = command("train", "--norm", "theirs", env=plugin("raise RuntimeError('no luck')"))
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "the plugin 'theirs' (their_norms) cannot be loaded: RuntimeError: no luck" in errors
    assert "Traceback" not in errors
