"""The page of `examples/browser` in a headless browser, with the emoji model of the package."""

import base64
import functools
import io
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rq_hf.models.rq_transformer.code_sampling import filter_logits

PAGE = Path(__file__).parents[2] / "examples" / "browser"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
CHROMIUM = shutil.which("chromium")
TIMEOUT = 120_000  # milliseconds, on a machine that may be busy

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"needs {library}: pip install 'rq_hf[onnx]'")
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'rq_hf[test]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt install chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="needs onnxruntime-web: npm install --prefix examples/browser"),
]

GREEDY = {"temperature": [1] * 4, "topK": [1] * 4, "topP": [1] * 4, "guidanceScale": [1] * 4}
# What tokenizers disagree on: case, white space, numbers, contractions, composition, scripts, symbols, added tokens.
CAPTIONS = [
    *"| |  |red apple|Red Apple| red  apple |red\tapple\n|\nred|a \n b|x \t |RED APPLE".split("|"),
    *"woman judge, dark skin tone|keycap 7|keycap: *|keycap #|1st place medal|100|3.14|a1b2c3".split("|"),
    *"it's|IT'S|'s|don't we'll they've I'm he'd you're|rock'n'roll|it’s|''''|'sss|a's b'LL".split("|"),
    *"café|cafe\u0301|Å|A\u030a|\u0301|e\u0301\u0302x|naïve façade|São Tomé & Príncipe|ñ N\u0303".split("|"),
    *"İstanbul|ISTANBUL ı|Straße|STRASSE ẞ|ΟΔΥΣΣΕΥΣ|Σ|ΑΣ Σ.|ǅ ǈ ǋ|ﬁ ﬂ|Ω \u2126 K \u212a|ŉ".split("|"),
    *"日本|日本の 旗|ﾊﾝｶｸ|中文，测试。|한국어|\u1112\u1161\u11ab|ひらがな カタカナ|Ａｐｐｌｅ".split("|"),
    *"Россия|ПРИВЕТ|ελληνικά|עברית|العربية ٣|हिन्दी|ไทย|ქართული ᲐᲑᲒ|አማርኛ|ᏣᎳᎩ ꭰ".split("|"),
    *"🚒|👩‍⚖️|👩🏿‍🚀|🇯🇵|❤️|7️⃣|a🚒b|🚒🚒|👨‍👩‍👧|🏴\U000e0067\U000e0062\U000e007f|☺ ☹".split("|"),
    *"a\u00a0b|a\u2003b|a\u200bb|a\u200db|a\ufeffb|a\u0085b|\ufeff|\u3000日|a\u2028b|\x1c x".split("|"),
    *"½ cup|x²|Ⅳ ⅳ|①②|٣٤|१२|²³|1½|π≈3|€5 £6 ¥7|5€|a-b_c|--|C++|#1!|(a)|<b>".split("|"),
    *'[PAD]|a [PAD] b|a[PAD]b|[pad]|[PAD][PAD]|[PAD] | [PAD]|[ PAD]|\\|"quoted"|`'.split("|"),
    *"\x00|\x7f|\u00ad|\ufffd|\U0001f9d1\u200d\U0001f680|\U00010400\U00010428|\U0001d400|\ud7ff\ue000".split("|"),
    *"supercalifragilisticexpialidocious|aaaaaaaaaaaaaaaa".split("|"),
    "x" * 60,
    "the quick brown fox " * 3,
]


class Server(ThreadingHTTPServer):
    """Serves a folder on a free port of the loopback."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def assemble(folder, **others):
    """The page in a folder, beside links to other folders."""
    folder.mkdir(exist_ok=True)
    for file in PAGE.iterdir():
        if file.suffix in (".html", ".js", ".css"):
            (folder / file.name).symlink_to(file)
    for name, target in others.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture(scope="module")
def site(emoji_onnx, tmp_path_factory):
    folder = assemble(tmp_path_factory.mktemp("site"), model=emoji_onnx, node_modules=RUNTIME.parent)
    with Server(folder) as server:
        yield server.url


@pytest.fixture(scope="module")
def page(browser, site):
    """The page, ready to sample; anything in its console that is wrong fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(TIMEOUT)
    page.on("pageerror", lambda error: pytest.fail(f"the page raised {error}"))
    page.goto(site)
    page.wait_for_selector("form button[type=submit]:enabled")
    yield page
    page.close()


@pytest.fixture(scope="module")
def codes_on_page(page):
    """Samples the codes of a prompt with the scripts of the page, outside of its worker."""
    page.evaluate(
        """async () => {
            const { Model } = await import("./model.js");
            const ort = await import("onnxruntime-web");
            ort.env.wasm.numThreads = 1;
            window.model = await Model.load(ort, new URL("model/", document.baseURI).href);
        }"""
    )

    def sample(prompt, settings, seed=0):
        codes = page.evaluate(
            """async ([prompt, settings, seed]) => {
                let last;
                for await (last of model.sample(prompt, settings, seed));
                return Array.from(last.codes);
            }""",
            [prompt, settings, seed],
        )
        return torch.tensor(codes).view(1, 8, 8, 4)

    return sample


def test_tokens_are_those_of_the_tokenizers_library(page, rq):
    found = page.evaluate(
        """async (captions) => {
            const { Tokenizer } = await import("./tokenizer.js");
            const tokenizer = new Tokenizer(await (await fetch("model/tokenizer.json")).json());
            return captions.map((caption) => tokenizer.encode(caption));
        }""",
        CAPTIONS,
    )
    assert len(CAPTIONS) > 100
    expected = rq.tokenizer(CAPTIONS)["input_ids"]
    differing = [(text, own, theirs) for text, own, theirs in zip(CAPTIONS, found, expected) if own != theirs]
    assert not differing


@pytest.mark.parametrize(
    "part, value, named",
    [
        ("model", {"type": "WordPiece", "vocab": {}, "merges": []}, "model of tokenizer.json is"),
        ("pre_tokenizer", {"type": "Whitespace"}, 'pre-tokenizer of tokenizer.json is {"type":"Whitespace"}'),
        ("normalizer", {"type": "BertNormalizer"}, "normalizer of tokenizer.json is"),
        ("post_processor", {"type": "BertProcessing"}, "post-processor of tokenizer.json is"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(page, emoji_onnx, part, value, named):
    tokenizer = json.loads((emoji_onnx / "tokenizer.json").read_text(encoding="utf-8")) | {part: value}
    message = page.evaluate(
        """async (tokenizer) => {
            const { Tokenizer } = await import("./tokenizer.js");
            try { new Tokenizer(tokenizer); } catch (error) { return error.message; }
        }""",
        tokenizer,
    )
    assert named in message


def test_random_numbers_are_those_of_mulberry32(page):
    found = page.evaluate(
        """async () => {
            const { uniformNumbers } = await import("./sampling.js");
            return [0, 1, 4294967295].map((seed) => Array.from({ length: 5 }, uniformNumbers(seed)));
        }"""
    )

    def mulberry32(state):
        for _ in range(5):
            state = (state + 0x6D2B79F5) % 2**32
            bits = (state ^ state >> 15) * (state | 1) % 2**32
            bits ^= (bits + (bits ^ bits >> 7) * (bits | 61)) % 2**32
            yield (bits ^ bits >> 14) / 2**32

    assert found == [list(mulberry32(seed)) for seed in (0, 1, 2**32 - 1)]


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 64, 1.0), (0.2, 64, 1.0), (3.0, 5, 1.0), (1.0, 64, 0.3), (2.0, 9, 0.8)]
)
def test_codes_are_sampled_from_the_distribution_of_python(page, temperature, top_k, top_p):
    logits = torch.randn(40, 64).round(decimals=1) * 2  # with equal ones
    uniform = torch.rand(40, dtype=torch.float64)
    found = page.evaluate(
        """async ([rows, settings, uniform]) => {
            const { sampleCode } = await import("./sampling.js");
            return rows.map((row, i) => sampleCode(Float32Array.from(row), settings, uniform[i]));
        }""",
        [logits.tolist(), {"temperature": temperature, "topK": top_k, "topP": top_p}, uniform.tolist()],
    )
    cumulative = filter_logits(logits / temperature, top_k, top_p).double().softmax(dim=-1).cumsum(dim=-1)
    expected = torch.searchsorted(cumulative, uniform[:, None], right=True).squeeze(1)
    assert found == expected.tolist()
    assert len(set(found)) > 3


@pytest.mark.parametrize("prompt, scale", [("fire engine", 1), ("woman judge dark skin tone", 3)])
def test_greedy_codes_are_those_of_python(codes_on_page, rq, prompt, scale):
    expected = rq(prompt, do_sample=False, guidance_scale=float(scale), output_type="latent").codes
    assert torch.equal(codes_on_page(prompt, GREEDY | {"guidanceScale": [scale] * 4}), expected)


def pixels_on_page(page):
    """The finished images of the gallery `(B, height, width, 3)` in [0, 255], the first one first."""
    images = page.evaluate(
        """() => [...document.querySelectorAll("figure:not(.unfinished) canvas")].map((canvas) =>
            [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data])"""
    )
    return np.array(images, dtype=np.uint8).reshape(-1, 64, 64, 4)[..., :3]


def create(page, prompt, **fields):
    page.fill("[name=prompt]", prompt)
    page.eval_on_selector("details", "details => details.open = true")
    for name, value in fields.items():
        page.fill(f"[name={name}]", str(value))
    page.click("form button[type=submit]")
    page.wait_for_selector("form button[type=submit]:enabled")


def test_a_visitor_gets_the_images_of_the_codes(page, rq, codes_on_page):
    create(page, "fire engine", count=2, seed=7, temperature=1)
    assert page.inner_text("#status").startswith("Done")
    pixels = pixels_on_page(page)
    assert len(pixels) == 2 and pixels[0].std() > 20 and not np.array_equal(*pixels)
    settings = GREEDY | {"topK": [512] * 4}
    codes = torch.cat([codes_on_page("fire engine", settings, seed) for seed in (7, 8)])
    expected = rq.decode_codes(codes, output_type="np") * 255
    assert np.abs(pixels - expected).max() <= 2
    assert page.locator(".seed").all_inner_texts() == ["seed 7", "seed 8"]

    saved = page.eval_on_selector("figure a", "link => [link.download, link.href]")
    assert saved[0] == "fire-engine-7.png"
    png = Image.open(io.BytesIO(base64.b64decode(saved[1].split(",")[1])))
    assert np.array_equal(np.array(png.convert("RGB")), pixels[0])

    create(page, "fire engine", count=1, seed=8)
    assert np.array_equal(pixels_on_page(page)[0], pixels[1])  # the seed alone decides


def test_images_appear_while_they_are_sampled(page):
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const canvas = document.querySelector("figure canvas");
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                window.seen.push(data.reduce((a, b) => a + b, 0));
            }).observe(document.querySelector("#status"), { childList: true });
        }"""
    )
    create(page, "sunflower", count=1, seed=1)
    assert len(set(page.evaluate("window.seen"))) >= 4  # after every second row


def test_too_many_words_give_a_message_and_the_page_goes_on(page):
    count = page.locator("figure").count()
    create(page, "a very long story " * 10, count=1)
    assert "at most 24 tokens" in page.inner_text("#message")
    assert page.locator("figure").count() == count
    create(page, "octopus", count=1)
    assert page.is_hidden("#message") and page.locator("figure").count() == count + 1


def test_nothing_is_requested_from_elsewhere(browser, site):
    page = browser.new_page()
    requested = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(site)
    page.wait_for_selector("form button[type=submit]:enabled", timeout=TIMEOUT)
    page.close()
    assert len(requested) > 8 and all(url.startswith((site, "data:", "blob:")) for url in requested)
    readme = (PAGE / "README.md").read_text(encoding="utf-8")
    runtime = {url.removeprefix(site) for url in requested if "node_modules" in url}
    assert len(runtime) == 2 and all(f'--include "{file}"' in readme for file in runtime)


def test_the_readme_says_that_the_folder_is_a_static_space():
    header = yaml.safe_load((PAGE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert header["sdk"] == "static" and (PAGE / header["app_file"]).is_file()


@pytest.mark.parametrize("missing", ["model", "node_modules", "one file", "a whole file"])
def test_what_is_missing_or_damaged_is_named_on_the_page(browser, emoji_onnx, tmp_path, missing):
    others = {"model": emoji_onnx, "node_modules": RUNTIME.parent}
    others.pop(missing, None)
    if missing in ("one file", "a whole file"):
        others["model"] = shutil.copytree(emoji_onnx, tmp_path / "damaged")
        decoder = others["model"] / "decoder.onnx"
        decoder.unlink() if missing == "one file" else decoder.write_bytes(decoder.read_bytes()[:-1])
    named = {
        "model": "model/onnx.json is missing (404)",
        "node_modules": "ort.wasm.bundle.min.mjs is missing",
        "one file": "model/decoder.onnx is missing (404)",
        "a whole file": "decoder.onnx is not the file that onnx.json describes",
    }
    with Server(assemble(tmp_path / "site", **others)) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#message:visible", timeout=TIMEOUT)
        assert named[missing] in page.inner_text("#message")
        assert page.is_disabled("form button[type=submit]")
        page.close()
