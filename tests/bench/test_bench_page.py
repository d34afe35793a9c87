"""The pages of `bench norms`, `bench train` and `bench input`."""

import html
import json
import re

import pytest

from norm_matters.bench.input import InputRow
from norm_matters.bench.norms import NormRow
from norm_matters.bench.page import Ratio, bench_page, input_page, norms_page, train_page, write_norms, write_page
from norm_matters.bench.train import TrainMeasurement
from norm_matters.core.errors import StorageError

PROVENANCE = {"command": ["norm-matters", "bench", "norms"], "package": {"commit": "abc123"}, "bandwidth": "9 GB/s"}


def norm_row(norm: str, implementation: str, ratio: float | None, shape: str = "2x3x4x5", **others) -> NormRow:
    row = NormRow(norm, "relu", shape, "float32", "contiguous", implementation, 12.345, ratio, 6.0, 0.486, 1234, 56789)
    return row._replace(**others)


def plots(page: bytes) -> list[dict]:
    """Of each plot: heading, shape -> ratios by series, where its rule is."""
    text = page.decode()
    match = re.search(r"docs_json = '(.*?)';", text)
    assert match is not None
    (document,) = json.loads(html.unescape(match[1].encode().decode("unicode_escape"))).values()
    found = []
    for root in document["roots"]:
        figure = root["attributes"]
        dots = {}
        for renderer in figure["renderers"]:
            data = dict(renderer["attributes"]["data_source"]["attributes"]["data"]["entries"])
            dots[data["series"][0]] = dict(zip(data["place"], data["ratio"], strict=True))
        rules = [item["attributes"]["location"] for item in figure["center"] if item.get("name") == "Span"]
        found.append({"dots": dots, "rules": rules})
    return found


def test_norms_page_shows_ratios_table_and_provenance():
    rows = [
        norm_row("l1", "cpu", 1.684),
        norm_row("l1", "cpu", 2.5, "8x8x8x8"),
        norm_row("linf", "reference", 0.5, layout="channels_last"),
        norm_row("nn.BatchNorm2d", "native", 1.0),
    ]
    page = norms_page(rows, PROVENANCE)
    first, second = plots(page)
    assert first == {"dots": {"l1 · cpu": {"2x3x4x5": "1.684", "8x8x8x8": "2.5"}}, "rules": [1]}
    assert second["dots"] == {"linf · reference": {"2x3x4x5": "0.5"}}
    text = page.decode()
    for part in (
        ">relu, contiguous</h3>",
        "<td>2.09</td>",  # the median over the shapes
        "<td>2x3x4x5</td><td>contiguous</td><td>cpu</td><td>1.684</td>",
        # What is the same everywhere has no column.
        "form: relu; dtype: float32; milliseconds: 12.35; floor ms: 6; share of floor: 0.486; kept bytes: 1,234;",
        "norm-matters bench norms",
        "package.commit",
        "abc123",
        "9 GB/s",
        "4 measurements",
    ):
        assert part in text, part
    # The page's own policy forbids requests; and there is nothing in it to ask for one.
    assert "default-src &#x27;none&#x27;" in text
    assert "<script src" not in text
    # No column for errors where there are none.
    assert ">error</span>" not in text


def test_failures_are_in_the_table_and_not_among_the_dots():
    failed = NormRow("l1", "relu", "2x3x4x5", "float32", "contiguous", "compiled", error="no <compiler>")
    page = norms_page([failed, norm_row("l2", "cpu", 2.0)], PROVENANCE)
    (plot,) = plots(page)
    assert list(plot["dots"]) == ["l2 · cpu"]
    assert "<td>no &lt;compiler&gt;</td>" in page.decode()
    # Nothing to draw at all.
    text = norms_page([failed], PROVENANCE).decode()
    assert "<figure" not in text
    assert "no &lt;compiler&gt;" in text


def test_dtypes_have_panels_of_their_own():
    page = norms_page([norm_row("l1", "cpu", 2.0), norm_row("l1", "cpu", 3.0, dtype="bfloat16")], {})
    text = page.decode()
    assert ">relu, contiguous, float32</h3>" in text
    assert ">relu, contiguous, bfloat16</h3>" in text
    assert [plot["dots"]["l1 · cpu"]["2x3x4x5"] for plot in plots(page)] == ["2", "3"]


def test_a_button_for_each_series_that_is_drawn():
    names = [f"series {index}" for index in range(9)]
    ratios = [Ratio("panel", "place", name, index + 0.5, "") for index, name in enumerate(names)]
    text = bench_page("Title", "subtitle", ratios, [{"a": 1}], {}, axis="faster by").decode()
    assert text.count('aria-pressed="true"') == 9
    # The colours come again after seven; the shape of the dots does not.
    buttons = re.findall(r'<button.*?color: (#\w+)" aria-hidden="true">(.)</span>series (\d)</button>', text)
    assert len({button[:2] for button in buttons}) == len(buttons)
    sides = re.findall(r'<button[^>]*data-series="(series-\d)"', text)
    assert sides == [f"series-{index}" for index in range(9)]
    assert all(f'"name":"{side}"' in text for side in sides)


def train_row(side: str, pages: str, ratio: float, **others) -> TrainMeasurement:
    values = {
        "model": "resnet20", "norm": "l1" if side == "ours" else "nn.BatchNorm2d", "batch_size": 128, "image_size": 32,
        "dataset": "<b>noise", "device": "cpu", "what": "step", "side": side, "layout": "contiguous",
        "compiled": False, "pages": pages, "workers": 0, "threads": 2, "seconds": 0.25,
        "images_per_second": 512.0, "ours_is_faster_by": ratio, "rounds": 9,
    }  # fmt: skip
    return TrainMeasurement(**{**values, **others})


def test_train_page():
    rows = [
        train_row("ours", "kept", 1.0, images_per_second=727.5),
        train_row("plain", "kept", 1.36, compiled=True),
        train_row("plain", "returned", 1.41, workers=2),
    ]
    page = train_page(rows, PROVENANCE)
    (plot,) = plots(page)
    assert plot["dots"] == {
        "plain · nn.BatchNorm2d · pages kept": {"contiguous, compiled": "1.36"},
        "plain · nn.BatchNorm2d · pages returned · 2 workers": {"contiguous, eager": "1.41"},
    }
    text = page.decode()
    for part in (
        "727.5 images per second",
        "seconds: 0.25",
        "<td>yes</td>",
        "<td>1.36</td>",
        "abc123",
        "&lt;b&gt;noise",
    ):
        assert part in text, part
    assert "<b>noise" not in text


def test_input_page():
    rows = [
        InputRow("small", "norm-matters", 0, 2048, 9, 90_000.0, 1.0, 2.0, 90_000.0, 1.0),
        InputRow("small", "torchvision", 1, 2048, 9, 9_000.0, 1.0, 2.0, 9_000.0, 10.25),
        InputRow("folder", "norm-matters", 1, 256, 9, 300.0, 1.0, 2.0, 300.0, 1.0),
        InputRow("folder", "timm", 2, 256, 9, 250.0, 1.0, 2.0, 125.0, 1.2),
    ]
    page = input_page(rows, PROVENANCE)
    assert [plot["dots"] for plot in plots(page)] == [
        {"torchvision": {"1 worker": "10.25"}},
        {"timm": {"2 workers": "1.2"}},
    ]
    assert "<td>90,000</td>" in page.decode()


def test_files(tmp_path):
    rows = [norm_row("l1", "cpu", 2.0), NormRow("l1", "relu", "2x3x4x5", "float32", "contiguous", "compiled")]
    table, page = write_norms(tmp_path / "new", rows, PROVENANCE)
    assert table.read_text().splitlines() == [
        "norm,form,shape,dtype,layout,implementation,milliseconds,speedup,floor_ms,share_of_floor,kept_bytes,"
        "peak_bytes,error",
        "l1,relu,2x3x4x5,float32,contiguous,cpu,12.345,2,6,0.486,1234,56789,",
        "l1,relu,2x3x4x5,float32,contiguous,compiled,,,,,,,",
    ]
    assert plots(page.read_bytes()) == plots(norms_page(rows, PROVENANCE))
    assert write_page(tmp_path / "new", "other.html", b"x").read_bytes() == b"x"
    with pytest.raises(StorageError):
        write_page(table, "norms.html", b"x")
