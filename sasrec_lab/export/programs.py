"""Programs of torch's own operators that a trained encoder is exported as. L items of a history."""

import torch

from sasrec_lab.model.encoder import SingleHistoryScores
from sasrec_lab.recommend.rankers import EncoderRanker


def program_of(ranker: EncoderRanker) -> torch.export.ExportedProgram:
    """Return the encoder as a program: attention checks torch.compiler.is_exporting()."""
    maxlen = ranker.encoder.longest_history
    example = torch.ones(maxlen, dtype=torch.int64)
    lengths = {0: torch.export.Dim("L", min=1, max=maxlen)} if maxlen > 1 else {}
    examples: list[torch.Tensor] = [example]
    shapes: list[dict[int, torch.export.Dim]] = [lengths]
    if ranker.query_time is not None:  # the times of the items, and that of the question
        examples, shapes = [example, example.clone(), example[:1].clone()], [lengths, lengths, {}]
    with torch.no_grad():
        model = SingleHistoryScores(ranker.encoder).eval()
        return torch.export.export(model, tuple(examples), dynamic_shapes=tuple(shapes))
