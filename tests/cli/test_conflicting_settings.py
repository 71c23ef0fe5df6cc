"""Settings that are valid alone and conflict together: the message names them, the allowed values and nothing else."""

import pytest

import pipeline.engine.settings
import training.run.settings
from clipmill.base.errors import UserError


@pytest.mark.parametrize(
    "resolve, recipe, assignment, said",
    [
        (
            training.run.settings.resolve,
            "demo",
            "data.frames_per_s=1",
            "settings: data.frames_per_s = 1.0 pads short clips",
        ),
        (training.run.settings.resolve, "demo", "data.neighbours=1", "settings: data.neighbours = 1 is for train.loss"),
        (
            pipeline.engine.settings.resolve,
            "demo",
            "caption.max_tokens=5",
            "setting caption: min_tokens = 5 must be below",
        ),
        (pipeline.engine.settings.resolve, "demo", "cut.fps=-1", "setting cut.fps = -1: input should be greater than"),
    ],
)
def test_the_message_names_them_and_no_others(resolve, recipe, assignment, said):
    with pytest.raises(UserError) as raised:
        resolve(None, recipe, [assignment])
    assert str(raised.value).startswith(said) and "{" not in str(raised.value)
