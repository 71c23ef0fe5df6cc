"""CLIP4Clip trains with the published settings, in chunks of any size."""

import pytest
import torch

from tests.helpers.clip_vip import random_texts, tiny_model
from training.data.batch import Batch
from training.learner import Learner
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.settings import Clip4ClipSettings
from training.parallel.distributed import Process
from training.run.settings import resolve
from training.settings import TrainSettings


def batch(num_clips: int = 6) -> Batch:
    pixels = torch.randint(0, 255, (num_clips, 4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels, ids = pixels.to(torch.uint8), random_texts(num_clips)
    masks = [torch.ones(num_clips, dtype=torch.bool)] * 3
    return Batch(torch.arange(num_clips), pixels, pixels[:, :1], ids, ids, *masks)


def losses(head: str, stem: str, num_steps: int, **changes) -> tuple[list[float], Clip4Clip]:
    published = resolve(None, "clip4clip_msrvtt", []).train.model_dump()
    settings = TrainSettings(**published | {"precision": "fp32", "lr": 1e-2, "lr_factors": {"clip.": 0.1}} | changes)
    clip = tiny_model(embed_dim=24, num_added=0, num_times=0)
    model = Clip4Clip(clip, Clip4ClipSettings(head=head, stem=stem, num_layers=2, frozen_layers=0))
    learner = Learner(model, settings, 40, Process(torch.device("cpu")))
    return [learner.train_step(batch())["loss"].item() for _ in range(num_steps)], model


@pytest.mark.parametrize("stem", ["2d", "3d"])
@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "seqTransf"])
def test_published_updates_fit_a_batch_and_leave_what_is_frozen(head: str, stem: str) -> None:
    values, model = losses(head, stem, 15)
    assert values[0] == values[1]  # the first update has rate 0
    assert values[-1] < 0.5 * values[0]
    start = tiny_model(embed_dim=24, num_added=0, num_times=0)
    assert torch.equal(model.clip.text.token_embedding.weight, start.text.token_embedding.weight)
    assert not torch.equal(model.text.blocks[0].fc1.weight, start.text.blocks[0].fc1.weight)


@pytest.mark.parametrize("head", ["seqLSTM", "seqTransf"])
def test_chunks_and_recomputation_change_no_loss(head: str) -> None:
    whole, _ = losses(head, "3d", 4)
    for changes in ({"chunk_size": 2}, {"activation_checkpointing": True}):
        assert losses(head, "3d", 4, **changes)[0] == pytest.approx(whole, rel=1e-5)
