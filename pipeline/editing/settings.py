"""Settings of `clipmill edit`: those of the student's run, and of editing boundaries."""

from typing import Any

from clipmill.base.settings import resolve_settings
from training.editing.settings import EditSettings
from training.run.settings import RECIPES, RunSettings


class EditRunSettings(RunSettings):
    """Settings of the student's run, with the section `edit`."""

    edit: EditSettings = EditSettings()


def resolve_edit(base: dict[str, Any], recipe: str | None, assignments: list[str]) -> EditRunSettings:
    """Resolve the teacher's run settings, or a recipe, with `--set` on top. Raises UserError."""
    return resolve_settings(EditRunSettings, RECIPES, base, recipe, assignments)
