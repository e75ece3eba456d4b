"""Make the figures of README.md by running the examples above them.

python docs/make_readme_figures.py --output_dir docs/images/readme
"""

import argparse
import contextlib
import re
import tempfile
from pathlib import Path

from manifest import write_manifest

from rq_hf import EMOJI_MODEL, MAR_EMOJI_MODEL

README = Path(__file__).parents[1] / "README.md"
# An example writes a file, and below it is the figure of that name.
EXAMPLE = re.compile(r"^```python\n([^`]*)^```\n\n!\[[^\]]*\]\(docs/images/readme/(\w+\.png)\)", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the figures")
    folder = parser.parse_args().output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    made, names = [], {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for code, figure in EXAMPLE.findall(README.read_text(encoding="utf-8")):
            exec(compile(code, README, "exec"), names)
            made.append(folder / figure)
            made[-1].write_bytes(Path(figure).read_bytes())
    write_manifest(folder / "make_readme_figures.json", [README], map(Path, (EMOJI_MODEL, MAR_EMOJI_MODEL)), made)


if __name__ == "__main__":
    main()
