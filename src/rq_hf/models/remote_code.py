"""What loads saved folders without `import rq_hf`, for `trust_remote_code=True`: a line or, on request, our code."""

import functools
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..argument_checks import check_bool
from ..model_cards import CODE_FILE

FILE = "code_rq.py"
PACKAGE = Path(__file__).parents[1]
# What `import rq_hf` needs, beside the modules at the top.
LAYERS = ("models", "pipelines", "semantic_ids", "convert", "presets")
# The code file is this, VERSION and FILES, and the rest.
CODE_START = '''"""The package rq_hf, for machines without it, as `save_pretrained(..., with_code=True)` wrote it.

`from rq_hf_code import rq_hf` writes FILES, those of the package, to a temporary folder and imports it from there.
Where rq_hf is installed, that one is used.
"""

import atexit
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

'''
CODE_END = """
try:
    import rq_hf
except ModuleNotFoundError as error:
    if error.name != "rq_hf":
        raise
    folder = tempfile.mkdtemp(prefix="rq_hf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, lines in FILES.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\\n".join(lines), encoding="utf-8")
    sys.path.append(folder)
    import rq_hf
else:
    if rq_hf.__version__ != VERSION:
        warnings.warn(f"rq_hf {rq_hf.__version__} is used; with this model comes the code of rq_hf {VERSION}")
"""


class LoaderFileMixin:
    """For a [`~transformers.PreTrainedConfig`] whose class is in `rq_hf`."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """See [`~transformers.PreTrainedConfig.save_pretrained`]. Also writes the one line with which
        `AutoModel.from_pretrained(folder, trust_remote_code=True)` works without `import rq_hf`; everyone else needs
        neither the file nor the argument."""
        name = type(self).__name__
        # The import registers the model as well; an entry of its own would make diffusers ask everyone for the
        # argument.
        self.auto_map = {"AutoConfig": f"{Path(FILE).stem}.{name}"}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, FILE).write_text(f"from rq_hf import {name}  # noqa: F401\n", encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: [`save_pretrained`] writes what `AutoConfig` needs, in place of the source files."""


def with_code(save_pretrained: Callable) -> Callable:
    """
    The `save_pretrained` of a model or pipeline, with its signature, which diffusers looks at. With `with_code=True`,
    the folder also gets the code of this package, `rq_hf_code.py`, which `loaders` of the object, if any, import: a
    dictionary of the names of loader files and their last lines.
    """

    @functools.wraps(save_pretrained)
    def wrapper(self, save_directory, *args, with_code: bool = False, **kwargs):
        check_bool("with_code", with_code)
        saved = save_pretrained(self, save_directory, *args, **kwargs)
        if with_code:
            Path(save_directory, CODE_FILE).write_text(code(), encoding="utf-8")
            for name, line in self.loaders.items():
                text = f"from .{Path(CODE_FILE).stem} import rq_hf\n\n{line}\n"
                Path(save_directory, name).write_text(text, encoding="utf-8")
        return saved

    return wrapper


def code() -> str:
    """A module that makes this version of the package importable where it is not installed."""
    number = version("rq_hf")
    files = {f"rq_hf-{number}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: rq_hf\nVersion: {number}\n"}
    below = (path for layer in LAYERS for path in (PACKAGE / layer).rglob("*") if path.suffix in (".py", ".json"))
    for path in sorted([*PACKAGE.glob("*.py"), *below]):
        files[f"rq_hf/{path.relative_to(PACKAGE).as_posix()}"] = path.read_text(encoding="utf-8")
    # Line by line, because the loaders search the file for lines that look like imports.
    lines = json.dumps({name: text.split("\n") for name, text in files.items()}, indent=1, ensure_ascii=False)
    return f'{CODE_START}VERSION = "{number}"\nFILES = {lines}\n{CODE_END}'
