"""The layer sliders in a real browser: they show another layer in all their plots, and hostile names stay texts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_matters.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
    ),
]

HOSTILE = "<img src=x onerror=\"document.documentElement.dataset.canary='1'\">@{value}${x}"
SLIDE = """
const input = document.querySelector(`input[data-plots=${arguments[0]}]`);
input.value = arguments[1];
input.dispatchEvent(new Event("input"));
return input.parentElement.querySelector("output").textContent;
"""
SHOWN = """
return Bokeh.documents[0].roots().filter(p => p.name === arguments[0]).map(p => {
  const source = p.renderers[0].data_source;
  return Array.from(source.get_column(arguments[1]) || []);
});
"""
RANGES = "return Bokeh.documents[0].roots().map(p => [p.y_range.start, p.y_range.end])"


@pytest.fixture
def page(make_run: Callable[..., Path], add_measurements: Callable[..., None]) -> Path:
    run = make_run("run", [{}] * 3)
    add_measurements(run, [1, 2, 3], weights=["conv1", HOSTILE, "fc"], norms=["bn1", HOSTILE], inputs=True)
    return write_report(run)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_slider_shows_another_layer_in_all_its_plots(page: Path, open_page: Callable, width: int) -> None:
    browser = open_page(page, width)
    assert browser.execute_script("return document.querySelectorAll('figure').length") == 5 + 3 + 5 + 1
    assert browser.execute_script("return document.documentElement.scrollWidth") == width, "scrolls sideways"
    expected = {index: browser.execute_script(SHOWN, "slider-weights", f"value-{index}") for index in (0, 1, 2)}
    norms = browser.execute_script(SHOWN, "slider-norms", "value")
    before = browser.execute_script(RANGES)
    assert browser.execute_script(SHOWN, "slider-weights", "value") == expected[0]
    assert len(expected[0]) == 3
    assert all(first != last for first, last in zip(expected[0], expected[2], strict=True))
    for index, name in ((2, "3: fc"), (1, f"2: {HOSTILE}"), (0, "1: conv1"), (2, "3: fc")):
        assert browser.execute_script(SLIDE, "slider-weights", index) == name
        assert browser.execute_script(SHOWN, "slider-weights", "value") == expected[index]
        assert browser.execute_script(SHOWN, "slider-norms", "value") == norms
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    after = browser.execute_script(RANGES)
    assert [one != other for one, other in zip(before, after, strict=True)] == [False] * 5 + [True] * 3 + [False] * 6
    assert browser.execute_script(SLIDE, "slider-norms", 1) == f"2: {HOSTILE}"
    assert browser.execute_script(SHOWN, "slider-norms", "value") != norms
    quiet = [entry for entry in browser.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")]
    assert quiet == []
    assert browser.execute_script("return document.documentElement.dataset.canary") is None


def test_the_pointer_shows_numbers_and_names_as_text(page: Path, open_page: Callable) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = open_page(page, 1280)
    texts = """
      const found = [];
      (function visit(node) {
        for (const element of node.querySelectorAll("*")) {
          found.push([...element.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join(""));
          if (element.shadowRoot) visit(element.shadowRoot);
        }
      })(document);
      return found.join("|");
    """
    figures = browser.find_elements("css selector", ".part figure")
    for figure, expected in ((figures[1], "equilibrium"), (figures[-1], f"2: {HOSTILE}")):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
        ActionChains(browser).move_to_element(figure).perform()
        browser.execute_async_script("setTimeout(arguments[0], 300)")
        assert expected in browser.execute_script(texts)
    assert browser.execute_script("return document.documentElement.dataset.canary") is None
