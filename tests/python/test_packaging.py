"""The files that `pip install .` installs, and their use from the checkout."""

import ast
import importlib.machinery
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    """Runs code in a new interpreter; like `python -m`, it sees the current directory first."""
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_installed_then_run_from_the_checkout() -> None:
    """The source folder shadows the installed package, which alone has the compiled module."""
    out = run_python(
        "import json, ktrt, ktrt._core as c; "
        "print(json.dumps([ktrt.__file__, c.__file__, ktrt.__version__, c.__version__]))"
    )
    package, core, version, core_version = json.loads(out)
    assert Path(package) == ROOT / "ktrt" / "__init__.py"
    assert Path(core).suffix == ".so"
    assert not Path(core).is_relative_to(ROOT / "ktrt")
    assert version == core_version == importlib.metadata.version("ktrt")


def test_installed_package_elsewhere(tmp_path: Path) -> None:
    out = run_python("import ktrt, ktrt._core; print(ktrt.__file__)", cwd=tmp_path)
    assert not Path(out.strip()).is_relative_to(ROOT / "ktrt")


def test_import_is_light() -> None:
    """Measures CPU time, in the best of several processes, since others use the cores too."""
    code = (
        "import json, sys, time; before = set(sys.modules); t = time.process_time(); import ktrt; "
        "t = time.process_time() - t; print(json.dumps([t, sorted(set(sys.modules) - before)]))"
    )
    found = [json.loads(run_python(code)) for _ in range(5)]
    seconds, modules = min(found)
    print(f"import ktrt: {1000 * seconds:.1f} ms, {len(modules)} modules")
    assert seconds < 0.02
    assert [each for each in modules if each.startswith("ktrt")] == ["ktrt"]
    # All others are the standard library's, for pkgutil and typing.
    assert {each.split(".")[0] for each in modules} <= {"ktrt", *sys.stdlib_module_names}
    assert len(modules) < 40


def test_public_names_are_imported_when_used() -> None:
    code = (
        "import json, sys, ktrt; found = {}\n"
        "for name in sorted(ktrt.__all__, key=lambda n: n in ('Handle', 'Session', 'load')):\n"
        "    found[name] = [getattr(ktrt, name).__class__.__name__, 'torch' in sys.modules]\n"
        "print(json.dumps([found, dir(ktrt)]))"
    )
    found, listed = json.loads(run_python(code))
    assert [name for name, (_, torch) in found.items() if torch] == ["Handle", "Session", "load"]
    assert set(found) <= set(listed)
    for name, (kind, _) in found.items():
        assert kind == {"load": "function", "__version__": "str"}.get(name, kind)
    message = run_python("import ktrt\ntry: ktrt.lod\nexcept AttributeError as e: print(e)")
    assert "lod" in message


@pytest.mark.parametrize("module", ["ktrt.config", "ktrt.prompt.template.load", "ktrt.errors"])
def test_imports_without_torch(module: str) -> None:
    out = run_python(f"import sys, {module}; print('torch' in sys.modules)")
    assert out.strip() == "False"


def test_help_is_light() -> None:
    """`python -m ktrt.chat --help` must not load modules that only a chat needs."""
    out = run_python(
        "import json, runpy, sys, time\n"
        "sys.argv = ['ktrt.chat', '--help']\n"
        "start = time.perf_counter()\n"
        "try: runpy.run_module('ktrt.chat', run_name='__main__')\n"
        "except SystemExit as e: code = e.code\n"
        "print(json.dumps([code, time.perf_counter() - start, sorted(sys.modules)]))"
    )
    code, seconds, modules = json.loads(out.splitlines()[-1])
    print(f"python -m ktrt.chat --help: {1000 * seconds:.0f} ms")
    assert not code
    assert "usage" in out.lower()
    assert not {"torch", "transformers", "peft", "kt_kernel"} & set(modules)


def installed_files() -> list[Path]:
    files = importlib.metadata.files("ktrt")
    assert files, "ktrt is not installed: pip install ."
    return [Path(str(f)) for f in files]


def core_path() -> Path:
    out = run_python("import ktrt._core as c; print(c.__file__)")
    return Path(out.strip())


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    files = installed_files()
    # The command lies outside, with the environment's programs: ../../../bin/ktrt.
    outside = [f for f in files if f.parts[0] == ".."]
    assert [f.name for f in outside] == ["ktrt"]
    tops = {f.parts[0] for f in files} - {".."}
    assert tops == {"ktrt", f"ktrt-{importlib.metadata.version('ktrt')}.dist-info"}
    names = {str(f) for f in files}
    assert {"ktrt/__init__.py", "ktrt/py.typed", "ktrt/_core.pyi"} <= names
    assert page_files(Path("ktrt/serve/page/static")) == {
        f for f in files if f.parts[:4] == ("ktrt", "serve", "page", "static")
    }
    suffixes = {
        f.suffix
        for f in files
        if f.parts[0] == "ktrt" and not {"__pycache__", "static"} & set(f.parts)
    }
    assert suffixes == {".py", ".pyi", ".typed", ".so"}


def page_files(folder: Path) -> set[Path]:
    """Returns the checkout's files of the server's page, licences included."""
    return {f.relative_to(ROOT) for f in (ROOT / folder).rglob("*") if f.is_file()}


def test_core_needs_only_the_c_and_cpp_runtime() -> None:
    out = subprocess.run(["ldd", core_path()], capture_output=True, text=True, check=True).stdout
    libraries = {Path(line.split()[0]).name.split(".so")[0] for line in out.splitlines()}
    runtime = {"linux-vdso", "ld-linux-x86-64", "libc", "libm", "libgcc_s", "libstdc++"}
    assert libraries <= runtime | {"libpthread"}


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_core_exports_its_init_function_only() -> None:
    out = subprocess.run(
        ["nm", "-D", "--defined-only", core_path()], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1] for line in out.splitlines()} == {"PyInit__core"}


def test_the_stub_names_what_the_module_has() -> None:
    tree = ast.parse((ROOT / "ktrt" / "_core.pyi").read_text("utf-8"))
    stub: dict[str, set[str]] = {"": set()}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            stub[""].add(node.name)
        elif isinstance(node, ast.ClassDef):
            stub[""].add(node.name)
            stub[node.name] = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
            names = (f.target for f in node.body if isinstance(f, ast.AnnAssign))
            stub[node.name] |= {name.id for name in names if isinstance(name, ast.Name)}
    out = run_python(
        "import json, ktrt._core as c\n"
        "special = '__init__', '__cuda_array_interface__'\n"
        "public = lambda o: [n for n in vars(o) if not n.startswith('_') or n in special]\n"
        "classes = {k: public(v) for k, v in vars(c).items() if isinstance(v, type)}\n"
        "print(json.dumps({'': public(c), **classes}))"
    )
    module = {name: set(names) for name, names in json.loads(out).items()}
    # Classes that only functions return have pybind11's __init__, which refuses.
    for name in module.keys() & stub.keys():
        if "__init__" not in stub[name]:
            module[name].discard("__init__")
    assert module == stub


def test_dependencies() -> None:
    requires = importlib.metadata.requires("ktrt") or []
    runtime = [r for r in requires if "extra ==" not in r]
    (torch,) = (r for r in runtime if re.match(r"torch\b", r))
    assert "==" not in torch, "kt-kernel pins torch; ktrt does not"
    (kt_kernel,) = (r for r in runtime if r.startswith("kt-kernel"))
    assert "==0.7.2" in kt_kernel
    assert "python_version < '3.13'" in kt_kernel.replace('"', "'")


def test_module_is_for_this_interpreter() -> None:
    assert core_path().name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
