"""Guards on the shape of the code: where imports may point, how long things may be, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {"agentgym_ig": 0, "indexes": 1, "envs": 2, "trainers": 3}
FILES = [path for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]
ALL_FILES = FILES + [
    path for folder in ("tests", "benchmarks", "data_scripts") for path in sorted((ROOT / folder).rglob("*.py"))
]
MAY_IMPORT_TORCH = ("agentgym_ig/lm/", "trainers/")
FUNCTION_LINES, FILE_LINES, PARAMETERS = 40, 400, 6


def layer_of_module(name: str) -> int:
    parts = name.split(".")
    return LAYERS.get(parts[1], 0) if len(parts) > 1 else 0


def is_command(path: Path) -> bool:
    """The command line puts all the parts together, so it alone may import upwards."""
    return "commands" in path.parts or path.name == "__main__.py"


def imports(tree: ast.AST) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    if is_command(path):
        return
    own = LAYERS[path.relative_to(ROOT).parts[0]]
    ours = [module for module in imports(ast.parse(path.read_text())) if module.split(".")[0] == "agentgym_ig"]
    above = [module for module in ours if layer_of_module(module) > own]
    assert not above, f"{name(path)} is below what it imports: {above}"


@pytest.mark.parametrize("path", ALL_FILES, ids=name)
def test_no_folder_is_imported_by_its_bare_name(path: Path) -> None:
    bare = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))} & {"envs", "indexes", "trainers"}
    assert not bare, "write agentgym_ig.<folder>: the bare name is a second copy of every class"


def test_no_test_has_brought_in_a_second_copy() -> None:
    assert not {"envs", "indexes", "trainers"} & set(sys.modules)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_torch_stays_where_it_belongs(path: Path) -> None:
    if name(path).startswith(MAY_IMPORT_TORCH):
        return
    top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = {"torch", "transformers", "faiss", "pyserini", "jnius", "sentence_transformers", "ray"}
    assert not heavy & {module.split(".")[0] for node in top_level for module in imports(node)}


@pytest.mark.parametrize("path", ALL_FILES, ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node, source) <= FUNCTION_LINES, f"{node.name} is too long"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: str) -> int:
    """Lines of the body that hold code: no docstring, comment or blank line. A signature is not body."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    lines = source.splitlines()[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@pytest.mark.parametrize("path", [path for path in FILES if not is_command(path)], ids=name)
def test_functions_take_few_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            positional = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
            assert len(positional) <= PARAMETERS, f"{node.name} takes {len(positional)} positional parameters"


def printed_by(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_is_cheap() -> None:
    check = (
        "import sys, agentgym_ig; "
        "heavy = {'torch', 'transformers', 'faiss', 'pyserini', 'datasets', 'bm25s', 'gymnasium'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_environments_and_indexes_need_no_torch() -> None:
    check = "import sys, agentgym_ig.envs, agentgym_ig.indexes; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_public_names() -> None:
    import agentgym_ig
    import agentgym_ig.envs
    import agentgym_ig.indexes
    import agentgym_ig.trainers

    for module in (agentgym_ig, agentgym_ig.envs, agentgym_ig.indexes, agentgym_ig.trainers):
        assert sorted(module.__all__) == sorted(set(module.__all__))
        assert all(hasattr(module, public) for public in module.__all__)
    assert agentgym_ig.indexes.__all__ == [
        "Bm25Index", "Bm25Settings", "BuildOptions", "CachedIndex", "HttpIndex", "HybridIndex", "Index", "PassageStore",
        "StoredIndex", "build_index", "open_index", "open_indexes", "read_corpus", "read_questions", "split_index",
        "write_corpus",
    ]  # fmt: skip
