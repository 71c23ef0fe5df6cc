"""`clipmill settings`: list every setting with its default, accepted values and the comment from the code."""

import json
import textwrap

import yaml
from rich.console import Console
from rich.text import Text

from clipmill.base.errors import UserError
from clipmill.base.settings_reference import SettingInfo, describe_settings
from pipeline.editing.settings import EditRunSettings
from pipeline.engine.settings import CorpusSettings

WIDTH = 110  # of a comment line
INTRODUCTION = """\
# Settings

`clipmill settings --format markdown` prints this page from the code. `clipmill settings SECTION` shows one section,
`clipmill settings SECTION --format yaml` prints a template to edit and pass as `--recipe FILE`. On the command line:
`--set cut.fps=2`. Settings marked *speed or safety* never change what a stage or a run writes, so changing them makes
no work pending.
"""
TITLES = {
    "corpus": "Corpus: `clipmill build`, `clipmill run`",
    "run": "Training runs: `clipmill train`, `eval`, `edit`",
}


def show_settings(section: str | None, format: str) -> None:
    """Print the settings of one section, or of all, as text, yaml or markdown. Raises UserError."""
    models = {"corpus": CorpusSettings, "run": EditRunSettings}
    owners = {name: kind for kind, model in models.items() for name in model.model_fields}
    if section is not None and section not in owners:
        raise UserError(f"settings {section}: no such section; choose one of {', '.join(owners)}.")
    if section is None and format == "yaml":
        raise UserError(f"settings --format yaml: name a section, one of {', '.join(owners)}.")
    chosen = [section] if section else list(owners)
    sections = {name: list(describe_settings(models[owners[name]].model_fields[name].annotation)) for name in chosen}
    if format == "text":
        _print_text(sections)
    elif format == "yaml":
        print(to_yaml(sections), end="")
    elif format == "markdown":
        print(to_markdown(sections, owners), end="")
    else:
        raise UserError(f"settings --format {format}: choose text, yaml or markdown.")


def _print_text(sections: dict[str, list[SettingInfo]]) -> None:
    console = Console(highlight=False)
    for section, settings in sections.items():
        for setting in settings:
            line = Text.assemble((f"{section}.{setting.name}", "bold"), f" = {json.dumps(setting.default)}")
            line.append(f"   {setting.values}{'; speed or safety' if setting.operational else ''}", "dim")
            console.print(line, soft_wrap=True)
            if setting.comment:
                console.print(Text(textwrap.indent(textwrap.fill(setting.comment, WIDTH), "    ")), soft_wrap=True)
        console.print()


def to_yaml(sections: dict[str, list[SettingInfo]]) -> str:
    """Write a commented template: every setting at its default."""
    lines = []
    for section, settings in sections.items():
        lines.append(f"{section}:")
        previous: list[str] = []
        for setting in settings:
            *parents, name = setting.name.split(".")
            if parents != previous:
                lines += [f"{'  ' * (depth + 1)}{parent}:" for depth, parent in enumerate(parents)]
            previous, indent = parents, "  " * (len(parents) + 1)
            remark = f"{setting.comment} ({setting.values})" if setting.comment else f"({setting.values})"
            lines += [f"{indent}# {line}" for line in textwrap.wrap(remark, WIDTH)]
            lines.append(f"{indent}{yaml.safe_dump({name: setting.default}, default_flow_style=True).strip()[1:-1]}")
        lines.append("")
    return "\n".join(lines)


def to_markdown(sections: dict[str, list[SettingInfo]], owners: dict[str, str]) -> str:
    """Write the reference page: a table per section."""
    parts, kind = [INTRODUCTION], None
    for section, settings in sections.items():
        if owners[section] != kind:
            kind = owners[section]
            parts.append(f"## {TITLES[kind]}\n")
        parts.append(f"### {section}\n\n| setting | default | accepts | |\n|---|---|---|---|")
        for setting in settings:
            comment = f"*Speed or safety.* {setting.comment}".strip() if setting.operational else setting.comment
            cells = (f"`{setting.name}`", f"`{json.dumps(setting.default)}`", setting.values, comment)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts) + "\n"
