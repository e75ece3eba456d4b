"""The web demo, as a Space starts it, in a real browser."""

import configparser
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image, ImageChops
from tiny import tiny_pipeline

import rq_hf

HOW = "pip install 'rq_hf[demo]' playwright, and the program chromium (Debian: apt install chromium)"
pytest.importorskip("gradio", reason=f"needs gradio: {HOW}")
pytest.importorskip("playwright.sync_api", reason=f"needs playwright: {HOW}")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs chromium: {HOW}")

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
TIMEOUT = 180  # seconds, on a machine that may be busy
TABS = ["Residual quantization", "MAR", "class", "none"]
RQ, MAR, CLASSES, UNCONDITIONAL = range(len(TABS))  # the models of the page
MEGABYTE = 2**20
JSON = {"Content-Type": "application/json"}
SETTINGS = [1.0, 1.0, 12, 1.0]  # guidance, temperature, top-k, top-p


class Server:
    """The demo as a process, started from the folder that is a Space."""

    def __init__(self, folder: Path):
        subprocess.run(["make", "--silent", "space", f"SPACE={folder / 'space'}"], cwd=ROOT, check=True)
        for kind in ("class", "none"):
            tiny_pipeline(kind).save_pretrained(folder / kind)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log, self.files = f"http://127.0.0.1:{port}", folder / "log", folder / "files"
        env = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
        env |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(self.files), "OMP_NUM_THREADS": "1"}
        env |= {"RQ_HF_MODELS": "rq mar ../class ../none", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        self.command = {"args": [sys.executable, "web_demo.py"], "cwd": folder / "space", "env": env}

    def start(self):
        """Gradio gives up when its own server does not answer within three seconds, as happens on a busy machine."""
        for _ in range(5):
            with self.log.open("w") as log:
                self.process = subprocess.Popen(**self.command, stdout=log, stderr=log)
            until(lambda: "To create a public link" in self.log.read_text() or self.process.poll() is not None)
            if "localhost is not accessible" not in self.log.read_text():
                break
        assert self.process.poll() is None, self.log.read_text()

    def memory(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / MEGABYTE


def until(happens):
    """Waits until this returns something true, and returns that."""
    end = time.monotonic() + TIMEOUT
    while not (result := happens()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return result


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("demo"))
    try:
        server.start()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class Visitor:
    """One who has the page open, and remembers what it asked of other machines."""

    def __init__(self, browser, url, **settings):
        self.page = browser.new_context(**settings).new_page()
        self.page.set_default_timeout(TIMEOUT * 1000)
        self.requests = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector(f"#create-{RQ}")

    def open(self, task, model=RQ):
        for tab in (TABS[model], task):
            self.page.get_by_role("tab", name=tab, exact=True).click()

    def fill(self, name, value):
        field = self.page.locator(f"#{name} :is(textarea, input[type=text], input[type=number])").first
        field.fill(str(value))
        field.blur()

    def ask(self, task, model=RQ, value=None, seed=0, count=1):
        """Presses the button of a task."""
        if value is not None:
            self.fill(f"value-{model}", value)
        self.fill(f"count-{model}", count)
        self.page.locator(f"#new-{model} input").uncheck()
        self.fill(f"seed-{model}", seed)
        self.page.click(f"#{task}-{model}")

    def images(self, place) -> list[Image.Image]:
        script = "images => images.map(image => image.src)"
        sources = self.page.eval_on_selector_all(f"#{place} :is(.thumbnail-item, .image-frame) img", script)
        return [Image.open(io.BytesIO(self.page.request.get(source).body())).convert("RGB") for source in sources]

    def sees(self, place, images):
        """Waits for exactly these images."""
        until(lambda: same_images(self.images(place), images))

    def message(self) -> str:
        """The message that appears, which is then closed."""
        toast = self.page.get_by_test_id("toast-body").first
        toast.wait_for()
        text = toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        toast.wait_for(state="detached")
        return text

    def upload(self, place, file):
        clear = self.page.locator(f"#{place} button[aria-label='Remove Image']")
        if clear.count():
            clear.first.click()
        self.page.set_input_files(f"#{place} input[type=file]", file)


def same_images(actual, expected):
    return [image.size for image in actual] == [image.size for image in expected] and not any(
        ImageChops.difference(*pair).getbbox() for pair in zip(actual, expected)
    )


def is_blank(image):
    return all(low == high for low, high in image.getextrema())


@pytest.fixture(scope="module")
def visitor(browser, server):
    visitor = Visitor(browser, server.url)
    yield visitor
    visitor.page.context.close()
    local = (server.url, "data:", "blob:")
    assert [url for url in visitor.requests if not url.startswith(local)] == []


@pytest.fixture(scope="module")
def mar():
    pipe = rq_hf.MARPipeline.from_pretrained(rq_hf.MAR_EMOJI_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def upload_file(file, size=(90, 70)):
    rows = np.linspace(0, 255, size[1], dtype=np.uint8)[:, None, None]
    columns = np.linspace(0, 255, size[0], dtype=np.uint8)[None, :, None]
    pixels = np.concatenate(np.broadcast_arrays(rows, columns, np.uint8(90)), axis=2)
    Image.fromarray(pixels).save(file)
    return Image.open(file)


def test_a_prompt_gives_the_image_of_its_seed_while_it_is_sampled(visitor, rq):
    visitor.open("Create")
    visitor.ask("create", value="fire engine", seed=7)
    (expected,) = rq("fire engine", generator=[7]).images
    visitor.sees(f"create-images-{RQ}", [expected])
    assert not is_blank(expected)
    assert visitor.page.locator(f"#create-images-{RQ} .caption-label").inner_text() == "seed 7"
    shown = [url for url in visitor.requests if url.endswith("image.png")]
    assert len(set(shown)) > 2
    screenshot = visitor.page.locator(f"#create-images-{RQ} .thumbnail-item img").screenshot()
    assert not is_blank(Image.open(io.BytesIO(screenshot)).convert("RGB"))


def test_a_new_seed_is_shown_and_gives_the_same_images_again(visitor, rq):
    visitor.open("Create")
    visitor.fill(f"value-{RQ}", "octopus")
    visitor.fill(f"count-{RQ}", 2)
    visitor.fill(f"seed-{RQ}", 7)
    visitor.page.locator(f"#new-{RQ} input").check()
    visitor.page.click(f"#create-{RQ}")
    caption = visitor.page.locator(f"#create-images-{RQ} .caption-label").first
    until(lambda: caption.inner_text() != "seed 7")
    seed = int(caption.inner_text().removeprefix("seed "))
    assert visitor.page.locator(f"#seed-{RQ} input").input_value() == str(seed)
    images = rq("octopus", num_images_per_prompt=2, generator=[seed, seed + 1]).images
    visitor.sees(f"create-images-{RQ}", images)


def test_two_prompts_side_by_side_from_the_same_seeds(visitor, rq):
    visitor.open("Compare")
    visitor.fill(f"other-{RQ}", "blue heart")
    visitor.ask("compare", value="red heart", seed=3)
    visitor.sees(f"compare-images-{RQ}", rq(["red heart", "blue heart"], generator=[3, 3]).images)
    captions = visitor.page.locator(f"#compare-images-{RQ} .caption-label").all_inner_texts()
    assert captions == ["red heart · seed 3", "blue heart · seed 3"]


def test_an_uploaded_image_at_every_depth(visitor, rq, tmp_path):
    image = upload_file(tmp_path / "photo.jpg", (900, 700))
    visitor.open("Reconstruct")
    visitor.upload(f"reconstruct-upload-{RQ}", tmp_path / "photo.jpg")
    for depth in (4, 1):
        visitor.fill(f"depth-{RQ}", depth)
        visitor.sees(f"reconstruct-{RQ}", rq.reconstruct(image, depth=depth, resize=True))


def test_variations_and_completions_of_an_image(visitor, rq, tmp_path):
    codes = rq.encode_image(upload_file(tmp_path / "image.png"), resize=True)
    visitor.open("Vary")
    visitor.upload(f"vary-upload-{RQ}", tmp_path / "image.png")
    visitor.ask("vary", value="sunflower", seed=5)
    visitor.sees(f"vary-images-{RQ}", rq("sunflower", prefix_codes=codes, keep_depth=1, generator=[5]).images)
    visitor.open("Complete")
    visitor.upload(f"complete-upload-{RQ}", tmp_path / "image.png")
    visitor.ask("complete", value="sunflower", seed=5)
    visitor.sees(f"complete-images-{RQ}", rq("sunflower", prefix_codes=codes, start=32, generator=[5]).images)


def test_mar_completes_a_part_of_an_image_of_its_own(visitor, mar):
    settings = {"guidance_scale": 3.0, "num_iterations": 16, "num_inference_steps": 25}
    visitor.open("Create", MAR)
    visitor.ask("create", MAR, "red heart", seed=1)
    (image,) = mar("red heart", generator=[1], **settings).images
    visitor.sees(f"create-images-{MAR}", [image])
    visitor.page.click(f"#to-complete-{MAR}")
    visitor.page.locator(f"#part-{MAR}").get_by_label("Right half").check()
    visitor.ask("complete", MAR, "blue heart", seed=2)
    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    edited = mar("blue heart", image=image, mask_image=mask, generator=[2], **settings).images
    visitor.sees(f"complete-images-{MAR}", edited)


def test_classes_and_models_without_a_condition(visitor, server):
    for model, folder, call in ((CLASSES, "class", {"class_labels": 2}), (UNCONDITIONAL, "none", {})):
        pipe = rq_hf.RQPipeline.from_pretrained(server.log.with_name(folder))
        visitor.open("Create", model)
        if call:
            visitor.page.locator(f"#value-{model} input").click()
            visitor.page.get_by_role("option", name="2", exact=True).click()
        visitor.ask("create", model, seed=4)
        visitor.sees(f"create-images-{model}", pipe(**call, generator=[4]).images)


@pytest.mark.parametrize(
    "prompt, message",
    [("  ", "Say in words what to create"), ("red apple " * 25, "at most 24 tokens"), ("", "Say in words")],
)
def test_a_wrong_prompt_gives_a_message(visitor, prompt, message):
    visitor.open("Create")
    visitor.ask("create", value=prompt)
    assert message in visitor.message()


def test_markup_in_a_prompt_stays_text(visitor):
    visitor.open("Create")
    visitor.ask("create", value="<img src=x onerror=document.title='run'> " + "apple " * 30)
    assert "at most 24 tokens" in visitor.message()
    assert visitor.page.title() == "Images, token by token"


def test_files_that_cannot_be_read_give_a_message_and_take_no_memory(visitor, server, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (8000, 6250)).save(tmp_path / "huge.png")
    upload_file(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    visitor.open("Vary")
    memory = server.memory()
    for name, message in (("text", "no image"), ("broken", "damaged"), ("huge", "more than 24 megapixels")):
        visitor.upload(f"vary-upload-{RQ}", tmp_path / f"{name}.png")
        visitor.page.locator(f"#vary-upload-{RQ} .image-frame img").wait_for(state="attached")
        visitor.ask("vary", value="sunflower")
        assert message in visitor.message()
    assert server.memory() - memory < 30
    visitor.page.locator(f"#vary-upload-{RQ} button[aria-label='Remove Image']").first.click()
    visitor.ask("vary", value="sunflower")
    assert "Upload an image first" in visitor.message()
    (tmp_path / "words.txt").write_text("no image")
    visitor.upload(f"vary-upload-{RQ}", tmp_path / "words.txt")
    assert visitor.message()


def test_visitors_at_the_same_time_get_their_own_images(browser, server, visitor, rq):
    other = Visitor(browser, server.url)
    visitor.open("Create")
    for one, prompt, seed in ((visitor, "pizza", 1), (other, "rocket", 2)):
        one.ask("create", value=prompt, seed=seed)
    for one, prompt, seed in ((visitor, "pizza", 1), (other, "rocket", 2)):
        one.sees(f"create-images-{RQ}", rq(prompt, generator=[seed]).images)
    other.page.context.close()


def test_the_page_fits_on_a_phone(browser, server):
    phone = Visitor(browser, server.url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    button = phone.page.locator(f"#create-{RQ}").bounding_box()
    assert button["y"] + button["height"] < 844
    phone.page.context.close()


def post(server, api_name, *values) -> str:
    """Puts a request of a program into the queue; returns the place of its answer."""
    place = f"{server.url}/gradio_api/call/{api_name}"
    with urllib.request.urlopen(urllib.request.Request(place, json.dumps({"data": values}).encode(), JSON)) as answer:
        return f"{place}/{json.load(answer)['event_id']}"


def answer(place) -> list:
    """Waits for the answer to a request; returns its values."""
    with urllib.request.urlopen(place) as events:
        return json.loads(events.read().decode().split("event: complete\ndata: ")[1])


def test_ten_in_the_queue_are_served_in_order(server):
    places = [post(server, "create_2", 1, 1, seed, False, *SETTINGS) for seed in range(10)]
    answers = [answer(place) for place in places]
    assert [(image["caption"], seed) for (image,), seed in answers] == [(f"seed {n}", n) for n in range(10)]
    written = [Path(image["image"]["path"]).stat().st_ctime_ns for (image,), _ in answers]
    assert written == sorted(set(written))


@pytest.mark.parametrize(
    "place",
    ["/etc/hostname", str(ROOT / "model_cards/emoji.png"), "http://127.0.0.1/a.png", "https://example.org/a.png"],
)
def test_nobody_has_the_server_read_what_was_not_uploaded(server, place):
    file = {"path": place, "meta": {"_type": "gradio.FileData"}}
    with urllib.request.urlopen(post(server, "reconstruct", file, 1)) as events:
        reason = "Upload the image itself" if place.startswith("http") else ""
        assert re.match(f"event: error.*{reason}", events.read().decode(), re.DOTALL)
    with pytest.raises(urllib.error.HTTPError, match="403|404"):
        urllib.request.urlopen(f"{server.url}/gradio_api/file={place}")


@pytest.mark.parametrize(
    "values",
    [("rocket", 9, 0), ("rocket", 0, 0), ("rocket", 1, -1), ("rocket", 1, 2**32), ("rocket " * 100, 1, 0)],
)
def test_requests_of_programs_have_the_bounds_of_the_page(server, values):
    with urllib.request.urlopen(post(server, "create", *values, False, *SETTINGS)) as events:
        message = events.read().decode()
    assert message.startswith("event: error")
    assert re.search("maximum|minimum|characters|Seeds", message)


def grown_memory(server, requests, api_name, value) -> float:
    """Megabytes that the memory has grown by in so many requests, after the first ten."""
    for seed in range(10 + requests):
        if seed == 10:
            memory = server.memory()
        images, _ = answer(post(server, api_name, value, 1, seed, False, *SETTINGS))
        assert len(images) == 1
    return server.memory() - memory


def test_memory_stays_where_it_was(server):
    assert grown_memory(server, 20, "create_2", 1) < 10


@pytest.mark.slow
def test_memory_stays_where_it_was_after_many_images(server):
    assert grown_memory(server, 200, "create", "rocket") < 30


def test_the_space_asks_for_what_the_package_needs():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    requirements = (SPACE / "requirements.txt").read_text().splitlines()
    assert [line for line in requirements if not line.startswith("--")] == config["options"][
        "install_requires"
    ].split()
    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "web_demo.py"
    assert version_of(header["sdk_version"]) >= version_of(config["options.extras_require"]["demo"].split(">=")[1])
    assert version_of(header["python_version"]) >= (3, 11)


def version_of(text):
    return tuple(map(int, re.findall(r"\d+", text)))
