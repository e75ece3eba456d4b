"""An extension of griffe, for the reference: docstrings in the style of Hugging Face become Markdown."""

import ast
import re
import textwrap
from pathlib import Path

import griffe

SOURCES = Path(__file__).parents[1] / "src"
MODULES = ("rq_hf", "rq_hf.data", "rq_hf.training", "rq_hf.metrics", "rq_hf.evaluation", "rq_hf.convert")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^(?P<names>[\w*`][\w*`, ]*?)(?P<type> \(.*?\))?: ", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


def public_names() -> dict[str, str]:
    """The public names, and where the reference has them."""
    names = {}
    for module in MODULES:
        path = SOURCES / Path(*module.split(".")) / "__init__.py"
        (exported,) = re.findall(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        names |= {name: f"{module}.{name}" for name in ast.literal_eval(exported)}
    return names


class HuggingFaceDocstrings(griffe.Extension):
    """Arguments become a list, and names in brackets links to the reference, or code where it lacks them."""

    def __init__(self):
        self.names = public_names()

    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = self.as_markdown(obj.docstring.value)

    def as_markdown(self, text: str) -> str:
        def section(match):
            entries = ENTRY.sub(r"* **\g<names>**\g<type>: ", textwrap.dedent(match[2]).strip())
            return f"**{match[1]}**\n\n{entries}\n\n"

        def link(match):
            target = self.names.get(match[1].rpartition(".")[2])
            return f"[`{match[1]}`][{target}]" if target else f"`{match[1]}`"

        return REFERENCE.sub(link, SECTION.sub(section, text))
