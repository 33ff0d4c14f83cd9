"""What reads the built pages finds planted faults."""

from __future__ import annotations

from pathlib import Path

from tests.site.built import address, broken_links, read_pages


def test_planted_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "guide").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="guide/#there">1</a><a href="guide/#gone">2</a><a href="lost/">3</a>'
        '<a href="https://example.org/lost/">4</a><a href="mailto:a@example.org">5</a>'
    )
    (tmp_path / "guide" / "index.html").write_text(
        '<h1 id="there">Guide</h1><a href="..">1</a><a href="#gone">2</a><a href="/picture.png">3</a>'
    )
    pages = read_pages(tmp_path)
    assert broken_links(tmp_path, pages) == [
        "guide/index.html: the link '#gone' leads to guide/index.html, which has no anchor 'gone'.",
        "guide/index.html: the link '/picture.png' leads to picture.png, which does not exist.",
        "index.html: the link 'guide/#gone' leads to guide/index.html, which has no anchor 'gone'.",
        "index.html: the link 'lost/' leads to lost/index.html, which does not exist.",
    ]


def test_addresses_are_those_of_readers() -> None:
    assert address("index.html") == "/"
    assert address("api/noise/index.html") == "/api/noise/"
    assert address("404.html") == "/404.html"
