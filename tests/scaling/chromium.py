"""A headless Chromium, driven through its DevTools protocol: opens a file, looks, clicks, takes pictures."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def program() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser(folder: Path):
    """A Page of a browser with a new profile in `folder`."""
    import websocket

    command = [program(), "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-gpu"]
    command += ["--no-sandbox", "--no-first-run", "--disable-dev-shm-usage", "--remote-allow-origins=*", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        _wait(lambda: port.exists() and port.read_text().count("\n") == 1, "the browser does not start")
        number, path = port.read_text().split()
        socket = websocket.create_connection(f"ws://127.0.0.1:{number}{path}", timeout=60, suppress_origin=True)
        page = Page(socket)
        yield page
        with contextlib.suppress(OSError, websocket.WebSocketException):
            page.send("Browser.close", root=True)
        socket.close()
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(condition, what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.05)


class Page:
    """One tab. `complaints` and `requests` collect what the console and the network saw since open()."""

    def __init__(self, socket):
        self._socket, self._number, self._session = socket, 0, None
        self.complaints, self.requests, self._events = [], [], []
        target = self.send("Target.createTarget", root=True, url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", root=True, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, root: bool = False, **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not root:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._event(answer)

    def _event(self, event: dict) -> None:
        method, values = event.get("method"), event.get("params", {})
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(values["exceptionDetails"].get("exception", {}).get("description") or str(values))
        elif method == "Log.entryAdded":
            self.complaints.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(values["args"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.complaints.clear(), self.requests.clear(), self._events.clear()
        self.send("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._event(json.loads(self._socket.recv()))
        self.settle()

    def settle(self) -> None:
        """Waits until what was changed is shown and its events have been handled."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, index: int = 0) -> None:
        """A real click with the mouse in the middle of an element."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{index}];"
            "e.scrollIntoView({block: 'center', inline: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path | None = None, whole: bool = True) -> bytes:
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        content = base64.b64decode(picture)
        if file:
            file.write_bytes(content)
        return content

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])
