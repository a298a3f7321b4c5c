"""A headless Chromium at the end of a pipe: open a page, ask it, press keys, take pictures. No dependency.

The DevTools protocol (https://chromedevtools.github.io/devtools-protocol/) over --remote-debugging-pipe: JSON objects
with a zero byte after each, written to the browser's file 3 and read from its file 4.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # a container's root may not make one; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def installed() -> str | None:
    """Path of the browser; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. ``said`` collects what the console, errors and the security policy had to say."""

    def __init__(self, browser: "Browser", session: str) -> None:
        self.browser, self.session = browser, session
        self.said: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, parameters, self.session, self.said)

    def open(self, address: str, ready: str = "true", seconds: float = 30.0) -> None:
        """Go there and wait until the expression ``ready`` holds."""
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && ({ready})", seconds)

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while not self.ask(f"Boolean({expression})"):
            if time.monotonic() > until:
                raise TimeoutError(f"{expression}: not so after {seconds:g} s; said: {self.said}")
            time.sleep(0.02)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def size(self, width: int, height: int, scale: float = 1.0, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile},
        )

    def theme(self, name: str) -> None:
        """What the page is told of the reader's system: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str) -> None:
        """A key down and up, as a keyboard sends it."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        found = self.call(
            "Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole)
        )
        path.write_bytes(base64.b64decode(found["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {
            "clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        }


class Browser:
    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self.process, self.to = process, to
        self.back = os.fdopen(back, "rb", buffering=0)
        self.rest = b""
        self.number = 0

    def page(self) -> Page:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        return Page(self, attached["sessionId"])

    def call(
        self,
        method: str,
        parameters: dict[str, Any],
        session: str | None = None,
        said: list[str] | None = None,
    ) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._next())
            if answer.get("id") == self.number:
                break
            if said is not None and (line := _complaint(answer)):
                said.append(line)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> bytes:
        while b"\0" not in self.rest:
            piece = self.back.read(1 << 20)
            if not piece:
                raise RuntimeError(f"the browser is gone (exit code {self.process.poll()})")
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return message


def _complaint(event: dict[str, Any]) -> str | None:
    """What a page said that a reader of its console would see."""
    method, given = event.get("method"), event.get("params", {})
    if method == "Runtime.exceptionThrown":
        return str(given["exceptionDetails"].get("exception", given))
    if method == "Runtime.consoleAPICalled":
        return f"console.{given['type']}: {[arg.get('value') for arg in given['args']]}"
    if method == "Log.entryAdded":
        return f"{given['entry']['source']}: {given['entry']['text']}"
    return None


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own profile, ended and swept up at the end."""
    path = installed()
    assert path, "no browser is installed"
    (theirs_in, to), (back, theirs_out) = _pipe(), _pipe()

    def become_3_and_4() -> None:
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [path, *_FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=become_3_and_4,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        opened = Browser(process, to, back)
        try:
            yield opened
        finally:
            _end(opened)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not called 3 or 4, which are the browser's."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 5) for end in low]
    for end in low:
        os.close(end)
    return high[0], high[1]


def _end(opened: Browser) -> None:
    try:
        opened.call("Browser.close", {})
        opened.process.wait(10)
    except (OSError, RuntimeError, subprocess.TimeoutExpired):
        opened.process.kill()
        opened.process.wait()
    os.close(opened.to)
    opened.back.close()
