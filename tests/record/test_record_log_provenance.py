"""log.txt and provenance.json: what happened, without secrets and without escape sequences."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import RunLog, append_event, collect_provenance, note_unreadable, write_provenance
from norm_matters.record.provenance import _commit


def test_every_line_of_the_log_has_the_time(tmp_path):
    log = RunLog(tmp_path / "log.txt")
    log.write("started\nin two lines")
    log.write("class \x1b[31mred\u202e naïve 猫")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", "", line) for line in lines] == [
        "started",
        "in two lines",
        r"class \x1b[31mred\u202e naïve 猫",
    ]


def test_provenance_holds_what_made_the_run():
    provenance = collect_provenance(["train", "--model", "resnet8"], seed=3, data={"name": "digits"})
    assert provenance["command"] == ["train", "--model", "resnet8"]
    assert (provenance["seed"], provenance["data"]) == (3, {"name": "digits"})
    assert provenance["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "numpy"} <= set(provenance["versions"])
    assert provenance["machine"]["device"] == "cpu"
    assert provenance["machine"]["threads"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", provenance["started"])
    assert json.loads(json.dumps(provenance)) == provenance


def test_no_secret_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("NORM_MATTERS_TOKEN", "canary-1")
    monkeypatch.setenv("SOME_SETTING", "canary-2")
    command = [
        "train", "model.options.hub_token=canary-3", "--api-key", "canary-4", "--password=canary-5",
        "--secret", "--epochs", "3", "lr=0.1",
    ]  # fmt: skip
    write_provenance(tmp_path, collect_provenance(command, tracker={"api_key": "canary-6", "name": "x", "keys": 3}))
    append_event(tmp_path, {"event": "resumed", "command": ["--token", "canary-7"], "PASSWORDS": ["canary-8"]})
    text = (tmp_path / "provenance.json").read_text()
    assert "canary" not in text
    provenance = json.loads(text)
    assert provenance["command"][-4:] == ["--secret", "--epochs", "3", "lr=0.1"]
    assert provenance["tracker"] == {"api_key": "(hidden)", "name": "x", "keys": 3}


def test_events_are_added_in_order(tmp_path):
    write_provenance(tmp_path, {"seed": 1})
    append_event(tmp_path, {"event": "resumed", "epoch": 2})
    append_event(tmp_path, {"event": "extended", "epochs": 9})
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["seed"] == 1
    assert [event["event"] for event in provenance["events"]] == ["resumed", "extended"]
    assert all(event["time"] for event in provenance["events"])


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', '{"events": 3}', "[" * 100_000, "\x00"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"provenance\.json is damaged"):
        append_event(tmp_path, {})
    assert (tmp_path / "provenance.json").read_text() == text


def test_a_missing_file_and_one_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="missing"):
        append_event(tmp_path, {})
    (tmp_path / "provenance.json").mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        append_event(tmp_path, {})


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    unknown = {"commit": None, "dirty": None}
    assert _commit(package) == unknown
    git("init", "-q")
    # Inside a repository that does not track it, as in a virtual environment: that commit says nothing about it.
    (tmp_path / "readme").write_text("")
    git("add", "readme")
    git("commit", "-qm", "x")
    assert _commit(package) == unknown
    git("add", "src")
    git("commit", "-qm", "y")
    (tmp_path / "readme").write_text("changed outside the package")
    assert _commit(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "new.py").write_text("")
    assert _commit(package) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_images_that_cannot_be_read_are_noted_once(tmp_path):
    write_provenance(tmp_path, {"command": []})
    assert note_unreadable(tmp_path, {"a": "a: gone"}) == (["a: gone"], {"a": "a: gone"})
    assert note_unreadable(tmp_path, {"a": "a: gone", "b": "b: cut"}) == (["b: cut"], {"a": "a: gone", "b": "b: cut"})
    before = (tmp_path / "provenance.json").read_bytes()
    assert note_unreadable(tmp_path, {})[1] == {"a": "a: gone", "b": "b: cut"}
    assert (tmp_path / "provenance.json").read_bytes() == before
    write_provenance(tmp_path, {"unreadable_images": [3]})
    with pytest.raises(UserError, match="unreadable_images are no list of images"):
        note_unreadable(tmp_path, {})
