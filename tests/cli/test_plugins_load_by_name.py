"""Settings of the form MODULE:ATTRIBUTE load what they name, and mistakes name the setting and the fix."""

import json

import pytest

from clipmill.base.errors import UserError
from clipmill.base.plugins import load_attribute


def test_a_function_or_class_is_loaded_from_its_module():
    assert load_attribute("caption.captioner", "json:dumps") is json.dumps
    assert load_attribute("caption.captioner", "json:JSONDecoder") is json.JSONDecoder
    assert load_attribute("caption.captioner", "importlib.metadata:version")("pytest") == pytest.__version__


def test_a_short_name_stands_for_its_place():
    assert load_attribute("train.loss", "short", "json:dumps") is json.dumps
    with pytest.raises(UserError, match="train.loss = short: module 'json' has no attribute 'nothing'"):
        load_attribute("train.loss", "short", "json:nothing")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("json", "must have the form MODULE:ATTRIBUTE"),
        (":dumps", "must have the form MODULE:ATTRIBUTE"),
        ("json:", "must have the form MODULE:ATTRIBUTE"),
        ("no.such.module:f", "No module named 'no'.*on PYTHONPATH"),
        ("json:no_such_function", "no attribute 'no_such_function'.*MODULE:ATTRIBUTE"),
    ],
)
def test_a_mistake_names_the_setting_and_the_fix(path, problem):
    with pytest.raises(UserError, match=f"setting segment.punctuate = {path}.*{problem}"):
        load_attribute("segment.punctuate", path)
