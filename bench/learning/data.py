"""Real data that packages ship: the images of Fashion-MNIST, and the English text of Python's own help topics."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_FOLDER = Path(os.environ.get("FASHION_MNIST", "out/data/fashion-mnist"))
_PACKAGE = "dataset-fashion-mnist"  # Debian's
_FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def fetch() -> None:
    """Put the four files where they are looked for, from Debian's package. Raises SystemExit, with the way by hand."""
    if all((_FOLDER / name).is_file() for name in _FILES):
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", "-q", _PACKAGE], cwd=folder, check=True, capture_output=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"Fashion-MNIST is not in {_FOLDER}, and Debian's package {_PACKAGE} cannot be had ({error}): put "
                f"{', '.join(_FILES)} there, or say where they are by FASHION_MNIST."
            ) from error
        _FOLDER.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            shutil.copy(next(Path(folder).rglob(name)), _FOLDER / name)


@cache
def images(part: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of "train" or "t10k", and their labels.

    Of half the width and height, (count, 1, 14, 14), means of 2 x 2: five seeds of every arm then take hours, not days.
    """
    with gzip.open(_FOLDER / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
    with gzip.open(_FOLDER / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:count]
    return F.avg_pool2d((torch.tensor(pixels) / 255 - 0.286) / 0.353, 2), torch.tensor(labels).long()


@cache
def text() -> tuple[Tensor, Tensor, int]:
    """Characters of the help topics as numbers: nine tenths to learn from, the last tenth to ask about, and how many kinds."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    kinds = sorted(set(whole))
    numbers = torch.tensor([kinds.index(character) for character in whole])
    cut = 9 * len(numbers) // 10
    return numbers[:cut], numbers[cut:], len(kinds)
