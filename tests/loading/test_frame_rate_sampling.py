"""Frames sampled at a rate, as in CLIP4Clip: frames that a short clip lacks are masked and ignored by models."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from clipmill.base.errors import UserError
from clipmill.cli.evaluate import run_eval
from tests.helpers.loaders import SIZE, assert_all_equal, make_run
from tests.helpers.training import SMALL, losses, small_corpus
from training.data.clip_frames import Picture, decode_clip
from training.data.frame_sampling import paced_indices
from training.data.selection import Selection
from training.models.encode import encode_clips
from training.models.registry import load
from training.run.settings import resolve
from training.run.setup import Request
from training.trainer import train

PACED = ["data.frames_per_s=2", "data.jitter=false"]  # of clips of 3 a second
CLIP4CLIP = ["model.init=demo", "model.method=clip4clip"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a run on clips of 2 to 5 frames."""
    return make_run(tmp_path_factory.mktemp("run"), jitter=False, frames_per_s=2.0)


def test_a_sample_has_the_frames_shown_at_those_times_and_nothing_behind(run):
    seen = set()
    for batch in run.batches(0, 5):
        clips = run.selection.take(batch.rows_B.numpy()).to_pylist()
        for slot, clip in enumerate(clips):
            expected = paced_indices(clip["num_frames"], 3.0, frames_per_s=2.0, most=4)
            data = (run.corpus / "shards" / clip["shard"].rpartition("/")[2]).read_bytes()
            data = data[clip["mp4_offset"] : clip["mp4_offset"] + clip["mp4_bytes"]]
            pictures = decode_clip(data, lambda total, chosen=expected: chosen, Picture(SIZE))
            taken = batch.video_BT3SS[slot].permute(0, 2, 3, 1).numpy()
            assert np.array_equal(taken[: len(expected)], pictures) and not taken[len(expected) :].any()
            assert batch.frame_mask_BT[slot].tolist() == [k < len(expected) for k in range(4)]
            seen.add(len(expected))
    assert seen == {2, 3, 4}, "short and long clips are both covered"


def test_every_number_of_processes_gives_the_same_masks(run):
    assert_all_equal(run.batches(0, 3), run.batches(0, 3, num_processes=2))


def test_a_clip_of_unknown_frame_rate_is_a_failure(run):
    reader = run.reader()
    reader.selection = _WithoutRates(run.selection.path)
    part = reader.read([0, 1], epoch=0)
    assert [failure.error.error_class for failure in part.failures] == ["no-frame-rate"] * 2
    assert not part.video_mask_B.any()


class _WithoutRates(Selection):
    def take(self, rows):
        table = super().take(rows)
        place = table.schema.get_field_index("fps")
        return table.set_column(place, table.schema.field(place), pa.nulls(len(table), pa.float64()))


@pytest.mark.parametrize(
    "model",
    [
        [*CLIP4CLIP, "model.clip4clip.head=meanP"],
        [*CLIP4CLIP, "model.clip4clip.head=seqLSTM"],
        [*CLIP4CLIP, "model.clip4clip.head=seqTransf"],
        [*CLIP4CLIP, "model.clip4clip.stem=3d"],
        ["model.init=demo", "model.method=unipt", "model.pooling=mean"],
    ],
    ids=["meanP", "seqLSTM", "seqTransf", "3d", "unipt"],
)
def test_missing_frames_change_nothing(model):
    settings = resolve(None, None, model)
    model = load(settings.model).eval()
    size = model.config.image_size
    pixels = torch.randint(0, 256, (2, 5, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        features = encode_clips(model, pixels, mask)
        noise = pixels.clone()
        noise[0, 3:] = 255 - noise[0, 3:]
        assert torch.equal(encode_clips(model, noise, mask), features)
        alone = encode_clips(model, pixels[:1, :3], mask[:1, :3])
        assert not torch.allclose(features[:1], encode_clips(model, pixels[:1], torch.ones_like(mask[:1])), atol=1e-3)
    torch.testing.assert_close(features[:1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model.init=demo"], "clip4clip"),
        (["model.init=demo", "model.method=unipt"], "model.pooling = mean"),
        ([*CLIP4CLIP, "data.jitter=true"], "data.jitter = false"),
    ],
)
def test_a_model_without_frame_masks_is_refused(settings, named):
    with pytest.raises(UserError, match=named):
        resolve(None, None, ["data.frames_per_s=1", "data.jitter=false", *settings])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["meanP", "tightTransf"])
def test_a_run_trains_and_evaluates_at_a_frame_rate(tmp_path, head):
    corpus = small_corpus(tmp_path / "corpus", num_clips=40)
    settings = (*SMALL, *CLIP4CLIP, *PACED, f"model.clip4clip.head={head}", "train.loss=vs", "data.num_frames=4")
    train(Request(str(tmp_path / "run"), str(corpus), "demo", (*settings, "train.max_steps=2")))
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert run_eval(run=tmp_path / "run", corpus=corpus, where="true", format="json")["num_videos"] == 40
