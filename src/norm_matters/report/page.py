"""HTML, escaped by construction, and the frame of a page that loads nothing from anywhere.

Every text becomes HTML through `tag`, which escapes whatever is not `Html` already. The page forbids by its content
security policy all requests, and all scripts but its own three (known by their SHA-256): a text that slipped through
would still be inert.
"""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from typing import Final

from norm_matters.report.style import CSS, SCRIPT

_VOID: Final = {"meta", "link", "line", "input"}
_FIGURE: Final = 32


class Html(str):
    """Text that is HTML already and must not be escaped again."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """Return an element; children that are not `Html`, and all attribute values, are escaped.

    Args:
        name: the element's name.
        children: texts and elements.
        attributes: by name; a trailing underscore is dropped (`class_`), other underscores become hyphens (`data_key`).
    """
    names = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    opening = name + "".join(f' {key}="{html.escape(value)}"' for key, value in names)
    if name in _VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Return the parts one after the other, those that are not `Html` escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """Return the few large figures at the top of a page, from pairs of (what it is, figure)."""
    return tag(
        "div",
        *(tag("div", tag("span", label), tag("b", value), class_="card") for label, value in facts),
        class_="cards",
    )


def numbers_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table of figures that scrolls sideways on a small screen; the first cell of a row is its heading.

    Cells of more than `_FIGURE` characters are words, and wrap.
    """
    head = tag("thead", tag("tr", *(tag("th", text, scope="col") for text in header)))
    body = (tag("tr", tag("th", row[0], scope="row"), *map(_cell, row[1:])) for row in rows)
    return tag("div", tag("table", head, tag("tbody", *body), class_="numbers"), class_="scroll")


def _cell(text: str) -> Html:
    return tag("td", text, class_="words") if len(text) > _FIGURE else tag("td", text)


def facts_table(facts: Iterable[tuple[str, str]]) -> Html:
    """Return a table of two columns, key and value, in which long values wrap."""
    rows = (tag("tr", tag("th", key, scope="row"), tag("td", tag("div", value))) for key, value in facts)
    return tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="scroll")


def section(title: str, *children: str) -> Html:
    """Return a heading and what stands below it."""
    return tag("section", tag("h2", title), *children)


def note(text: str) -> Html:
    """Return a sentence that stands out."""
    return tag("p", text, class_="note")


def page(title: str, subtitle: str, sections: Iterable[str], scripts: Sequence[str]) -> bytes:
    """Return a whole page in UTF-8.

    Args:
        title: the page's name and first heading.
        subtitle: one line below it.
        sections: the elements of the page, in order.
        scripts: JavaScript that the sections need (none: a page without scripts); ours, never the user's.
    """
    scripts = [_utf8(script) for script in (*scripts, SCRIPT)] if scripts else []
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        # CSP must come before any script; the icon is empty because browsers ask a server for one otherwise.
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    heading = tag("header", tag("h1", title), tag("p", subtitle, class_="soft"))
    body = tag(
        "body",
        tag("main", heading, *sections, tag("footer", "Written by norm-matters.")),
        *(tag("script", Html(script)) for script in scripts),
    )
    return _utf8("<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n").encode()


def _policy(scripts: Iterable[str]) -> str:
    """The content security policy: no requests, inline styles (bokeh sets them), and these scripts only."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _utf8(text: str) -> str:
    """The text with lone surrogates (of a file name that is no UTF-8) replaced, so that it can be written."""
    return text.encode("utf-8", "replace").decode()
