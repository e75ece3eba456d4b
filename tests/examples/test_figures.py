import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import rq_hf

ROOT = Path(__file__).parents[2]
DOCS, CARDS, IMAGES = ROOT / "docs", ROOT / "model_cards", ROOT / "docs" / "images"
PAGE = ROOT / "examples" / "browser"
PAGE_FILES = ("index.html", "model.js", "page.js", "sampling.js", "style.css", "tokenizer.js", "worker.js")
SIDE = 64
COLUMNS = {"coarse_to_fine.png": 4, "variations.png": 4, "completions.png": 5, "being_drawn.png": 4}
EMOJI, MAR_EMOJI = Path(rq_hf.EMOJI_MODEL), Path(rq_hf.MAR_EMOJI_MODEL)
SOURCES = {  # of a manifest: scripts and models
    "make_figures": ([DOCS / "make_figures.py", ROOT / "examples" / "demo.py"], [EMOJI]),
    "make_browser_figure": (
        [DOCS / "make_browser_figure.py", *(PAGE / name for name in PAGE_FILES)],
        [EMOJI],
    ),
    "make_mar_figures": ([DOCS / "make_mar_figures.py"], [MAR_EMOJI]),
    "readme/make_readme_figures": ([ROOT / "README.md"], [EMOJI, MAR_EMOJI]),
}
BY_TRAINING = {  # made by benchmarks, examples/train_lora.py and docs/plot_curves.py
    IMAGES / name for name in ("curves.png", "first_training.png", "labels.png", "lora.png", "rate_distortion.png")
}
BY_BROWSER = {IMAGES / "web_demo.png"}  # made by docs/make_screenshot.py


def column(figure, number):
    return figure.crop((number * SIDE, 0, (number + 1) * SIDE, 4 * SIDE)).tobytes()


def read_manifest(name):
    return json.loads((IMAGES / f"{name}.json").read_text(encoding="utf-8"))


def figures_of(name):
    folder = (IMAGES / name).parent
    return [
        folder / figure if (folder / figure).exists() else CARDS / figure for figure in read_manifest(name)["figures"]
    ]


def run_script(script, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
    monkeypatch.syspath_prepend(DOCS)
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.slow
def test_figures_of_the_documentation(tmp_path, monkeypatch):
    output_dir, card_image = tmp_path / "images", tmp_path / "emoji.png"
    run_script(DOCS / "make_figures.py", monkeypatch, "--output_dir", output_dir, "--card_image", card_image)
    figures = {path.name: Image.open(path) for path in output_dir.glob("*.png")}
    sizes = {name: figure.size for name, figure in figures.items()}
    assert sizes == {name: (columns * SIDE, 4 * SIDE) for name, columns in COLUMNS.items()}
    assert column(figures["coarse_to_fine.png"], 3) == column(figures["variations.png"], 0)
    for name, figure in figures.items():
        assert len({column(figure, number) for number in range(COLUMNS[name])}) == COLUMNS[name]
    made = json.loads((output_dir / "make_figures.json").read_text(encoding="utf-8"))
    assert made["figures"].keys() == {*COLUMNS, card_image.name}
    assert {kind: made[kind] for kind in ("scripts", "models")} == {
        kind: read_manifest("make_figures")[kind] for kind in ("scripts", "models")
    }


@pytest.mark.slow
def test_figures_of_the_readme_are_what_its_examples_write(tmp_path, monkeypatch):
    run_script(DOCS / "make_readme_figures.py", monkeypatch, "--output_dir", tmp_path)
    made = {path.name: Image.open(path) for path in tmp_path.glob("*.png")}
    expected = {path.name: Image.open(path) for path in figures_of("readme/make_readme_figures")}
    assert len(made) == 5
    assert {name: image.size for name, image in made.items()} == {n: image.size for n, image in expected.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_figures_are_not_stale(name):
    scripts, models = SOURCES[name]
    now = runpy.run_path(str(DOCS / "manifest.py"))["manifest"](scripts, models, figures_of(name))
    assert read_manifest(name) == now, f"run docs/{Path(name).name}.py, as its help says, and look at the figures"


def test_every_figure_is_made_by_a_script():
    figures = {path for folder in (IMAGES, CARDS) for path in folder.rglob("*.png")}
    made = {figure for name in SOURCES for figure in figures_of(name)}
    assert figures == made | BY_BROWSER | BY_TRAINING


def test_curves_of_a_training(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="docs/plot_curves.py needs pip install 'rq_hf[benchmarks]'")
    logs = {
        "rqvae": [{"arguments": {}}, {"step": 50, "psnr": 11.0}, {"step": 100, "psnr": 14.0, "validation/psnr": 13.0}],
        "transformer": [
            {"arguments": {}},
            {"step": 50, "loss_depth_1": 5.0, "loss_depth_2": 5.5},
            {"step": 100, "loss_depth_1": 4.0, "loss_depth_2": 5.0},
            {"step": 100, "validation/loss": 4.4},
        ],
    }
    for name, lines in logs.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--rqvae", tmp_path / "rqvae.jsonl", "--transformer", tmp_path / "transformer.jsonl"]
    run_script(DOCS / "plot_curves.py", monkeypatch, *options, "--output", tmp_path / "curves.png")
    assert len(Image.open(tmp_path / "curves.png").convert("RGB").getcolors(100_000)) > 50
