"""Learning curves from the TensorBoard files of a run."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event


def learning_curve(run: Path, metric: str) -> dict[int, float]:
    """Return epoch -> value; epochs that a resumed run repeated have their newest value."""
    values, epochs = {}, {}  # by step
    for file in sorted((run / "tb").glob("events.out.tfevents.*")):
        for record in _records_with(file.read_bytes(), metric.encode(), b"epoch"):
            event = Event.FromString(record)
            for scalar in event.summary.value:
                if scalar.tag == metric:
                    values[event.step] = scalar.simple_value
                elif scalar.tag == "epoch":
                    epochs[event.step] = int(scalar.simple_value)
    return {epochs[step]: values[step] for step in sorted(values) if step in epochs}


def _records_with(data: bytes, *words: bytes) -> Iterator[bytes]:
    """Yield the records of a TFRecord file that contain one of the words.

    The file repeats: length (8 bytes), its checksum (4), record, its checksum (4). TensorBoard's own reader would
    recompute the checksums in Python, which makes it many times slower.
    """
    begin = 12
    while begin <= len(data):
        (length,) = struct.unpack_from("<Q", data, begin - 12)
        record = data[begin : begin + length]
        if len(record) == length and any(word in record for word in words):
            yield record
        begin += length + 16
