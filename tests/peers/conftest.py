"""What holds for all comparisons with mmpretrain."""

import logging
import warnings

import pytest


@pytest.fixture(autouse=True)
def _quiet():
    """Keep the peer's log and its warnings about newer libraries out of the report."""
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
