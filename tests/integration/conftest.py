"""The run and the bank that these tests share."""

import pytest

from tests.integration.tiny_run import Tiny
from tests.integration.tiny_run import tiny as make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory)
