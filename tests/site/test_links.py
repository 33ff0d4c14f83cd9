"""The links of the Markdown files lead somewhere, and every page is in the navigation."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FILES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
NOT_IN_NAVIGATION: frozenset[str] = frozenset()  # Pages that are meant to be found by links only.

FENCE = re.compile(r"^ *(`{3,}|~{3,})")
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
# The text of a link may run over lines, and may hold an image.
LINK = re.compile(r"\]\(\s*<?([^()\s<>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s+\".*\")?\s*$", re.MULTILINE)
ATTRIBUTE = re.compile(r"<[^>]*?\b(?:href|src)=\"([^\"]+)\"")
HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
NAMED = re.compile(r"<[^>]*?\b(?:id|name)=\"([^\"]+)\"")
API = re.compile(r"^::: +([\w.]+)", re.MULTILINE)


def prose(text: str) -> str:
    """Empty the lines of fenced code.

    Args:
        text: A Markdown file.

    Returns:
        The file with as many lines, without the code.
    """
    kept, fence = [], ""
    for line in text.split("\n"):
        found = FENCE.match(line)
        if fence:
            if found and found[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
            kept.append("")
        elif found:
            fence = found[1]
            kept.append("")
        else:
            kept.append(line)
    return "\n".join(kept)


def links(text: str) -> Iterator[tuple[int, str]]:
    """Find the links of a file, images and HTML among them.

    Args:
        text: A Markdown file.

    Yields:
        The number of the line, and where the link leads.
    """
    plain = CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), prose(text))
    for pattern in (LINK, REFERENCE, ATTRIBUTE):
        for found in pattern.finditer(plain):
            yield plain.count("\n", 0, found.start(1)) + 1, found[1]


def site_anchor(heading: str) -> str:
    """Make the anchor of a heading as the built site does.

    Args:
        heading: The text of the heading, without markup.

    Returns:
        The anchor.
    """
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def github_anchor(heading: str) -> str:
    """Make the anchor of a heading as GitHub does.

    Args:
        heading: The text of the heading, without markup.

    Returns:
        The anchor.
    """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str, anchor: Callable[[str], str], joint: str) -> set[str]:
    """Find what can be linked to in a file.

    Args:
        text: A Markdown file.
        anchor: What makes an anchor of a heading.
        joint: What stands before the number of an anchor that was there already.

    Returns:
        The anchors.
    """
    plain = prose(text)
    found = {match[1] for match in NAMED.finditer(plain)}
    for line in plain.split("\n"):
        if heading := HEADING.match(line):
            words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[2])
            first = name = anchor(re.sub(r"[`*]", "", words))
            count = 0
            while name in found:
                count += 1
                name = f"{first}{joint}{count}"
            found.add(name)
    return found


@cache
def anchors_of(path: Path, on_site: bool) -> frozenset[str]:
    """Find what can be linked to in a file on disk.

    Args:
        path: The file.
        on_site: Whether the link is followed on the built site, or else on GitHub.

    Returns:
        The anchors.
    """
    text = path.read_text("utf-8")
    if on_site:
        return frozenset(anchors(text, site_anchor, "_") | set(API.findall(text)))
    return frozenset(anchors(text, github_anchor, "-"))


def fault(path: Path, link: str, docs: Path = DOCS) -> str | None:
    """Say what is wrong with a link.

    Args:
        path: The file that it is in.
        link: Where it leads.
        docs: The folder whose files become the site.

    Returns:
        The end of a sentence, or None if the link is sound or leads to another host.
    """
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    # Symbolic links are not followed: a picture in docs/ may be one to a file outside.
    named = os.path.normpath(path.parent / unquote(parts.path))
    target = Path(named) if parts.path else path
    on_site = path.is_relative_to(docs)
    if on_site and not target.is_relative_to(docs):
        return "leaves docs/, which the site does not hold"
    if not target.exists():
        return "leads to no file"
    if parts.fragment and target.suffix == ".md":
        known = anchors_of(target, on_site)
        anchor = unquote(parts.fragment)
        # Below a name that mkdocstrings documents, the site has an anchor for each member.
        documented = [name for name in known if on_site and "." in name]
        if anchor not in known and not anchor.startswith(tuple(f"{n}." for n in documented)):
            return "leads to no heading"
    return None


def navigation() -> list[str]:
    """List the pages of the navigation.

    Returns:
        Their paths below ``docs/``, in order.
    """
    _, _, entries = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")
    # The navigation ends where a line begins at the margin.
    entries = re.split(r"^\S", entries, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"(?:-|:) +[\"']?([\w./-]+\.md)[\"']? *$", entries, re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: the link {link!r} {wrong}."
        for line, link in links(path.read_text("utf-8"))
        if (wrong := fault(path, link))
    ]
    assert not found, "\n".join(found)


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    entries = navigation()
    assert entries, "mkdocs.yml has no navigation that this test can read."
    twice = {entry for entry in entries if entries.count(entry) > 1}
    assert not twice, f"The navigation of mkdocs.yml names {sorted(twice)} twice."
    lost = set(entries) - pages
    assert not lost, f"The navigation of mkdocs.yml names {sorted(lost)}, which docs/ lacks."
    unlisted = pages - set(entries) - NOT_IN_NAVIGATION
    assert not unlisted, f"Add {sorted(unlisted)} to the navigation of mkdocs.yml."


PLANTED = """# Two  words -- `a_b`

[sound](other.md#more) and [a text over
two lines](#two-words-a_b) and [elsewhere](https://example.org/#x), `code[i](missing.md)`.
[no file](missing.md), ![no picture](missing.png), [no heading](other.md#less), [](#nothing)

```
# no heading
[code](missing.md)
```

<a href="gone.html">gone</a>, [outside](../README.md), [API](other.md#clipgrad.noise.Noise)

[reference]: lost.md
"""


def test_planted_faults_are_found(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").write_text("# Outside\n")
    (docs / "other.md").write_text("# More\n\n## More\n\n::: clipgrad.noise\n")
    page = docs / "page.md"
    page.write_text(PLANTED)
    found = {
        link: (line, wrong)
        for line, link in links(page.read_text())
        if (wrong := fault(page, link, docs))
    }
    assert found == {
        "missing.md": (5, "leads to no file"),
        "missing.png": (5, "leads to no file"),
        "other.md#less": (5, "leads to no heading"),
        "#nothing": (5, "leads to no heading"),
        "gone.html": (12, "leads to no file"),
        "../README.md": (12, "leaves docs/, which the site does not hold"),
        "lost.md": (14, "leads to no file"),
    }


def test_anchors_are_those_of_the_site_and_of_github() -> None:
    text = "# Step & sum\n\n## Zürich\n\n## Zürich\n"
    assert anchors(text, site_anchor, "_") == {"step-sum", "zurich", "zurich_1"}
    assert anchors(text, github_anchor, "-") == {"step--sum", "zürich", "zürich-1"}
