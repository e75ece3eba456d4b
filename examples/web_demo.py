"""A web page to create images, to compare, vary and complete them, and to see them at every depth of their codes.

    python examples/web_demo.py
    python examples/web_demo.py --model models/imagenet-1.4b

Needs the extra `demo`. It is also a Space: see examples/space/README.md.
"""

import argparse
import functools
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from rq_hf import EMOJI_MODEL, MAR_EMOJI_MODEL, MARPipeline, RQPipeline
from rq_hf.images import to_rgb
from rq_hf.models.rq_transformer.generation_settings import DEFAULTS
from rq_hf.untrusted_files import one_line

try:
    import spaces  # GPUs of Spaces that are lent for a call
except ImportError:
    spaces = None

MODELS = {"rq": EMOJI_MODEL, "mar": MAR_EMOJI_MODEL}
PROMPTS = ["red apple", "fire engine", "sunflower", "octopus", "rocket"]
MAX_IMAGES = 8
MAX_PROMPT = 300  # characters
MAX_PIXELS = 24_000_000
MAX_FILE_SIZE = "20mb"
MAX_WAITING = 20  # visitors
MAX_SESSIONS = 50  # that Gradio remembers, in 0.3 MB each
LARGEST_SEED = 2**32 - 1
PREVIEWS = 8  # of an image while it is sampled
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
LABELS = {
    "guidance_scale": ("Guidance", "how closely to follow the words; 1 is no guidance"),
    "temperature": ("Temperature", "higher is more varied, lower more typical"),
    "top_k": ("Top-k", "sample from so many of the likeliest codes"),
    "top_p": ("Top-p", "sample from the likeliest codes with this share of the probability"),
    "num_iterations": ("Iterations", "in which the tokens of an image are sampled"),
    "num_inference_steps": ("Denoising steps", "of each token"),
}
NAMES = {"rq": "Residual quantization", "mar": "MAR"}
PARTS = {  # of an image, by its rows and columns in [0, 1]
    "Lower half": lambda y, x: y > 0.5,
    "Upper half": lambda y, x: y < 0.5,
    "Left half": lambda y, x: x < 0.5,
    "Right half": lambda y, x: x > 0.5,
    "Middle": lambda y, x: ((y - 0.5).abs() < 0.25) & ((x - 0.5).abs() < 0.25),
    "All but the middle": lambda y, x: ((y - 0.5).abs() > 0.25) | ((x - 0.5).abs() > 0.25),
}
TITLE = "Images, token by token"
INTRODUCTION = "Say what to create, and press **Create**. The images appear while they are sampled."
EMBEDDED = "This small model has learned emoji from their names."
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto !important; }
.grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.gallery-item .caption-label { position: static; max-width: none; border-width: 1px 0 0; text-align: center; }
.gallery-item .thumbnail-lg { display: flex; flex-direction: column; aspect-ratio: auto; height: auto; }
.gallery-item .thumbnail-lg img { aspect-ratio: 1; height: auto; }
.gallery-container:has(.preview) { min-height: 360px; }
.image-frame, .image-frame img { width: 100%; height: 100%; object-fit: contain; }
"""

Pipeline = RQPipeline | MARPipeline
Captioned = list[tuple[Image.Image, str]]

# Pipelines are not shared between calls. A call that a visitor has left ends here before the next one begins.
WORKER = ThreadPoolExecutor(max_workers=1)


def load(model: str) -> Pipeline:
    """The pipeline of a folder or Hub id, or `"rq"` or `"mar"`, on the accelerator if there is one."""
    pipe = DiffusionPipeline.from_pretrained(MODELS.get(model, model))
    if not isinstance(pipe, Pipeline):
        raise ValueError(f"--model must name pipelines of rq_hf, got {model} of class {type(pipe).__name__}")
    pipe.set_progress_bar_config(disable=True)
    # The GPUs of Spaces show themselves only to torch.cuda.
    accelerator = "cuda" if torch.cuda.is_available() else torch.accelerator.current_accelerator(check_available=True)
    return pipe.to(accelerator or "cpu")


def settings_of(pipe: Pipeline) -> dict[str, tuple[float, float, float, float]]:
    """Lowest and highest value, that of the model, and the step of every setting that is one number."""
    config = pipe.transformer.config
    if isinstance(pipe, MARPipeline):
        settings = {
            "guidance_scale": (1, 10, 3.0, 0.1),
            "temperature": (0.5, 1.5, 1.0, 0.05),
            "num_iterations": (1, config.num_tokens, min(16, config.num_tokens), 1),
            "num_inference_steps": (2, 100, 25, 1),
        }
    else:
        own = {name: getattr(pipe.transformer.generation_config, name, None) for name in DEFAULTS}
        own = {name: default if own[name] is None else own[name] for name, default in DEFAULTS.items()}
        settings = {
            "guidance_scale": (1, 10, own["guidance_scale"], 0.1),
            "temperature": (0.05, 2, own["temperature"], 0.05),
            "top_k": (1, config.codebook_size, own["top_k"] or config.codebook_size, 1),
            "top_p": (0.05, 1, own["top_p"], 0.05),
        }
    if config.null_cond_id is None:
        del settings["guidance_scale"]
    return {name: numbers for name, numbers in settings.items() if not isinstance(numbers[2], list)}


def classes_of(pipe: Pipeline) -> list[tuple[str, int]]:
    """Names and numbers of the classes of a class-conditional model."""
    config = pipe.transformer.config
    numbers = [number for number in range(config.cond_vocab_size) if number != config.null_cond_id]
    named = len(config.id2label) == len(numbers)
    return [(config.id2label[number] if named else str(number), number) for number in numbers]


def conditions_of(pipe: Pipeline, values: list) -> dict:
    """The arguments of the pipeline that say what to sample: a prompt or class for every image, or how many images."""
    if pipe.is_text_conditional:
        for text in values:
            if not (text and text.strip()):
                raise ValueError("Say in words what to create, for example: red apple")
            if len(text) > MAX_PROMPT:
                raise ValueError(f"A prompt may have {MAX_PROMPT} characters, this one has {len(text)}")
        return {"prompt": values}
    return {"class_labels": values} if pipe.is_class_conditional else {"batch_size": len(values)}


def read_image(file: str) -> Image.Image:
    """An uploaded image in RGB. Raises `ValueError`, in words for visitors, for anything else."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 1_000_000
        raise ValueError(f"This image has more than {limit} megapixels: make it smaller first") from error
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"This file is no image, or damaged; {', '.join(FORMATS)} can be read") from error


def sample(pipe: Pipeline, values: list, seeds: list[int], **arguments) -> Iterator[Captioned]:
    """Yields the images about `PREVIEWS` times while they are sampled, and the finished ones at last.

    `values` are prompts or classes, or `None` for an unconditional model.
    """
    captions = [f"seed {seed}" for seed in seeds]
    if len(set(values)) > 1:
        names = [pipe.transformer.config.id2label.get(value, value) for value in values]
        captions = [f"{name} · {caption}" for name, caption in zip(names, captions)]
    previews, left = SimpleQueue(), threading.Event()

    def on_step(pipe, step, number, tensors):
        if left.is_set():
            pipe._interrupt = True
        elif (step + 1) % math.ceil(pipe.num_timesteps / PREVIEWS) == 0:
            if isinstance(pipe, MARPipeline):
                previews.put(pipe.decode_latents(tensors["latents"]))
            else:
                previews.put(pipe.decode_codes(tensors["codes"], num_positions=number + 1))
        return {}

    arguments |= conditions_of(pipe, values)
    finished = WORKER.submit(pipe, generator=seeds, callback_on_step_end=on_step, **arguments)
    finished.add_done_callback(lambda _: previews.put(None))
    try:
        for images in iter(previews.get, None):
            yield list(zip(images, captions))
        yield list(zip(finished.result().images, captions))
    finally:
        left.set()


# What a visitor can do. `value` is a prompt or a class, or `None`; an image is sampled for every seed.


def create(pipe: Pipeline, value, seeds: list[int], settings: dict) -> Iterator[Captioned]:
    yield from sample(pipe, [value] * len(seeds), seeds, **settings)


def compare(pipe: Pipeline, value, seeds: list[int], settings: dict, other) -> Iterator[Captioned]:
    """Two images for every seed, side by side."""
    yield from sample(pipe, [value, other] * len(seeds), [seed for seed in seeds for _ in range(2)], **settings)


def vary(
    pipe: Pipeline, value, seeds: list[int], settings: dict, image: Image.Image, kept: int
) -> Iterator[Captioned]:
    """Keeps so many codes of every position; by MAR, this percentage of the tokens."""
    encoded = encode(pipe, image)
    if isinstance(pipe, MARPipeline):
        strength = 1 - kept / 100
        num_hidden = math.ceil(strength * pipe.transformer.config.num_tokens)
        given = {"known_latents": encoded, "strength": strength} | at_most(settings, num_hidden)
    else:
        given = {"prefix_codes": encoded.expand(len(seeds), -1, -1, -1), "keep_depth": kept}
    yield from sample(pipe, [value] * len(seeds), seeds, **settings | given)


def complete(
    pipe: Pipeline, value, seeds: list[int], settings: dict, image: Image.Image, part: int | str
) -> Iterator[Captioned]:
    """Samples anew all but so many rows of codes, from the top; by MAR, one of `PARTS`."""
    encoded = encode(pipe, image)
    if isinstance(pipe, MARPipeline):
        rows, columns = (torch.arange(count) / count + 0.5 / count for count in pipe.transformer.config.grid_size)
        mask = PARTS[part](rows[:, None], columns[None, :]).expand(pipe.transformer.config.grid_size)
        if not mask.any():
            raise ValueError(f"{part}: the map of this model is too small for this part")
        given = {"known_latents": encoded, "mask": mask.reshape(1, -1)} | at_most(settings, int(mask.sum()))
    else:
        start = part * encoded.shape[2]
        given = {"prefix_codes": encoded.expand(len(seeds), -1, -1, -1), "start": start}
    yield from sample(pipe, [value] * len(seeds), seeds, **settings | given)


def encode(pipe: Pipeline, image: Image.Image | None) -> torch.Tensor:
    """Codes or latents of one image of any size."""
    if image is None:
        raise ValueError("Upload an image first")
    return pipe.encode_image(image, resize=True)


def at_most(settings: dict, num_tokens: int) -> dict:
    """The iterations of MAR where only so many tokens are sampled: at most one per token."""
    return {"num_iterations": min(settings["num_iterations"], num_tokens)}


def reconstruct(pipe: Pipeline, image: Image.Image | None, depth: int | None) -> Image.Image | None:
    """An image from the first `depth` codes of every position; by MAR, from its latents."""
    if image is None:
        return None
    given = {} if depth is None else {"depth": depth}
    return pipe.reconstruct(image, resize=True, **given)[0]


# The page. Gradio, which is optional, is imported here alone.


@contextmanager
def messages():
    """Shows errors in what a visitor gave on the page."""
    import gradio as gr

    try:
        yield
    except (ValueError, TypeError) as error:
        raise gr.Error(one_line(error), print_exception=False) from error


def upload_image(name: str):
    """An input for an image, of which functions get the pixels, or `None`."""
    import gradio as gr
    from gradio_client.utils import is_http_url_like

    component = gr.Image(
        label="An image",
        type="filepath",
        sources=["upload", "clipboard"],
        height=260,
        elem_id=name,
    )
    keep = component.async_move_resource_to_block_cache

    async def keep_file(path):  # Gradio would also download what a program names by its URL.
        if is_http_url_like(str(path)):
            raise gr.Error("Upload the image itself", print_exception=False)
        return await keep(path)

    def preprocess(payload):  # Gradio would not say what is wrong with a file.
        with messages():
            return None if payload is None else read_image(payload.path)

    component.async_move_resource_to_block_cache = keep_file
    component.preprocess = preprocess
    return component


def condition_input(pipe: Pipeline, label: str, value: str, name: str):
    """The input that says what to sample: words, a class, or nothing."""
    import gradio as gr

    if pipe.is_text_conditional:
        return gr.Textbox(value, label=label, max_length=MAX_PROMPT, elem_id=name)
    if pipe.is_class_conditional:
        classes = classes_of(pipe)
        return gr.Dropdown(classes, value=classes[0][1], label=label, elem_id=name)
    return gr.State()


def slider(label: str, info: str | None, lowest: float, highest: float, value: float, step: float, name: str):
    """A slider, of integers where `step` is one; no control where there is nothing to choose."""
    import gradio as gr

    if lowest == highest:
        return gr.State(value)
    whole = {"precision": 0} if isinstance(step, int) else {}
    return gr.Slider(lowest, highest, value, step=step, label=label, info=info, elem_id=name, **whole)


class Page:
    """The controls of one model, and a tab for everything it can do."""

    def __init__(self, pipe: Pipeline, number: int):
        import gradio as gr

        self.pipe, self.number = pipe, number
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.add_inputs()
            with gr.Column(scale=3, min_width=300), gr.Tabs() as self.tabs:
                self.add_tasks()

    def name(self, text: str) -> str:
        return f"{text}-{self.number}"

    def add_inputs(self) -> None:
        """What all tasks have in common."""
        import gradio as gr

        self.value = condition_input(self.pipe, "What to create", PROMPTS[0], self.name("value"))
        if self.pipe.is_text_conditional:
            gr.Examples(PROMPTS, self.value, label="For example")
        self.count = slider("Images", None, 1, MAX_IMAGES, 4, 1, self.name("count"))
        with gr.Row():
            self.seed = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id=self.name("seed")
            )
            self.is_new = gr.Checkbox(True, label="New seed every time", elem_id=self.name("new"))
        with gr.Accordion("Settings", open=False):
            self.sliders = {
                setting: slider(*LABELS[setting], min(lowest, own), max(highest, own), own, step, self.name(setting))
                for setting, (lowest, highest, own, step) in settings_of(self.pipe).items()
            }

    def add_tasks(self) -> None:
        import gradio as gr

        config, is_mar = self.pipe.transformer.config, isinstance(self.pipe, MARPipeline)
        uploads = {}
        with gr.Tab("Create", id="create"):
            created = self.add_task(create)
            links = gr.Row()
        if not isinstance(self.value, gr.State):
            with gr.Tab("Compare", id="compare"):
                label = "Beside it, from the same seeds"
                other = condition_input(self.pipe, label, PROMPTS[1], self.name("other"))
                self.add_task(compare, other, columns=2)
        if is_mar:
            kept = ("percent of its tokens", 5, 95, 50, 5)
        else:
            kept = ("codes of every position, coarse to fine", 1, config.code_shape[-1] - 1, 1, 1)
        if is_mar or config.code_shape[-1] > 1:
            with gr.Tab("Vary", id="vary"):
                uploads["vary"] = upload_image(self.name("vary-upload"))
                self.add_task(vary, uploads["vary"], slider("Kept", *kept, self.name("kept")))
        with gr.Tab("Complete", id="complete"):
            uploads["complete"] = upload_image(self.name("complete-upload"))
            if is_mar:
                part = gr.Radio(list(PARTS), value="Lower half", label="Sampled anew", elem_id=self.name("part"))
            else:
                height = config.code_shape[0]
                info = f"rows of codes, from the top; the image has {height}"
                part = slider("Kept", info, 1, height - 1, height // 2, 1, self.name("part"))
            self.add_task(complete, uploads["complete"], part)
        with gr.Tab("Reconstruct", id="reconstruct"):
            uploads["reconstruct"] = self.add_reconstruction()
        with links:
            for tab, upload in uploads.items():
                button = gr.Button(f"{tab.capitalize()} it", size="sm", elem_id=self.name(f"to-{tab}"))
                button.click(None, created, upload, js=take_image(created.elem_id))
                button.click(functools.partial(gr.Tabs, selected=tab), None, self.tabs, api_visibility="private")

    def add_task(self, task: Callable, *more, columns: int = 4):
        """A button that starts a task with `more` inputs; returns the gallery of its images."""
        import gradio as gr

        name = task.__name__
        button = gr.Button(name.capitalize(), variant="primary", elem_id=self.name(name))
        gallery = gr.Gallery(
            format="png",
            columns=columns,
            height="auto",
            object_fit="contain",
            show_label=False,
            buttons=["download"],
            interactive=False,
            elem_id=self.name(f"{name}-images"),
        )

        def run(value, count, seed, new_seed, *rest):
            with messages():
                if new_seed:
                    seed = random.randrange(1_000_000)
                if seed is None or seed + count - 1 > LARGEST_SEED:
                    raise ValueError(f"Seeds must lie in [0, {LARGEST_SEED}]")
                settings, more = dict(zip(self.sliders, rest)), rest[len(self.sliders) :]
                for images in task(self.pipe, value, list(range(seed, seed + count)), settings, *more):
                    yield images, seed

        triggers = [button.click]
        if task is create and self.pipe.is_text_conditional:
            triggers.append(self.value.submit)
        gr.on(
            triggers,
            on_gpu(run),
            [self.value, self.count, self.seed, self.is_new, *self.sliders.values(), *more],
            [gallery, self.seed],
            api_name=name,
            concurrency_id="model",
            show_progress_on=gallery,
        )
        return gallery

    def add_reconstruction(self):
        """An image that follows an upload, and the depth; returns the upload."""
        import gradio as gr

        with gr.Row():
            image = upload_image(self.name("reconstruct-upload"))
            result = gr.Image(
                label="Its reconstruction",
                format="png",
                buttons=["download"],
                interactive=False,
                height=260,
                elem_id=self.name("reconstruct"),
            )
        depth = gr.State()
        if isinstance(self.pipe, RQPipeline):
            last, info = self.pipe.vae.config.depth, "codes of every position, coarse to fine"
            depth = slider("Depth", info, 1, last, last, 1, self.name("depth"))

        def run(image, depth):
            with messages():
                return reconstruct(self.pipe, image, depth)

        gr.on(
            [image.change, depth.change],
            on_gpu(run),
            [image, depth],
            result,
            api_name="reconstruct",
            concurrency_id="model",
            trigger_mode="always_last",
        )
        return image


def take_image(gallery: str) -> str:
    """JavaScript that takes the chosen image of a gallery, or the first."""
    chosen = f"[...document.querySelectorAll('#{gallery} .thumbnail-item')].findIndex(e => e.matches('.selected'))"
    return f"images => images?.length ? images[Math.max(0, {chosen})].image : null"


def on_gpu(function: Callable) -> Callable:
    """The function on a GPU that is lent for every call, where this is a Space with such GPUs."""
    return spaces.GPU(function) if spaces is not None else function


def build(models: list[str]):
    """The page of these models, one tab for each."""
    import gradio as gr

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses what has more than twice as many
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {TITLE}\n{INTRODUCTION}")
        for number, model in enumerate(models):
            with gr.Tab(NAMES.get(model) or Path(model).name):
                if model in MODELS:
                    gr.Markdown(EMBEDDED)
                Page(load(model), number)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        nargs="+",
        default=os.environ.get("RQ_HF_MODELS", "rq mar").split(),
        help="rq, mar, or pipelines of ours, folders or Hub ids; default: the variable RQ_HF_MODELS, or rq mar",
    )
    args = parser.parse_args()
    try:
        import gradio as gr
    except ImportError:
        parser.error("gradio is not installed: pip install 'rq_hf[demo]'")
    try:
        page = build(args.model)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
    font, font_mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # others would be downloaded
    page.launch(
        theme=gr.themes.Default(font=font, font_mono=font_mono),
        css=CSS,
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=MAX_SESSIONS,
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
