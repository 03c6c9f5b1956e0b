"""A real browser for tests of pages: found where there is one, asked what it drew.

Looked for in this order: `AWQKIT_BROWSER` (the path of a Chromium), chromium or chrome on PATH, the one that playwright
downloaded, QtWebEngine from the extra `browser` of pyproject.toml. None of them is needed for anything else.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = (
    *("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser"),
    *("google-chrome", "google-chrome-stable", "chrome"),
)
TIMEOUT_SECONDS = 120
_HEIGHT = 900

# Runs in the page before anything of its own: waits until every plot has an svg of plotly's, writes down what can be
# seen, then changes a color of the theme and tells those who watch it, as a switch from light to dark would.
_PROBE = """
(() => {
  const watched = [], original = window.matchMedia.bind(window);
  window.matchMedia = (query) => { const found = original(query); watched.push(found); return found; };
  const size = (element) => { const box = element.getBoundingClientRect(); return box.width * box.height; };
  const marks = (plot) => {
    const drawn = plot.querySelectorAll(".bars .point path, .points path, .lines path, .heatmaplayer image");
    return [...drawn].filter((mark) => size(mark) > 0 || mark.matches(".lines path")).length;
  };
  const account = () => ({
    plots: Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
      marks: marks(plot), width: plot.getBoundingClientRect().width,
      svg: Math.max(0, ...[...plot.querySelectorAll(".main-svg")].map((svg) => svg.getBoundingClientRect().width)),
    }])),
    inks: [...new Set([...document.querySelectorAll(".xtick text")].map((text) => text.style.fill))],
    background: getComputedStyle(document.body).backgroundColor,
    width: document.documentElement.clientWidth,
    contentWidth: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    loads: performance.getEntriesByType("resource").map((entry) => entry.name),
  });
  let patience = 100;
  const look = () => {
    const waiting = [...document.querySelectorAll(".plot")].some((plot) => !plot.querySelector(".main-svg"));
    if (waiting && patience-- > 0) { setTimeout(look, 100); return; }
    const before = account();
    document.documentElement.style.setProperty("--muted", "rgb(1, 2, 3)");
    watched.forEach((query) => query.dispatchEvent(new Event("change")));
    setTimeout(() => tell({ ...before, inkAfterChange: account().inks }), 300);
  };
  const tell = (seen) => {
    document.documentElement.style.removeProperty("--muted");
    watched.forEach((query) => query.dispatchEvent(new Event("change")));
    const probe = document.createElement("pre");
    probe.id = "probe"; probe.hidden = true; probe.textContent = JSON.stringify(seen);
    document.body.append(probe);
  };
  addEventListener("load", () => setTimeout(look, 300));
})();
"""


@dataclass(frozen=True)
class Opened:
    """What a browser says of a page. console: every message. probe: what `_PROBE` wrote down."""

    console: list[str]
    probe: dict[str, Any]


def browser_command() -> list[str] | None:
    """How a browser is started here, or None. Ends in the Chromium's path, or in the program that opens QtWebEngine."""
    named = os.environ.get("AWQKIT_BROWSER")
    found = named or next(filter(None, map(shutil.which, NAMES)), None) or _of_playwright()
    if found:
        return [found]
    if importlib.util.find_spec("PySide6") and importlib.util.find_spec("PySide6.QtWebEngineCore"):
        return [sys.executable, str(Path(__file__).with_name("qt_page.py"))]
    return None


def open_page(page: str, width: int, scheme: str, picture: Path | None = None) -> Opened:
    """Open the HTML `page` in a window of `width` pixels under the color scheme "light" or "dark"."""
    command = browser_command()
    assert command is not None, "no browser here"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page.replace("<head>", f"<head><script>{_PROBE}</script>", 1), encoding="utf-8")
        if len(command) > 1:
            return _open_in_qt(command, file, width, scheme, picture)
        return _open_in_chromium(command[0], file, width, scheme, Path(folder))


def _open_in_qt(command: list[str], file: Path, width: int, scheme: str, picture: Path | None) -> Opened:
    words = [*command, str(file), str(width), *([str(picture)] if picture else [])]
    flags = " ".join(_flags(scheme))
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return Opened(found["console"], found["probe"])


def _open_in_chromium(program: str, file: Path, width: int, scheme: str, folder: Path) -> Opened:
    words = [
        *(program, "--headless", "--no-first-run", *_flags(scheme)),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{_HEIGHT}"),
        *("--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    probe = re.search(r'<pre id="probe"[^>]*>(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe is not None, done.stderr
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return Opened(console, json.loads(html.unescape(probe[1])))


def _flags(scheme: str) -> list[str]:
    # No sandbox and no GPU: neither is there in a container, and the page is our own.
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    return ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", preferred]


def _of_playwright() -> str | None:
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    programs = sorted(
        path
        for pattern in ("chromium*/*/headless_shell", "chromium*/*/chrome-headless-shell", "chromium*/*/chrome")
        for path in cache.glob(pattern)
    )
    return str(programs[-1]) if programs else None
