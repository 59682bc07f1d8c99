"""Does the style check read the functions that a person would read, wherever they stand?"""

import pytest

from autograder.checks import CheckFailed, NotYet
from autograder.checks.style import hold_style

TIDY = 'def double(x):\n    """Twice x."""\n    return 2 * x\n'
UNTIDY = "def double(x):\n    return 2 * x\n"


def judge(*sources):
    hold_style(None, None, sources, {"": {"double"}}, {"double": lambda _submission, _rng: None})


@pytest.mark.parametrize("first", ["", "%%time\n", "\n%%capture shown --no-stderr\n", "%matplotlib inline\n", "!ls\n"])
def test_a_magic_hides_no_function(first):
    judge(first + TIDY)
    with pytest.raises(CheckFailed, match="double has lost its docstring"):
        judge(first + UNTIDY)


def test_a_cell_in_another_language_is_not_read():
    with pytest.raises(NotYet):
        judge("%%bash\n" + TIDY)
    judge("%%bash\nfor f in *; do echo $f; done", "this is no Python", TIDY)


def test_the_last_definition_counts():
    judge(UNTIDY, TIDY)
    with pytest.raises(CheckFailed, match="docstring"):
        judge(TIDY, UNTIDY)


def test_a_stub_is_not_judged():
    with pytest.raises(NotYet, match="0 are so far"):
        judge('def double(x):\n    """Twice x."""\n    raise NotImplementedError("TODO")\n')
