"""Twelve hostile texts in every field of every kind of page, in a real browser: none runs, none asks for anything."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from norm_matters.bench.numerics import Measurement
from norm_matters.bench.numerics_page import numerics_page
from norm_matters.bench.page import Ratio, bench_page
from norm_matters.report import compare, write_report
from norm_matters.report.groups import Group
from norm_matters.report.read import read_run
from norm_matters.report.sweep import SweepArm, write_sweep_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
    ),
]

SET = "document.documentElement.dataset.canary"
HOST = "http://127.0.0.1:9"
PAYLOADS = {
    "script": f"<script>{SET}=1</script>",
    "image": f'<img src=x onerror="{SET}=2">',
    "attribute": f'"><svg onload={SET}=3>',
    "quote": f"'; {SET}=4; '",
    "end of script": f"</script><script>{SET}=5</script>",
    "address": f"javascript:{SET}=6",
    "template": f"{{{{constructor.constructor('{SET}=7')()}}}}",
    "interpolation": f"${{{SET}=8}}`+({SET}=8)+`",
    "frame": f"<iframe src='{HOST}/9'></iframe><object data='{HOST}/9'></object><base href='{HOST}/'>",
    "line separator": f"\u2028{SET}=10\u2028//--><!--",
    "style": f"<style>@import '{HOST}/11';</style><link rel=stylesheet href='{HOST}/11'><body background='{HOST}/11'>",
    "tooltip": f'@{{label}}{{safe}} @text{{safe}} $name <b onmouseover="{SET}=12" onload="{SET}=12">b</b>',
}
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
FOREIGN = (
    COLLECT
    + """
const tags = ["IMG", "IFRAME", "OBJECT", "EMBED", "BASE", "FORM", "AUDIO", "VIDEO"];
const handlers = elements.filter(e => [...e.attributes].some(a => a.name.startsWith("on")));
return [...elements.filter(e => tags.includes(e.tagName)), ...handlers].map(e => e.outerHTML.slice(0, 200));
"""
)


def folder_name(payload: str) -> str:
    return payload.replace("/", "\u2215")[:120]


def assert_inert(browser, page: Path) -> None:
    """Nothing ran, nothing of the texts became an element, and nothing but the page was asked for."""
    assert browser.execute_script(f"return {SET}") is None
    assert browser.execute_script(FOREIGN) == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    policy = browser.execute_script("return document.querySelector('meta[http-equiv]').content")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def point_at_the_plots(browser) -> None:
    """Have the tooltips shown."""
    from selenium.webdriver.common.action_chains import ActionChains

    for figure in browser.find_elements("css selector", "figure")[:3]:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
        ActionChains(browser).move_to_element(figure).perform()
        browser.execute_async_script("setTimeout(arguments[0], 200)")


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_report(payload: str, make_run: Callable[..., Path], open_page: Callable) -> None:
    provenance = {
        "command": ["norm-matters", payload],
        "data": {"val": payload, "classes": [payload, "b"]},
        "package": {"version": payload, "commit": payload, "dirty": True},
        "events": [{"event": payload, "epoch": 1, "error": payload, "command": [payload]}],
        payload: {payload: payload},
    }
    run = make_run(folder_name(payload), [{}] * 3, model=payload, norm=payload, dataset=payload, provenance=provenance)
    page = write_report(run)
    browser = open_page(page, 1280)
    point_at_the_plots(browser)
    assert_inert(browser, page)


def test_comparison(make_run: Callable[..., Path], tmp_path: Path, open_page: Callable) -> None:
    runs = [
        make_run(folder_name(payload), [{}] * 3, model=payload, norm=payload, dataset=payload, seed=seed)
        for payload in PAYLOADS.values()
        for seed in (0,)
    ]
    page = compare(runs, tmp_path / "page.html").page
    browser = open_page(page, 1280)
    point_at_the_plots(browser)
    assert_inert(browser, page)


def test_sweep(make_run: Callable[..., Path], tmp_path: Path, open_page: Callable) -> None:
    columns = [f"{name}val_error1_{part}" for name in ("", "best_") for part in ("mean", "sd", "low", "high")]
    columns += ["baseline", "pairs", "difference", "difference_low", "difference_high", "p_t", "p_holm"]
    arms = [
        SweepArm(
            Group(payload, [read_run(make_run(folder_name(payload), [{}] * 3, model=payload))]),
            [4.0 + number],
            {**dict.fromkeys(columns), "runs": 1, "n": 1, "val_error1_mean": 4.0 + number, "baseline": payload},
        )
        for number, payload in enumerate(PAYLOADS.values())
    ]
    texts = list(PAYLOADS.values())
    runs = [
        {"run": text, "norm": text, "error": text, "val_error1": 1.0, **dict.fromkeys(texts, text)} for text in texts
    ]
    page = tmp_path / "summary.html"
    everything = " ".join(PAYLOADS.values())
    write_sweep_page(
        page, everything, everything, arms, metric="val_error1", measured=everything, runs=runs, notes=[everything]
    )
    browser = open_page(page, 1280)
    point_at_the_plots(browser)
    assert_inert(browser, page)


def test_bench(tmp_path: Path, open_page: Callable) -> None:
    texts = list(PAYLOADS.values())
    ratios = [Ratio(texts[n % 2], text, texts[n % 3], 1.0 + n, text) for n, text in enumerate(texts)]
    rows = [{"name": text, "value": 1.0, **dict.fromkeys(texts, text)} for text in texts]
    everything = " ".join(texts)
    page = tmp_path / "bench.html"
    provenance = {"command": texts, **{text: {text: text} for text in texts}}
    page.write_bytes(bench_page(everything, everything, ratios, rows, provenance, axis=everything, notes=texts))
    browser = open_page(page, 1280)
    point_at_the_plots(browser)
    assert_inert(browser, page)


def test_numerics(tmp_path: Path, open_page: Callable) -> None:
    rows = [
        Measurement(norm, "fp16", "fp32", "nearest", 1024, sigma, 1.0, 0.01, 0.01, "ok")
        for norm in PAYLOADS.values()
        for sigma in (1.0, 10.0)
    ]
    page = tmp_path / "numerics.html"
    page.write_bytes(numerics_page(rows))
    browser = open_page(page, 1280)
    point_at_the_plots(browser)
    assert_inert(browser, page)
