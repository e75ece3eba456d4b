import shutil

import pytest

import rq_hf


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as programs:
        browser = programs.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def rq():
    """The emoji model of the package."""
    pipe = rq_hf.RQPipeline.from_pretrained(rq_hf.EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe
