"""Take the pictures of the example pages that the README shows, in a headless Chromium."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
SIZE = {"width": 1180, "height": 760}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
NUM_COLOURS = 128
SHOWN = {
    "llama-7b-a100-40g": ".hero",
    "predicted-against-measured-h200": "#section-timelines",
    "accuracy-h200": "#section-steps",
}
"""Page to the element with which its picture begins."""


def main() -> None:
    """Write a picture beside each page."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, element in SHOWN.items():
            page = browser.new_page(viewport=SIZE)
            page.goto((EXAMPLES / f"{name}.html").as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            page.evaluate("dispatchEvent(new Event('beforeprint')); dispatchEvent(new Event('afterprint'))")
            page.evaluate("(element) => document.querySelector(element).scrollIntoView({behavior: 'instant'})", element)
            page.wait_for_timeout(300)
            save(page.screenshot(), EXAMPLES / f"{name}.png")
            page.close()
        browser.close()


def save(picture: bytes, path: Path) -> None:
    """Save a picture with few colours, which pages like these do not exceed by much, in less than half of the bytes."""
    from PIL import Image

    colours = Image.open(io.BytesIO(picture)).convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE)
    colours.save(path, optimize=True)


if __name__ == "__main__":
    main()
