"""Finding the run that an earlier attempt of a launch has begun."""

import json
from pathlib import Path

import pytest

from norm_matters.core.errors import UserError
from norm_matters.record import claim_run_folder, find_begun, launch_entry


def begin(output: Path, name: str, launch: object, started: str = "2026-01-01T00:00:00Z") -> Path:
    folder = claim_run_folder(output, name, "unused")
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "provenance.json").write_text(json.dumps({"launch": launch, "started": started}))
    return folder


def test_the_latest_run_of_the_launch_with_these_settings_is_found(tmp_path: Path) -> None:
    begin(tmp_path, "old", {"id": "a", "settings": "s"}, "2026-01-01T00:00:00Z")
    latest = begin(tmp_path, "an", {"id": "a", "settings": "s"}, "2026-01-02T00:00:00Z")
    begin(tmp_path, "other", {"id": "b", "settings": "s"}, "2026-01-03T00:00:00Z")
    begin(tmp_path, "else", {"id": "a", "settings": "t"}, "2026-01-03T00:00:00Z")
    assert find_begun(tmp_path, "a", "s") == latest
    assert find_begun(tmp_path, "c", "s") is None
    assert find_begun(tmp_path / "nowhere", "a", "s") is None


def test_a_clock_that_went_back_brings_back_no_earlier_run(tmp_path: Path) -> None:
    begin(tmp_path, "before-numbers", {"id": "a", "settings": "s"}, "2026-01-09T00:00:00Z")
    for day in (3, 2, 1):
        entry = launch_entry(tmp_path, "a", "s")
        begun = begin(tmp_path, f"day-{day}", entry, f"2026-01-0{day}T00:00:00Z")
        assert find_begun(tmp_path, "a", "s") == begun
    assert entry == {"id": "a", "settings": "s", "number": 3}
    assert launch_entry(tmp_path, "b", "s")["number"] == 1


@pytest.mark.parametrize("launch", [None, [], {}, {"id": "a"}, {"id": "a", "settings": "s", "number": "x"}])
def test_runs_without_a_launch_are_passed_over(launch: object, tmp_path: Path) -> None:
    begin(tmp_path, "plain", launch)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "provenance.json").write_text("{")
    assert find_begun(tmp_path, "a", "s") is None


def test_a_folder_that_was_claimed_and_no_more_can_be_claimed_again(tmp_path: Path) -> None:
    claim_run_folder(tmp_path, "mine", "unused")
    with pytest.raises(UserError, match="taken"):
        claim_run_folder(tmp_path, "mine", "unused")
    assert claim_run_folder(tmp_path, "mine", "unused", again=True) == tmp_path / "mine"
    begin(tmp_path, "recorded", None)
    with pytest.raises(UserError, match="taken"):
        claim_run_folder(tmp_path, "recorded", "unused", again=True)
