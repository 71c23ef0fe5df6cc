"""`clipmill settings`: the page in docs matches the code, and the printed template resolves to the defaults."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from clipmill.base.settings_reference import describe_settings
from clipmill.cli.app import app
from pipeline.editing.settings import EditRunSettings, resolve_edit
from pipeline.engine.settings import CorpusSettings
from pipeline.engine.settings import resolve as resolve_corpus

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
SECTIONS = [*CorpusSettings.model_fields, *EditRunSettings.model_fields]


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["settings", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_page_in_docs_is_what_the_command_prints():
    remedy = "run: clipmill settings --format markdown > docs/settings.md"
    assert PAGE.read_text() == printed("--format", "markdown"), remedy


@pytest.mark.parametrize("model", [CorpusSettings, EditRunSettings])
def test_every_setting_says_what_it_does(model):
    assert [setting.name for setting in describe_settings(model) if not setting.comment] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_a_template_means_the_defaults(section, tmp_path):
    text = printed(section, "--format", "yaml")
    assert list(yaml.safe_load(text)) == [section]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    if section in CorpusSettings.model_fields:
        assert resolve_corpus(None, str(recipe), []) == CorpusSettings()
    else:
        assert resolve_edit({}, str(recipe), []) == EditRunSettings()


def test_text_names_the_whole_key_its_limits_and_its_comment():
    text = printed("cut")
    assert "cut.short_side = 256   integer ≥ 16, ≤ 4320, a multiple of 2, or source" in text
    assert "    Pixels of the shorter side" in text
