"""One tab of the browser, which opens page after page and says what is wrong with each."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from tests.site.browser import Browser

HEIGHT = 900
TALLEST = 6000  # Pictures of longer pages are cut here.

# Waits until the fonts and all images are there, and the page has been drawn with them. Lazy images would else only
# load when they are scrolled to. An element is named as too wide if nothing around it scrolls.
LOOK = """
(async () => {
  for (const image of document.images) image.loading = "eager";
  const over = (image) => new Promise((resolve) => {
    if (image.complete) return resolve();
    image.addEventListener("load", resolve);
    image.addEventListener("error", resolve);
  });
  await Promise.all([document.fonts.ready, ...Array.from(document.images, over)]);
  await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
  await new Promise((resolve) => setTimeout(resolve, 50));
  const root = document.documentElement;
  const width = root.clientWidth;
  const held = (element) => {
    for (let e = element.parentElement; e && e !== document.body; e = e.parentElement)
      if (getComputedStyle(e).overflowX !== "visible") return true;
    return false;
  };
  const wide = [];
  const actual = Math.max(root.scrollWidth, document.body.scrollWidth);
  if (actual > width)
    for (const e of document.body.querySelectorAll("*"))
      if (wide.length < 3 && e.getBoundingClientRect().right > width + 1 && !held(e))
        wide.push(e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + ": "
                  + e.textContent.trim().replace(/\\s+/g, " ").slice(0, 60));
  const broken = Array.from(document.images).filter((image) => image.naturalWidth === 0);
  return {width, actual, wide, height: root.scrollHeight,
          images: broken.map((image) => image.getAttribute("src"))};
})()
"""


class Tab:
    """A tab that opens the pages of one origin."""

    def __init__(self, browser: Browser, origin: str) -> None:
        """Open an empty tab.

        Args:
            browser: The browser.
            origin: The only origin that pages may ask for anything.
        """
        self._browser = browser
        self._origin = origin
        self._size = (0, 0)
        target = browser.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = browser.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a command to this tab."""
        return self._browser.call(method, parameters, self._session)

    def open(self, url: str, width: int) -> list[str]:
        """Open a page, and wait until it is drawn.

        Args:
            url: The page's address.
            width: The width of the window in pixels.

        Returns:
            What is wrong with the page, a sentence for each fault.
        """
        # Without a page in between, what the last one still does would count for this one.
        self._browser.events.clear()
        self._call("Page.navigate", {"url": "about:blank"})
        self._browser.wait("Page.loadEventFired")
        screen = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", screen)
        self._browser.events.clear()
        opened = self._call("Page.navigate", {"url": url})
        if "errorText" in opened:
            return [f"The page does not open: {opened['errorText']}."]
        self._browser.wait("Page.loadEventFired")
        answer = self._call(
            "Runtime.evaluate",
            {"expression": LOOK, "awaitPromise": True, "returnByValue": True},
        )
        if "exceptionDetails" in answer:
            return [f"The page cannot be looked at: {_thrown(answer['exceptionDetails'])}"]
        seen = answer["result"]["value"]
        self._size = (width, min(seen["height"], TALLEST))
        faults = [*self._events(), *_looks(seen)]
        return list(dict.fromkeys(faults))

    def picture(self) -> bytes:
        """Take a picture of the whole page that is open.

        Returns:
            A JPEG file.
        """
        width, height = self._size
        taken = self._call(
            "Page.captureScreenshot",
            {
                "format": "jpeg",
                "quality": 80,
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": width, "height": height or HEIGHT, "scale": 1},
            },
        )
        return base64.b64decode(taken["data"])

    def _events(self) -> Iterator[str]:
        """Turn the events since the page was opened into faults."""
        asked: dict[str, str] = {}
        for event in self._browser.events:
            values = event.get("params", {})
            match event.get("method"):
                case "Network.requestWillBeSent":
                    url = asked[values["requestId"]] = values["request"]["url"]
                    if not url.startswith((f"{self._origin}/", "data:", "blob:", "about:")):
                        yield f"The page asks another host: {url}."
                case "Network.responseReceived" if values["response"]["status"] >= 400:
                    response = values["response"]
                    yield f"The request of {response['url']} fails with {response['status']}."
                case "Network.loadingFailed" if not values.get("canceled"):
                    url = asked.get(values["requestId"], "something")
                    yield f"The request of {url} fails with {values['errorText']}."
                case "Runtime.exceptionThrown":
                    yield f"An exception is not caught: {_thrown(values['exceptionDetails'])}"
                case "Runtime.consoleAPICalled" if values["type"] in ("error", "assert"):
                    words = (_shown(argument) for argument in values["args"])
                    yield f"The console has an error: {' '.join(words)}"
                case "Log.entryAdded" if values["entry"]["level"] == "error":
                    if values["entry"]["source"] != "network":  # Those are reported above.
                        yield f"The console has an error: {values['entry']['text']}"


def _shown(argument: dict[str, Any]) -> str:
    """Show an argument of a call of the console."""
    return str(argument.get("value", argument.get("description", argument["type"])))


def _thrown(details: dict[str, Any]) -> str:
    """Show an exception in one line."""
    text = details.get("exception", {}).get("description") or details["text"]
    return " ".join(text.split())


def _looks(seen: dict[str, Any]) -> Iterator[str]:
    """Turn what LOOK found on a page into faults."""
    if seen["actual"] > seen["width"]:
        named = "; ".join(seen["wide"]) or "no single element"
        yield f"The page is {seen['actual']} pixels wide, because of {named}."
    for source in seen["images"]:
        yield f"The image {source} does not load."
