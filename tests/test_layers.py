"""Who may import whom: imports only go down (WORKSPACE.md, "The map")."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOWN = ("core", "ops", "parts", "mixers", "models")  # each may import those before it
MAY = {f"seqmix.{name}": {f"seqmix.{below}" for below in DOWN[:i]} for i, name in enumerate(DOWN)}
MAY |= {f"seqmix.{name}": set(MAY) for name in ("linearize", "inference", "analysis")}
MAY |= {"pallas_kernels": set(), "seqmix": set(), "seqmix.catalog": set(), "seqmix.tasks": {"seqmix.core"}}
MAY["seqmix.interop"] = {"seqmix.core", "seqmix.catalog"}
MAY["experiments"] = set(MAY)
MAY["configs"] = {*MAY}


def imports(path, module_level=False):
    """Dotted names of what a file imports of ours: anywhere, or when it is itself imported."""
    tree = ast.parse(path.read_text())
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("seqmix", *MAY))


def layer(name: str) -> str:
    """The part of the house that a dotted name lies in."""
    two = ".".join(name.split(".")[:2])
    return two if two in MAY else name.split(".")[0]


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for top in ("seqmix", "pallas_kernels", "experiments", "configs")
    for path in sorted((ROOT / top).rglob("*.py"))
}


def test_imports_only_go_down():
    assert "seqmix.core.param" in imports(FILES["seqmix.models.lm"])
    kernels_late = {"seqmix.ops": "pallas_kernels"}  # imported where they are dispatched, so that no CPU box loads them
    bad = [
        f"{name} imports {used}"
        for name, path in FILES.items()
        for used in imports(path)
        if layer(used) not in MAY[layer(name)] | {layer(name), kernels_late.get(layer(name))}
    ]
    assert not bad


def test_ops_load_no_kernels_when_imported():
    ops = [path for name, path in FILES.items() if layer(name) == "seqmix.ops"]
    assert ops and not [used for path in ops for used in imports(path, True) if layer(used) == "pallas_kernels"]


def test_mixers_do_not_import_each_other():
    for name, path in FILES.items():
        if layer(name) == "seqmix.mixers":
            group = name.split(".")[2:3]
            for used in imports(path):
                foreign = used.split(".")[2:3] != group and group == ["composite"]
                assert layer(used) != "seqmix.mixers" or foreign, f"{name} imports {used}"


def test_no_module_is_called_utils_or_like_what_it_holds():
    for name, path in FILES.items():
        tree = ast.parse(path.read_text())
        held = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        last = name.split(".")[-1]
        assert last != "utils" and not (last in held and name.startswith("seqmix.")), name
