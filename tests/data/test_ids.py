"""Raw ids given by a program, of any type."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from sasrec_lab.data.ids import Ids, as_id_array
from sasrec_lab.errors import InputError

INTEGERS, TEXTS = Ids(np.array([7, 8, 9])), Ids(np.array(["7", "x"]))


def refused(given: object) -> str:
    with pytest.raises(InputError) as caught:
        as_id_array(given, "users")
    return str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        [8, 7],
        (8, 7),
        ["8", "7"],
        [8.0, 7.0],
        np.array([8, 7], np.uint8),
        np.array(["8", "7"]),
        np.array([8, "7"], object),
        pd.Series([8, 7], index=["a", "a"]),
        pd.Series([8, 7], dtype="Int16"),
        pd.Series(["8", "7"], dtype="category"),
        pd.Index([8, 7]),
        pa.array([8, 7]),
        {8: "", 7: ""}.keys(),
    ],
    ids=lambda given: type(given).__name__,
)
def test_ids_in_any_container_are_found(given):
    assert INTEGERS.indices(given, "users").tolist() == [1, 0]
    assert TEXTS.indices(given, "users").tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (pd.MultiIndex.from_arrays([[1], [2]]), "users is a MultiIndex of 2 dimensions, not a list of ids; give one"),
        (np.array([[1, 2]]), "users is a ndarray of 2 dimensions, not a list of ids; give one column"),
        (np.array(7), "users is a ndarray of 0 dimensions, not a list of ids; give one column"),
        (np.zeros(2, [("a", int)]), "users is a ndarray, not a list of ids (Cannot construct a Series"),
        (bytearray(b"12"), "users is a bytearray, not a list of ids; give a list"),
        (memoryview(b"12"), "users is a memoryview, not a list of ids; give a list"),
        (iter([1]), "users is a list_iterator, not a list of ids; give a list"),
        (["a", "\ud800"], "users contains text that is not Unicode ("),
        ([1, "\ud800"], "users contains text that is not Unicode ("),
        ([1, 10**5000], "users contains an integer of more than 1,000 digits; give it as text"),
        ([[10**5000]], "users contains a value of type list that is too long to print; ids are integers"),
        (10**5000, "users=a value of type int that is too long to print is not a list of ids; write [a"),
        ([2**63], "users contains 9223372036854775808; integer ids must fit in 64 bits, so give it as text"),
        ([b"1"], "users contains b'1'; ids are integers or text"),
        ([["x" * 500]], "users contains ['xxxxxxxxxxxxxxxxxxxxxxxxxxxx..."),
        ([1, np.nan], "users: id 2 of 2 is missing; remove or fill it"),
        ([pd.NaT], "users: id 1 of 1 is missing; remove or fill it"),
        (pd.date_range("2021", periods=1), "users contains Timestamp('2021-01-01 00:00:00'); ids are integers or text"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",  # Python does not print the long integers
)
def test_what_is_not_a_list_of_ids_is_one_line(given, message):
    assert refused(given).startswith(message)
