"""Set up every test: single-threaded native libraries, Hypothesis profiles, and fixtures shared by the session."""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Every run uses the same examples unless HYPOTHESIS_PROFILE=any; time limits would only measure the machine's load.
UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **UNHURRIED)
settings.register_profile("any", **UNHURRIED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a busy machine, a Ray worker that starts slowly has not failed, and a node that answers slowly is not dead.
os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
os.environ.setdefault("RAY_health_check_timeout_ms", "60000")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1200")

# Keys and secrets of the tests are not the user's. Processes of one run share them.
if "PYTEST_STATE" not in os.environ:
    os.environ["PYTEST_STATE"] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="clipmill-tests-")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with most slow tests first, so that processes that take a file at a time end together."""
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Reset torch to one thread: sums in fp32 depend on the number, which an earlier training may have set."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def footage() -> Path:
    """Return the folder of real videos beside the checkout; skip the test if it is missing."""
    folder = SHARED / "data" / "videos"
    if not folder.is_dir():
        pytest.skip(f"no real footage: {folder} is not there")
    return folder


@pytest.fixture(scope="session")
def local_ray():
    """Start one Ray for all tests that need it, since starting it takes seconds."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Serve a small demo world with every fault over loopback HTTP."""
    from pipeline.demo.server import serve
    from pipeline.demo.world import WorldSettings, make_world, write_sources
    from tests.helpers.builds import ServedWorld

    folder = tmp_path_factory.mktemp("world")
    broken = ("not-found", "html", "truncated", "empty", "audio-only", "unavailable-once", "cut-off", "duplicate")
    make_world(folder / "world", WorldSettings(num_videos=5, min_video_s=14, max_video_s=22, broken=broken, seed=3))
    faults = json.loads((folder / "world" / "faults.json").read_text())
    with serve(folder / "world", faults=faults) as base_url:
        write_sources(folder / "world", base_url, folder / "sources.jsonl")
        yield ServedWorld(folder / "world", base_url, folder / "sources.jsonl", faults)


@pytest.fixture(scope="session")
def built(local_ray, world, tmp_path_factory):
    """Build a corpus from the world for tests that only read it; return (corpus folder, the build's report).

    A captioner without a model writes its captions, because loading models would take most of the time of each build.
    """
    from tests.helpers.builds import PLAIN, build_here

    corpus = tmp_path_factory.mktemp("built") / "corpus"
    return corpus, build_here(corpus, [str(world.sources)], *PLAIN)


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """Build a packed corpus of videos that show their frame numbers; tests copy it before they change it."""
    from tests.helpers.edits import build_corpus

    return build_corpus(tmp_path_factory.mktemp("numbered") / "corpus")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Make a corpus of eight videos with the rows and media of every stage, without Ray; tests read or copy it."""
    from tests.helpers.whole_corpus import VIDEOS, build_whole, url_of, write_sources

    folder = tmp_path_factory.mktemp("whole")
    sources = write_sources(folder / "list.jsonl", VIDEOS)
    build_whole(folder / "corpus", sources, command=f"clipmill build {url_of('video-b')} {url_of('video-a')}")
    return folder / "corpus"
