"""Makes `docs/images/browser.png`: the page of `examples/browser` after a few prompts.

    python docs/make_browser_figure.py --output_dir docs/images

needs what the page needs beside it (its README.md), Debian's chromium, and playwright (`pip install 'rq_hf[test]'`).
"""

import argparse
import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from manifest import write_manifest

from rq_hf import EMOJI_MODEL

PAGE = Path(__file__).parents[1] / "examples" / "browser"
SOURCES = sorted(file for file in PAGE.iterdir() if file.suffix in (".html", ".js", ".css"))
PROMPTS = ["pizza", "octopus", "sunflower", "fire engine", "woman astronaut dark skin tone"]
TIMEOUT = 300_000  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the figure")
    args = parser.parse_args()
    for needed in ("model", "node_modules"):
        if not (PAGE / needed).is_dir():
            parser.error(f"{PAGE / needed} is missing; see {PAGE / 'README.md'}")

    from playwright.sync_api import sync_playwright

    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(PAGE))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    figure = args.output_dir / "browser.png"
    with sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 600}, color_scheme="light")
        page.set_default_timeout(TIMEOUT)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        for prompt in PROMPTS:
            page.wait_for_selector("form button[type=submit]:enabled")
            page.fill("[name=prompt]", prompt)
            page.click("form button[type=submit]")
        page.wait_for_selector("form button[type=submit]:enabled")
        page.eval_on_selector("#status", "status => { status.textContent = ''; }")  # the time it took here
        page.screenshot(path=figure)
        browser.close()
    server.shutdown()
    write_manifest(
        args.output_dir / "make_browser_figure.json", [Path(__file__), *SOURCES], [Path(EMOJI_MODEL)], [figure]
    )


if __name__ == "__main__":
    main()
