"""Install the wheel in environments of their own, one for each supported version, and train and recommend in each.

python scripts/support_matrix.py --json docs/results/support.json    all environments whose Python is on this machine
python scripts/support_matrix.py --only 'Python 3.13' --keep         one of them, and keep its environment

It needs PyPI, and 1 to 7 GB of disk for an environment at a time: on Linux PyPI has torch with CUDA. An environment
whose Python or packages are not to be had, or that would take more than --max-gb, is recorded as not run, with the
reason. What runs in each is scripts/support/check.py. `twine check` looks at the sdist and the wheel. --json is written
after each environment; with --only the file's rows of other environments stay, with the date and commit of their own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.results import write_results

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "scripts/support/check.py"
CONSTRAINTS = ROOT / "constraints.txt"
HYDRA_CANDIDATE = "1.4.0rc3"
PACKAGES = "sdist and wheel"


@dataclass(frozen=True)
class Environment:
    """A Python, and the versions that differ from constraints.txt; `after` are installed in spite of pyproject.toml."""

    python: str
    versions: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return what distinguishes the environment."""
        changed = [f"{name} {version}" for name, version in (self.versions | self.after).items()]
        return ", ".join([f"Python {self.python}", *changed])


ENVIRONMENTS = [
    Environment("3.11"),
    Environment("3.12"),
    Environment("3.13"),
    Environment("3.11", {"torch": "2.11.0", "setuptools": "81.0.0"}),  # this torch wants setuptools below 82
    Environment("3.11", {"torch": "2.14.1"}),
    Environment("3.11", after={"hydra-core": HYDRA_CANDIDATE}),
]


class NotRun(Exception):
    """An environment cannot be made here; the message is the reason."""


def main() -> None:
    """Build, make each environment in turn, run the check in it, and print and write the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    parser.add_argument(
        "--only",
        action="append",
        choices=[each.name for each in ENVIRONMENTS],
        metavar="NAME",
        help="such as 'Python 3.13'; may be repeated",
    )
    parser.add_argument("--max-gb", type=float, default=12, help="largest download of an environment (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the environments, below the printed folder")
    args = parser.parse_args()
    earlier = read_earlier(args.json) if args.json and args.only else []
    folder = Path(tempfile.mkdtemp(prefix="support-"))
    try:
        rows = [{"environment": PACKAGES, "outcome": build(folder), "versions_of_run": None}]
        for environment in ENVIRONMENTS:
            if not args.only or environment.name in args.only:
                rows.append(outcome_of(environment, folder, args.max_gb, args.keep))
                print(f"{rows[-1]['environment']}: {rows[-1]['outcome']}", flush=True)
                if args.json:
                    write_results(args.json, in_order([*earlier, *rows]))
    finally:
        if args.keep:
            print(f"environments: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if any(str(row["outcome"]).startswith("failed") for row in rows):
        sys.exit(1)


def read_earlier(file: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier call, each with its date and commit; none if there is no file."""
    if not file.is_file():
        return []
    results = json.loads(file.read_text())
    return [{"measured": results["measured"], "commit": results["commit"]} | row for row in results["rows"]]


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last row of each environment that is still in the matrix, in its order."""
    last = {row["environment"]: row for row in rows}
    return [last[name] for name in (PACKAGES, *(each.name for each in ENVIRONMENTS)) if name in last]


def build(folder: Path) -> str:
    """Build sdist and wheel into dist/ in the folder, and return the outcome of `twine check`."""
    tools = make_venv(sys.executable, folder / "tools")
    run([tools, "-m", "pip", "install", "-q", "build", "twine"], "the build tools")
    run([tools, "-m", "build", "--outdir", folder / "dist", ROOT], "the build")
    run([tools, "-m", "twine", "check", "--strict", *sorted((folder / "dist").iterdir())], "twine check")
    shutil.rmtree(folder / "tools")
    return "passed twine check"


def outcome_of(environment: Environment, folder: Path, max_gb: float, keep: bool) -> dict[str, Any]:
    """Return the row of an environment: `passed`, `failed: why` or `not run: why`, and its versions."""
    place = folder / environment.name.replace(" ", "_").replace(",", "")
    row: dict[str, Any] = {"environment": environment.name, "versions_of_run": None}
    try:
        python = make_venv(find_python(environment.python), place)
        install(environment, python, next((folder / "dist").glob("*.whl")), folder, max_gb)
        elsewhere = place / "elsewhere"
        elsewhere.mkdir()
        printed = run([python, CHECK], "the check", cwd=elsewhere)
        return row | {"outcome": "passed", "versions_of_run": json.loads(printed.splitlines()[-1])}
    except NotRun as reason:
        return row | {"outcome": f"not run: {reason}"}
    except Failed as reason:
        return row | {"outcome": f"failed: {reason}"}
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


class Failed(Exception):
    """A command failed; the message says which, and its last line."""


def run(command: list[Any], what: str, cwd: Path | None = None) -> str:
    """Return what a command prints, run outside the clone, so that it finds the installed package only."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SASREC_LAB_DATA")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd or tempfile.gettempdir(), env=env, capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Failed(f"{what}: {lines[-1]}")
    return done.stdout


def find_python(version: str) -> str:
    """Return the interpreter of this version: on PATH, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for found in [*sorted(pyenv.glob(f"versions/{version}.*/bin/python")), shutil.which(f"python{version}")]:
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            return str(found)
    raise NotRun(f"this machine has no Python {version}")


def make_venv(python: str, place: Path) -> Path:
    """Make an environment and return its Python."""
    run([python, "-m", "venv", place], "venv")
    return place / "bin" / "python"


def install(environment: Environment, python: Path, wheel: Path, folder: Path, max_gb: float) -> None:
    """Install the wheel with the tested versions, but those of the environment."""
    lines = CONSTRAINTS.read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in environment.versions]
    pins = folder / "constraints.txt"
    pins.write_text("\n".join([*kept, *(f"{name}=={version}" for name, version in environment.versions.items())]))
    pip = [python, "-m", "pip", "install", "-q", "-c", pins, wheel]
    check_size(pip, folder / "report.json", max_gb)
    run(pip, "pip install")
    for name, version in environment.after.items():
        run([python, "-m", "pip", "install", "-q", "--pre", f"{name}=={version}"], f"pip install {name}")


def check_size(pip: list[Any], report: Path, max_gb: float) -> None:
    """Raise NotRun if the versions are not to be had, or if the packages of CUDA would be too large to install here.

    Their sizes are not in pip's report; with them an environment takes about 7 GB, without about 1.
    """
    try:
        run([*pip, "--dry-run", "--report", report], "pip install")
    except Failed:
        raise NotRun("pip does not find these versions together here") from None
    names = [part["metadata"]["name"] for part in json.loads(report.read_text())["install"]]
    size = 7 if any(name.startswith("nvidia") for name in names) else 1
    if size > max_gb:
        raise NotRun(f"only torch's CUDA build is to be had, which takes {size} GB, and --max-gb={max_gb:g}")


if __name__ == "__main__":
    main()
