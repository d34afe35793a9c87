"""The pages in a real browser: they draw, say nothing, ask nobody for anything, and hostile texts stay texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_matters.report import compare, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
    ),
]

# A folder's name cannot hold a slash, so that the payload must do without an end tag.
HOSTILE = "<img src=x onerror=\"document.documentElement.dataset.canary='1'\">@{label}${x}"

# Everything that the page shows, also inside bokeh's shadow roots.
COLLECT = """
function visit(node, found) {
  for (const element of node.querySelectorAll("*")) {
    found.push(element);
    if (element.shadowRoot) visit(element.shadowRoot, found);
  }
  return found;
}
const elements = visit(document, []);
"""
TEXTS = COLLECT + "return elements.map(e => [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join(''))"


@pytest.fixture
def pages(make_run: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """Pages of runs whose every text is hostile."""
    provenance = {"data": {"val": HOSTILE, "classes": [HOSTILE]}, HOSTILE: HOSTILE}
    runs = [
        make_run(
            f"{HOSTILE}{seed}", [{}] * 3, model=HOSTILE, norm=norm, dataset=HOSTILE, seed=seed, provenance=provenance
        )
        for norm, seed in ((HOSTILE, 0), (HOSTILE, 1), ("l1", 2))
    ]
    return {
        "report": write_report(runs[0]),
        "empty": write_report(make_run("empty")),
        "compare": compare(runs, tmp_path / "page.html").page,
    }


def requests(browser) -> list[str]:
    """The addresses that the browser asked for since the page was opened, but for those inside the page."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("name", "plots"), [("report", 5), ("empty", 0), ("compare", 8)])
def test_pages_draw_quietly(pages: dict[str, Path], open_page: Callable, name: str, plots: int, width: int) -> None:
    browser = open_page(pages[name], width)
    canvases = COLLECT + "return elements.filter(e => e.tagName == 'CANVAS' && e.width > 100).length"
    assert browser.execute_script(canvases) >= plots
    assert browser.execute_script("return document.querySelectorAll('figure').length") == plots
    assert browser.execute_script("return document.documentElement.scrollWidth") == width, "scrolls sideways"
    assert [entry for entry in browser.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")] == []
    assert requests(browser) == [pages[name].as_uri()]
    assert browser.execute_script(COLLECT + "return elements.filter(e => e.tagName == 'IMG').length") == 0
    assert browser.execute_script("return document.documentElement.dataset.canary") is None


def test_the_pointer_shows_values_and_hostile_labels_as_text(pages: dict[str, Path], open_page: Callable) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser = open_page(pages["compare"], 1280)
    figure = browser.find_element("css selector", "figure")
    ActionChains(browser).move_to_element(figure).perform()
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    texts = browser.execute_script(TEXTS)
    for text in (f"{HOSTILE}0: 40", f"{HOSTILE}2: 40"):
        assert text in texts, "no tooltip with the groups' labels and their errors in epoch 2"
    assert browser.execute_script(COLLECT + "return elements.filter(e => e.tagName == 'IMG').length") == 0
    assert browser.execute_script("return document.documentElement.dataset.canary") is None


def test_the_legend_hides_a_series_in_all_plots(pages: dict[str, Path], open_page: Callable) -> None:
    browser = open_page(pages["report"], 390)
    visible = """
      return Bokeh.documents[0].roots().map(
        p => p.renderers.filter(r => r.visible).map(r => r.name).sort().join(" "))"""
    before = browser.execute_script(visible)
    assert [line.split().count("series-1") > 0 for line in before] == [True, True, True, False, False]
    button = browser.find_element("css selector", "button[data-series=series-1]")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    after = browser.execute_script(visible)
    assert not any("series-1" in line for line in after)
    assert all("series-0" in line for line in after[:3])
    button.click()
    assert browser.execute_script(visible) == before


def test_plots_zoom_together(pages: dict[str, Path], open_page: Callable) -> None:
    browser = open_page(pages["report"], 1280)
    browser.execute_script("Bokeh.documents[0].roots()[0].x_range.start = 2")
    starts = browser.execute_script("return Bokeh.documents[0].roots().map(p => p.x_range.start)")
    assert starts == [2] * 5
