import runpy
import sys
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[2] / "docs" / "make_figures.py"
SIDE = 64
COLUMNS = {"coarse_to_fine.png": 4, "variations.png": 4, "completions.png": 5, "being_drawn.png": 4}


def column(figure, number):
    return figure.crop((number * SIDE, 0, (number + 1) * SIDE, 4 * SIDE)).tobytes()


def test_figures_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path / "images")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    figures = {path.name: Image.open(path) for path in (tmp_path / "images").iterdir()}
    sizes = {name: figure.size for name, figure in figures.items()}
    assert sizes == {name: (columns * SIDE, 4 * SIDE) for name, columns in COLUMNS.items()}
    assert column(figures["coarse_to_fine.png"], 3) == column(figures["variations.png"], 0)
    for name, figure in figures.items():
        assert len({column(figure, number) for number in range(COLUMNS[name])}) == COLUMNS[name]
