"""What every test gets: quiet native threads, and the folder of real footage where it is there."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def footage() -> Path:
    """Real videos kept beside the checkout, not in it."""
    folder = SHARED / "data" / "videos"
    if not folder.is_dir():
        pytest.skip(f"no real footage: {folder} is not there")
    return folder
