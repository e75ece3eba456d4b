"""A hook of MkDocs: the site has the tree of the repository, so that relative links are right in both.

Pages outside docs/ are in it, and every file that a page links to. Sources become pages, and links whose text is a
name that a source defines lead to its line.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "docs/api/*.md", "model_cards/*.md", "benchmarks/*.md", "examples/*/*.md")
STYLE = ROOT / "docs" / "site.css"
IMAGES = (".png", ".jpg", ".svg")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\(\s*(?P<target>(?!\w+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
SYMBOL = re.compile(r"`([A-Za-z_][\w.]*)`")


def pages() -> list[Path]:
    return [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def links(page: Path) -> Iterator[tuple[str, Path]]:
    """Texts and targets of the links of a page to files of the repository."""
    for match in LINK.finditer(page.read_text(encoding="utf-8")):
        yield match["text"], target_of(match, page.parent)


def target_of(match: re.Match, folder: Path) -> Path:
    return Path(os.path.normpath(folder / match["target"]))


def line_of(name: str, source: Path) -> int:
    """The line where a source defines `function`, `Class` or `Class.method`. Raises `LookupError` if it does not."""
    nodes, line = ast.parse(source.read_text(encoding="utf-8")).body, 0
    for part in name.split("."):
        definition = next((node for node in nodes if getattr(node, "name", None) == part), None)
        if definition is None:
            raise LookupError(f"{source.relative_to(ROOT)} does not define {name}")
        nodes, line = definition.body, definition.lineno
    return line


def source_page(path: Path) -> str:
    """A source as a page with an anchor at every line, left out of the search."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_for_filename

    lexer = get_lexer_for_filename({".cff": "citation.yaml"}.get(path.suffix, path.name))
    code = highlight(path.read_text(encoding="utf-8"), lexer, HtmlFormatter(lineanchors="line", wrapcode=True))
    return f"---\nhide: [toc]\nsearch: {{exclude: true}}\n---\n# {path.name}\n\n{code}"


def on_files(files, config):
    """Replaces the files of docs/ by those of the whole repository."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config["docs_dir"]]:
        files.remove(file)
    linked = {target for page in pages() for _, target in links(page)} - {*pages()}
    for path in [*pages(), *sorted(linked), STYLE]:
        name = path.relative_to(ROOT).as_posix()
        if path in linked and path.suffix not in IMAGES:
            files.append(File.generated(config, f"{name}.md", content=source_page(path)))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links to sources to their pages."""
    folder = (ROOT / page.file.src_uri).parent

    def link(match):
        path = target_of(match, folder)
        if files.get_file_from_path(f"{path.relative_to(ROOT).as_posix()}.md") is None:
            return match[0]
        symbol = SYMBOL.fullmatch(match["text"])
        anchor = f"#line-{line_of(symbol[1], path)}" if symbol and path.suffix == ".py" else ""
        return f"[{match['text']}]({match['target']}.md{anchor})"

    return LINK.sub(link, markdown)
