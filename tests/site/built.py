"""The links and anchors of built pages, read from their HTML without a browser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

HERE = "http://site.invalid"  # Stands for the site's own origin; nothing is ever asked of it.


@dataclass
class Page:
    """What a page links to, and what can be linked to in it."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    """Collect the links and anchors of one page."""

    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the link and the anchor of an element, if it has them."""
        values = dict(attrs)
        if values.get("id"):
            self.page.anchors.add(values["id"] or "")
        if tag == "a":
            if values.get("name"):
                self.page.anchors.add(values["name"] or "")
            if values.get("href"):
                self.page.links.append(values["href"] or "")


def read_page(text: str) -> Page:
    """Read the HTML of a page.

    Args:
        text: The HTML.

    Returns:
        Its links and anchors.
    """
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.page


def read_pages(site: Path) -> dict[str, Page]:
    """Read all pages of a built site.

    Args:
        site: The folder of the site.

    Returns:
        The pages by their file below ``site``, such as ``api/noise/index.html``.
    """
    files = sorted(site.rglob("*.html"))
    return {f.relative_to(site).as_posix(): read_page(f.read_text("utf-8")) for f in files}


def address(name: str) -> str:
    """Turn a page's file into the path by which readers reach it.

    Args:
        name: The file below the folder of the site.

    Returns:
        The path, such as ``/api/noise/``.
    """
    return "/" + (name.removesuffix("index.html") if f"/{name}".endswith("/index.html") else name)


def _fault(site: Path, pages: dict[str, Page], name: str, link: str) -> str | None:
    """Say what is wrong with a link, or None if it leads somewhere or to another host."""
    parts = urlsplit(urljoin(HERE + address(name), link))
    if f"{parts.scheme}://{parts.netloc}" != HERE:
        return None
    path = unquote(parts.path).lstrip("/")
    target = f"{path}index.html" if path == "" or path.endswith("/") else path
    if not (site / target).is_file():
        return f"{name}: the link {link!r} leads to {target}, which does not exist."
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"{name}: the link {link!r} leads to {target}, which has no anchor {anchor!r}."
    return None


def broken_links(site: Path, pages: dict[str, Page]) -> list[str]:
    """Find the links inside a site that lead nowhere.

    Args:
        site: The folder of the site.
        pages: Its pages, as :func:`read_pages` gives them.

    Returns:
        A sentence for each link of a page that lacks its file or its anchor.
    """
    found = []
    for name, page in pages.items():
        faults = (_fault(site, pages, name, link) for link in dict.fromkeys(page.links))
        found += [fault for fault in faults if fault]
    return found
