"""How the project hangs together: who may import whom, how scripts run, and a few rules for every file."""

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGE_FOLDERS = (
    "preprocess_raw_data",
    "generate_embeddings",
    "difficulty_metadata",
    "train_specialized_embeddings",
    "publish_model",
    "evaluate_embeddings",
)
SCRIPTS = {
    "preprocess_raw_data/process_tar.py": "Stage 1: ",
    "generate_embeddings/generate_embeddings.py": "Stage 2: ",
    "preprocess_raw_data/merge_and_split.py": "Stage 3: ",
    "preprocess_raw_data/compute_fingerprints.py": "Stage 4: ",
    "difficulty_metadata/compute_visual_neighbors.py": "Stage 5: ",
    "train_specialized_embeddings/train.py": "Stage 6: ",
    "publish_model/convert_to_hf.py": "Stage 7: ",
    "publish_model/generate_embeddings_from_parquet.py": "Stage 8: ",
    "evaluate_embeddings/evaluate.py": "Stage 9: ",
    "run_pipeline.py": "Run stages 1 to 9 ",
}
PROJECT_FOLDERS = (*STAGE_FOLDERS, "pipeline", "sample_data", "tests", "benchmarks", "slurm")
FILES = sorted([path for folder in PROJECT_FOLDERS for path in (REPO / folder).rglob("*.py")] + list(REPO.glob("*.py")))


@cache
def parse_files():
    """Return the syntax tree of every file: not at import, because each process of the tests imports this file."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def find_imports(tree):
    """Return the first word of every import of a file, also of those inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def files_below(folder):
    return {path: tree for path, tree in parse_files().items() if path.relative_to(REPO).parts[0] == folder}


def test_the_shared_package_imports_no_stage():
    project = {*PROJECT_FOLDERS, "run_pipeline"} - {"pipeline"}
    wrong = {path.name: find_imports(tree) & project for path, tree in files_below("pipeline").items()}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("folder", STAGE_FOLDERS)
def test_a_stage_imports_the_shared_package_and_its_own_folder_only(folder):
    project = {*PROJECT_FOLDERS, "run_pipeline"} - {"pipeline", folder}
    wrong = {path.name: find_imports(tree) & project for path, tree in files_below(folder).items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_no_import_is_relative():
    wrong = [
        path.name
        for path, tree in parse_files().items()
        if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
        # The published files are loaded by transformers as a package of their own.
        and not path.name.startswith(("modeling_", "configuration_"))
    ]
    assert wrong == []


def test_no_module_hides_a_library_from_a_script_beside_it():
    trap = {"datasets", "parser", "types", "logging", "test", "config", *sys.stdlib_module_names}
    wrong = [path for folder in STAGE_FOLDERS for path in files_below(folder) if path.stem in trap]
    assert wrong == []


def catches_everything(handler):
    names = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
    return any(name is None or getattr(name, "id", "") in ("Exception", "BaseException") for name in names)


def test_no_handler_swallows_bugs():
    wrong = [
        f"{path.name}:{node.lineno}"
        for path, tree in parse_files().items()
        for node in ast.walk(tree)
        # One that cleans up and raises again swallows nothing.
        if isinstance(node, ast.ExceptHandler)
        and catches_everything(node)
        and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)
    ]
    # The acceptance on a GPU is there to find bugs: it reports one as a failure, and goes on to find others.
    assert [place for place in wrong if not place.startswith("findings.py")] == []


def test_no_file_is_longer_than_four_hundred_lines():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_module_says_what_it_is():
    wrong = [path for path, tree in parse_files().items() if tree.body and not ast.get_docstring(tree)]
    assert [path.name for path in wrong if path.parent.name != "tests"] == []


# Runs modules as `python -m` does, one after the other.
HELP = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        print(f"ended with {stop.code or 0}")
"""


def run_python(folder, *arguments):
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert list(folder.iterdir()) == []
    return run.stdout


def test_a_script_tells_its_number_first_by_path_and_as_a_module_from_any_folder(tmp_path):
    scripts = [script for script in SCRIPTS if (REPO / script).is_file()]
    modules = [script.removesuffix(".py").replace("/", ".") for script in scripts]
    texts = run_python(tmp_path, "-c", HELP, json.dumps([[module, "--help"] for module in modules]))
    texts = texts.split("ended with 0\n")
    assert texts.pop() == ""
    for script, text in zip(scripts, texts, strict=True):
        assert text.startswith(SCRIPTS[script])
        assert run_python(tmp_path, REPO / script, "--help") == text


def test_help_is_there_before_any_heavy_library():
    scripts = [
        f"import {script.removesuffix('.py').replace('/', '.')}" for script in SCRIPTS if (REPO / script).is_file()
    ]
    code = "; ".join([*scripts, "import sys; print(*{'torch', 'transformers', 'sklearn', 'faiss'} & set(sys.modules))"])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# What may stand directly in a folder; `control` and `renderer` are rooms of parts, not of commands.
MOST_FILES = 15
COMMAND_FOLDERS = (*STAGE_FOLDERS, "sample_data", "slurm")
SHIPPED = {"publish_model": {"modeling_spatial_embeddings", "configuration_spatial_embeddings", "pooling", "projector"}}
# Tables of the reference's names: they import no room, and any may import them.
PURE = ("pipeline.reference.settings", "pipeline.reference.weights")
# Each room imports those before it, and what stands above the rooms of `pipeline`.
ROOMS = {
    "pipeline": ("files", "inference", "retrieval", "embeddings_dataset", "reference"),
    "preprocess_raw_data": ("tars", "merging"),
    "difficulty_metadata": ("neighbor_search",),
    "train_specialized_embeddings": ("sampling", "training", "tuning"),
    "publish_model": ("model_folder", "new_data", "derived"),
    "evaluate_embeddings": ("scores", "page"),
    "slurm": ("control",),
    "sample_data": ("renderer",),
}


def find_modules(tree):
    """Return the full name of every module, or name in a module, that a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_folder_shows_more_than_a_person_can_take_in():
    folders = {path.parent for folder in {*COMMAND_FOLDERS, "pipeline"} for path in files_below(folder)}
    counts = {
        str(folder.relative_to(REPO)): sum(path.is_file() and path.name != "__init__.py" for path in folder.iterdir())
        for folder in folders
    }
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("folder", COMMAND_FOLDERS)
def test_what_stands_in_a_stages_folder_is_a_command_or_is_shipped(folder):
    parts = [
        path.name
        for path in (REPO / folder).glob("*.py")
        if path.stem not in {"__init__", *SHIPPED.get(folder, ())}
        and 'if __name__ == "__main__":' not in path.read_text(encoding="utf-8")
    ]
    assert parts == []


@pytest.mark.parametrize("folder", ROOMS)
def test_rooms_import_downwards_only(folder):
    rooms = ROOMS[folder]
    assert {path.parent.name for path in files_below(folder)} - {folder, "slurm"} == set(rooms)
    wrong = []
    for path, tree in files_below(folder).items():
        room = path.relative_to(REPO).parts[1]
        if room in rooms:
            above = rooms[rooms.index(room) + 1 :]
            commands = {path.stem for path in (REPO / folder).glob("*.py")} - SHIPPED.get(folder, set())
            modules = set() if folder == "pipeline" else commands
            names = {name for name in find_modules(tree) if name.startswith(f"{folder}.")}
            imported = [name.split(".") for name in names if not name.startswith(PURE)]
            wrong += [f"{path.name}: {words[1]}" for words in imported if words[1] in {*above, *modules}]
    assert wrong == []


def test_no_modules_import_one_another_in_a_circle():
    modules = {".".join(path.relative_to(REPO).with_suffix("").parts): tree for path, tree in parse_files().items()}
    imports = {
        module: {part for name in find_modules(tree) for part in (name, name.rpartition(".")[0]) if part in modules}
        for module, tree in modules.items()
    }
    TopologicalSorter(imports).prepare()  # a CycleError names the circle


def test_the_core_of_the_shared_package_imports_no_room():
    rooms = tuple(f"pipeline.{room}" for room in ROOMS["pipeline"])
    files = files_below("pipeline")
    core = [path for path in files if path.parent.name == "pipeline"]
    pure = [REPO / name.replace(".", "/") for name in PURE]
    wrong = [
        f"{path.name}: {name}"
        for path in [*core, *(path.with_suffix(".py") for path in pure)]
        for name in find_modules(files[path])
        if name.startswith(rooms) and not name.startswith(PURE)
    ]
    assert wrong == []


# The only module that locks, renames, removes and, by descriptor, opens files; others use what it offers.
WORKSPACE = REPO / "pipeline" / "workspace.py"
FILE_CALLS = {
    "flock", "lockf", "unlink", "rmtree", "rename", "renames", "remove", "removedirs", "rmdir", "replace", "link",
    "symlink", "hardlink_to", "open",
}  # fmt: skip


def calls_on_files(tree):
    """Yield the calls that lock, open, rename or remove files: of `shutil`, `fcntl` or `os`, or of a path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in FILE_CALLS:
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            # `str.replace`, `list.remove` and `dataclasses.replace` have the names of methods of a path.
            of_modules = {"remove", "link", "replace", "open"}
            is_path = owner.endswith(("path", "folder", "dir", "temporary", "file"))
            if (
                owner in {"os", "shutil", "fcntl"}
                or node.attr not in of_modules
                or (is_path and node.attr == "replace")
            ):
                yield f"{node.attr} in line {node.lineno}"


def test_one_module_locks_renames_and_removes_files():
    product = [path for path in FILES if path.relative_to(REPO).parts[0] not in {"tests", "benchmarks", "sample_data"}]
    others = [path for path in product if path != WORKSPACE]
    found = {path.name: sorted(calls_on_files(parse_files()[path])) for path in others}
    assert {name: calls for name, calls in found.items() if calls} == {}
