"""Bad calls, command lines and files: each is refused by name, or gives a right result.

A failure prints the cases. `python -m tests.fuzz` tries many more of them.
"""

import bad_files
import fuzzing
import pytest
from bad_calls import TARGETS

GROUPS = {
    name: [t for t in TARGETS if str(t).split("(")[0].split(".")[0] == name]
    for name in dict.fromkeys(str(t).split("(")[0].split(".")[0] for t in TARGETS)
}


def failures(cases, verdict):
    found = [(case, *verdict(case)) for case in cases]
    return [f"{kind}: {case}\n    {seen}" for case, kind, seen in found if kind not in ("refused", "right")]


@pytest.mark.parametrize("targets", GROUPS.values(), ids=GROUPS)
def test_bad_calls(targets):
    count = 2 * sum(len(target.kinds) for target in targets)
    failed = failures(fuzzing.cases(targets, count, seed=0), fuzzing.verdict)
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    bad_files.save_folder(folder)
    return folder


def test_bad_command_lines_and_files(folder):
    failed = failures(bad_files.file_cases(120, 0, folder), bad_files.verdict)
    assert not failed, "\n".join(failed)


def test_the_generator_is_seeded():
    first, again, other = ([str(case) for case in fuzzing.cases(TARGETS, 50, seed)] for seed in (0, 0, 1))
    assert first == again != other


def test_what_is_accepted_wrongly_is_noticed():
    """A call that ignores its argument, one that takes another value than meant, and one with an obscure error."""
    for call, value, expected in (
        ("lambda n: 3", "-1", "wrong"),
        ("lambda n: n + 1 if n == 3 else n", "np.int64(3)", "right"),
        ("lambda n: [n] * (2 if type(n) is int else 1)", "np.int64(3)", "wrong"),
        ("lambda n: [0][n]", "7", "obscure"),
    ):
        target = fuzzing.Target(f"({call})", {"n": "1"}, {"n": fuzzing.integer(0)})
        assert fuzzing.verdict(fuzzing.Case(target, {"n": value}))[0] == expected
