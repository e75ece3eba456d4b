"""What becomes of bad input: it is refused by name, or the result is right; anything else is a defect.

A case is text that can be pasted into Python: an expression per argument. Whether a value stands for a plain one, and
for which, is decided by the kind of the argument, independently of the package. `nan`, `x` and other names in the
expressions are those of `NAMES`; `x` is the valid value of a tensor.
"""

import io
import logging
import math
import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._pytree import tree_flatten

NAMES = {"np": np, "torch": torch, "nan": math.nan, "inf": math.inf, "Decimal": Decimal, "Fraction": Fraction}

# Values of all types, for arguments of any kind.
ODDITIES = """
None; True; False; 0; 1; -1; 2; 3; 10**15; 2**63; -2**63; 0.5; 1.5; 2.0; -0.5; 1e-320; 1e308; nan; inf; -inf; '1';
'0.5'; 'abc'; ''; 'nan'; 'True'; b'1'; []; (); {}; [1]; [0.5]; [None]; ['1']; [nan]; [True]; [[1.0]]; (1,); 1j;
np.int64(2); np.int32(1); np.uint8(1); np.float32(0.5); np.float16(0.5); np.float64(nan); np.bool_(True);
np.array(2); np.array(0.5); np.array(nan); np.array([1, 2]); np.ones(4); np.ones(4, int); np.ones((1, 4));
np.array([]); np.array('1'); np.array([None]); torch.tensor(2); torch.tensor(0.5); torch.tensor(nan);
torch.tensor(True); torch.ones(4); torch.ones(4, dtype=torch.long); torch.ones(3); torch.zeros(0); torch.ones(1);
torch.ones(1, 4); [1, 2, 3, 4]; (1, 2, 3, 4); [0.5] * 4; (0.5, 0.6, 0.7, 0.8); [0.5, None, 0.5, 0.5];
[0.5, nan, 0.5, 0.5]; ['0.5'] * 4; [0.5] * 3; [-1] * 4; [[0.5]] * 4; range(1, 5); {'a': 1}; {1, 2}; object();
Fraction(1, 2); Decimal(1); torch.float32; torch.Generator(); iter([1])
"""

# Variants of a valid tensor `x`.
VARIANTS = """x.float(); x.double(); x.half(); x.bfloat16(); x.int(); x.byte(); x.bool(); x.to(torch.complex64);
x[None]; x[0]; x[:0]; x[..., :0]; x[..., :-1]; x[:1]; x[:, :1]; torch.cat([x, x]); torch.cat([x, x], -1);
x.transpose(0, -1); x.flatten(); x.numpy(); x.numpy().astype('float64'); x.tolist(); [*x]; (x, x); [x, x]; {'x': x};
x.to('meta'); x.to_sparse(); x.clone().requires_grad_(x.is_floating_point()); x * nan; x.float() * nan;
x.float() + inf; x + 10**6; -x - 1; x * 255; x.numpy().astype(object); x.expand(2, *x.shape); x.clone().contiguous();
x.squeeze(); x.sum(); str(x)"""
HUGE = ("10**15", "2**63")


class Invalid(Exception):
    """The value stands for no plain one."""


class Kind(NamedTuple):
    """
    Args:
        plain: value -> the plain value that it stands for; raises `Invalid`.
        values: expressions to try besides those that all kinds share.
        is_tensor: whether variants of the valid value are tried, too.
        is_bounded: whether the call takes longer or more memory for larger numbers, so that no huge ones are tried.
    """

    plain: Callable[[Any], Any]
    values: tuple[str, ...] = ()
    is_tensor: bool = False
    is_bounded: bool = False


def expressions(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";") if part.strip())


def scalar(value):
    """Arrays and tensors without dimensions as what they hold."""
    return value.item() if isinstance(value, np.ndarray | torch.Tensor | np.generic) and value.ndim == 0 else value


def is_number(value, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool | np.bool_)


def number(accepts: Callable[[float], bool], values: str = "0.25; 1; np.float32(0.25); torch.tensor(0.25)") -> Kind:
    def plain(value):
        value = scalar(value)
        if not is_number(value) or abs(value) > 1e300 or not accepts(float(value)):
            raise Invalid
        return float(value)

    return Kind(plain, expressions(values))


def integer(lowest: int, highest: int = 2**31 - 1, is_bounded: bool = True) -> Kind:
    def plain(value):
        value = scalar(value)
        if not is_number(value, Integral) or not lowest <= value <= highest:
            raise Invalid
        return int(value)

    nearby = {lowest - 1, lowest, lowest + 1} | ({highest - 1, highest, highest + 1} if highest < 1000 else {2, 4})
    texts = [f"{form}({n})" if form else str(n) for n in sorted(nearby) for form in ("", "np.int64", "torch.tensor")]
    return Kind(plain, tuple(texts), is_bounded=is_bounded)


def index_like(value):
    """For settings that may be given as 2.0."""
    value = scalar(value)
    if not is_number(value) or value != value or abs(value) == math.inf or value != int(value) or value < 1:
        raise Invalid
    return int(value)


def _plain_flag(value):
    value = scalar(value)
    if not isinstance(value, bool):
        raise Invalid
    return value


flag = Kind(_plain_flag, expressions("np.bool_(False); np.array(True); 'False'; 'no'"))


def one_of(*accepted) -> Kind:
    def plain(value):
        if not any(type(value) is type(choice) and value == choice for choice in accepted):
            raise Invalid
        return value

    return Kind(plain, (*map(repr, accepted), *(repr(str(a).upper()) for a in accepted)))


def optional(kind: Kind) -> Kind:
    return kind._replace(plain=lambda value: None if value is None else kind.plain(value))


def listed(value) -> list:
    """A list, tuple or other sequence, or a one-dimensional array or tensor, as a list."""
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 1:
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    raise Invalid


def restricted(kind: Kind, accepts: Callable[[Any], bool]) -> Kind:
    """Of the values of a kind those whose plain one is accepted."""

    def plain(value):
        if not accepts(found := kind.plain(value)):
            raise Invalid
        return found

    return kind._replace(plain=plain)


def several(kind: Kind, count: int | None = None, values: str = "", container: type = list) -> Kind:
    def plain(value):
        items = [kind.plain(item) for item in listed(value)]
        if not items or count not in (None, len(items)):
            raise Invalid
        return container(items)

    return Kind(plain, expressions(values) if values else kind.values)


def one_or_several(kind: Kind, count: int | None = None, values: str = "") -> Kind:
    many = several(kind, count)

    def plain(value):
        try:
            return kind.plain(value)
        except Invalid:
            return many.plain(value)

    return Kind(plain, kind.values + (expressions(values) if values else ()))


def tensor(accepts: Callable[[torch.Tensor], bool], is_integer: bool = False, values: str = "") -> Kind:
    def plain(value):
        try:
            found = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        except Exception:
            raise Invalid from None
        found = found.detach().to_dense() if found.layout != torch.strided else found.detach()
        floating = found.is_floating_point()
        whole = not floating and not found.is_complex() and found.dtype != torch.bool
        if found.is_meta or not (whole if is_integer else floating):
            raise Invalid
        found = found.long() if is_integer else found.float()
        if not accepts(found):
            raise Invalid
        return found.contiguous()

    return Kind(plain, expressions(values) if values else (), is_tensor=True)


def floats(*shape: int | None, finite: bool = True, smallest: int = 1) -> Kind:
    """A tensor of this shape, where `None` is any size of at least `smallest`."""
    return tensor(lambda x: fits(x, shape, smallest) and (not finite or bool(x.isfinite().all())))


def integers(*shape: int | None, below: int, smallest: int = 1) -> Kind:
    def accepts(x):
        return fits(x, shape, smallest) and (not x.numel() or 0 <= int(x.min()) <= int(x.max()) < below)

    return tensor(accepts, is_integer=True)


def fits(x: torch.Tensor, shape: tuple[int | None, ...], smallest: int = 1) -> bool:
    return x.ndim == len(shape) and all(
        size >= smallest if wanted is None else size == wanted for size, wanted in zip(x.shape, shape)
    )


def anything(values: str, accepts: Callable[[Any], bool] = lambda value: False) -> Kind:
    """Neither numbers nor tensors: right as they are where `accepts` them."""

    def plain(value):
        if not accepts(value):
            raise Invalid
        return value

    return Kind(plain, expressions(values))


def is_finite(result) -> bool:
    return all(bool(x.isfinite().all()) for x in leaves(result) if isinstance(x, torch.Tensor))


@dataclass
class Target:
    """
    A call to try.

    Args:
        call: expression of what is called.
        valid: expressions of arguments with which it succeeds.
        kinds: of the arguments that are varied.
        also: other words by which a message may name an argument.
        probe: result -> what of it is compared.
        is_right: what holds for every result.
    """

    call: str
    valid: Mapping[str, str]
    kinds: Mapping[str, Kind]
    also: Mapping[str, str] = None
    probe: Callable[[Any], Any] = lambda result: result
    is_right: Callable[[Any], bool] = is_finite

    def __str__(self):
        return self.call


class Case(NamedTuple):
    target: Target
    changed: dict[str, str]

    def __str__(self):
        valid = {name: text for name, text in self.target.valid.items() if name not in self.changed}
        arguments = [f"{name}={text}" for name, text in {**valid, **self.changed}.items()]
        tensors = [self.target.valid[n] for n, text in self.changed.items() if uses_valid(self.target, n, text)]
        return f"{self.target.call}({', '.join(arguments)})" + "".join(f"  with x = {t}" for t in tensors)


def cases(targets: Sequence[Target], count: int, seed: int) -> Iterator[Case]:
    """Every argument of every target in turn, in random order, so that all of them are tried about equally often."""
    rng = random.Random(seed)
    arguments = [(target, name) for target in targets for name in target.kinds]
    for number in range(count):
        if number % len(arguments) == 0:
            rng.shuffle(arguments)
        target, name = arguments[number % len(arguments)]
        changed = {name: draw(rng, target, name)}
        others = [n for n, kind in target.kinds.items() if n != name and not kind.is_tensor]
        if others and rng.random() < 0.2:
            other = rng.choice(others)
            changed[other] = draw(rng, target, other)
        yield Case(target, changed)


def uses_valid(target: Target, name: str, text: str) -> bool:
    """Whether the expression for this argument is made of the valid one."""
    return target.kinds[name].is_tensor and name in target.valid and "x" in re.findall(r"\w+", text)


def draw(rng: random.Random, target: Target, name: str) -> str:
    kind = target.kinds[name]
    pools = [expressions(ODDITIES)]
    if kind.values:
        pools.append(kind.values)
    if kind.is_tensor and name in target.valid:
        pools += [expressions(VARIANTS)] * 2
    texts = rng.choice(pools)
    return rng.choice([text for text in texts if not kind.is_bounded or text not in HUGE])


class TooLong(Exception):
    pass


@contextmanager
def quiet(seconds: int = 20):
    """No output, no warnings, and an end; yields what would have been printed."""

    def stop(*_):
        raise TooLong(f"no result within {seconds} seconds of computing")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        output = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(output), redirect_stderr(output):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            yield output
    finally:
        logging.disable(logging.NOTSET)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def evaluate(target: Target, changed: Mapping[str, str], convert: bool = False):
    """The result of the call; with `convert`, of that with the plain values instead."""
    names = dict(NAMES)
    torch.manual_seed(0)
    call, arguments = eval(target.call, names), {}
    torch.manual_seed(0)
    np.random.seed(0)
    for name, text in {**target.valid, **changed}.items():
        if name in changed and uses_valid(target, name, text):
            names["x"] = eval(target.valid[name], names)
        arguments[name] = eval(text, names)
        if convert and name in changed:
            arguments[name] = target.kinds[name].plain(arguments[name])
    torch.manual_seed(0)
    return target.probe(call(**arguments))


def verdict(case: Case) -> tuple[str, str]:
    """`"refused"`, `"right"`, `"obscure"` or `"wrong"`, and what was seen."""
    target, changed = case
    with quiet():
        try:
            result = evaluate(target, changed)
        except (ValueError, TypeError, OSError, StrictDataclassError) as error:
            words = "|".join(filter(None, [*changed, *((target.also or {}).get(name) for name in changed)]))
            named = re.search(rf"\b({words})\b", str(error))
            return ("refused" if named else "obscure"), describe(error)
        except Exception as error:
            return "obscure", describe(error)
        try:
            expected = evaluate(target, changed, convert=True)
        except Invalid:
            return "wrong", f"accepted: {shorten(result)}"
        except Exception as error:
            return "wrong", f"accepted, but the plain value is refused: {describe(error)}"
        if not same(result, expected):
            return "wrong", f"{shorten(result)} instead of {shorten(expected)}"
        if not target.is_right(result):
            return "wrong", f"not a right result: {shorten(result)}"
        return "right", shorten(result)


def describe(error: BaseException) -> str:
    return shorten(f"{type(error).__name__}: {error}")


def shorten(value, limit: int = 160) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[:limit] + "…"


def leaves(result) -> list:
    if isinstance(result, nn.Module):
        result = result.state_dict()
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in tree_flatten(result)[0]]


def same(result, expected) -> bool:
    results, wanted = leaves(result), leaves(expected)
    return len(results) == len(wanted) and all(same_leaf(a, b) for a, b in zip(results, wanted))


def same_leaf(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        tolerance = 1e-4 if a.dtype == b.dtype else 2e-2  # a result in another precision
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
    if type(a).__module__.startswith("PIL"):
        a, b = np.asarray(a), np.asarray(b)
    if isinstance(a, np.ndarray):
        return a.shape == np.shape(b) and bool(np.allclose(a, b, rtol=1e-3, atol=2e-3))
    if isinstance(a, float):
        return a == b or (a != a and b != b) or math.isclose(a, b, rel_tol=1e-4)
    return a == b
