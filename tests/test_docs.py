"""Every code block of README, CONTRIBUTING, docs and cards is run, or says why it cannot be; links are followed."""

import importlib
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from documents import (
    DATA,
    OTHER_PROGRAMS,
    PAGES,
    PYTHON,
    ROOT,
    SHELL,
    check_command,
    commands,
    read_blocks,
    run_blocks,
)
from processes import run

import rq_hf

SLOW = (
    "README",
    "browser",
    "data",
    "first-training",
    "mar",
    "rate-distortion",
    "sampling",
    "semantic-ids",
    "training",
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@pages
def test_blocks_are_well_formed(page):
    text, blocks = page.read_text(encoding="utf-8"), read_blocks(page)
    assert text.count("```") == 2 * len(blocks)
    assert text.count("\n<!-- not run") == sum(block.reason is not None for block in blocks)
    assert {block.language for block in blocks} <= {SHELL, PYTHON, *DATA}


@pages
def test_the_programs_accept_every_command(page, monkeypatch):
    for block in read_blocks(page):
        if block.language == SHELL:
            found = commands(block)
            assert found, f"line {block.line} has no command"
            for words in found:
                if words[0] in OTHER_PROGRAMS:
                    assert block.reason, f"line {block.line}: {words[0]} needs a network; say so before the block"
                else:
                    try:
                        check_command(words, monkeypatch)
                    except (Exception, SystemExit) as error:
                        raise AssertionError(f"line {block.line}: {' '.join(words)}") from error


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
        for page in PAGES
        if any(block.reason is None and block.language not in DATA for block in read_blocks(page))
    ],
)
def test_blocks_that_are_not_marked_run(page, tmp_path):
    outcome = run(run_blocks, page, tmp_path)
    assert outcome.code == 0, outcome.output


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rq_hf.__version__
    readme = PAGES[0].read_text(encoding="utf-8")
    assert len(citation["references"]) == 2 and all(paper["url"] in readme for paper in citation["references"])


HOOKS = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))


@pytest.mark.parametrize("page", HOOKS["pages"](), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_to_names_in_sources(page):
    for text, target in HOOKS["links"](page):
        assert target.is_file(), f"[{text}] leads to {target}"
        symbol = HOOKS["SYMBOL"].fullmatch(text)
        if symbol and target.suffix == ".py":
            assert HOOKS["line_of"](symbol[1], target) > 0


def test_a_name_that_a_source_lacks_is_named():
    with pytest.raises(LookupError, match="src/rq_hf/images.py does not define to_cmyk"):
        HOOKS["line_of"]("to_cmyk", ROOT / "src" / "rq_hf" / "images.py")


class Html(HTMLParser):
    """The ids of a page of the site, and what it links to or loads."""

    def __init__(self, page):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag in ("script", "img", "link", "iframe"):
            self.loaded += [attributes[name] for name in ("src", "href") if name in attributes]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="the site needs pip install 'rq_hf[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.resolve(): Html(path) for path in folder.rglob("*.html") if path.name != "404.html"}


@pytest.mark.slow
def test_the_site_has_no_broken_link_and_loads_nothing_from_elsewhere(site):
    broken = []
    for page, html in site.items():
        assert not [url for url in html.loaded if urlsplit(url).netloc], page
        for link in [*html.links, *html.loaded]:
            url = urlsplit(link)
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            target = target / "index.html" if target.is_dir() else target
            if url.scheme or url.netloc:
                continue
            if not target.is_file() or (
                url.fragment and target in site and unquote(url.fragment) not in site[target].ids
            ):
                broken.append(f"{page.name}: {link}")
    assert not broken, "\n".join(broken)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["rq_hf", "data", "training", "metrics", "evaluation", "convert"])
def test_the_reference_has_every_public_name(site, module):
    name = module if module == "rq_hf" else f"rq_hf.{module}"
    page = "models" if module == "rq_hf" else module
    (reference,) = (html for path, html in site.items() if path.parts[-3:-1] == ("api", page))
    for exported in importlib.import_module(name).__all__:  # some are named like their module
        assert {f"{name}.{exported}", f"{name}.{exported}.{exported}"} & reference.ids, exported
