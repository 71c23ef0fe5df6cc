"""The command line starts quickly, and the recipes and cluster files shipped with it are valid."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clipmill.base.errors import UserError
from clipmill.base.settings import recipe_names

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "duckdb", "pyarrow", "av", "open_clip", "numpy", "yt_dlp", "whisper")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['clipmill', '--help']\n"
        "from clipmill.cli.app import _run\n"
        "_run()\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "build" in done.stdout and "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_every_command_explains_itself():
    for command in ("build", "run", "status", "sql", "stats", "verify", "demo"):
        done = subprocess.run([sys.executable, "-m", "clipmill", command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "Usage" in done.stdout


def test_a_build_without_sources_resumes_a_corpus_but_creates_none(tmp_path):
    from clipmill.cli.app import build

    with pytest.raises(UserError, match="mistyped is not a corpus"):
        build(None, corpus=str(tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


def test_the_cluster_file_passes_rays_own_validator():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())))


def test_every_recipe_is_valid():
    import pipeline.engine.settings
    import training.run.settings

    for module in (pipeline.engine.settings, training.run.settings):
        names = recipe_names(module.RECIPES)
        assert "demo" in names
        for name in names:
            assert module.resolve(None, name, [])


def test_no_file_names_a_registry():
    address = re.compile(r"py[p]i[.]org|python[h]osted[.]org|index[-_]url")  # does not match itself
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    for name in files:
        if name.endswith((".py", ".toml", ".txt", ".md", ".yaml", "Makefile", "run")):
            text = (ROOT / name).read_text(errors="replace")
            assert not address.search(text), name
