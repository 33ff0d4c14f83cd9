"""Open every page of the built documentation in a headless Chromium, and report what is wrong.

    make docs
    python -m tests.site

Each page is opened as wide as a screen and as wide as a telephone. A fault is an error in the console, a request
that fails or goes to another host, a link or an anchor that leads nowhere, an image that does not load, or a page
that is wider than its window. The pictures of all pages are in ``site-pictures/`` afterwards. The status is 1 if
there is a fault, and 2 if the pages could not be opened.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.site.browser import Browser, BrowserError, find_chromium
from tests.site.built import address, broken_links, read_pages
from tests.site.server import serving
from tests.site.tab import Tab

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (1280, 400)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        words: The words of the command line, by default those of this process.

    Returns:
        The folders ``site`` and ``pictures``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tests.site",
        description="Open every page of the built documentation in a headless Chromium.",
    )
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="what `make docs` built")
    parser.add_argument(
        "--pictures",
        type=Path,
        default=ROOT / "site-pictures",
        help="where the pictures go; older pictures in it are removed",
    )
    return parser.parse_args(words)


def picture_name(page: str, width: int) -> str:
    """Name the picture of a page.

    Args:
        page: The page's file below the folder of the site.
        width: The width of the window.

    Returns:
        A file name such as ``api-noise-400.jpg``.
    """
    stem = page.removesuffix(".html").removesuffix("/index").replace("/", "-")
    return f"{stem}-{width}.jpg"


def open_pages(names: list[str], site: Path, pictures: Path) -> list[str]:
    """Open the pages at every width, and take their pictures.

    Args:
        names: The pages' files below ``site``.
        site: The folder of the built site.
        pictures: The folder for the pictures.

    Returns:
        The faults, a line for each.
    """
    program = find_chromium()
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.jpg"):
        old.unlink()
    found = []
    with serving(site) as origin, Browser(program) as browser:
        tab = Tab(browser, origin)
        for width in WIDTHS:
            for name in names:
                faults = tab.open(origin + address(name), width)
                found += [f"{name} at {width} pixels: {fault}" for fault in faults]
                (pictures / picture_name(name, width)).write_bytes(tab.picture())
    return found


def show(faults: list[str]) -> None:
    """Print the faults, each once.

    Args:
        faults: A line for each fault.
    """
    for fault in dict.fromkeys(faults):
        print(fault, flush=True)


def main(words: list[str] | None = None) -> int:
    """Check the built site.

    Args:
        words: The words of the command line, by default those of this process.

    Returns:
        The exit status.
    """
    options = arguments(words)
    if not (options.site / "index.html").is_file():
        print(f"{options.site} holds no built site; run `make docs` first.", file=sys.stderr)
        return 2
    pages = read_pages(options.site)
    faults = broken_links(options.site, pages)
    show(faults)
    try:
        opened = open_pages(sorted(pages), options.site, options.pictures)
    except BrowserError as error:
        print(error, file=sys.stderr)
        return 2
    show(opened)
    count = len(set(faults) | set(opened))
    widths = " and ".join(map(str, WIDTHS))
    print(
        f"{len(pages)} pages were opened at {widths} pixels, with {count} fault{'s' * (count != 1)}."
    )
    print(f"Their pictures are in {os.path.relpath(options.pictures)}.")
    return int(bool(count))


if __name__ == "__main__":
    sys.exit(main())
