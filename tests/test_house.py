"""The house itself: who imports whom, and how fast it opens."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dact"
# From the bottom upwards: a file imports only from layers below its own. A name with a slash is a
# file of a package; files of encoders/ and data/ that are not listed share the layer of their
# package and do not import each other in a circle.
LAYERS = [
    {"checks", "files", "plots", "signals", "bounds", "agreement"},
    {"functional", "metrics", "optimization", "outputs", "model_card"},
    {"consistency"},
    {"hub"},
    {"submodels", "encoders"},
    {"inference", "persistence", "arguments", "metric_logging"},
    {"model"},
    {"data"},
    {"answers", "callbacks", "factories"},
    {"scores"},
    {"calibration"},
    {"text_classifier"},
    {"exporting", "server"},
    {"tuning/space", "tuning/digests", "tuning/pruner", "tuning/fitting", "tuning/outcome"},
    {"tuning/selection", "tuning/tensorboard", "tuning/storage", "tuning/retries"},
    {"tuning/stages", "tuning/sampler"},
    {"tuning/run", "tuning/recipe", "tuning/features", "tuning/evaluation"},
    {"tuning/studies", "tuning/survey", "tuning/trial_loop"},
    {"tuning/summary"},
    {"tuning/progress", "tuning/pictures"},
    {"tuning/baseline"},
    {"tuning/prepared"},
    {"tuning/trial", "tuning/checkpointed_fit"},
    {"tuning/workers", "tuning/confirmation"},
    {"tuning/final"},
    {"tuning/engine"},
    {"tuning"},
    {"cli"},
    {"cli/errors"},
    {"cli/output", "cli/predict"},
    {"cli/stored"},
    {"cli/main"},
    {"__main__"},
]
KNOWN = set().union(*LAYERS)


def file_of(path):
    """``dact/tuning/run.py`` -> ``tuning/run``; ``dact/data/text.py`` -> ``data``."""
    name = str(path.relative_to(PACKAGE).with_suffix("")).removesuffix("/__init__")
    return name if name in KNOWN else name.split("/")[0]


def imports_of(path):
    """Return all modules of dact that a file imports, anywhere in it, those for type checking
    included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dact")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module.split(".")[0] == "dact":
                for alias in node.names:  # a name may be a module
                    inner = f"{node.module}.{alias.name}"
                    is_module = source_of(inner) is not None
                    yield inner if is_module else node.module


def source_of(module):
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def layer_of(path):
    name = file_of(path)
    assert name in KNOWN, f"{path} is in no layer"
    return next(level for level, names in enumerate(LAYERS) if name in names)


def modules():
    return [
        path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent != PACKAGE
    ]


def test_imports_run_downwards_only():
    for path in modules():
        for name in imports_of(path):
            source = source_of(name)
            assert source is not None, f"{path} imports {name}"
            if source.parent == PACKAGE and source.name == "__init__.py":
                assert layer_of(path) > layer_of(PACKAGE / "model.py"), (
                    f"{path} imports dact itself"
                )
            elif file_of(source) != file_of(path):
                assert layer_of(source) < layer_of(path), f"{path} imports {name}"


def test_no_file_imports_itself_in_a_circle():
    wanted = {path: {source_of(name) for name in imports_of(path)} - {path} for path in modules()}
    while leaves := {path for path, needs in wanted.items() if not needs & wanted.keys()}:
        wanted = {path: needs for path, needs in wanted.items() if path not in leaves}
    assert not wanted, f"these import each other: {sorted(map(str, wanted))}"


def test_files_and_lines_are_short():
    for path in modules():
        lines = path.read_text().splitlines()
        assert len(lines) <= 450, path
        assert max(map(len, lines), default=0) <= 120, path


def test_only_the_engine_knows_the_engine():
    for path in (PACKAGE / "tuning").glob("*.py"):
        if path.name in ("engine.py", "__init__.py"):
            continue
        tree = ast.parse(path.read_text())
        names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names & {"engine", "TuningEngine"}, path


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("transformers", {"encoders/huggingface.py", "data/tokenizers.py"}),
        ("tokenizers", {"data/tokenizers.py"}),
        ("datasets", {"data/files.py"}),
        ("onnxruntime", {"encoders/onnx.py"}),
        ("litserve", {"server.py"}),
    ],
)
def test_heavy_packages_have_one_door(package, allowed):
    for path in modules():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == package for name in names):
                assert str(path.relative_to(PACKAGE)) in allowed, path


def test_import_dact_is_light():
    """It imports nothing heavy that Lightning and torchmetrics do not import themselves."""
    code = (
        "import sys, lightning.pytorch; before = {*sys.modules}; import dact; "
        "print(*({'transformers', 'datasets', 'optuna', 'tokenizers'} & ({*sys.modules} - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
