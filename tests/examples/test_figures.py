import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import rq_hf

ROOT = Path(__file__).parents[2]
DOCS, CARDS, IMAGES = ROOT / "docs", ROOT / "model_cards", ROOT / "docs" / "images"
SIDE = 64
COLUMNS = {"coarse_to_fine.png": 4, "variations.png": 4, "completions.png": 5, "being_drawn.png": 4}
SOURCES = {  # of a manifest: scripts and model
    "make_figures": ([DOCS / "make_figures.py", ROOT / "examples" / "demo.py"], Path(rq_hf.EMOJI_MODEL)),
    "make_mar_figures": ([DOCS / "make_mar_figures.py"], Path(rq_hf.MAR_EMOJI_MODEL)),
}
BY_BROWSER = {"web_demo.png"}  # made by docs/make_screenshot.py
BY_TRAINING = {"labels.png", "lora.png", "rate_distortion.png"}  # made by benchmarks, and examples/train_lora.py


def column(figure, number):
    return figure.crop((number * SIDE, 0, (number + 1) * SIDE, 4 * SIDE)).tobytes()


def read_manifest(name):
    return json.loads((IMAGES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_figures_of_the_documentation(tmp_path, monkeypatch):
    output_dir, card_image = tmp_path / "images", tmp_path / "emoji.png"
    script = DOCS / "make_figures.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--output_dir", str(output_dir), "--card_image", str(card_image)])
    monkeypatch.syspath_prepend(DOCS)
    runpy.run_path(str(script), run_name="__main__")
    figures = {path.name: Image.open(path) for path in output_dir.glob("*.png")}
    sizes = {name: figure.size for name, figure in figures.items()}
    assert sizes == {name: (columns * SIDE, 4 * SIDE) for name, columns in COLUMNS.items()}
    assert column(figures["coarse_to_fine.png"], 3) == column(figures["variations.png"], 0)
    for name, figure in figures.items():
        assert len({column(figure, number) for number in range(COLUMNS[name])}) == COLUMNS[name]
    made = json.loads((output_dir / "make_figures.json").read_text(encoding="utf-8"))
    assert made["figures"].keys() == {*COLUMNS, card_image.name}
    assert {kind: made[kind] for kind in ("scripts", "model")} == {
        kind: read_manifest("make_figures")[kind] for kind in ("scripts", "model")
    }


@pytest.mark.parametrize("name", SOURCES)
def test_figures_are_not_stale(name):
    scripts, model = SOURCES[name]
    made = read_manifest(name)
    figures = [CARDS / figure if (CARDS / figure).exists() else IMAGES / figure for figure in made["figures"]]
    now = runpy.run_path(str(DOCS / "manifest.py"))["manifest"](scripts, model, figures)
    assert made == now, f"run docs/{name}.py, as its help says, and look at the figures"


def test_every_figure_is_made_by_a_script():
    figures = {path.name for folder in (IMAGES, CARDS) for path in folder.glob("*.png")}
    made = {figure for name in SOURCES for figure in read_manifest(name)["figures"]}
    assert figures == made | BY_BROWSER | BY_TRAINING
