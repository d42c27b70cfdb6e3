"""Every kind of model learns: it ranks better than popularity on data whose next item depends on the last one."""

import json

import pytest

DATA = ["dataset=synthetic", "dataset.synthetic.users=300", "dataset.synthetic.items=60"]
SMALL = ["model.dim=16", "model.maxlen=20", "optimizer.lr=0.01", "trainer=cpu", "trainer.max_epochs=15"]


@pytest.mark.parametrize(
    "model",
    [
        "model=ligr",
        "model=gru4rec",
        "model=gru4rec model.dropout=0.1 trainer.precision=bf16-mixed",
        "model=sasrec model.pos_emb=rope",
        "model=hstu",
        "model=fuxi model.divisor=31 batch_size=32",
        "model=ligr model.pos_emb=relative model.heads=2",
    ],
)
def test_a_model_beats_popularity(model, train_here, tmp_path):
    done = train_here(*DATA, *model.split(), *SMALL, "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["metrics"]["test/ndcg@10"] > 1.2 * results["baselines"]["popularity"]["test/ndcg@10"]
