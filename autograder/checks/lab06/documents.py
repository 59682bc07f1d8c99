"""Reads reports: what a reader sees of Markdown or HTML, and whether anything in it is alive."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html.parser import HTMLParser

import mistune

__all__ = ["Document", "Section", "has", "numbers", "read_markdown", "squeezed"]

_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+−]?\d+)?")
_POWER = re.compile(r"\s*(?:[·⋅×*]|\\cdot|\\times)\s*10(?:(?:\^|\*\*)\{?([-−+]?\d+)\}?|([-−]\d+|⁻?[⁰¹²³⁴-⁹]+))")
_DIGITS = str.maketrans("⁻−⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_LIVE = {
    "script",
    "iframe",
    "object",
    "embed",
    "form",
    "base",
    "link",
    "frame",
    "svg",
    "video",
    "audio",
    "source",
    "input",
}
_ADDRESSES = {"src", "srcset", "poster", "background", "data", "action", "formaction"}


def squeezed(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def numbers(text: str) -> list[float]:
    """All numbers in a text, in order; 4.2·10⁻⁷ and 4.2 × 10^-7 are numbers, too."""
    text = _POWER.sub(lambda m: "e" + (m[1] or m[2]).translate(_DIGITS), re.sub(r"\.{2,}", " … ", text))
    return [float(found.replace("−", "-")) for found in _NUMBER.findall(text)]


def has(found: Iterable[float], value: float) -> bool:
    """Is there a number that is this value, to three significant digits?"""
    return any(abs(number - value) <= 0.0051 * abs(value) + 1e-15 for number in found)


class Section:
    """What stands under one heading."""

    def __init__(self, heading: str = ""):
        self.heading, self.text = heading, ""
        self.tables: list[list[list[str]]] = []  # table, row, cell
        self.images: list[tuple[str, str]] = []  # (caption with title, address)

    def rows(self) -> list[list[str]]:
        """The rows of all tables."""
        return [row for table in self.tables for row in table]


class Document(HTMLParser):
    """A page as a reader sees it.

    Attributes:
        sections: heading of the second level -> Section, in order; "" is what stands before the first.
        text: all that can be read, the title and style left out.
        title: of the page.
        style: the text of <style> elements.
        live: what must not be there, in words: elements that load or run something, handlers, addresses from elsewhere.
        tags: names of all elements.
        charset: of <meta charset>, "" without.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.sections = {"": Section()}
        self.text = self.title = self.style = self.charset = ""
        self.live: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self._heading: str | None = None
        self._section = self.sections[""]
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        """Sections, tables, pictures; and what is alive."""
        self.tags.add(tag)
        values = {name: value or "" for name, value in attributes}
        if tag in _LIVE or (tag == "meta" and values.get("http-equiv", "").lower() == "refresh"):
            self.live.append(f"<{tag}>")
        for name, value in values.items():
            address = value.strip().lower()
            if name.startswith("on"):
                self.live.append(f"{name}=")
            elif (name in _ADDRESSES and not address.startswith("data:image/")) or address.startswith(
                ("javascript:", "vbscript:")
            ):
                self.live.append(f"{name}={value[:40]!r}")
        self.charset = values.get("charset", self.charset) if tag == "meta" else self.charset
        if tag == "h2":
            self._heading = ""
        elif tag == "table":
            self._section.tables.append([])
        elif tag == "tr" and self._section.tables:
            self._section.tables[-1].append([])
        elif tag in ("td", "th") and self._section.rows():
            self._section.tables[-1][-1].append("")
        elif tag == "br":
            self.handle_data(" ")
        elif tag == "img":
            self._section.images.append(
                (f"{values.get('alt', '')} {values.get('title', '')}".strip(), values.get("src", ""))
            )
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        """The end of a heading begins its section."""
        if tag in self._open:
            while self._open.pop() != tag:
                pass
        if tag == "h2" and self._heading is not None:
            heading = squeezed(self._heading)
            self._section = self.sections.setdefault(heading, Section(heading))
            self._heading = None

    def handle_data(self, data):
        """Text, into what it belongs to."""
        if "style" in self._open or "title" in self._open:
            if "style" in self._open:
                self.style += data
            else:
                self.title += data
            return
        self.text += data
        if self._heading is not None:
            self._heading += data
            return
        self._section.text += data if not ({"td", "th"} & set(self._open)) else f"{data} "
        if {"td", "th"} & set(self._open) and self._section.rows() and self._section.tables[-1][-1]:
            self._section.tables[-1][-1][-1] += data


def read_markdown(markdown: str) -> Document:
    """Markdown as a page that lets HTML through, as notebooks do: what is not escaped comes alive."""
    return Document(mistune.create_markdown(escape=False, plugins=["table"])(markdown))
