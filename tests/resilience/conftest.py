"""What the tests of supervision share."""

from contextlib import ExitStack

import pytest

from tests.resilience.lines import Raw


@pytest.fixture
def opened():
    with ExitStack() as stack:
        yield stack.enter_context
        while Raw.all:
            Raw.all.pop().close()
