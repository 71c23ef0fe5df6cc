"""Training with CLIP4Clip's tightTransf: the published symmetric loss over all processes' pairs, scored once each."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipmill.base.errors import UserError
from tests.helpers.clip_vip import max_difference, random_texts, tensors, tiny_model
from tests.helpers.updates import BATCH, alone, assert_same, settings, together, whole_batch
from tests.models.test_clip4clip_reference import features, inputs, load
from training.data.batch import Batch
from training.learner import Learner
from training.losses.pair_matching import matching_loss
from training.models.clip4clip.heads import PairDropout, pair_keys
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.settings import Clip4ClipSettings
from training.parallel.distributed import Process

SETTINGS = Clip4ClipSettings(head="tightTransf", num_layers=2)


def small(dropout: float = 0.0) -> Clip4Clip:
    model = Clip4Clip(tiny_model(embed_dim=24, num_added=0, num_times=0), SETTINGS)
    model.head.dropout.p = dropout
    model.pairs_at_a_time = 10
    return model


def test_twice_the_published_loss_with_its_gradients() -> None:
    model, case = load("tightTransf"), tensors("clip4clip", "tightTransf.cases.safetensors")
    text, frames = (feature.clone().requires_grad_() for feature in features("tightTransf", "f64"))
    there = torch.ones(len(frames), dtype=torch.bool)
    score = partial(model.similarity, video_mask=inputs()["video_mask"])
    loss = matching_loss(score, text.squeeze(1), frames, there, there).total / 2
    loss.backward()
    assert max_difference(loss, case["f64/loss_symmetric"]) <= 1e-12
    assert max_difference(text.grad, case["f64/grad_sequence_output"]) <= 1e-7
    assert max_difference(frames.grad, case["f64/grad_visual_output"]) <= 1e-7


def test_missing_items_form_no_pair() -> None:
    """The result is that of a batch without the unreadable clip; a clip without text is only a negative of others."""

    def score(text_BC: Tensor, frames_KFC: Tensor) -> Tensor:
        return text_BC @ frames_KFC.mean(dim=1).T

    text, frames = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, 4, dtype=torch.float64)
    there = torch.ones(5, dtype=torch.bool)
    but_2 = torch.tensor([True, True, False, True, True])
    holed = text.clone()
    holed[2] = torch.nan
    without = matching_loss(score, text[but_2], frames[but_2], there[:4], there[:4]).total
    torch.testing.assert_close(matching_loss(score, holed, frames, there, but_2).total, without)
    mute = matching_loss(score, holed, frames, but_2, there)
    torch.testing.assert_close(mute.terms["subtitle_to_video"], _text_to_video(score(text, frames), but_2))
    assert matching_loss(score, text, frames, there, ~there).total == 0


def _text_to_video(scores: Tensor, asks: Tensor) -> Tensor:
    return (scores.logsumexp(dim=1) - scores.diagonal())[asks].mean()


def test_with_its_dropout_it_fits_a_batch() -> None:
    pixels = torch.randint(0, 255, (6, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ids, there = random_texts(6), torch.ones(6, dtype=torch.bool)
    batch = Batch(torch.arange(6), pixels, pixels[:, :1], ids, ids, there, there, there)
    torch.manual_seed(0)
    model = small(dropout=0.1).eval()
    learner = Learner(model, settings(loss="vs", lr=3e-3), 60, Process(torch.device("cpu")))
    losses = [learner.train_step(batch)["loss"].item() for _ in range(40)]
    assert model.training and losses[-1] < 0.5 * losses[0]
    assert model.logit_scale.item() == small().logit_scale.item()


@pytest.mark.slow
def test_processes_change_no_update() -> None:
    """Its dropout is a function of the pair, so every number of processes drops the same."""
    expected = alone(settings(loss="vs"), whole_batch, dropping)
    for outcomes in together(2, [settings(loss="vs")], whole_batch, dropping):
        for outcome in outcomes:
            assert_same(outcome, expected)


def dropping() -> Clip4Clip:
    torch.manual_seed(3)  # as a run does on every process
    return small(dropout=0.5)


def test_dropout_does_not_depend_on_who_scores_a_pair() -> None:
    model = small(dropout=0.5).train()
    texts, frames = torch.randn(6, 24), torch.randn(5, 3, 24)

    def scores(first: int, last: int, pairs_at_a_time: int = 7) -> Tensor:
        torch.manual_seed(1)
        model.first_text, model.pairs_at_a_time = first, pairs_at_a_time
        return model.similarity(texts[first:last], frames).detach()

    whole = scores(0, 6)
    torch.testing.assert_close(torch.cat([scores(0, 2), scores(2, 6)]), whole)
    torch.testing.assert_close(scores(0, 6, pairs_at_a_time=30), whole)
    assert not torch.allclose(model.similarity(texts, frames), whole)  # the next step drops others


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    dropout, tokens = PairDropout(p).train(), torch.ones(400, 5, 24)
    keys = pair_keys(7, torch.arange(400) // 20, torch.arange(400) % 20)
    dropped = dropout(tokens, keys)
    assert (dropped == 0).float().mean() == pytest.approx(p, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    assert (dropped == 0).float().mean(dim=0).std() < 0.05 and (dropped == 0).float().mean(dim=(1, 2)).std() < 0.06
    assert torch.equal(dropout.eval()(tokens, keys), tokens)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss": "vsc_fc"}, "train.loss = vsc_fc.*allowed here: vs"),
        ({"loss": "vs", "chunk_size": 4}, "train.chunk_size = 4"),
        ({"loss": "vs", "feedback": True}, "train.feedback = True"),
    ],
)
def test_what_needs_a_vector_per_video_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Learner(small(), settings(**changes), 10, Process(torch.device("cpu")))


def test_flops_of_a_pair_are_those_of_its_blocks() -> None:
    """The counter includes the head's three small layers, which the estimate leaves out."""
    model = small().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.similarity(torch.randn(BATCH, 24), torch.randn(BATCH, 3, 24))
    estimate = model.pair_flops(3)
    assert 3 * counted.get_total_flops() == pytest.approx(BATCH**2 * estimate, rel=0.05)
