"""The layers of the C++ and Python code, and the sizes of their files and functions.

Imports point down. A new package needs a row in a table here, which is the place to decide where it
belongs.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# Allowed imports of the packages and files directly in ktrt/, in addition to EVERYBODYS; from the
# bottom up.
PYTHON_LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "utils": set(),
    "folders": set(),
    "machine": set(),
    "config": {"folders"},
    "prompt": {"config", "folders"},
    "engine": {"_core", "config", "machine"},
    "experts": {"config", "engine"},
    "checkpoint": {"engine", "experts", "folders"},
    "layers": {"engine"},
    "kv": {"engine"},
    "adapter": {"engine", "experts"},
    "generate": {"config", "engine", "experts", "kv"},
    "loading": {
        "adapter", "checkpoint", "config", "engine", "experts", "folders", "generate", "kv",
        "layers", "machine", "prompt",
    },
    "session": {"adapter", "config", "experts", "generate", "loading", "prompt"},
    "api": {"config", "folders", "generate", "loading", "prompt", "session"},
    "command_line": {"config"},
    "audit": {"adapter", "command_line", "config", "engine", "experts", "folders", "loading"},
    "bench": {
        "api", "command_line", "config", "engine", "experts", "generate", "loading", "machine",
        "session",
    },
    "chat": {"api", "command_line", "config", "engine", "loading", "prompt", "session"},
    "doctor": {"command_line", "config", "engine", "loading", "machine"},
    "export": {
        "adapter", "checkpoint", "command_line", "config", "engine", "experts", "loading", "prompt",
    },
    "pack": {"command_line", "config", "engine", "loading"},
    "serve": {
        "adapter", "api", "audit", "command_line", "config", "engine", "folders", "generate",
        "machine", "prompt", "session",
    },
    "__init__": {"api", "config", "generate", "session"},
    # Names the verbs' packages as data, so that `ktrt --help` imports none of them.
    "__main__": {"command_line", "config"},
}  # fmt: skip
EVERYBODYS = {"errors", "utils"}
# Stricter than the package around it: reads and computes everything a second time, so it must share
# nothing with the code that it verifies.
INDEPENDENT = {"audit.reference": {"errors"}}
# Packages that take the whole Config; the others take their part of it.
ASSEMBLERS = {"config", "api", "audit", "bench", "chat", "doctor", "export", "pack", "serve"}
# Packages and modules that do not import torch.
WITHOUT_TORCH = {
    "__init__", "__main__", "audit.reference", "bench.report", "checkpoint.generation_config",
    "command_line", "config", "doctor.advice", "errors", "folders", "generate.response",
    "generate.text_stream", "loading.pack_cache", "loading.pack_manifest", "machine.facts",
    "machine.threads", "prompt", "utils.json_files", "utils.owned_folder", "utils.program",
    "utils.signals", "utils.streams", "utils.temporaries",
}  # fmt: skip
WITHOUT_TORCH |= {
    f"chat.{name}"
    for name in (
        "arguments", "choices", "commands", "compare", "conversation", "dialog", "editor",
        "keyboard", "partner", "remote", "status", "terminal",
    )
}  # fmt: skip

# The only files that call the model, and the one that calls a model on the meta device.
CALLERS = {
    "generate/forwards.py", "generate/graphs.py", "generate/row_steps.py", "kv/size.py",
}  # fmt: skip
# Sets PEFT's forward again with every set of adapters; one entry in ``Patches`` undoes all.
SETS_FORWARD = {"layers/cuda_linear.py"}

# Layers of csrc/ and the layers below each.
CPP_LAYERS: dict[str, set[str]] = {
    "base": set(),
    "layout": {"base"},
    "cpu": {"base"},
    "kernels": {"layout", "base"},  # and cpu/isa.h
    "lora": {"layout", "base"},
    "engine": {"kernels", "cpu", "base"},
    "random": {"base"},
    # Operators, side by side.
    "moe": {"engine", "lora", "kernels", "layout", "cpu", "base"},
    "linear": {"engine", "lora", "kernels", "layout", "base"},
    "attention": {"engine", "lora", "kernels", "base"},
    "norm": {"engine", "kernels", "base"},
    "linear_attention": {"engine", "kernels", "cpu", "base"},
    "cuda": {"moe", "engine", "cpu", "base"},
}
CPP_LAYERS["bindings"] = set(CPP_LAYERS)
ISA_FILE = re.compile(
    r"kernels/.+/(portable|avx2|avx_vnni(_evex)?|avx512(_vnni|_bf16)?|amx(_emulated)?)\.cc"
)
INTRINSICS = re.compile(r"(x86|[a-z]*mm)intrin\.h")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def cpp_files(folder: Path) -> list[Path]:
    return sorted([*folder.rglob("*.h"), *folder.rglob("*.cc")])


def module_of(path: Path) -> str:
    """Returns the module or package directly under ktrt/ that a file belongs to."""
    return path.relative_to(ROOT / "ktrt").parts[0].removesuffix(".py")


def is_without_torch(path: Path) -> bool:
    """Returns whether the file, or a package around it, is in WITHOUT_TORCH."""
    parts = path.relative_to(ROOT / "ktrt").with_suffix("").parts
    return any(".".join(parts[: n + 1]) in WITHOUT_TORCH for n in range(len(parts)))


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yields every (module, name) that a file imports; name is "" for `import module`."""
    package = ["ktrt", *path.relative_to(ROOT / "ktrt").parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def ktrt_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the imports from ktrt as (module directly under ktrt/, imported name).

    A bare `import ktrt` brings the version and lazy names, which are in no layer.
    """
    for module, name in imports_of(path):
        parts = module.split(".")
        if parts[0] == "ktrt" and (len(parts) > 1 or name):
            yield (parts[1], name) if len(parts) > 1 else (name, "")


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text("utf-8"), re.MULTILINE)


def dotted(path: Path) -> str:
    """Returns the module's name below ktrt, the package's for its __init__: ``experts.gpu``."""
    parts = path.relative_to(ROOT / "ktrt").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def wrong_imports(path: Path) -> list[str]:
    """Returns an error for each import of a file in ktrt/ that does not point down."""
    module, name_below = module_of(path), dotted(path)
    allowed = PYTHON_LAYERS[module] | EVERYBODYS | {module, "__version__"}
    for inner, others in INDEPENDENT.items():
        if f"{name_below}.".startswith(f"{inner}."):
            allowed = others
    wrong = []
    for imported, name in imports_of(path):
        below = imported.removeprefix("ktrt.") if imported != "ktrt" else name
        if imported.split(".")[0] != "ktrt" or not below:
            continue
        inside = any(f"{below}.".startswith(f"{inner}.") for inner in INDEPENDENT)
        if below.split(".")[0] not in allowed and not (inside and allowed == {"errors"}):
            wrong.append(f"ktrt.{name_below} must not import {imported} ({name})")
        if (imported, name) == ("ktrt.config", "Config") and module not in ASSEMBLERS:
            wrong.append(f"ktrt.{name_below}: take the part of Config that is needed")
    return wrong


def cycles(arrows: Mapping[str, AbstractSet[str]]) -> list[str]:
    """Returns the modules of the first cycle that ``graphlib`` finds, if there is one."""
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", python_files("ktrt"), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_point_down(path: Path) -> None:
    module = module_of(path)
    assert module in PYTHON_LAYERS, f"{module} has no layer yet: add it to PYTHON_LAYERS"
    assert not wrong_imports(path)
    if is_without_torch(path):
        assert not {m.split(".")[0] for m, _ in imports_of(path)} & {"torch"}, f"{path}: torch"


def test_the_layers_have_no_cycle_and_no_dead_row() -> None:
    assert not cycles(PYTHON_LAYERS)
    assert set(PYTHON_LAYERS) == {module_of(path) for path in python_files("ktrt")}
    arrows: dict[str, set[str]] = {module: set() for module in PYTHON_LAYERS}
    for path in python_files("ktrt"):
        arrows[module_of(path)] |= {imported for imported, _ in ktrt_imports(path)}
    unused = {m: allowed - arrows[m] for m, allowed in PYTHON_LAYERS.items()}
    assert not {m: names for m, names in unused.items() if names}
    assert len(list((ROOT / "ktrt").glob("*.py"))) <= 8


def calls_of_the_model(tree: ast.AST) -> list[int]:
    """Returns the lines that call something named model, or pass input_ids."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            keywords = {keyword.arg for keyword in node.keywords}
            if name in ("model", "_model") or "input_ids" in keywords:
                found.append(node.lineno)
    return found


def patches_by_hand(tree: ast.AST) -> list[str]:
    """Returns the targets that set or delete an attribute ``forward``, or a function in a table of
    transformers."""
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.Delete):
            targets += node.targets
    tables = ("_global_mapping", "_FUNCTIONS")
    return [
        ast.unparse(each)
        for each in targets
        if (isinstance(each, ast.Attribute) and each.attr == "forward")
        or (isinstance(each, ast.Subscript) and ast.unparse(each.value).endswith(tables))
    ]


def test_only_the_runner_calls_the_model() -> None:
    trees = {
        str(path.relative_to(ROOT / "ktrt")): ast.parse(path.read_text("utf-8"))
        for path in python_files("ktrt")
    }
    assert {name for name, tree in trees.items() if calls_of_the_model(tree)} == CALLERS
    assert {name for name, tree in trees.items() if patches_by_hand(tree)} == SETS_FORWARD


def test_packages_have_no_cycle_inside() -> None:
    """Imports for type annotations count too: they are dependencies."""
    modules = {dotted(path): path for path in python_files("ktrt")}
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for module, path in modules.items():
        for imported, name in imports_of(path):
            below = imported.removeprefix("ktrt.")
            target = f"{below}.{name}" if f"{below}.{name}" in modules else below
            if target in modules and target.split(".")[0] == module.split(".")[0]:
                arrows[module].add(target)
    assert not cycles(arrows)


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = {
        "layers/a.py": "from ktrt.session import Session\n",
        "config/b.py": "def f():\n    from ktrt import engine\n",
        "loading/c.py": "from ..chat.dialog import Talk\n",
        "engine/d.py": "from ktrt.config import Config\n",
        "audit/reference/e.py": "from ktrt.checkpoint.folder import Checkpoint\n",
        "experts/f.py": "import ktrt._core\n",
    }
    for name, text in found.items():
        path = tmp_path / "ktrt" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        assert len(wrong_imports(path)) == 1, name
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("path", cpp_files(CSRC), ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_point_down(path: Path) -> None:
    relative = path.relative_to(CSRC)
    layer = relative.parts[0]
    assert layer in CPP_LAYERS, f"{layer} is no layer of csrc/"
    for include in includes_of(path):
        if include.startswith("pybind11/"):
            assert layer == "bindings", f"{relative} must not see pybind11"
        if not (CSRC / include).exists():
            continue
        target = include.split("/")[0]
        below = CPP_LAYERS[layer] | {layer}
        assert target in below or (layer, include) == ("kernels", "cpu/isa.h"), (
            f"{relative} must not include {include}"
        )
        if include == "cpu/thread_pool.h":
            assert layer in {"cpu", "engine", "moe"}, f"{relative}: take a lease of the engine"


def test_only_isa_files_see_intrinsics() -> None:
    """Directly or through headers, which would carry ISA-specific inline code elsewhere."""
    includes = {str(p.relative_to(CSRC)): includes_of(p) for p in cpp_files(CSRC)}
    tainted = {f for f, found in includes.items() if any(map(INTRINSICS.fullmatch, found))}
    while grown := {f for f, found in includes.items() if tainted & set(found)} - tainted:
        tainted |= grown
    wrong = {f for f in tainted if f.endswith(".cc") and not ISA_FILE.fullmatch(f)}
    assert tainted, "no file includes an intrinsics header: is the pattern wrong?"
    assert not wrong
    outside = {f for f in tainted if not f.startswith("kernels/")}
    assert not outside


def test_only_isa_cc_reads_the_environment() -> None:
    readers = [p for p in cpp_files(CSRC) if re.search(r"\bgetenv\b|\benviron\b", p.read_text())]
    assert readers == [CSRC / "cpu/isa.cc"]


def test_no_global_isa_or_fast_math_flags() -> None:
    build_files = [ROOT / "CMakeLists.txt", ROOT / "CMakePresets.json", ROOT / "pyproject.toml"]
    for path in [*build_files, *ROOT.glob("cmake/*"), *ROOT.glob("*/**/CMakeLists.txt")]:
        text = path.read_text("utf-8")
        assert not re.search(r"-march=|-mtune=native|-ffast-math|-Ofast", text), path
        if path.name != "ktrt_isa.cmake":
            assert not re.search(r"-m(avx|amx|fma|f16c|sse)", text), path


# Sizes: a file or function that wants more is two.


@pytest.mark.parametrize(
    ("paths", "limit"),
    [
        (python_files("ktrt", "bench", "examples", "tools"), 400),
        (python_files("tests") + cpp_files(ROOT / "tests"), 600),
        ([p for p in cpp_files(CSRC) if p.is_relative_to(CSRC / "kernels")], 800),
        ([p for p in cpp_files(CSRC) if not p.is_relative_to(CSRC / "kernels")], 500),
    ],
    ids=["python", "tests", "kernels", "cpp"],
)
def test_file_length(paths: list[Path], limit: int) -> None:
    lengths = {p: len(p.read_text("utf-8").splitlines()) for p in paths}
    assert lengths
    assert not {p: n for p, n in lengths.items() if n > limit}


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the names and lengths of a file's functions, without docstrings."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                length -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield node.name, length


def cpp_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the first lines and lengths of the functions outside classes.

    Relies on the project's format: a function starts and ends in column 0 and ends in a bare "}"
    (a class in "};", a namespace in "}  // namespace").
    """
    start, first = 0, ""
    for number, line in enumerate(path.read_text("utf-8").splitlines()):
        if line == "}":
            yield first, number - start + 1
        elif line and line[0] not in " #/}":
            start, first = number, line


def test_python_function_length() -> None:
    paths = python_files("ktrt", "bench", "examples", "tools")
    found = {(str(p), name): n for p in paths for name, n in python_functions(p)}
    assert found
    assert not {key: n for key, n in found.items() if n > 50}


def test_cpp_function_length() -> None:
    too_long: dict[tuple[str, str], int] = {}
    for path in cpp_files(CSRC):
        limit = 120 if path.is_relative_to(CSRC / "kernels") else 60
        functions = dict(cpp_functions(path))
        too_long |= {(str(path), name): n for name, n in functions.items() if n > limit}
    assert not too_long


def test_the_function_counters_count(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text('def f():\n    """Two\n    lines."""\n    x = 1\n    return x\n')
    assert list(python_functions(source)) == [("f", 3)]
    source = tmp_path / "a.cc"
    source.write_text(
        "namespace a {\nstruct B {\n  int c;\n};\nint f(int a,\n      int b) {\n\n}\n"
    )
    assert list(cpp_functions(source)) == [("int f(int a,", 4)]
