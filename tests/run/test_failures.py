"""Which failures of torch and Lightning become a user's line."""

import pytest
from lightning_fabric.utilities.exceptions import MisconfigurationException

from sasrec_lab.errors import InputError
from sasrec_lab.run.failures import explain, explaining_failures


def test_a_flag_that_lightning_rejects_late_is_a_line():
    assert (
        explain(MisconfigurationException("You requested\nthe impossible")) == "trainer: You requested the impossible"
    )


def test_an_unknown_error_keeps_its_traceback():
    assert explain(RuntimeError("shape mismatch")) is None
    error = IndexError("too many indices")
    with pytest.raises(IndexError) as caught, explaining_failures():
        raise error
    assert caught.value is error
    with pytest.raises(InputError, match=r"^seed=x$"), explaining_failures():
        raise InputError("seed=x")
