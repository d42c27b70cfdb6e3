"""Learning curves from the TensorBoard files of a run."""

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

_MAX_BYTES = 128 << 20  # of a file; a run of a thousand epochs writes one


def learning_curve(run: Path, metric: str) -> dict[int, float]:
    """Return epoch -> value; epochs that a resumed run repeated have their newest value.

    Files and records that TensorBoard could not read either are skipped.
    """
    curve: dict[int, float] = {}
    for file in sorted((run / "tb").glob("events.out.tfevents.*")):
        curve |= _curve_of_file(file, metric)
    return dict(sorted(curve.items()))


def _curve_of_file(file: Path, metric: str) -> dict[int, float]:
    """Return epoch -> value, where the steps are numbers of epochs, or those of training next to a scalar `epoch`."""
    values: dict[int, float] = {}  # by step
    epochs: dict[int, int] = {}  # of a file that version 0.1.0 wrote
    for event in _events(file, metric.encode(), b"epoch"):
        for scalar in event.summary.value:
            if scalar.tag == metric:
                values[event.step] = scalar.simple_value
            elif scalar.tag == "epoch" and math.isfinite(scalar.simple_value):
                epochs[event.step] = int(scalar.simple_value)
    if not epochs:
        return {step - 1: value for step, value in values.items()}
    return {epochs[step]: value for step, value in values.items() if step in epochs}


def _events(path: Path, *words: bytes) -> Iterator[Event]:
    """Yield the events of a file that contain one of the words."""
    if not path.is_file() or not 0 < path.stat().st_size <= _MAX_BYTES:  # a pipe would be waited for
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for begin, end in _records(data):
            if any(data.find(word, begin, end) >= 0 for word in words):
                try:
                    yield Event.FromString(data[begin:end])
                except Exception:  # protobuf's own, which only TensorBoard depends on
                    continue


def _records(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each whole record of a TFRecord file.

    The file repeats: length (8 bytes), its checksum (4), record, its checksum (4). TensorBoard's own reader would
    recompute the checksums in Python, which makes it many times slower.
    """
    begin = 12
    while begin <= len(data):
        (length,) = struct.unpack_from("<Q", data, begin - 12)
        if length == 0:  # no event is empty, but gigabytes of zeros take no place on a disk
            return
        if begin + length <= len(data):
            yield begin, begin + length
        begin += length + 16
