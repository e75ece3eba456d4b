"""Checks of single arguments, which say what was got and what is accepted."""

from numbers import Integral


def is_integer(value) -> bool:
    """Whether `value` is an integer of Python or NumPy; a boolean is not one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_size(name: str, value: int) -> None:
    """Raises `TypeError` unless `value` is an integer (of Python or NumPy), and `ValueError` below 1."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raises `TypeError` for anything but `True` and `False`."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Raises `ValueError` unless `value` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
