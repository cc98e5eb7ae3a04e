"""Import directions, read from the sources, and modules that must not load heavy packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_hf

PACKAGE = Path(moe_hf.__file__).parent
# Packages and modules, in layers: each imports only from its own layer and from layers above.
LAYERS = [
    ["models"],
    ["errors", "extra_packages", "freed_memory", "version"],
    ["model_files"],
    ["value_checks", "yaml_file"],
    ["families", "old_names", "hub_errors", "writing"],
    ["model_size"],
    ["data", "distributed"],
    ["checkpoint_files", "checksums"],
    ["run_folder", "loading", "generation", "offload", "translator"],
    ["routing"],
    ["evaluation"],
    ["averaging", "hub", "model_card", "model_card_run", "model_card_sample", "model_code", "pruning", "upcycling"],
    ["translation_pipeline"],
    ["training"],
    ["demo", "experiments"],
    ["commands"],
    ["cli", "__main__"],
]
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def room_of(module: str) -> str:
    """training.lm -> training."""
    return module.partition(".")[0]


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    package = file.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} if name else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "moe_hf":
            found.add(node.module.partition(".")[2])
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.startswith("moe_hf.")}
    return {name for name in found if name in LAYER_OF or room_of(name) in LAYER_OF}


FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py" and "metrics" not in path.parts
)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_earlier_layers(file):
    room = room_of(".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    assert room in LAYER_OF, f"{room} has no layer"
    later = {name for name in imports(file) if LAYER_OF[room_of(name)] > LAYER_OF[room]}
    assert not later, f"{room} imports {sorted(later)}"


def test_no_file_needs_itself():
    needs = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): imports(file)
        for file in FILES
    }
    for module, found in needs.items():  # `from . import x` in a room's module names the room
        needs[module] = found & needs.keys() - {room_of(module)}

    def reached(module: str) -> set[str]:
        seen, todo = set(), set(needs[module])
        while todo:
            seen |= todo
            todo = set().union(*(needs[name] for name in todo)) - seen
        return seen

    assert not [module for module in needs if module in reached(module)]


def test_every_room_of_the_layers_exists():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__"} == set(LAYER_OF)


def test_experiments_are_imported_by_scripts_and_tests_only():
    for file in FILES:
        if room_of(file.relative_to(PACKAGE).as_posix().partition("/")[0]) not in ("experiments", "commands"):
            assert not [name for name in imports(file) if room_of(name) == "experiments"], file


def test_what_needs_no_training_loads_neither_datasets_nor_training():
    code = """if True:
        import sys, moe_hf
        print([m for m in sys.modules if m == "datasets" or "moe_hf.training" in m or m == "moe_hf.hub"])
        import moe_hf.averaging, moe_hf.hub, moe_hf.loading, moe_hf.pruning, moe_hf.translator, moe_hf.upcycling
        print([m for m in sys.modules if m == "datasets" or "moe_hf.training" in m])
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]
