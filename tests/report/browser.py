"""A real browser without a window, driven over its DevTools protocol: what the page's tests open, click and look at.

It is a Chromium or Chrome that is installed (ASYNCRL_BROWSER, or on PATH): no Python package brings one.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.waits import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("ASYNCRL_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
WHY_NOT = "no Chromium is on PATH or at ASYNCRL_BROWSER (Debian, Ubuntu: apt install chromium)"
ANSWER_S = 60.0
PHONE = {"width": 390, "height": 844, "phone": True}
VIEWS = {"desk": {}, "dark": {"dark": True}, "phone": PHONE, "phone in the dark": {**PHONE, "dark": True}}
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Tab": 9, " ": 32, "Enter": 13}


class Browser:
    """A page in a browser.

    said      console messages, uncaught errors and the browser's own complaints, as texts
    requests  URLs that the page asked for
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._events: deque[dict[str, Any]] = deque()
        self.said: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol; fails where the browser refuses it or does not answer."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        deadline = time.monotonic() + ANSWER_S
        while (answer := self._next(deadline)).get("id") != number:
            self._take(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False
    ) -> None:
        """Opens a file in a window of this size, and waits until it is loaded and painted."""
        self.resize(width, height, phone=phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self._events.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + ANSWER_S
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._take(self._next(deadline))
        self.frame()

    def opened_ms(self) -> float:
        """How long the page took from the start of its loading until its script was through and it was painted."""
        return self.evaluate(
            "Math.max(performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd,"
            "...performance.getEntriesByType('paint').map(paint => paint.startTime))"
        )

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Gives the page a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def frame(self) -> None:
        """Waits until what was changed is painted."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page; of a promise, what it comes to."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, f"{expression[:200]}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def middle(self, selector: str) -> tuple[float, float]:
        """Brings an element into view and returns where its middle is, in pixels of the window."""
        found = self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)}); if (!element) return null;"
            "element.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const box = element.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        assert found is not None, f"{selector} is not on the page"
        return found[0], found[1]

    def move(self, x: float, y: float) -> None:
        """Moves the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.frame()

    def click(self, selector: str) -> None:
        """Clicks with the mouse on the middle of an element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.frame()

    def press(self, key: str) -> None:
        """Presses a key and lets it go; the browser answers when the page has handled it, painted or not."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        """Writes what the window shows, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def _next(self, deadline: float) -> dict[str, Any]:
        return json.loads(self._socket.recv(timeout=max(0.0, deadline - time.monotonic())))

    def _take(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        about = event["params"]
        match event["method"]:
            case "Runtime.consoleAPICalled":
                self.said.append(f"{about['type']}: {[given.get('value') for given in about['args']]}")
            case "Runtime.exceptionThrown":
                self.said.append(f"uncaught: {about['exceptionDetails']}")
            case "Log.entryAdded":
                self.said.append(f"{about['entry']['level']}: {about['entry']['text']}")
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty page, whose files are in the folder `profile`; ended with all of its processes."""
    assert BROWSER is not None, WHY_NOT
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio"]
    command += ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"]
    profile.mkdir(parents=True, exist_ok=True)
    with (profile / "stderr").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port_file = profile / "DevToolsActivePort"

        def is_up() -> bool:
            assert process.poll() is None, (profile / "stderr").read_text(errors="replace")[-2000:]
            return port_file.is_file() and port_file.read_text().count("\n") >= 1

        wait_until(is_up, "the browser's port", 60.0)
        port, path = port_file.read_text().splitlines()[:2]
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, open_timeout=ANSWER_S, proxy=None) as main:
            main.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
            target = json.loads(main.recv(timeout=ANSWER_S))["result"]["targetId"]
            url = f"ws://127.0.0.1:{port}/devtools/page/{target}"
            with connect(url, max_size=None, open_timeout=ANSWER_S, proxy=None) as page:
                yield Browser(page)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
