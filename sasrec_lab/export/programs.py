"""Programs that a trained encoder is exported as: torch.export's, and ONNX. L items of a history."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO

import torch

from sasrec_lab.errors import InputError
from sasrec_lab.model.encoder import SingleHistoryScores, SingleHistoryVector
from sasrec_lab.recommend.rankers import EncoderRanker

INPUTS = ("history", "times", "query_time")  # of an ONNX model; the last two only if it reads times


def torch_program(ranker: EncoderRanker, *, vectors: bool) -> bytes:
    """Return the content of a .pt2 file: scores after a history, or with `vectors` its vector."""
    saved = BytesIO()  # when torch itself writes to a full disk, it ends the process
    torch.export.save(program_of(ranker, vectors=vectors), saved)
    return saved.getvalue()


def onnx_program(ranker: EncoderRanker, *, vectors: bool) -> bytes:
    """Return the content of an .onnx file: scores after a history, or with `vectors` its vector.

    Raises:
        InputError: the extra is missing, or the model has an operation that ONNX lacks.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise InputError(
            f"output ends in .onnx, which needs {' and '.join(missing)}; install the extra: pip install"
            " 'sasrec-lab[onnx]'"
        )
    program = program_of(ranker, vectors=vectors)
    inputs = INPUTS if ranker.query_time is not None else INPUTS[:1]
    outputs = ["vector" if vectors else "scores"]
    try:
        with _without_notes_of_the_exporter():
            made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            f"output: this model cannot be written as ONNX ({str(error).splitlines()[0]}); use .pt2"
        ) from error
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


@contextmanager
def _without_notes_of_the_exporter() -> Iterator[None]:
    """Hide notes of torch's exporter on packages that are not installed, and on its own old calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        log.setLevel(level)


def program_of(ranker: EncoderRanker, *, vectors: bool = False) -> torch.export.ExportedProgram:
    """Return the encoder as a program: attention checks torch.compiler.is_exporting()."""
    maxlen = ranker.encoder.longest_history
    example = torch.ones(maxlen, dtype=torch.int64)
    lengths = {0: torch.export.Dim("L", min=1, max=maxlen)} if maxlen > 1 else {}
    examples: list[torch.Tensor] = [example]
    shapes: list[dict[int, torch.export.Dim]] = [lengths]
    if ranker.query_time is not None:  # the times of the items, and that of the question
        examples, shapes = [example, example.clone(), example[:1].clone()], [lengths, lengths, {}]
    with torch.no_grad():
        model = (SingleHistoryVector if vectors else SingleHistoryScores)(ranker.encoder).eval()
        return torch.export.export(model, tuple(examples), dynamic_shapes=tuple(shapes))


# By the ending of a file
PROGRAMS = {".pt2": torch_program, ".onnx": onnx_program}
