"""A headless Chromium driven over a pipe: real mouse, keys and screenshots, nothing to install.

The DevTools protocol runs over two inherited file descriptors (``--remote-debugging-pipe``):
messages are JSON, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-extensions", "--hide-scrollbars", "--mute-audio",
    "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
_PATIENCE = 120.0
#: The browser reads commands from descriptor 3 and answers on 4.
_WIRE = """
import os, sys
ends = [os.dup2(int(end), 50 + i) for i, end in enumerate(sys.argv[1:3])]
for i, end in enumerate(ends):
    os.dup2(end, 3 + i)
os.execv(sys.argv[3], sys.argv[3:])
"""


def found() -> str | None:
    """Return the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a running browser.

    Attributes:
        events: every protocol event seen so far, in order.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            self._buffer += os.read(self._read, 1 << 20)
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, path: Path, width: int = 1440, height: int = 1000) -> None:
        """Show a file and wait until the page says it is ready."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.call("Page.navigate", url=path.resolve().as_uri())
        root = "document.documentElement && document.documentElement.dataset"
        deadline = time.monotonic() + _PATIENCE
        while not self.js(f"({root}.readyMs || {root}.error) ?? null"):
            if time.monotonic() > deadline:
                raise TimeoutError("the page never said that it is ready")
            time.sleep(0.02)

    def js(self, expression: str) -> Any:
        """Return the value of an expression, promises awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def frame(self) -> None:
        """Wait until what was asked for is drawn."""
        self.js("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Send one mouse event ("Pressed", "Released", "Moved", "Wheel")."""
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        """Press and release the left button."""
        for kind in ("Moved", "Pressed", "Released"):
            more = {} if kind == "Moved" else {"button": "left", "clickCount": 1}
            self.mouse(kind, x, y, **more)
        self.frame()

    def drag(self, x0: float, x1: float, y: float, *, shift: bool = False) -> None:
        """Press at x0, move to x1, release."""
        held: dict[str, Any] = {"button": "left", "buttons": 1, "modifiers": 8 if shift else 0}
        self.mouse("Pressed", x0, y, clickCount=1, **held)
        for step in range(1, 6):
            self.mouse("Moved", x0 + (x1 - x0) * step / 5, y, **held)
        self.mouse("Released", x1, y, clickCount=1, **held)
        self.frame()

    def wheel(self, x: float, y: float, delta: float) -> None:
        """Turn the wheel; negative zooms in."""
        self.mouse("Wheel", x, y, deltaX=0, deltaY=delta)
        self.frame()

    def key(self, key: str) -> None:
        """Press a key that types a character, or a named one."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.frame()

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of what is visible, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def problems(self) -> list[str]:
        """Return uncaught errors and everything logged as a warning or worse."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e.get("method") in kinds]

    def requests(self) -> list[str]:
        """Return the addresses the page asked for."""
        return [
            e["params"]["request"]["url"]
            for e in self.events
            if e.get("method") == "Network.requestWillBeSent"
        ]


@contextmanager
def browser(profile: Path, dark: bool = False) -> Iterator[Browser]:
    """Run a browser with an empty profile directory."""
    path = found()
    if path is None:
        raise FileNotFoundError(f"no browser: none of {', '.join(NAMES)} is on the path")
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    flags = [*_FLAGS, f"--user-data-dir={profile}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    process = subprocess.Popen(
        [sys.executable, "-c", _WIRE, str(to_read), str(from_write), path, *flags],
        pass_fds=(to_read, from_write), env=os.environ | {"HOME": str(profile)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(from_write)
    try:
        yield Browser(to_write, from_read)
    finally:
        process.terminate()
        process.wait(timeout=20)
        os.close(to_write)
        os.close(from_read)
