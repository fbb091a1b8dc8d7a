"""The house rules that a program can check: floors, circles, sizes, names, what is imported where, what is never used.

Imports within functions count like any others.
"""

import ast
import functools
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import minivit
from minivit.cli.main import COMMANDS

ROOT = Path(minivit.__file__).parent
# what learners get to write in (learn/texts) is no part of the package: nothing imports it
FILES = sorted(file for file in ROOT.rglob("*.py") if file.parent != ROOT / "learn" / "texts")
# a file imports from the floors below its own, or from its own room
FLOORS = ["errors", "files", "backend", "autograd", "ops", "nn", "models", "weights", "train", "measure", "runs", "cli"]
BESIDE = {  # whom they stand beside
    "data": "ops", "show": "ops", "study": "weights", "learn": "measure", "__init__": "cli", "__main__": "cli",
}  # fmt: skip


# files of one name in two rooms, and what makes them one thing; an operation and its fast twins share theirs, too
SAME_NAMES = {
    "attention.py": "the operation, and the layer that holds its weights",
    "random.py": "the keys, and where a layer gets its key from",
    "graph.py": "the nodes of a computation, and the command that draws them",
    "export.py": "the writing of other systems' files, and its command",
    "lr_find.py": "the search for a learning rate, and its command",
    "folder.py": "a folder of images, and a folder of a run",
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def floor(module: str) -> int:
    """Return the floor of ``minivit.ROOM…``."""
    return FLOORS.index(BESIDE.get(room(module), room(module)))


def name_of(file: Path) -> str:
    return ".".join(["minivit", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


NAMES = {name_of(file): file for file in FILES}


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


@functools.cache
def text_of(file: Path) -> str:
    return file.read_text()


@functools.cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def tree_of(file: Path) -> ast.Module:
    return parsed(text_of(file))


def in_rooms(*rooms: str) -> list[Path]:
    return [file for file in FILES if file.relative_to(ROOT).parts[0] in rooms]


# ---- floors and circles ----------------------------------------------------------------------------------------------


def against_the_floors(file_name: str, source: str) -> list[str]:
    def allowed(name: str) -> bool:
        return floor(name) < floor(file_name) or room(name) == room(file_name) or file_name == "minivit.__main__"

    return [
        f"{file_name}:{line} imports {name}"
        for name, line in imports(parsed(source))
        if name.split(".")[0] == "minivit" and name != "minivit.__version__" and not allowed(name)
    ]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_import_against_the_floors(file):
    assert against_the_floors(name_of(file), text_of(file)) == []


def test_the_floor_test_sees_a_wrong_import():
    assert against_the_floors("minivit.autograd.graph", "from minivit.ops.matmul import linear")
    assert against_the_floors("minivit.ops.matmul", "def f():\n    import minivit.nn.layers")
    assert against_the_floors("minivit.runs.job", "import minivit as mv")
    assert against_the_floors("minivit.ops.matmul", "from minivit import data")
    assert not against_the_floors("minivit.ops.matmul", "from minivit.autograd.op import op")


def circle(sources: dict[str, str]) -> list[str]:
    """Return the modules of a circle of imports among ``sources``, from the first to itself, or [] if there is none.

    ``from minivit.room import name`` imports minivit.room.name where that is a file, else minivit/room/__init__.py.
    """
    graph = {
        file: {
            module
            for name, _ in imports(parsed(source))
            if (module := name if name in sources else name.rpartition(".")[0]) in sources
            and name != "minivit.__version__"
        }
        for file, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_circle_of_files():
    assert circle({name: text_of(file) for name, file in NAMES.items()}) == []


def test_the_circle_test_sees_a_circle():
    circular = {
        "minivit.data.a": "from minivit.data import b\nimport numpy as np",
        "minivit.data.b": "def late():\n    from minivit.data.c import name",
        "minivit.data.c": "import minivit.data.a",
        "minivit.data.d": "from minivit.data.a import name",
    }
    assert set(circle(circular)) == {"minivit.data.a", "minivit.data.b", "minivit.data.c"}
    assert circle(circular)[0] == circle(circular)[-1]
    assert circle(circular | {"minivit.data.c": "import math"}) == []
    assert circle({"minivit.data": "from minivit.data.a import x", "minivit.data.a": "from minivit.data import y"})
    assert circle({"minivit.data.a": "from minivit.data.a import x"})


@pytest.mark.parametrize("room", ["data", "show"])
def test_data_and_show_know_nothing_of_models(room):
    """They stand side by side: neither imports the other."""
    for file in in_rooms(room):
        for name, line in imports(tree_of(file)):
            if name.startswith("minivit."):
                assert name.split(".")[1] in ("errors", "files", "backend", room), f"{file}:{line}"


# ---- who names a ViT, who speaks -------------------------------------------------------------------------------------


def lines_naming_the_vit(source: str) -> list[int]:
    """Return where a file imports ViT or gets it from a module; docstrings and other texts may name it."""
    named = lambda node: (
        (isinstance(node, ast.alias) and node.name == "ViT") or (isinstance(node, ast.Attribute) and node.attr == "ViT")
    )
    return [node.lineno for node in ast.walk(parsed(source)) if named(node)]


def test_only_models_and_the_public_face_name_the_vit():
    """Who builds, counts, resumes or explains a model goes through the registry."""
    others = [file for file in FILES if file != ROOT / "__init__.py" and file not in in_rooms("models")]
    assert {name_of(file): lines for file in others if (lines := lines_naming_the_vit(text_of(file)))} == {}


def test_the_vit_test_sees_a_vit():
    assert lines_naming_the_vit("def f():\n    from minivit.models.vit import ViT as Model") == [2]
    assert lines_naming_the_vit("import minivit.models.vit as v\nmodel = v.ViT(depth=1)") == [2]
    assert lines_naming_the_vit('def f(model):\n    """See ViT, or mv.ViT(depth=1)."""\n    return "ViT"') == []


def lines_that_speak(source: str) -> list[int]:
    """Return where a file prints, shows a bar, or ends the process."""
    tree = parsed(source)
    speaks = lambda node: (
        (isinstance(node, ast.Name) and node.id in ("print", "SystemExit"))
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.exit", "os._exit"))
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("exit", "quit"))
    )
    lines = [node.lineno for node in ast.walk(tree) if speaks(node)]
    return lines + [line for name, line in imports(tree) if name.split(".")[0] == "tqdm" or name == "sys.exit"]


def test_only_the_command_line_prints_and_exits():
    silent = [file for file in FILES if file not in in_rooms("cli", "__main__.py")]
    assert {name_of(file): lines for file in silent if (lines := lines_that_speak(text_of(file)))} == {}


@pytest.mark.parametrize(
    "line",
    ["print(1)", "def f(say=print): pass", "raise SystemExit(1)", "import sys; sys.exit(1)", "exit()",
     "def f():\n    from tqdm import tqdm", "from sys import exit as leave"],
)  # fmt: skip
def test_the_test_of_silence_hears(line):
    assert lines_that_speak(line)
    assert not lines_that_speak(f'def f():\n    """{line!r}"""')


# ---- what is imported where, what is never used ----------------------------------------------------------------------


def left_aside(sources: dict[str, str]) -> set[str]:
    """Return the modules among ``sources`` that no other imports."""
    found = {name for file, source in sources.items() for name, _ in imports(parsed(source)) if name != file}
    return sources.keys() - found - {name.rpartition(".")[0] for name in found}


def test_every_file_is_imported_by_another():
    """But the commands, which main.py imports by name, kernels, whose twins name them, and exercises, which the ladder
    lists: a model or a twin whose file is not would be missing. The runner is a process of its own."""
    commands = {f"minivit.cli.{command.replace('-', '_')}" for command in COMMANDS}
    commands |= {name for name in NAMES if name.startswith(("minivit.ops.cuda.kernels.", "minivit.learn.ladder."))}
    packages = {name for name, file in NAMES.items() if file.name == "__init__.py"}
    aside = left_aside({name: text_of(file) for name, file in NAMES.items()})
    assert aside - commands - packages == {"minivit.__main__", "minivit.learn.runner"}


def test_a_file_left_aside_is_seen():
    assert left_aside({"minivit.a": "import minivit.b", "minivit.b": "", "minivit.c": "import minivit.c"}) == {
        "minivit.a", "minivit.c",
    }  # fmt: skip
    assert left_aside({"minivit.a": "from minivit.b import f", "minivit.b": ""}) == {"minivit.a"}
    assert left_aside({"minivit.a": "from minivit import b", "minivit.b": ""}) == {"minivit.a"}


def test_cupy_is_imported_in_backend_only():
    for file in FILES:
        for name, line in imports(tree_of(file)):
            if name.split(".")[0] in ("cupy", "cupyx"):
                assert name_of(file).startswith("minivit.backend."), f"{file}:{line}"


def test_no_pickle_no_exec_no_numpy_random():
    for file in FILES:
        tree = tree_of(file)
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


def test_no_process_wide_mutable_state_in_the_engine():
    """No ``global`` statement anywhere: recording and random keys are kept for each thread."""
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            assert not isinstance(node, ast.Global), f"{file}:{node.lineno}"


# ---- sizes and names -------------------------------------------------------------------------------------------------


def test_the_engine_and_the_model_fit_on_their_screens():
    assert len((ROOT / "autograd" / "graph.py").read_text().splitlines()) <= 250
    assert len((ROOT / "models" / "vit.py").read_text().splitlines()) <= 160


def test_no_file_over_350_lines():
    lengths = {name_of(file): len(text_of(file).splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_no_function_over_60_lines():
    lengths = {
        f"{name_of(file)}.{node.name}": node.end_lineno - node.lineno + 1
        for file in FILES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_one_name_one_file():
    """But for those with a reason, and for twins and their kernels: ops/cpu/matmul.py has those of ops/matmul.py."""
    rooms = defaultdict(set)
    for file in FILES:
        room = file.parent.relative_to(ROOT).as_posix()
        rooms[file.name].add("ops" if room in ("ops/cpu", "ops/cuda", "ops/cuda/kernels") else room)
    twice = {name for name, found in rooms.items() if len(found) > 1}
    assert twice - SAME_NAMES.keys() - {"__init__.py"} == set()
