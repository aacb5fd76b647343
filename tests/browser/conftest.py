"""A real Chromium, without a network, and the pages that it is shown."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Visit:
    """A page that was opened, with all that it complained of and asked for."""

    def __init__(self, context: BrowserContext, path: Path, *, runs: bool) -> None:
        self.page: Page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if runs:
            self.page.wait_for_selector("html[data-ready]", state="attached")

    def first_paint_seconds(self) -> float:
        """When the page's first contents were there."""
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        return float(self.page.evaluate(paint)) / 1000

    def draw_all(self) -> None:
        """Draw what a reader has not scrolled to yet, as printing does."""
        self.page.evaluate("dispatchEvent(new Event('beforeprint')); dispatchEvent(new Event('afterprint'))")
        assert self.page.evaluate("[...document.querySelectorAll('.plot')].every((plot) => plot._fullLayout)")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: .ci/run installs Debian's")
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def _refuse_network(context: BrowserContext) -> None:
    context.route(lambda url: not url.startswith(("file:", "data:", "blob:")), lambda route: route.abort())


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens a file in a context of its own, in which every request but that of a local file is refused."""
    contexts = []

    def open_page(path: Path, **options: object) -> Visit:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        _refuse_network(context)
        contexts.append(context)
        return Visit(context, path, runs=options.get("java_script_enabled") is not False)

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def drawn(chromium: Browser, pages: dict[str, Path]) -> Iterator[dict[str, Visit]]:
    """The module's pages, opened once with every figure drawn, for tests that only read."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"]
    )
    _refuse_network(context)
    visits = {name: Visit(context, path, runs=True) for name, path in pages.items()}
    for seen in visits.values():
        seen.draw_all()
    yield visits
    context.close()
