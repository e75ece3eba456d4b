"""Published protocols of evaluation by name, from `protocols.json`."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..argument_checks import check_choice

FILE = Path(__file__).with_name("protocols.json")


@dataclass(frozen=True)
class PublishedRow:
    """
    Args:
        model: name of its card in `model_cards`.
        published: figures of the authors, by metric.
    """

    model: str
    published: dict[str, float]


@dataclass(frozen=True)
class Protocol:
    """
    How figures were published.

    Args:
        name: of the protocol.
        title: the same in words.
        source: where it is described.
        settings: defaults of the options of `examples/evaluate_generation.py`. What the sampling settings do not name
            is the model's own, as its authors saved it.
        reference: provenance of the statistics that the authors compare with, see [`FeatureStatistics`], and the name
            of their `file`. `count` is that of the data set, or `None` where the number is not known.
        differences: where results may differ from the authors' for other reasons than chance.
        rows: the models that were evaluated in this way.
    """

    name: str
    title: str
    source: str
    settings: dict
    reference: dict[str, str | int | None]
    differences: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


def read_protocols() -> dict[str, Protocol]:
    """All protocols by name."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        name: Protocol(
            name=name,
            **value
            | {
                "differences": tuple(value["differences"]),
                "rows": tuple(PublishedRow(**row) for row in value["rows"]),
            },
        )
        for name, value in values.items()
    }


def load_protocol(name: str) -> Protocol:
    """Raises `ValueError` for a name that is none of the protocols."""
    protocols = read_protocols()
    check_choice("protocol", name, tuple(protocols))
    return protocols[name]
