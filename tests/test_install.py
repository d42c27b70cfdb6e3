"""Ways to install the package, its declared and pinned dependencies, and `make setup`."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from commands import children_seconds
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CODE = {path for path in (ROOT / "sasrec_lab").rglob("*") if path.suffix in (".py", ".cpp", ".h")}
CONF = {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")}
PRINT_CONF_DIR = "from sasrec_lab.config.schema import CONF_DIR; print(CONF_DIR)"


def run(*command: object, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SASREC_LAB_DATA")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tree, so that a build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "project"
    for part in ("sasrec_lab", "conf"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def make_venv(folder: Path, *install: object) -> Path:
    """Make an environment with the project in it, which borrows all other packages from the one that runs the tests."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", scheme="venv", vars=paths))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", *install, cwd=folder.parent)
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as it is published: from the sdist, which is built from the tree."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source, cwd=dist)
    return next(dist.glob("*.whl"))


def assert_runs(bin_folder: Path, elsewhere: Path, home: Path) -> None:
    """Check that both commands, called in a folder outside the project, compose the config of the folder `home`."""
    by_module = run(bin_folder / "python", "-m", "sasrec_lab.train", "--cfg", "job", cwd=elsewhere)
    by_script = run(bin_folder / "sasrec-train", "--cfg", "job", cwd=elsewhere)
    assert by_module == by_script
    assert "\nmodel:\n" in by_module
    where = run(bin_folder / "python", "-c", PRINT_CONF_DIR, cwd=elsewhere)
    assert Path(where.strip()).resolve() == home.resolve()


@pytest.mark.slow
def test_wheel(wheel: Path, tmp_path: Path) -> None:
    bin_folder = make_venv(tmp_path / "venv", wheel)
    site = Path(
        run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    files = {str(path.relative_to(site / "sasrec_lab")) for path in (site / "sasrec_lab").rglob("*") if path.is_file()}
    code = {str(path.relative_to(ROOT / "sasrec_lab")) for path in CODE}
    assert {file for file in files if not file.endswith(".pyc")} == code | CONF
    assert "ops/cpp/block.cpp" in files
    assert not (site / "conf").exists()
    assert not (site / "tests").exists()
    assert_runs(bin_folder, tmp_path, home=site / "sasrec_lab" / "conf")


@pytest.mark.slow
def test_editable(source: Path, tmp_path: Path) -> None:
    bin_folder = make_venv(tmp_path / "venv", "--editable", source)
    assert_runs(bin_folder, tmp_path, home=source / "conf")


def test_clone(source: Path) -> None:
    """Only the libraries are installed; `python -m` runs in the project's folder."""
    where = run(sys.executable, "-c", PRINT_CONF_DIR, cwd=source)
    assert Path(where.strip()).resolve() == (source / "conf").resolve()
    assert "\nmodel:\n" in run(sys.executable, "-m", "sasrec_lab.train", "--cfg", "job", cwd=source)


def test_conf_has_no_python_files() -> None:
    assert not list((ROOT / "conf").rglob("*.py"))


def test_help_and_config_do_not_import_torch(tmp_path: Path) -> None:
    """Importing torch and Lightning takes seconds; help and config must not wait for them."""
    late = {"torch", "pytorch_lightning", "pandas", "numpy"}
    check = f"import sys, sasrec_lab.train; print(sorted({late} & set(sys.modules)))"
    assert run(sys.executable, "-c", check, cwd=tmp_path) == "[]\n"
    before = children_seconds()
    run(sys.executable, "-m", "sasrec_lab.train", "--cfg", "job", cwd=tmp_path)
    assert children_seconds() - before < 1.5


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def test_constraints_pin_every_dependency() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}
    assert "" not in pins.values(), "a line that is not name==version"
    assert not [version for version in pins.values() if "+" in version], "a local version such as +cpu is on no index"
    assert not [name for name in pins if name.startswith(("nvidia", "triton", "cuda"))], "not on every platform"
    for requirement in requirements("test", "compiler"):  # what `make setup` installs
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


@pytest.mark.parametrize("folder", ["sasrec_lab", "scripts", "tests"])
def test_imports_are_declared(folder: str) -> None:
    """What a module imports is in pyproject.toml, not there by luck because something else needs it.

    What scripts/peers has runs in environments of its own.
    """
    extras = [extra for extra in PROJECT["optional-dependencies"] if extra != "test" or folder != "sasrec_lab"]
    declared = {canonicalize_name(requirement.name) for requirement in requirements(*extras)} | {"sasrec-lab"}
    ours = {"sasrec_lab", "tests"} | {path.stem for place in (folder, "scripts") for path in (ROOT / place).iterdir()}
    distributions = packages_distributions()
    stray = []
    for file in sorted(set((ROOT / folder).rglob("*.py")) - set((ROOT / "scripts" / "peers").iterdir())):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - ours:
                owners = {
                    canonicalize_name(name) for name in distributions.get(top, [top])
                }  # an extra need not be there
                if not owners & declared:
                    stray.append(f"{file.relative_to(ROOT)} imports {top}")
    assert not stray


def make_setup(folder: Path, **commands: str) -> str:
    """Return the error stream of `make setup` on a machine that has only these commands, each a line of shell."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "bin").mkdir()
    for name, script in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    make = shutil.which("make")
    env = {"PATH": str(folder / "bin")}
    done = subprocess.run([make, "setup"], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert not (folder / ".venv" / ".complete").exists()
    return done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a compiler is installed on Linux only")
@pytest.mark.parametrize(("command", "brings"), [("g++", False), ("clang++", False), ("cc", True)])
def test_setup_installs_a_compiler_only_if_there_is_none(command: str, brings: bool, tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$*" in *compiler*) echo "$*" >&2; exit 1;; esac\n')
    python.chmod(0o755)
    message = make_setup(tmp_path, **{command: "exit 0", "uname": "echo Linux"})
    asked = "-m pip install -q -c constraints.txt -e .[compiler]\nno C++ compiler found, and installing one failed"
    assert message.startswith(asked) == brings
    assert ("compiler" in message) == brings


def test_setup_without_a_python_that_fits(tmp_path: Path) -> None:
    message = make_setup(tmp_path, python3="exit 1", python="exit 0").splitlines()[0]
    assert message.startswith("no Python 3.11, 3.12 or 3.13 on PATH; install one")


def test_setup_without_ensurepip(tmp_path: Path) -> None:
    script = 'case "$2" in *ensurepip*) exit 1;; *print*) echo 3.12;; esac'
    message = make_setup(tmp_path, python3=script).splitlines()[0]
    assert message.startswith("python3 cannot create virtual environments")
    assert message.endswith("sudo apt install python3.12-venv")
