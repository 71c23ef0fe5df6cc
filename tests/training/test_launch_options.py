"""Options become settings without a change: SQL keeps its line breaks and quotes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipmill.base.settings import read_yaml
from training.launch import yaml_string


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
@example("a > 1 -- comment\nAND b < 2")
@example("---\n...")
@example("text = 'it''s' \t AND \"b\" 👩")
def test_any_text_is_read_back_as_it_was(text):
    assert read_yaml(yaml_string(text)) == text


@pytest.mark.parametrize("text", ["null", "1", "[a]", "{a: b}", "&x", "*x", "# no comment", ""])
def test_a_text_that_yaml_would_read_otherwise_stays_a_text(text):
    assert read_yaml(yaml_string(text)) == text
