"""HTML is escaped by construction, and a page may run its own scripts and nothing else."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.report.page import Html, facts_table, join, numbers_table, page, tag

# What HTML can hold at all: control characters are not text, and a parser rewrites line ends.
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=30)


class Reader(HTMLParser):
    """Collects the elements, their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        self.text += data


@settings(deadline=None, max_examples=60)
@given(TEXTS, TEXTS)
def test_texts_and_attributes_come_back_as_they_were(text: str, attribute: str) -> None:
    read = Reader(tag("p", text, class_=attribute, data_name=attribute))
    assert read.text == text
    assert read.elements == [("p", {"class": attribute, "data-name": attribute})]


@settings(deadline=None, max_examples=30)
@given(TEXTS, TEXTS)
def test_tables_hold_texts_in_any_cell(key: str, value: str) -> None:
    for table in (facts_table([(key, value)]), numbers_table([key, value], [[key, value]])):
        read = Reader(table)
        assert read.text in (key + value, (key + value) * 2)
        assert {name for name, _ in read.elements} <= {"div", "table", "thead", "tbody", "tr", "th", "td"}


def test_html_is_not_escaped_twice() -> None:
    assert tag("p", tag("b", "<"), "<") == "<p><b>&lt;</b>&lt;</p>"
    assert join([Html("<br>"), "<br>"]) == "<br>&lt;br&gt;"


def test_a_page_allows_its_own_scripts_only() -> None:
    source = page("a < b", "sub & title", [tag("p", "<script>no</script>")], ["let a = 1 < 2;"]).decode()
    read = Reader(source)
    policy = next(attributes["content"] for _, attributes in read.elements if "http-equiv" in attributes)
    assert policy is not None
    digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in read.scripts}
    assert "let a = 1 < 2;" in read.scripts
    assert set(re.findall("'sha256-([^']+)'", policy)) == digests
    assert "script-src 'unsafe-inline'" not in policy
    assert "default-src 'none'" in policy
    assert "<script>no</script>" in read.text


def test_a_page_without_plots_has_no_scripts() -> None:
    source = page("title", "", [], []).decode()
    assert Reader(source).scripts == []
    assert "script-src &#x27;none&#x27;" in source


def test_a_page_loads_nothing() -> None:
    read = Reader(page("title", "", [], ["let a;"]).decode())
    addresses = [
        value for _, attributes in read.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses == ["data:,"]


def test_a_file_name_that_is_no_unicode_can_be_shown() -> None:
    source = page("broken \udcff name", "", ["\udcff"], ["let a = '\udcff';"]).decode()
    assert "broken ? name" in source
