"""What TensorBoard shows, asked through its own server; attention maps against what the model computes."""

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import holdout_of, random_users
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sasrec_lab import tensorboard
from sasrec_lab.command_line import load
from sasrec_lab.data.batches import evaluation_batch
from sasrec_lab.model.attention import Plan, attend
from sasrec_lab.model.encoder import Encoder

TINY = ["dataset=synthetic", "dataset.synthetic.users=100", "dataset.synthetic.items=40", "model=tiny", "trainer=fast"]


@contextmanager
def board(logdir: Path) -> Iterator[Any]:
    """Gives what asks TensorBoard for a path, with a JSON body where one is given."""
    words = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0", "--reload_interval", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words, "--load_fast", "false"], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in server.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)/", line + server.stderr.readline()):
                break

        def ask(path: str, body: Any = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://127.0.0.1:{found[1]}/data/{path}", data, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        yield ask
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


@pytest.mark.slow
def test_a_sweep_of_four_in_one_process_is_one_board(train_command, tmp_path):
    """The hyper-parameters and final metrics of each are its own, and scalars are named alike in all."""
    done = train_command("-m", *TINY, "model.dim=8,16", "model.ff_dim=null,32", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    runs = {f"{file.parent.name}/tb": file.parent for file in (tmp_path / "sweep").glob("*/metrics.json")}
    assert len(runs) == 4
    with board(tmp_path / "sweep") as ask:
        tags = ask("plugin/scalars/tags")
        assert tags.keys() == runs.keys()
        assert len({tuple(sorted(of_run)) for of_run in tags.values()}) == 1
        experiment = ask("plugin/hparams/experiment", {"experimentName": "", "includeMetrics": True})
        names = {info["name"] for info in experiment["hparamInfos"]}
        assert {"seed", "batch_size", "model/dim", "model/ff_dim", "loss/name", "optimizer/lr"} <= names
        assert {"dataset/weight/column", "trainer/max_epochs", "evaluation/k"} <= names
        shown = [metric["name"]["tag"] for metric in experiment["metricInfos"]]
        columns = [{"metric": metric["name"]} for metric in experiment["metricInfos"]]
        query = {"experimentName": "", "startIndex": 0, "sliceSize": 100, "colParams": columns}
        query["allowedStatuses"] = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
        groups = ask("plugin/hparams/session_groups", query)["sessionGroups"]
        assert len(groups) == 4
        for group in groups:
            (session,) = group["sessions"]
            name = session["name"]
            facts = json.loads((runs[name] / "run.json").read_text())
            assert group["hparams"].keys() == names
            assert group["hparams"]["model/dim"] == facts["config"]["model"]["dim"]
            assert str(group["hparams"]["model/ff_dim"]).removesuffix(".0") == str(facts["config"]["model"]["ff_dim"])
            measured = json.loads((runs[name] / "metrics.json").read_text())["metrics"]
            values = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
            assert values.keys() == set(shown)
            expected = {tag: measured[tag.removeprefix("best/")] for tag in values}
            assert values == pytest.approx(expected, abs=1e-6)
        assert {"test/ndcg@10", "test/recall@10", "best/val/ndcg@10"} <= set(shown)


def test_pictures_are_drawn_only_where_they_are_asked_for(train_command, tmp_path):
    plain = train_command(*TINY, "hydra.run.dir=plain")
    asked = train_command(
        *TINY, "hydra.run.dir=asked", "tensorboard.attention_users=2", "tensorboard.projector=true", "model.blocks=2"
    )
    assert (plain.returncode, asked.returncode) == (0, 0), asked.stderr
    assert {file.name.partition(".")[0] for file in (tmp_path / "plain" / "tb").iterdir()} == {"events", "hparams"}
    events = EventAccumulator(str(tmp_path / "asked" / "tb")).Reload()
    assert len(events.Tags()["images"]) == 2
    assert all(re.fullmatch(r"attention/user \d+", tag) for tag in events.Tags()["images"])
    rows = (tmp_path / "asked" / "tb" / "00000" / "items" / "metadata.tsv").read_text().splitlines()
    assert rows[0] == "item\tid\tinteractions"
    assert len(rows) == 1 + 40
    counts = [int(row.split("\t")[2]) for row in rows[1:]]
    assert counts == sorted(counts, reverse=True)
    saved = torch.load(tmp_path / "asked" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    vectors = np.loadtxt(tmp_path / "asked" / "tb" / "00000" / "items" / "tensors.tsv", delimiter="\t")
    numbers = [int(row.split("\t")[1]) for row in rows[1:]]  # the generated data set's ids are 1, 2, ...
    assert vectors == pytest.approx(saved["encoder.input_items.weight"][np.array(numbers) - 1].numpy(), abs=1e-6)


@pytest.mark.parametrize("norm", ["sasrec", "pre", "post"])
def test_attention_weights_are_those_the_model_uses(norm):
    """Times the values they are what each block's attention gives."""
    cfg = load(["model.dim=12", "model.heads=3", "model.maxlen=10", f"model.norm={norm}", "model.dropout=0.5"]).model
    torch.manual_seed(0)
    encoder = Encoder(20, cfg)
    holdout = holdout_of(random_users(0), maxlen=10)
    (row,) = tensorboard.spread(holdout, 1)
    batch = evaluation_batch(holdout, np.array([row]), "test", 10, None).inputs
    seen = {}
    for number, block in enumerate(encoder.blocks):
        for name in ("query", "key", "value"):
            layer = getattr(block, name)
            layer.register_forward_hook(lambda _l, _i, out, at=(number, name): seen.__setitem__(at, out))
    blocks = tensorboard.attention_weights(encoder, batch)
    assert encoder.training
    assert len(blocks) == 2
    tokens = int(batch.offsets[-1])
    for number, weights in enumerate(blocks):
        assert weights.shape == (3, tokens, tokens)
        q, k, v = (seen[number, name] for name in ("query", "key", "value"))
        expected = attend(q, k, v, Plan(batch), 3, 0.0)[:tokens]
        values = v[:tokens].unflatten(1, (3, 4)).transpose(0, 1)  # (H, T, D / H)
        assert torch.allclose((weights @ values).transpose(0, 1).flatten(1), expected, atol=1e-5)


def test_users_are_spread_from_short_to_long_histories():
    holdout = holdout_of([[1, 2, 3] * n + [4] for n in (1, 2, 3, 4, 5)] + [[5, 6]])
    lengths = [
        int(holdout.val_ends[holdout.users[row]] - holdout.starts[row]) for row in tensorboard.spread(holdout, 3)
    ]
    assert lengths == [3, 9, 15]
    assert len(tensorboard.spread(holdout, 50)) == 5


def test_what_stands_in_the_picture():
    figure = tensorboard._figure([torch.eye(3)[None].expand(2, 3, 3)], ["a", "b", "c" * 50])
    first, second = figure.axes[:2]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b", "c" * 29 + "…"]
    assert (first.get_title(), second.get_title()) == ("block 1, head 1", "block 1, head 2")
    assert figure.get_suptitle() == "all 3 items"
