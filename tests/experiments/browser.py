"""A headless Chromium, driven by ChromeDriver's own HTTP protocol: no package is needed for it."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing():
    """What is not installed here, or an empty string."""
    return " and ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)


class Browser:
    def __init__(self, url):
        self.url = url

    def call(self, path, payload=None, method=None):
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, path):
        self.call("/url", {"url": Path(path).resolve().as_uri()})

    def run(self, script, *arguments):
        """What a script's `return` returns; it finds the arguments in `arguments`."""
        return self.call("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition):
        """Until a JavaScript expression is true: at most 30 seconds."""
        script = f"""
            const [done] = arguments;
            const look = () => ({condition}) ? done(true) : setTimeout(look, 20);
            look();
        """
        self.call("/execute/async", {"script": script, "args": []})

    def element(self, css):
        return self.call("/element", {"using": "css selector", "value": css})[ELEMENT]

    def click(self, css):
        """As a person does: it fails where something else is in the way."""
        self.call(f"/element/{self.element(css)}/click", {})

    def keys(self, css, text):
        self.call(f"/element/{self.element(css)}/value", {"text": text})

    def screen(self, width, height=900, scheme="light"):
        """A screen so wide, in CSS pixels, of a person who prefers light or dark pages."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, file, **options):
        Path(file).write_bytes(base64.b64decode(self.devtools("Page.captureScreenshot", options)["data"]))

    def devtools(self, command, parameters):
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def complaints(self):
        """Errors and warnings on the console since the last call: script errors and refused loads among them."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]


@contextmanager
def browser():
    """A fresh browser with an empty profile, closed at the end."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
            options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
            start = Browser(f"http://127.0.0.1:{port}/session")
            session = start.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            opened = Browser(f"{start.url}/{session}")
            try:
                yield opened
            finally:
                with suppress(OSError, AssertionError):
                    opened.call("", method="DELETE")
        finally:
            driver.terminate()
            driver.wait()
            if driver.stdout:
                driver.stdout.close()
