"""A loss from another package, `train.loss=MODULE:ATTRIBUTE`, is minimised by the ordinary trainer."""

import pytest
import torch

from clipmill.base.errors import UserError
from tests.helpers.shards import make_corpus, pack
from tests.helpers.training import SMALL, lines, small_corpus, train_here
from training.cost.estimate import estimate
from training.losses import LOSSES, Loss, LossInputs, LossValue, load_loss
from training.losses.terms import sum_of_means
from training.run.settings import resolve

NAME = f"{__name__}:PULL"


def pull(inputs: LossInputs) -> LossValue:
    """Pull every video to its subtitle: the mean of 1 - cosine over the clips that have one."""
    counted_B = inputs.video_mask & inputs.subtitle_mask
    cosine_B = (torch.where(counted_B[:, None], inputs.video * inputs.subtitle, 0)).sum(dim=1)
    mean = torch.where(counted_B, 1 - cosine_B, 0).sum() / counted_B.sum().clamp(min=1)
    return sum_of_means({"": inputs.log_scale * 0, "pull": mean}, inputs.group)


PULL = Loss(pull, sources=frozenset({"video", "subtitle"}), num_similarities=0)


@pytest.mark.parametrize("chunks", [[], ["train.chunk_size=4"]], ids=["whole batches", "gradient caching"])
def test_it_is_minimised_logged_and_resumed(tmp_path, chunks):
    corpus = small_corpus(tmp_path / "corpus", 24)
    settings = [f"train.loss={NAME}", "train.lr=0.001", "train.warmup_ratio=0", *chunks]
    train_here(corpus, tmp_path / "run", *settings, "train.max_steps=6")
    steps = lines(tmp_path / "run")
    assert all(step["loss"] == step["pull"] for step in steps)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert train_here(None, tmp_path / "run").step == 6


def test_what_it_does_not_compare_is_not_encoded_and_costs_nothing(tmp_path):
    root = make_corpus(tmp_path / "corpus", 12)
    pack(root)
    given = [*SMALL, "train.batch_size=4"]
    pulled, whole = (
        estimate(root, resolve(None, "demo", [*given, f"train.loss={loss}"]), gpus=[]) for loss in (NAME, "vsc_fc")
    )
    assert pulled.step.flops_per_step < 0.8 * whole.step.flops_per_step
    assert pulled.memory.loss < whole.memory.loss


@pytest.mark.parametrize(
    "loss, said",
    [
        ("nonsense", "train.loss = nonsense: choose vs, vs_fc"),
        ("no_such_module:LOSS", "setting train.loss = no_such_module:LOSS: No module named 'no_such_module'"),
        (f"{__name__}:NOTHING", "has no attribute 'NOTHING'"),
        (f"{__name__}:pull", "it is a function, not a training.losses.Loss"),
    ],
)
def test_an_invalid_loss_is_refused_by_name(loss, said):
    with pytest.raises(UserError, match=said):
        load_loss(resolve(None, None, [f"train.loss={loss}"]).train.loss)


def test_neighbours_are_for_a_loss_that_takes_them():
    with pytest.raises(UserError, match="data.neighbours = 1 is for train.loss = mil_nce"):
        resolve(None, None, [f"train.loss={NAME}", "data.neighbours=1"])


@pytest.mark.parametrize("name", LOSSES)
def test_every_built_in_loss_is_where_the_registry_says(name):
    assert isinstance(load_loss(name), Loss)
