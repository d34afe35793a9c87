"""The pages: a card for every norm, valid specs, links that lead somewhere, examples that run, tables as measured."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from norm_matters.norms import NORMS, canonical_spec, check_spec, create_norm

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "norms"
CARDS = sorted(FOLDER.glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text())


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def claimed_specs(page: Path) -> list[str]:
    """The specs in a card's line `Spec: ...`, and in the first column of the index."""
    lines = re.findall(r"^(?:Spec: (.*)|\| (`[^|]*`) \|.*\.md\) \|)$", prose(page), re.MULTILINE)
    return [spec for line in lines for spec in in_backticks("".join(line))]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def load_script(name: str) -> ModuleType:
    """A module of docs/norms, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_norms_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets an example register norms that no other test sees."""
    monkeypatch.setattr(NORMS, "_targets", dict(NORMS._targets))
    monkeypatch.setattr(NORMS, "_summaries", dict(NORMS._summaries))


def test_every_norm_has_a_card_and_a_line_in_the_index() -> None:
    index = FOLDER / "README.md"
    on_cards = {spec.partition(":")[0] for page in CARDS if page != index for spec in claimed_specs(page)}
    assert on_cards == set(NORMS.names())
    assert [spec.partition(":")[0] for spec in sorted(claimed_specs(index))] == sorted(NORMS.names())


def test_cards_have_the_same_sections() -> None:
    wanted = ["computes?", "Constant", "Cost", "In low precision", "When to use", "Options", "Source"]
    for page in CARDS:
        if claimed_specs(page) and page.name != "README.md":
            headings = re.findall(r"^## (.*)$", prose(page), re.MULTILINE)
            assert len(headings) == len(wanted), page_name(page)
            for heading, pattern in zip(headings, wanted, strict=True):
                assert re.search(pattern, heading), f"{page_name(page)}: {heading}"


def test_cards_name_every_option_of_their_norm() -> None:
    from norm_matters.norms.batchwise import BATCH_OPTIONS

    for page in CARDS:
        for spec in claimed_specs(page):
            norm = NORMS.get(spec.partition(":")[0])
            options = prose(page).partition("## Options")[2] or prose(page)
            for key in set(norm.OPTIONS) - set(BATCH_OPTIONS):
                assert f"`{key}`" in options, f"{page_name(page)}: {key}"


def test_specs_that_are_claimed_are_canonical() -> None:
    for page in CARDS:
        for spec in claimed_specs(page):
            assert spec == canonical_spec(spec), page_name(page)


@pytest.mark.parametrize("page", CARDS, ids=page_name)
def test_specs_are_valid(page: Path, registry: None) -> None:
    """What has a registered norm's name and a colon is a spec; a norm that the page itself registers counts too."""
    for own in re.findall(r'NORMS\.register\("(\w+)"', page.read_text()):
        # Its options are those of its class, which the examples build; here its name is enough.
        NORMS.register(own, "norm_matters.norms.l1:L1Norm")
    for text in in_backticks(prose(page)):
        name, colon, _ = text.partition(":")
        if colon and name in NORMS:
            check_spec(text)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page_name(page)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page_name(page)}: {link}"


def examples(page: Path) -> list[str]:
    return [code for language, code in FENCED.findall(page.read_text()) if language == "python"]


@pytest.mark.parametrize("page", [page for page in CARDS if examples(page)], ids=page_name)
def test_examples_run(page: Path, registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, given `model`, a network with batch norms."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look their class up
    module.__dict__["model"] = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    with torch.random.fork_rng(devices=[]):
        for number, code in enumerate(examples(page), start=1):
            exec(compile(code, f"{page_name(page)}, block {number}", "exec"), module.__dict__)


def test_tables_say_what_was_measured() -> None:
    tables = load_script("tables")
    for page in CARDS:
        assert tables.fill(page.read_text()) == page.read_text(), f"python docs/norms/plots.py --tables: {page.name}"


def test_plots_are_there_and_small() -> None:
    drawn = {norm for norm, panel, _ in load_script("tables").read_numbers() if panel == "slope"}
    assert drawn == {path.stem for path in FOLDER.glob("*.png")}
    for path in FOLDER.glob("*.png"):
        assert path.stat().st_size <= 60_000
        assert f"({path.name})" in (FOLDER / f"{path.stem}.md").read_text()


def test_measured_numbers_are_those_of_the_code() -> None:
    """plots.csv was made by this code: some of its numbers anew."""
    numbers = load_script("tables").read_numbers()
    for name, spec in {"l1": "l1", "linf": "linf", "topk": "topk:k=10", "lp": "lp:p=3", "range": "range"}.items():
        norm: Any = create_norm(spec, 64, affine=False)
        assert numbers[name, "spread", "Gaussian"].at(1024) == pytest.approx(norm.spread(1024), rel=1e-3)
        for constant in ("calibrated", "paper"):
            x = torch.randn((1, 256, 1024), generator=torch.Generator().manual_seed(5))
            y: torch.Tensor = create_norm(spec, 256, affine=False, constant=constant)(x)
            rms = float(y.square().mean().sqrt())
            assert numbers[name, "rms", f"Gaussian, {constant}"].at(1024) == pytest.approx(rms, rel=0.02)
