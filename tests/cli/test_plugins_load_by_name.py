"""Settings of the form MODULE:ATTRIBUTE load what they name, and mistakes name the setting and the fix."""

import json

import pytest

from clipmill.base.errors import UserError
from clipmill.base.plugin import load_attribute


def test_a_function_or_class_is_loaded_from_its_module():
    assert load_attribute("json:dumps", "caption.captioner") is json.dumps
    assert load_attribute("json:JSONDecoder", "caption.captioner") is json.JSONDecoder
    assert load_attribute("importlib.metadata:version", "caption.captioner")("pytest") == pytest.__version__


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("json", "must have the form MODULE:ATTRIBUTE"),
        (":dumps", "must have the form MODULE:ATTRIBUTE"),
        ("json:", "must have the form MODULE:ATTRIBUTE"),
        ("no.such.module:f", "No module named 'no'.*on PYTHONPATH"),
        ("json:no_such_function", "no attribute 'no_such_function'.*MODULE:ATTRIBUTE"),
        ("json:__name__", "not callable but of type str; name a function or a class"),
    ],
)
def test_a_mistake_names_the_setting_and_the_fix(path, problem):
    with pytest.raises(UserError, match=f"setting segment.punctuate = {path}.*{problem}"):
        load_attribute(path, "segment.punctuate")
