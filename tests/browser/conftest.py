"""Chromium without a window, and a JupyterLab of its own for a folder: what students and instructors really see.

`DIFFLAB_SCREENSHOTS=folder` keeps pictures of every page that is tried, to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox of its own (containers forbid it), no graphics card, and nothing that calls home.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE = 300  # seconds until a page or a cell counts as stuck; a slow machine needs a fraction of them


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable]:
    """open_page(address): a page in Chromium. Skips where there is no Chromium, or no Playwright to drive it."""
    if CHROMIUM is None:
        pytest.skip("browser tests need Chromium (apt-get install chromium), and there is none on the PATH")
    reason = "browser tests need playwright (pip install -e '.[dev]'), and it is not installed"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    # Ends with the module: Playwright's event loop would be in the way of tests that have one of their own.
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        context = browser.new_context(viewport={"width": 1300, "height": 1000})
        context.set_default_timeout(PATIENCE * 1000)
        api.expect.set_options(timeout=PATIENCE * 1000)

        def open_page(address: str):
            page = context.new_page()
            page.goto(address)
            return page

        yield open_page
        browser.close()


@pytest.fixture
def picture(request) -> Callable:
    """picture(page, "name"): keep what the page shows, if DIFFLAB_SCREENSHOTS names a folder."""

    def keep(page, name: str) -> None:
        if folder := os.environ.get("DIFFLAB_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(Path(folder, f"{name}.png")))

    return keep


@contextlib.contextmanager
def jupyterlab(folder: Path, home: Path) -> Iterator[Callable[[str], str]]:
    """Run JupyterLab for a folder, with settings of its own under `home`.

    Yields what makes the address of a file of that folder, which lets in whoever has it.
    """
    settings = {
        # no question whether to fetch Jupyter's news
        "labconfig/page_config.json": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
        # cells out of sight are in the page as well
        "lab/user-settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    }
    for name, content in settings.items():
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(json.dumps(content))
    runtime = home / "runtime"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # formgrader starts helpers by name
    environment = os.environ | {
        "PATH": path, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(runtime), "IPYTHONDIR": str(home / "ipython"),
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (info := _server_info(runtime)):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"JupyterLab did not start:\n{(home / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.1)
        yield lambda file: f"{info['url']}lab{file and '/tree/'}{file}?token={info['token']}"
    finally:
        server.terminate()
        server.wait(PATIENCE)


def _server_info(runtime: Path) -> dict | None:
    """What a Jupyter server writes about itself once it listens."""
    for path in runtime.glob("jpserver-*.json"):
        with contextlib.suppress(ValueError):  # half written
            return json.loads(path.read_text())
    return None
