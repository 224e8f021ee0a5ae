"""The house itself: who imports whom, how fast it opens, and whether its documents do what they say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dact"
# From the ground floor upwards: a module imports only from floors below its own, or from its own package.
FLOORS = [
    {"checks", "console", "usage", "files", "plots"},
    {"functional", "agreement", "optimization", "outputs"},
    {"submodels", "metrics", "encoders"},
    {"inference", "persistence", "arguments", "evaluation"},
    {"model"},
    {"data"},
    {"calibration", "callbacks", "text_classifier", "export"},
    {"tuning", "server"},
    {"cli"},
    {"__main__"},
]


def part_of(module):
    """``dact.data.text`` -> ``data``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "dact":
                yield from (f"dact.{alias.name}" for alias in node.names)
            else:
                yield node.module


def floor_of(part):
    return next(level for level, parts in enumerate(FLOORS) if part in parts)


def modules():
    return [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE]


def test_imports_run_downwards_only():
    for path in modules():
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports_of(path):
            if name.startswith("dact.") and part_of(name) != own and (PACKAGE / part_of(name)).with_suffix("").name:
                part = part_of(name)
                if (PACKAGE / f"{part}.py").exists() or (PACKAGE / part).is_dir():
                    assert floor_of(part) < floor_of(own), f"{path} imports {name}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("transformers", {"encoders/huggingface.py", "data/text.py"}),
        ("tokenizers", {"data/text.py"}),
        ("datasets", {"data/tables.py"}),
        ("onnxruntime", {"encoders/onnx.py"}),
        ("litserve", {"server.py"}),
    ],
)
def test_heavy_packages_have_one_door(package, allowed):
    for path in modules():
        tree = ast.parse(path.read_text())
        typing_only = {
            id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
            for node in ast.walk(block)
        }  # fmt: skip
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if id(node) not in typing_only and any(name.split(".")[0] == package for name in names):
                assert str(path.relative_to(PACKAGE)) in allowed, path


def test_import_dact_is_light():
    """It imports nothing heavy that Lightning and torchmetrics do not import themselves."""

    def heavy(module):
        code = (
            f"import sys, {module}; print(*({{'transformers', 'datasets', 'optuna', 'tokenizers'}} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert heavy("dact") <= heavy("lightning.pytorch")


def test_every_picture_and_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for path in re.findall(r"\]\(([^)#:]+)\)", prose) + re.findall(r"(?:configs|benchmarks)/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path


def snippets():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert snippets()
    names = {}
    for code in snippets():
        exec(compile(code, "README.md", "exec"), names)  # one page, read from top to bottom
