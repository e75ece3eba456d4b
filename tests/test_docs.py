"""Every code block of README, CONTRIBUTING, docs and cards is run here, or says why it cannot be."""

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

SLOW = ("README", "browser", "data", "mar", "rate-distortion", "sampling")
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
