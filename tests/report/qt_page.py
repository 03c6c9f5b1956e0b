"""Opens one page in QtWebEngine, which is Chromium in a pip wheel, and prints what became of it as JSON.

    python qt_page.py PAGE WIDTH [PICTURE.png]

A program of its own: Qt wants the main thread, and its libraries stay out of the test process. The page puts its own
account into an element "probe" (see `browser.py`, which also sets the environment that Qt needs), whose text is passed
on with everything that the console said.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

_POLL_MS, _LIMIT_MS, _SETTLE_MS = 100, 60_000, 1500
_HEIGHT = 900
_ASK = "(document.getElementById('probe') || {}).textContent || ''"


class _Page(QWebEnginePage):
    def __init__(self) -> None:
        super().__init__()
        self.console: list[str] = []

    def javaScriptConsoleMessage(self, level: object, message: str, line: int, source: str) -> None:
        self.console.append(message)


def main(page_file: str, width: str, picture: str | None = None) -> None:
    """Open, wait for the probe, print."""
    app = QApplication([])
    page, view = _Page(), QWebEngineView()
    view.setPage(page)
    view.resize(int(width), _HEIGHT)
    view.show()

    def told(text: str) -> None:
        if not text:
            QTimer.singleShot(_POLL_MS, ask)
            return
        print(json.dumps({"console": page.console, "probe": json.loads(text)}), flush=True)
        if picture is None:
            app.quit()
            return
        view.resize(int(width), json.loads(text)["height"])
        QTimer.singleShot(_SETTLE_MS, lambda: (view.grab().save(picture), app.quit()))

    def ask() -> None:
        page.runJavaScript(_ASK, 0, told)

    QTimer.singleShot(_LIMIT_MS, lambda: app.exit(1))
    page.load(QUrl.fromLocalFile(str(Path(page_file).resolve())))
    ask()
    code = app.exec()
    # Without this order Qt warns that a profile outlives its page.
    view.setPage(None)
    page.deleteLater()
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
