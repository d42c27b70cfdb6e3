"""Train, report, recommend and call the package from Python in this environment; print its versions as JSON.

It is run outside the clone by the Python of an environment in which just the package is installed.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

WORDS = ["dataset=csv", "dataset.path=my.csv", "dataset.user=uid", "dataset.item=sku", "dataset.time=ts", "model=tiny"]
PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "numpy", "pandas", "pyarrow")


def main() -> None:
    """Run the commands and the three lines of Python on a small file, and compare their numbers."""
    rows = [f"{user},{(user * 7 + time * time) % 23},{time}" for user in range(60) for time in range(9)]
    Path("my.csv").write_text("uid,sku,ts\n" + "\n".join(rows) + "\n")
    command("train", *WORDS, "trainer=fast", "hydra.run.dir=run")
    command("train", "-m", *WORDS, "trainer=fast", "seed=0,1", "hydra.sweep.dir=sweep")
    assert "markov" in command("report", "sweep"), "the report lacks its baselines"
    assert command("recommend", "run=run", "users=[1,2]", "k=3").count("user_id") == 2, "two lists were asked for"
    assert "unknown key 'model.dimm'" in command("train", "model.dimm=1", fails=True), "a typo is not named"

    from sasrec_lab import load_run, load_sweep, train_model

    run = train_model(*WORDS, "trainer=fast")
    assert run.metrics == load_run("run").metrics, "the numbers of Python and of the command differ"
    assert len(run.recommend([1, 2], k=3)) == 6, "two lists of three items were asked for"
    assert load_sweep("sweep")["status"].tolist() == ["finished"] * 2, "a job of the sweep has not finished"
    kernels = run.info["kernels"]
    print(json.dumps({name: version(name) for name in ("sasrec-lab", *PACKAGES)} | {"kernels": kernels}))


def command(name: str, *words: str, fails: bool = False) -> str:
    """Return what an installed command prints; raise an exception with its last line if it fails, or if it should."""
    done = subprocess.run([Path(sys.executable).with_name(f"sasrec-{name}"), *words], capture_output=True, text=True)
    if bool(done.returncode) != fails:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise SystemExit(f"sasrec-{name} ended with {done.returncode}: {lines[-1]}")
    return done.stderr if fails else done.stdout


if __name__ == "__main__":
    main()
