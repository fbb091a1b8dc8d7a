"""A page in headless Chromium, asked over its DevTools pipe: JSON messages, each ended by a zero byte."""

from __future__ import annotations

import atexit
import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--use-gl=swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the network is off
]  # fmt: skip


class _Browser:
    """Chromium, started once for all pages of a process, and gone with it: at the end of its pipe it ends."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        self._sent, self._rest, self._pid = 0, b"", os.getpid()
        (read_here, out), (read_there, into) = os.pipe(), os.pipe()

        def ends() -> None:  # in the child: it reads from 3 and writes to 4
            os.dup2(read_there, 1003)
            os.dup2(out, 1004)
            os.dup2(1003, 3)
            os.dup2(1004, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=ends,
        )  # fmt: skip
        os.close(out)
        os.close(read_there)
        self._in, self._out = os.fdopen(into, "wb", buffering=0), os.fdopen(read_here, "rb", buffering=0)
        atexit.register(self._end)

    def is_gone(self) -> bool:
        return self._process.poll() is not None

    def _end(self) -> None:
        if os.getpid() != self._pid:  # a fork of the process whose it is
            return
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def ask(self, method: str, session: str | None, note: Callable[[dict[str, Any]], None], **params: Any) -> Any:
        """Return what a method gives; what the session says meanwhile goes to ``note``."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._in.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                block = self._out.read(1 << 20)
                assert block, "Chromium has gone"
                self._rest += block
            text, _, self._rest = self._rest.partition(b"\0")
            said = json.loads(text)
            if said.get("id") == self._sent:
                assert "error" not in said, said["error"]
                return said["result"]
            if said.get("sessionId") == session:
                note(said)


_browsers: list[_Browser] = []  # this process's, once there is one


class Page:
    """A page; ``with Page(file) as page: page.run("1 + 1")``. What its console says of errors is in ``errors``.

    It shares nothing with the pages before it: each is in a context of its own, as a private window is.
    """

    def __init__(self, file: Path, width: int = 1040, height: int = 900, dark: bool = False) -> None:
        if not _browsers or _browsers[0].is_gone():  # it may have died of the page before
            _browsers[:] = [_Browser(file.parent / f"profile-{os.getpid()}")]
        self.errors: list[str] = []
        self._session: str | None = None
        self._context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=file.resolve().as_uri())
        self.run("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        self.frame()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.ask("Target.disposeBrowserContext", browserContextId=self._context)

    def ask(self, method: str, **params: Any) -> Any:
        return _browsers[0].ask(method, self._session, self._note, **params)

    def _note(self, said: dict[str, Any]) -> None:
        params = said.get("params", {})
        if said.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
        elif said.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif said.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"]))

    def run(self, script: str) -> Any:
        """Return what an expression gives, awaited."""
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def frame(self) -> None:
        """Wait until what was asked for is drawn: ``waiting`` is the page's own word that a part is left."""
        self.run("new Promise((done) => { const left = () => typeof waiting !== 'undefined' && waiting; "
                 "const go = () => requestAnimationFrame(() => requestAnimationFrame(() => left() ? go() : done())); "
                 "go(); })")  # fmt: skip

    def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 and kind == "keyDown" else ""
            )
        self.frame()

    def picture(self, path: Path, full: bool = True) -> None:
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=full, **self._all(full))
        path.write_bytes(base64.b64decode(shot["data"]))

    def _all(self, full: bool) -> dict[str, Any]:
        if not full:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
