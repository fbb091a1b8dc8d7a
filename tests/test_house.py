"""The house rules that a program can check: floors, sizes, what is imported where, what is never used."""

import ast
from pathlib import Path

import pytest

import minivit

ROOT = Path(minivit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# a file imports from lower floors, or from its own
FLOORS = ["errors", "files", "backend", "autograd", "ops", "nn", "models", "weights", "train", "measure", "runs", "cli"]
LIKE = {"data": "ops", "show": "ops", "__init__": "cli", "__main__": "cli"}


def floor(module: str) -> int:
    """Return the floor of ``minivit.ROOM…``."""
    room = module.split(".")[1] if "." in module else "__init__"
    return FLOORS.index(LIKE.get(room, room))


def name_of(file: Path) -> str:
    return ".".join(["minivit", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def against_the_floors(file_name: str, source: str) -> list[str]:
    own = floor(file_name)
    return [
        f"{file_name}:{line} imports {name}"
        for name, line in imports(ast.parse(source))
        if name.startswith("minivit.") and name != "minivit.__version__" and floor(name) > own
    ]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_import_against_the_floors(file):
    assert against_the_floors(name_of(file), file.read_text()) == []


def test_the_floor_test_sees_a_wrong_import():
    assert against_the_floors("minivit.autograd.graph", "from minivit.ops.matmul import linear")
    assert against_the_floors("minivit.ops.matmul", "def f():\n    import minivit.nn.layers")
    assert not against_the_floors("minivit.ops.matmul", "from minivit.autograd.op import op")


def test_data_knows_nothing_of_models():
    for file in (ROOT / "data").glob("*.py"):
        for name, line in imports(ast.parse(file.read_text())):
            if name.startswith("minivit."):
                assert name.split(".")[1] in ("errors", "files", "backend", "data"), f"{file.name}:{line}"


def test_cupy_is_imported_in_backend_only():
    for file in FILES:
        for name, line in imports(ast.parse(file.read_text())):
            if name.split(".")[0] in ("cupy", "cupyx"):
                assert name_of(file).startswith(("minivit.backend.", "minivit.ops.cuda.")), f"{file}:{line}"


def test_no_pickle_no_exec_no_numpy_random():
    for file in FILES:
        tree = ast.parse(file.read_text())
        assert not {n.split(".")[0] for n, _ in imports(tree)} & {"pickle", "marshal", "shelve", "dill", "joblib"}, file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                allowed = file.name == "mutate.py"  # runs a gradient's own source with one change in it
                assert allowed or node.func.id not in ("exec", "eval", "compile"), f"{file}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), f"{file}:{node.value.lineno}"
                assert node.value.value is False, f"{file}:{node.value.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("np", "xp"):
                assert node.attr != "random", f"{file}:{node.lineno}: random numbers come from keys"


def test_the_engine_and_the_model_fit_on_their_screens():
    assert len((ROOT / "autograd" / "graph.py").read_text().splitlines()) <= 250
    assert len((ROOT / "models" / "vit.py").read_text().splitlines()) <= 160


def test_no_process_wide_mutable_state_in_the_engine():
    """No ``global`` statement anywhere: recording and random keys are kept for each thread."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not isinstance(node, ast.Global), f"{file}:{node.lineno}"
