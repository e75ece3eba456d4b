"""Make the screenshot of docs/web-demo.md: the page with images that it has just created.

    python docs/make_screenshot.py --output docs/images/web_demo.png

Needs the extra `demo`, the package playwright, and the program chromium.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

DEMO = Path(__file__).parents[1] / "examples" / "web_demo.py"
PROMPT, COUNT = "sunflower", 4
TIMEOUT = 180  # seconds


def wait_for_server(port: int) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"{DEMO.name} did not start within {TIMEOUT} seconds")


def photograph(port: int, output: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 640})
        page.set_default_timeout(TIMEOUT * 1000)
        page.goto(f"http://127.0.0.1:{port}")
        page.locator("#value-0 :is(textarea, input)").fill(PROMPT)
        page.click("#create-0")
        page.mouse.move(0, 0)
        images = page.locator("#create-images-0 img")
        images.nth(COUNT - 1).wait_for()
        shown = before = None
        while shown is None or shown != before:  # previews are replaced until the images are finished
            page.wait_for_timeout(10_000)
            shown, before = images.evaluate_all("images => images.map(image => image.src)"), shown
        page.screenshot(path=output)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(DEMO)], env=os.environ | {"GRADIO_SERVER_PORT": str(port)})
    try:
        wait_for_server(port)
        photograph(port, args.output)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
