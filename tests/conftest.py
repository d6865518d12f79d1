"""What every test shares: no downloads, a cache of its own, and public data sets where a machine has them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download something fails at once
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and our subprocesses do not mix

ROOT = Path(__file__).resolve().parent.parent
DATA_VARIABLE = "EDGEVLM_TEST_DATA"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered between runs stays out of the user's own cache."""
    monkeypatch.setenv("EDGEVLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def product_files() -> list[Path]:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing tells product files from build outputs")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of public data sets that ``EDGEVLM_TEST_DATA`` names."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set: it names a folder with public data sets")
    return Path(folder)
