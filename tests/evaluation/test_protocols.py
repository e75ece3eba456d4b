import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from rq_hf.evaluation import load_protocol, read_protocols
from rq_hf.metrics.moments import FeatureMoments
from rq_hf.metrics.statistics import FeatureStatistics

ROOT = Path(__file__).parents[2]
PROTOCOLS = read_protocols()


@pytest.fixture(scope="module")
def evaluation():
    return runpy.run_path(str(ROOT / "examples" / "evaluate_generation.py"))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_settings_are_options_of_the_evaluation(evaluation, name):
    required = {
        "GenerationArguments": {"model": "m", "output_dir": "o"},
        "SamplingArguments": {},
        "CaptionArguments": {},
        "MetricArguments": {"reference": "r", "network_weights": "w"},
    }
    left = dict(load_protocol(name).settings)
    for kind, given in required.items():
        names = {entry.name for entry in fields(evaluation[kind])}
        own = {option: left.pop(option) for option in names & left.keys()}
        arguments = evaluation[kind](**given, **own)
        assert {option: getattr(arguments, option) for option in own} == own
    assert not left


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_reference_completes_the_provenance(name):
    protocol = load_protocol(name)
    identity = {"network": "inception", "protocol": protocol.settings["network"], "network_sha256": "0" * 64}
    provenance = {key: value for key, value in protocol.reference.items() if key != "file"}
    moments = FeatureMoments.from_moments(provenance["count"] or 2, torch.zeros(2), torch.eye(2))
    FeatureStatistics(moments, provenance | identity | {"count": moments.count})


def published(card):
    """(metric, with rejection sampling) -> the authors' value."""
    return {
        (result.metric_type, "rejection" in result.metric_name): result.metric_value
        for result in ModelCard.load(card).data.eval_results or []
        if result.source_name == "published by the authors"
    }


def test_the_figures_are_all_that_the_cards_quote():
    found = {}
    for protocol in PROTOCOLS.values():
        for row in protocol.rows:
            for metric, value in row.published.items():
                found.setdefault(row.model, {})[metric, "acceptance_rate" in protocol.settings] = value
    cards = {path.stem: published(path) for path in (ROOT / "model_cards").glob("*.md")}
    assert found == {name: figures for name, figures in cards.items() if figures}


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="protocol must be one of .*'coco-30k'.*, got 'coco'"):
        load_protocol("coco")


@pytest.mark.slow
def test_the_page_with_the_commands_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "make_protocols.py"))["page"]
    assert (ROOT / "docs" / "evaluation-protocols.md").read_text(encoding="utf-8") == page()
