"""TensorBoard's own view of a sweep, attention maps and item vectors."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import exp, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import holdout_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sasrec_lab.config.composition import load
from sasrec_lab.data.batches import pack
from sasrec_lab.model.encoder import Encoder
from sasrec_lab.training import tensorboard

TINY = ["dataset=synthetic", "dataset.synthetic.users=100", "dataset.synthetic.items=40", "model=tiny", "trainer=fast"]


@contextmanager
def served(folder: Path) -> Iterator[Callable[[str, dict | None], dict]]:
    """Serve TensorBoard on loopback; yield a function that requests a path below /data/plugin/, with data to post."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0", "--host", "127.0.0.1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+:\d+", line)))

        def ask(path: str, post: dict | None = None) -> dict:
            data = json.dumps(post).encode() if post else None
            request = urllib.request.Request(
                f"{address}/data/plugin/{path}", data, {"Content-Type": "application/json"}
            )
            for _ in range(120):  # it answers 400 until it has read the hyperparameters
                with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
                time.sleep(0.5)
            pytest.fail(f"TensorBoard refuses {path}")

        yield ask
    finally:
        process.terminate()
        process.communicate()


def until(runs: int, ask: Callable[[], dict | list]) -> dict | list:
    """Ask until TensorBoard, which reads the folders in the background, has this many runs."""
    for _ in range(120):
        if len(answer := ask()) == runs:
            return answer
        time.sleep(0.5)
    pytest.fail(f"TensorBoard has {len(answer)} runs, not {runs}")


@pytest.mark.slow
def test_one_folder_shows_a_whole_sweep(train_here, tmp_path):
    """One process makes four runs, so the numbers of its event files pass 10 and no longer sort as text."""
    words = ["-m", *TINY, "model.ff_dim=null,8", "model.dim=8,16", "hydra.sweep.dir=sweep"]
    done = train_here(*words)
    assert (done.returncode, done.stderr) == (0, "")
    folders = {f"{file.parent.name}/tb": file.parent for file in (tmp_path / "sweep").glob("*/metrics.json")}
    results = {name: json.loads((folder / "metrics.json").read_text())["metrics"] for name, folder in folders.items()}
    assert len(results) == 4
    with served(tmp_path / "sweep") as ask:
        scalars = until(4, lambda: ask("scalars/tags"))
        assert set(scalars) == set(results)
        assert len({tuple(sorted(tags)) for tags in scalars.values()}) == 1  # the same names in all runs
        assert {"~train/loss", "~train/lr", "val/ndcg@10"} <= set(scalars[next(iter(results))])

        experiment = ask("hparams/experiment", {"experimentName": "", "hparamsLimit": 0})
        names = {info["name"] for info in experiment["hparamInfos"]}
        assert {"dataset/weight/column", "dataset/titles/path"} <= names  # also if the section is null
        assert {"model/dim", "seed", "loss/name", "optimizer/lr", "evaluation/monitor", "trainer/max_epochs"} <= names
        metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
        first = ["chosen by val/ndcg@10", *(f"{name}@{k}" for name in ("ndcg", "recall") for k in (10, 20, 5))]
        assert metrics[: len(first)] == [f"test/{name}" for name in first]
        columns = [{"hparam": name} for name in sorted(names)] + [{"metric": {"tag": tag}} for tag in metrics]
        wanted = {
            "experimentName": "",
            "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
            "colParams": columns,
            "startIndex": 0,
            "sliceSize": 100,
        }
        groups = ask("hparams/session_groups", wanted)["sessionGroups"]
    assert len(groups) == 4
    for group in groups:
        (session,) = group["sessions"]
        values = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
        assert values["test/ndcg@10"] == pytest.approx(results[session["name"]]["test/ndcg@10"], rel=1e-6)
        assert values["test/chosen by val/ndcg@10"] == pytest.approx(results[session["name"]]["val/ndcg@10"], rel=1e-6)
        assert set(group["hparams"]) == names  # every run has all keys
        model = json.loads((folders[session["name"]] / "run.json").read_text())["config"]["model"]
        shown = {name: group["hparams"][name] for name in ("model/dim", "model/ff_dim")}
        assert {name: float(value) if value != "None" else None for name, value in shown.items()} == {
            "model/dim": model["dim"],
            "model/ff_dim": model["ff_dim"],
        }


@pytest.mark.slow
def test_attention_and_vectors_are_written_on_request(train_here, tmp_path):
    asked = ["tensorboard.attention_users=2", "tensorboard.projector=true"]
    for name, words in {"asked": asked, "plain": []}.items():
        done = train_here(*TINY, f"hydra.run.dir={name}", *words)
        assert (done.returncode, done.stderr) == (0, "")
    reader = EventAccumulator(str(tmp_path / "asked" / "tb"), size_guidance={"images": 0}).Reload()
    assert len(reader.Tags()["images"]) == 2
    assert all(tag.startswith("~attention/user ") for tag in reader.Tags()["images"])
    assert reader.Images(reader.Tags()["images"][0])[0].encoded_image_string.startswith(b"\x89PNG")
    (vectors,), (rows,) = (list((tmp_path / "asked" / "tb").rglob(name)) for name in ("tensors.tsv", "metadata.tsv"))
    items = len(np.load(tmp_path / "asked" / "items.npz")["ids"])
    assert np.loadtxt(vectors).shape == (items, 16)
    assert rows.read_text().splitlines()[0] == "item\tid\tinteractions"
    assert len(rows.read_text().splitlines()) == items + 1

    plain = EventAccumulator(str(tmp_path / "plain" / "tb")).Reload()
    assert plain.Tags()["images"] == []
    assert not list((tmp_path / "plain" / "tb").rglob("projector_config.pbtxt"))


@pytest.mark.parametrize(("heads", "causal"), [(1, True), (2, True), (2, False)])
def test_attention_maps_are_the_models_own_weights(heads, causal):
    """They equal a slow computation from queries and keys, and rows are probabilities, over the past if causal."""
    cfg = replace(load([*TINY, f"model.heads={heads}", "model.dropout=0.5"]).model, causal=causal)
    torch.manual_seed(0)
    encoder = Encoder(30, cfg).train()
    history = np.array([3, 7, 7, 29, 1], dtype=np.int32)
    batch, _ = pack(np.array([0]), np.array([5]), history)
    (weights,) = tensorboard.attention_weights(encoder, batch)
    assert encoder.training
    assert weights.shape == (heads, 5, 5)
    assert torch.allclose(weights.sum(-1), torch.ones(heads, 5))
    assert ((weights == 0) == (causal & torch.ones(5, 5).triu(1).bool())).all()

    block = encoder.eval().blocks[0]
    x = encoder._embed(batch)
    with torch.no_grad():
        q, k = block.query(block.attention_norm(x))[:5].tolist(), block.key(x)[:5].tolist()
    width = cfg.dim // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(5):
            seen = range(i + 1 if causal else 5)
            terms = [exp(sum(a * b for a, b in zip(q[i][part], k[j][part], strict=True)) / sqrt(width)) for j in seen]
            assert weights[head, i, : len(seen)].tolist() == pytest.approx(
                [term / sum(terms) for term in terms], rel=1e-4
            )


def test_maps_omit_the_weight_of_the_padding_attended_to():
    """With as much as is lacking, of the padding's value, they give attention's output."""
    cfg = load(["model=sasrec_rectools", "model.dim=16", "model.heads=2", "model.maxlen=9"]).model
    torch.manual_seed(0)
    encoder = Encoder(30, cfg).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch, _ = pack(np.array([0]), np.array([5]), np.array([3, 7, 7, 29, 1]))
    block, outputs, values = encoder.blocks[0], [], []
    block.value.register_forward_hook(lambda _layer, _inputs, out: values.append(out[:5]))
    block.output.register_forward_hook(lambda _layer, inputs, _out: outputs.append(inputs[0][:5]))
    weights = tensorboard.attention_weights(encoder, batch)[0]
    missing = 1 - weights.sum(-1, keepdim=True)  # (H, T, 1)
    assert (missing > 0.001).all()
    v, pad = values[0].unflatten(1, (2, -1)).transpose(0, 1), block.value.bias.view(2, 1, -1)
    heads = weights @ v + missing * pad
    torch.testing.assert_close(heads.transpose(0, 1).flatten(1), outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pos_emb", ["learned", "rope", "relative"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("model", ["sasrec", "ligr"])
def test_values_weighted_by_a_map_are_attentions_output(model, causal, pos_emb):
    cfg = load([f"model={model}", "model.dim=16", "model.heads=2", f"model.pos_emb={pos_emb}", "model.maxlen=9"]).model
    torch.manual_seed(0)
    encoder = Encoder(30, replace(cfg, causal=causal)).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch, _ = pack(np.array([0]), np.array([5]), np.array([3, 7, 7, 29, 1]))
    values, outputs = [], []
    for block in encoder.blocks:
        block.value.register_forward_hook(lambda _layer, _inputs, out: values.append(out[:5]))
        block.output.register_forward_hook(lambda _layer, inputs, _out: outputs.append(inputs[0][:5]))
    weights = tensorboard.attention_weights(encoder, batch)
    for v, out, each in zip(values, outputs, weights, strict=True):
        heads = each @ v.unflatten(1, (2, -1)).transpose(0, 1)  # (H, T, D / H)
        torch.testing.assert_close(heads.transpose(0, 1).flatten(1), out, rtol=1e-4, atol=1e-5)


def test_users_are_picked_from_short_to_long_histories():
    """A history of one item is never picked, as its map has a single cell."""
    holdout = holdout_of([[1, 2, 3] * n + [4] for n in (5, 1, 3, 2, 4)] + [[5, 6, 7]])
    lengths = holdout.test.ends - holdout.test.starts
    assert lengths[tensorboard.pick_users_by_length(holdout, 3)].tolist() == [2, 6, 15]
    assert len(tensorboard.pick_users_by_length(holdout, 50)) == 6


def test_attention_figure_has_labels_and_titles():
    figure = tensorboard._figure([torch.eye(3).expand(2, 3, 3)], ["a", "b", "c" * 50])
    first, second = figure.axes[:2]
    assert [label.get_text() for label in first.get_yticklabels()] == ["a", "b", "c" * 29 + "…"]
    assert (first.get_title(), second.get_title()) == ("block 1, head 1", "block 1, head 2")
    assert figure.get_suptitle() == "all 3 items"
