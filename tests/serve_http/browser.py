"""Headless Chromium by its DevTools protocol over two pipes: open a page, run script in it, click, take a picture."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A browser with one page, a context manager.

    Example: with Browser() as b: b.open(url); b.run("document.title")
    """

    def __enter__(self):
        program = next((found for name in NAMES if (found := shutil.which(name))), None)
        assert program, f"none of {', '.join(NAMES)} is installed; make test-serve needs one"
        self.folder = tempfile.TemporaryDirectory()
        their_in, self.out = os.pipe()
        self.inp, their_out = os.pipe()

        # Chromium reads commands from descriptor 3 and writes answers to 4. The shell puts them there.
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
        command += [
            f"--user-data-dir={self.folder.name}",
            "--remote-debugging-pipe",
            "--window-size=1100,900",
            "about:blank",
        ]
        script = f'exec "$@" 3<&{their_in} 4>&{their_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self.rest, self.number, self.session, self.said = b"", 0, None, []
        pages = self.ask("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in pages if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.out)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.inp)
        self.folder.cleanup()

    def ask(self, method, **params):
        """A command's result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self.number:
                assert "error" not in found, found
                return found["result"]
            self.said.append(found)

    def _read(self):
        while b"\0" not in self.rest:
            piece = os.read(self.inp, 1 << 16)
            assert piece, "the browser ended"
            self.rest += piece
        line, self.rest = self.rest.split(b"\0", 1)
        return json.loads(line)

    def open(self, url):
        self.ask("Page.navigate", url=url)
        self.wait(f"location.href === {url!r} && document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression in the page."""
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script, seconds=15.0):
        """Until an expression is true; what it was."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script}: not so; the page reads: {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def press(self, selector):
        """Click where a person would: in the middle of what the selector finds."""
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector, text):
        """Put a text in the place of a field's own."""
        self.run(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({selector!r}))")
        self.ask("Input.insertText", text=text)

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def requested(self):
        """Addresses that the page has asked for."""
        self.run("1")
        return [m["params"]["request"]["url"] for m in self.said if m.get("method") == "Network.requestWillBeSent"]

    def complaints(self):
        """What the console and the browser's own log hold of errors: a policy that was broken, an exception."""
        self.run("1")
        log = [m["params"]["entry"]["text"] for m in self.said if m.get("method") == "Log.entryAdded"]
        thrown = [str(m["params"]) for m in self.said if m.get("method") == "Runtime.exceptionThrown"]
        return log + thrown
