"""The house: which file may import which, how many files a newcomer meets, how long a function may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sasrec_lab"
# A part imports parts of lower floors, and files of its own part; parts of one floor may import each other in one
# direction, which the search for circles watches.
FLOORS = [
    {"errors", "files"},
    {"config", "ops"},
    {"data"},
    {"model", "evaluation", "run"},
    {"training"},
    {"recommend", "report"},
    {"train", "export", "evaluate"},
    {"search", "api"},
]
SEPARATE = [
    ("config", "ops"),
    ("recommend", "report"),
    ("model", "run"),
    ("model", "evaluation"),
    ("run", "evaluation"),
]
FILES = sorted(PACKAGE.glob("**/*.py"))
TESTS = sorted(ROOT.glob("tests/**/test_*.py"))


def module_of(path: Path) -> str:
    """Return the dotted name below the package, such as `data.holdout`; a folder's own is the folder's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports start with sasrec_lab"
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            package, _, inside = name.partition(".")
            if package == "sasrec_lab":
                found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found - {""}


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if module.partition(".")[0] in floor)


IMPORTS = {module_of(path): imports(path) for path in FILES if module_of(path)}


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_run_downwards(module):
    part = module.partition(".")[0]
    for other in IMPORTS[module]:
        assert floor_of(other) <= floor_of(module), f"{module} imports {other}"
        assert {part, other.partition(".")[0]} not in [set(pair) for pair in SEPARATE], f"{module} imports {other}"


def test_no_module_imports_itself_through_others():
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in finished:
            for other in IMPORTS.get(module, ()):
                visit(other, (*path, module))
            finished.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_the_package_shows_its_flow():
    assert len(list(PACKAGE.glob("*.py"))) <= 5
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders - {"conf"} == {
        "config",
        "data",
        "ops",
        "model",
        "training",
        "evaluation",
        "run",
        "recommend",
        "report",
        "export",
        "search",
        "evaluate",
        "api",
    }


def test_config_imports_neither_torch_nor_lightning():
    for path in PACKAGE.glob("config/*.py"):
        found = re.search(r"^\s*(import|from) (torch|pytorch_lightning|lightning)", path.read_text(), re.M)
        assert not found, f"{path.name}: {found[0]}"


def imports_at_once(path: Path) -> set[str]:
    """Return what a file imports as it is imported: not inside functions, nor for types only."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_lists_and_exports_do_not_wait_for_lightning():
    """Lightning and torchmetrics take longer to import than all else that a command needs to make lists."""
    waiting = [path for part in ("recommend", "evaluate", "export") for path in sorted(PACKAGE.glob(f"{part}/*.py"))]
    reached: dict[str, str] = {module_of(path): module_of(path) for path in waiting}  # by module: through which others
    while waiting:
        path = waiting.pop()
        module = module_of(path)
        for name in imports_at_once(path):
            package, _, inside = name.partition(".")
            assert package not in ("pytorch_lightning", "torchmetrics"), f"{reached[module]} imports {name}"
            if package == "sasrec_lab" and inside in MODULES and inside not in reached:
                reached[inside] = f"{reached[module]} -> {inside}"
                waiting += [each for each in FILES if module_of(each) == inside]
    assert "model.encoder" in reached


def test_hydras_internals_are_in_one_file():
    files = [path for path in FILES if "hydra._internal" in path.read_text()]
    assert len(files) <= 1, files


def functions(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


@pytest.mark.parametrize(
    "path", [*FILES, *sorted(ROOT.glob("scripts/**/*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_functions_fit_on_a_screen_and_have_docstrings(path):
    for function in functions(path):
        assert function.end_lineno - function.lineno < 60, function.name
        assert not function.args.kwarg, f"{function.name}: name the arguments instead of **{function.args.kwarg.arg}"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_tests_mirror_the_package():
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS} - {Path()}
    assert all((PACKAGE / folder).is_dir() or folder == Path("scripts") for folder in folders), folders


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_tests_are_short_and_unique(path):
    names = [function.name for function in functions(path) if function.name.startswith("test_")]
    assert not [name for name in names if len(name) > 60]
    assert len(names) == len(set(names)), "the later of two tests of one name replaces the other"
