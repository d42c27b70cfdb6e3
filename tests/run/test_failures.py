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


def test_a_lost_connection_says_that_another_process_ended():
    error = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer.")
    assert explain(error) == "another process of this run ended, so the run ends; resume it with ckpt=last"
