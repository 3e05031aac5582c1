"""The folders, who may import whom, and where each third party has its home."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "parallel", "runtime", "launch")  # each may import itself and those before it
# Inside a folder each room may import itself and those before it; runtime/__init__.py is the door above them all.
ROOMS = {
    "runtime": ("config", "settings", "device", "layers", "attention", "models", "jobs", "xdit", "__init__"),
    "launch": (
        "errors",
        "machine",
        "env",
        "report",
        "control",
        "ranks",
        "queue",
        "commands",
        "bench",
        "cli",
        "__init__",
    ),
}
HOMES = {
    "triton": "kernels/",
    "torch.distributed": "parallel/",
    "xfuser": "parallel/xdit.py",
    "yunchang": "parallel/xdit.py",
    "diffusers": "runtime/",
    "transformers": "runtime/",
    "ray": ("launch/ranks/ray_cluster.py", "launch/queue/ray_actor.py"),
    "argparse": "launch/",
}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from semvid.runtime import folder` names a module too.
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    mine = FOLDERS.index(path.relative_to(ROOT).parts[0])
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"{path}: import semvid.{name}, not {name}"
        if parts[0] == "semvid":
            assert parts[1] in FOLDERS, f"{path} imports {name}"
            assert FOLDERS.index(parts[1]) <= mine, f"{path} imports {name}, which lies above it"


def room_of(module: str) -> tuple[str, int] | None:
    """Returns the folder of semvid.`folder`.`room`… and the floor of its room; None where a folder has no rooms."""
    parts = module.split(".")
    if parts[0] != "semvid" or len(parts) < 3 or parts[1] not in ROOMS:
        return None
    # What is taken from the folder itself comes through its door.
    room = parts[2] if parts[2] in ROOMS[parts[1]] else "__init__"
    return parts[1], ROOMS[parts[1]].index(room)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_entered_from_above_only(path: Path) -> None:
    place = path.relative_to(ROOT).with_suffix("")
    mine = room_of(".".join(("semvid", *place.parts)))
    if mine is None:
        return
    assert place.parts[1] in ROOMS[mine[0]], f"{path} is in no room that tests/test_layout.py knows"
    for name in imports(path):
        theirs = room_of(name)
        if theirs is not None and theirs[0] == mine[0]:
            assert theirs[1] <= mine[1], f"{path} imports {name}, which lies above it"


def test_no_two_modules_import_each_other() -> None:
    modules = {".".join(("semvid", *path.relative_to(ROOT).with_suffix("").parts)): path for path in sources()}
    graph = {
        name: {m for m in modules for i in top_imports(path) if i == m or i.startswith(m + ".")} - {name}
        for name, path in modules.items()
    }
    while leaves := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def top_imports(path: Path) -> Iterator[str]:
    """Yields what a module imports when it is imported."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_third_party_has_one_home(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    for name in imports(path):
        for party, home in HOMES.items():
            if name == party or name.startswith(party + "."):
                assert place.startswith(home), f"{place} imports {name}, whose home is {home}"


def test_xfuser_is_imported_inside_functions() -> None:
    # Its import fails on a CPU build of PyTorch, where everything else must work.
    tree = ast.parse((ROOT / "parallel" / "xdit.py").read_text())
    top = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in top if "xfuser" in line or "yunchang" in line]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_launch_prints_and_reads_the_environment(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] == "launch":
        return
    tree = ast.parse(path.read_text())
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in called
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]


def test_kernels_is_no_regular_package() -> None:
    # A top-level package called kernels would hide Hugging Face's, which diffusers and transformers import.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_folder_is_packaged_with_its_types() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inner = [str(path.parent.relative_to(ROOT)) for name in FOLDERS for path in (ROOT / name).glob("*/**/__init__.py")]
    packages = [*FOLDERS, *(name.replace("/", ".") for name in inner)]
    assert sorted(setuptools["packages"]) == sorted(f"semvid.{name}" for name in [*packages, "configs"])
    for name in FOLDERS:
        assert (ROOT / name / "py.typed").exists()
        assert "py.typed" in setuptools["package-data"][f"semvid.{name}"]


def test_every_config_file_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "semvid.configs"
    ]
    configs = ROOT / "configs"
    packaged = {path for pattern in patterns for path in configs.glob(pattern) if path.is_file()}
    assert packaged == {path for path in configs.rglob("*") if path.is_file()}
    assert configs / "demo-model" / "vae" / "config.json" in packaged


def test_the_weights_stay_small() -> None:
    assert sum(path.stat().st_size for path in ROOT.glob("configs/**/*.safetensors")) <= 36 << 20
