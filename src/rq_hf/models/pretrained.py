"""What must hold for saved weights. The libraries fill in for a file that lacks some, at most with a warning."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from ..argument_checks import check_source


def check_loading_info(source: str, loading_info: dict) -> None:
    """Raises `ValueError` unless the weights of a folder or Hub model were those of its configuration."""
    for problem, names in (("lacks", loading_info["missing_keys"]), ("has unknown", loading_info["unexpected_keys"])):
        if names:
            names = sorted(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source} {problem} weights, or its config.json is of another model: {names[0]}{more}")


@contextmanager
def reading(name: str, source: str) -> Iterator[None]:
    """
    Raises `FileNotFoundError` for a `source` that is neither a folder nor possible on the Hub, `ValueError` for files
    of weights inside that are not safetensors, or whose weights have other shapes than `config.json` says.
    """
    check_source(name, source)
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"the weights in {source} are truncated or invalid: {error}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(f"the weights in {source} do not fit its config.json: {error}") from error
