"""Imports point one way, and importing the package is cheap: no kernel language, no plotting, no device."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import magi_attention

PACKAGE = Path(__file__).parents[1] / "magi_attention"

# What each layer may import of ours, beside itself: mask -> planning -> {comm, kernels} -> runtime -> api, functional.
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "config": set(),
    "mask": set(),
    "planning": {"mask", "config"},
    "comm": {"planning"},
    "kernels": {"mask"},
    "runtime": {"mask", "planning", "comm", "kernels", "config"},
    "functional": {"mask", "kernels"},
    "interop": {"mask"},
    "api": {"mask", "planning", "kernels", "runtime", "functional", "config"},
    "common": {"mask", "config"},
    "testing": {"mask", "kernels"},
    "integrations": {"mask", "runtime", "api", "config"},
    "viz": {"mask", "planning"},
    "cli": {"mask", "planning", "kernels", "config", "functional", "api", "viz", "testing"},
    "__main__": {"cli"},
}

# What a layer may not import of others, anywhere in its files. A name covers all below it.
FORBIDDEN: dict[str, set[str]] = {
    "mask": {"torch.distributed"},
    "planning": {"torch"},
    "kernels": {"torch.distributed"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> str:
    """`magi_attention.mask.bands` is of layer `mask`, `magi_attention` itself of `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Every module that a file of `package` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            # A name may be a layer, as in `from magi_attention import api`.
            yield from (".".join([*base, alias.name]) for alias in node.names)


def broken_rules(source: str, module: str, package: str) -> list[str]:
    """What `source` imports although the layer of `module` may not."""
    layer = layer_of(module)
    broken = []
    for name in imported_modules(source, package):
        if name == "magi_attention" or name.startswith("magi_attention."):
            target = layer_of(name)
            if target.startswith("__") and target != "__main__":  # magi_attention.__version__
                continue
            if target != layer and target not in ALLOWED[layer]:
                broken.append(f"{module} imports {name}: {layer} may import {sorted(ALLOWED[layer])} only")
        elif any(name == bad or name.startswith(bad + ".") for bad in FORBIDDEN.get(layer, ())):
            broken.append(f"{module} imports {name}: no file of {layer} may")
    return broken


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: module_name(path))
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    assert layer_of(module) in ALLOWED, f"{module} is of no known layer: say in ALLOWED what it may import"
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    assert not broken_rules(path.read_text(), module, package)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("magi_attention.mask.bands", "from magi_attention.planning import plan_attention"),
        ("magi_attention.mask.bands", "def f():\n    from magi_attention import runtime"),
        ("magi_attention.mask.bands", "from ..kernels import reference"),
        ("magi_attention.comm.work", "import magi_attention.kernels.reference"),
        ("magi_attention.kernels.reference", "from magi_attention.comm import group_cast"),
        ("magi_attention.kernels.reference", "import torch.distributed as dist"),
        ("magi_attention.kernels.reference", "from torch import distributed"),
        ("magi_attention.planning.chunks", "import torch"),
        ("magi_attention.api.functools", "from magi_attention.cli import main"),
        ("magi_attention.api.functools", "def f():\n    import magi_attention.integrations.transformers"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert broken_rules(source, module, module.rpartition(".")[0])


def test_every_layer_is_there() -> None:
    found = {layer_of(module_name(path)) for path in MODULES}
    assert {"mask", "planning", "comm", "kernels", "runtime", "functional", "api", "common", "config"} <= found


def test_common_holds_no_code() -> None:
    for path in sorted((PACKAGE / "common").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            text = ast.get_source_segment(path.read_text(), node)
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            assert isinstance(node, ast.ImportFrom) or is_docstring or is_all, f"{path.name} has code: {text}"


def loaded_by(statement: str, *modules: str) -> list[str]:
    """Which of `modules` a fresh interpreter has loaded after `statement`, and `cuda` if a device was touched."""
    program = f"""
import sys
{statement}
loaded = [name for name in {modules!r} if name in sys.modules]
if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
    loaded.append("cuda")
print(*loaded)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "module", ["magi_attention", "magi_attention.api", "magi_attention.functional", "magi_attention.kernels"]
)
def test_import_loads_no_kernel_language_and_touches_no_device(module: str) -> None:
    assert loaded_by(f"import {module}", "triton", "matplotlib", "rich", "transformers") == []


def test_the_package_finds_its_api() -> None:
    assert loaded_by("import magi_attention\nmagi_attention.api.calc_attn\nmagi_attention.functional", "triton") == []
    with pytest.raises(AttributeError, match="module 'magi_attention' has no attribute 'apis'"):
        magi_attention.apis  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("module", ["magi_attention", "magi_attention.mask", "magi_attention.planning"])
def test_masks_and_plans_need_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}", "torch", "matplotlib") == []
