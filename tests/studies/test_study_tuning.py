"""The tuning study: the parameters that each arm trains, and the memory that a step is said to keep."""

import pytest
import torch

from bench.studies.tuning import ARMS, lr_of, num_trained, saved_of, spoken_scenes, tuned_as
from bench.studies.tuning import STUDY as TUNING
from tests.helpers.clip_vip import random_pixels, random_texts, tiny_model
from training.models.clip_vip.model import ClipVip


def plain() -> ClipVip:
    return tiny_model(pooling="mean", num_added=0, num_times=0)


def test_each_arm_trains_its_own_part() -> None:
    counts = {name: num_trained(tuned_as(name, plain(), seed=0)) for name in ARMS}
    assert counts["frozen"] == 0 < counts["linear maps"] < counts["UniPT, last layer"] < counts["UniPT"]
    assert counts["full fine-tuning"] == sum(parameter.numel() for parameter in plain().parameters())
    assert {name for name in ARMS if lr_of(name, TUNING.sizes["default"]) is None} == {"frozen"}


def test_linear_maps_begin_as_the_frozen_model() -> None:
    pixels, ids = random_pixels(3, 2), random_texts(3)
    linear, frozen = tuned_as("linear maps", plain(), seed=0), plain()
    torch.testing.assert_close(linear.encode_video(pixels), frozen.encode_video(pixels))
    torch.testing.assert_close(linear.encode_text(ids), frozen.encode_text(ids))
    linear.encode_video(pixels).sum().backward()
    assert all(parameter.grad is None for parameter in linear.backbone.parameters())


def test_what_is_kept_falls_with_what_is_trained() -> None:
    kept = {name: saved_of(tuned_as(name, plain(), seed=0), 2, 2, 8) for name in ARMS}
    assert kept["frozen"] == 0 < kept["linear maps"] < kept["UniPT, last layer"] < kept["UniPT"]
    assert kept["UniPT"] < kept["full fine-tuning"] / 3


def test_scenes_are_a_function_of_the_seed() -> None:
    (scenes, said), (_, others) = spoken_scenes(5, [0, 1]), spoken_scenes(5, [0, 2])
    assert (scenes, said) == spoken_scenes(5, [0, 1]) and said != others and all(said)


@pytest.mark.slow
def test_a_small_study_of_tuning(tmp_path) -> None:
    arms = {arm.name: arm for arm in TUNING.arms}
    values = {name: TUNING.run(arms[name], 0, TUNING.sizes["small"], tmp_path) for name in ("UniPT", "frozen")}
    assert values["frozen"]["saved_b32"] == 0 < values["UniPT"]["saved_b32"]
    assert set(values["UniPT"]) == set(TUNING.metrics)
