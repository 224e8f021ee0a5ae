"""The house itself: who imports whom, how large it is, and how fast it opens."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dact"
# From the bottom upwards: a file imports nothing from a folder above its own. Files at the root of
# the package may import any folder but the last two.
FOLDERS = ["encoders", "data", "calibration", "tuning", "cli"]
MOST_CODE = 8_290  # lines without blank lines, comments and docstrings
MOST_LINES = 12_704


def files():
    return sorted(PACKAGE.rglob("*.py"))


def source_of(module):
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imports_of(path):
    """Return all files of dact that a file imports, anywhere in it, also for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # A name that is imported may be a module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if source_of(name) else node.module for name in names]
        for name in names:
            if name.split(".")[0] == "dact":
                assert source_of(name) is not None, f"{path} imports {name}"
                found.add(source_of(name))
    return found - {path}


def folder_of(path):
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def test_no_files_import_each_other_in_a_circle():
    # `import dact` gives names of files above, which are imported on first use.
    wanted = {path: imports_of(path) for path in files() if path != PACKAGE / "__init__.py"}
    while leaves := {path for path, needs in wanted.items() if not needs & wanted.keys()}:
        wanted = {path: needs for path, needs in wanted.items() if path not in leaves}
    assert not wanted, f"these import each other: {sorted(map(str, wanted))}"


def test_folders_import_downwards_only():
    for path in files():
        own = folder_of(path)
        for other in imports_of(path):
            there = folder_of(other)
            if own and there:
                assert FOLDERS.index(there) <= FOLDERS.index(own), f"{path} imports {other}"
            elif there and path.name not in ("__init__.py", "__main__.py"):
                assert there not in ("tuning", "cli"), f"{path} imports {other}"


def code_lines(text):
    """Return the number of lines that hold code: no comment, no docstring, and not blank."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*quiet, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_house_is_small():
    texts = [path.read_text() for path in files()]
    assert sum(map(code_lines, texts)) <= MOST_CODE
    assert sum(len(text.splitlines()) for text in texts) <= MOST_LINES


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("transformers", {"encoders", "data"}),
        ("tokenizers", {"data"}),
        ("datasets", {"data"}),
        ("onnxruntime", {"encoders"}),
        ("litserve", {""}),
    ],
)
def test_heavy_packages_have_one_door(package, allowed):
    doors = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == package for name in names):
                doors.add(path)
    assert {folder_of(path) for path in doors} == allowed
    assert len(doors) <= 2, doors


@pytest.mark.slow
def test_import_dact_is_light():
    """It imports nothing heavy that Lightning and torchmetrics do not import themselves."""
    code = (
        "import sys, lightning.pytorch; before = {*sys.modules}; import dact; "
        "print(*({'transformers', 'datasets', 'optuna', 'tokenizers'} & ({*sys.modules} - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
