"""The search for unexpected exceptions that `make fuzz` runs for minutes: a few inputs for each reader."""

import pytest
from fuzz.readers import READERS, search


@pytest.mark.parametrize("reader", READERS)
def test_a_few_mutated_inputs_are_read_or_one_line(tmp_path, reader):
    (tmp_path / "files").mkdir()
    assert search(reader, 40, 0, tmp_path / "files") == 0
