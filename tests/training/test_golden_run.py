"""Twenty steps of the demo recipe on a fixed corpus, so that no loss or order changes by accident.

    python -m tests.training.test_golden_run     writes tests/data/golden_demo_run.json anew

Losses are fp32 on a CPU; other processors and thread counts round differently, and the difference grows with steps.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.helpers.training import SMALL, lines, small_corpus
from training.data.epoch_files import Epochs, plan_spec
from training.run.folder import RunFolder
from training.run.setup import Prepared, Request
from training.trainer import train

GOLDEN = Path(__file__).parents[1] / "data" / "golden_demo_run.json"


def demo_run(folder: Path) -> dict:
    settings = (*SMALL, "train.max_steps=20", "data.loader_processes=0")
    request = Request(str(folder / "run"), str(small_corpus(folder / "corpus")), "demo", settings)
    train(request)
    prepared = Prepared.open(RunFolder(request.run))
    data = prepared.settings.data
    spec = plan_spec(prepared.selection, data, prepared.settings.train.batch_size)
    epochs = Epochs(folder / "plan", spec, prepared.selection.path, data.apart)
    batches = [prepared.selection.take(epochs.rows(step))["clip_id"].to_pylist() for step in (0, 1, 15)]
    return {
        "selection_hash": prepared.selection.hash,
        "plan": spec.fingerprint,
        "clips of steps 1, 2 and 16": batches,
        "losses": [line["loss"] for line in lines(folder / "run")],
    }


@pytest.mark.slow
def test_twenty_steps_of_the_demo_recipe_are_as_they_were(tmp_path):
    golden, now = json.loads(GOLDEN.read_text()), demo_run(tmp_path)
    assert now["clips of steps 1, 2 and 16"] == golden["clips of steps 1, 2 and 16"]
    assert (now["selection_hash"], now["plan"]) == (golden["selection_hash"], golden["plan"])
    assert now["losses"] == pytest.approx(golden["losses"], rel=5e-3)
    assert now["losses"][0] == pytest.approx(golden["losses"][0], rel=1e-5)


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(demo_run(Path(scratch)), indent=1) + "\n")
        print(f"written: {GOLDEN}")
