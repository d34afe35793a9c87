"""The page of one run, in every state a run can be in."""

from collections.abc import Callable
from pathlib import Path

import pytest

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import note_unreadable
from norm_matters.report import write_report

STATES = ("done", "none", "one", "lost", "huge", "all lost", "all infinite", "all empty")


def body(page: Path) -> str:
    """The page without bokeh's own code, in which any word can occur."""
    return page.read_text().partition("<script>")[0].partition("</style>")[2]


@pytest.mark.parametrize("state", STATES)
def test_any_state_of_a_run_has_a_page(runs_in_all_states: dict[str, Path], state: str) -> None:
    folder = runs_in_all_states[state]
    page = write_report(folder)
    assert page == folder / "report.html"
    assert f"<h1>{state}</h1>" in body(page)
    assert "model.norm_precision" in body(page)


def test_the_page_tells_the_figures_of_a_run(make_run: Callable[..., Path]) -> None:
    rows = [{"val_error1": 20.0}, {"val_error1": 2.5}, {"val_error1": 4.0, "seconds": 125.0}]
    text = body(write_report(make_run("run", rows)))
    assert "resnet8 with l1 on digits, seed 0 · 3 of 3 epochs · validation: test" in text
    assert "last epoch (3)</span><b>96.00 %" in text
    assert "best epoch (2)</span><b>97.50 %" in text
    assert "<b>2 min 9 s</b>" in text
    assert "norm-matters train --name &#x27;two words&#x27;" in text
    for title in ("Loss", "Error@1 (%)", "Error@5 (%)", "Learning rate", "Training images per second"):
        assert f"<span>{title}</span>" in text
    for fact in ("model.name", "resnet8", "package.commit", "0123abc", "cat, dog", "events.0.event"):
        assert fact in text


def test_what_a_run_lacks_is_not_drawn(runs_in_all_states: dict[str, Path]) -> None:
    one = body(write_report(runs_in_all_states["one"]))
    assert "Error@5" not in one
    assert "<span>Loss</span>" in one
    none = write_report(runs_in_all_states["none"])
    assert "No epoch has ended yet" in body(none)
    assert "<figure" not in body(none)
    assert len(none.read_bytes()) < 100_000, "bokeh is embedded for no plot"


def test_a_lost_loss_is_said(runs_in_all_states: dict[str, Path]) -> None:
    text = body(write_report(runs_in_all_states["lost"]))
    assert "The training loss is not a finite number in epoch 2 and 1 later." in text
    assert "The validation loss is not a finite number in epoch 2 and 1 later." in text
    assert "not a finite number" not in body(write_report(runs_in_all_states["done"]))


def test_images_for_which_others_stood_in_are_counted(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [{}])
    assert "could not be read" not in body(write_report(folder))
    note_unreadable(folder, {"a.png": "a.png: no image"})
    assert "1 training image could not be read: others of the same class stood in." in body(write_report(folder))
    note_unreadable(folder, {"a.png": "a.png: no image", "b.png": "b.png: cut"})
    text = body(write_report(folder))
    assert "2 training images could not be read" in text
    assert "b.png: cut" in text


def test_a_page_is_replaced(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [{}])
    (folder / "report.html").write_text("old")
    assert "<h1>run</h1>" in write_report(folder).read_text()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "provenance.json",
        "report.html",
        "results.csv",
    ]


def test_hostile_texts_are_escaped(make_run: Callable[..., Path]) -> None:
    hostile = "</td></script><script>alert(1)</script>"
    provenance = {"data": {"val": hostile, "classes": [hostile]}, hostile: hostile}
    text = write_report(
        make_run("<b>name", [{}], model=hostile, norm=hostile, dataset=hostile, provenance=provenance)
    ).read_text()
    assert hostile not in text
    assert text.count("<script>") == text.count("</script>") == 3
    assert "<h1>&lt;b&gt;name</h1>" in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


def test_no_run_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_a_storage_error(make_run: Callable[..., Path]) -> None:
    folder = make_run("run", [{}])
    (folder / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(folder)
