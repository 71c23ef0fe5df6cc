"""Write a study's rows as a page: question, plot, scores, outcome of the claims, and the command to repeat it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from bench.studies.study import VERDICTS, Arm, Claim, Study, Table
from clipmill.base.atomic_file import write_text
from training.run.plots import save

DEFAULT_OUT = "docs/studies"
INDEX = """# Studies

These studies test claims of the methods' papers in miniature on the demo world, where the truth is known: small models,
minutes of training, several seeds, held-out clips. Each page has a table, a plot, notes on what was tried, and the
outcome of each claimed ordering. “Yes” and “no” mean that the differences within seeds lie beyond the 95 % interval of
Student's t; everything else is “undecided”. A result here need not hold on real videos, and vice versa.

```
python -m bench.studies                                         # list them
python -m bench.studies proxies --out docs/studies/proxies      # run or resume one; --seeds, --workers, --size small
python -m bench.studies --out docs/studies                      # write this page from all rows
```

To write a study, see [bench/studies](../../bench/studies/__init__.py)."""


def write_report(study: Study, size: str, num_seeds: int, table: Table, out: Path) -> None:
    """Write DIR/plot.svg and DIR/README.md, which depend on the rows only, not on the machine or the date."""
    save(study.draw(table), out / "plot.svg")
    write_text(out / "README.md", page(study, size, num_seeds, table))


def write_index(folder: Path, done: Mapping[str, tuple[Study, Table, float]]) -> None:
    """Write FOLDER/README.md with the claim and the outcome of each study.

    `done` holds study, rows and processor seconds by name.
    """
    lines = [["study", "claimed", "outcome", "processor minutes"], ["---"] * 4]
    for name, (study, table, cpu_s) in done.items():
        outcome = "not finished" if table.lacks(study) else _verdicts(study, table)
        lines.append([f"[{name}]({name}/README.md)", study.claimed, outcome, f"{cpu_s / 60:.0f}"])
    write_text(folder / "README.md", f"{INDEX}\n\n{_markdown(lines)}\n")


def _verdicts(study: Study, table: Table) -> str:
    verdicts = [table.outcome(claim).verdict for claim in study.claims]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts)


def page(study: Study, size: str, num_seeds: int, table: Table) -> str:
    """Return the page of a study in Markdown."""
    command = f"python -m bench.studies {study.name} --out {DEFAULT_OUT}/{study.name}"
    command += "" if size == "default" else f" --size {size}"
    command += "" if num_seeds == study.num_seeds else f" --seeds {num_seeds}"
    settings = ", ".join(f"{key} {value}" for key, value in asdict(study.sizes[size]).items())
    parts = [
        f"# {study.title}",
        study.question,
        f"**Claimed.** {study.claimed}",
        f"**Here.** {study.setting}",
        "![The scores](plot.svg)",
        f"Mean ± standard deviation over {num_seeds} seeds" + (", in percent." if study.percent else "."),
        scores(study, table),
        "## Outcome",
        claims(study, table),
        f"Differences are taken within seeds: mean ± standard error over {num_seeds} seeds. “Yes” and “no” mean that "
        "the difference lies beyond the 95 % interval of Student's t; everything else is undecided.",
        study.notes,
        "## Repeat it",
        f"```\n{command}\n```",
        f"Size `{size}`: {settings}. All rows: [rows.csv](rows.csv).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def scores(study: Study, table: Table) -> str:
    """Return a Markdown table with a line per arm and a column per metric."""
    under_conditions = any(arm.condition for arm in study.arms)
    head = (["", "condition"] if under_conditions else [""]) + list(study.metrics.values())
    lines = [head, ["---"] * len(head)]
    for arm in study.arms:
        names = [arm.name, arm.condition] if under_conditions else [arm.name]
        lines.append(names + [_cell(study, table, arm, metric) for metric in study.metrics])
    return _markdown(lines)


def claims(study: Study, table: Table) -> str:
    """Return a Markdown table with a line per claim."""
    lines = [["claimed", "metric", "difference", "outcome"], ["---"] * 4]
    lines += [_claim(study, claim, table) for claim in study.claims]
    return _markdown(lines)


def _cell(study: Study, table: Table, arm: Arm, metric: str) -> str:
    mean, deviation = table.mean(arm, metric)
    return f"{_number(study, mean)} ± {_number(study, deviation)}"


def _claim(study: Study, claim: Claim, table: Table) -> list[str]:
    outcome = table.outcome(claim)
    difference = f"{_number(study, outcome.mean + claim.by, True)} ± {_number(study, outcome.error)}"
    return [claim.says, study.metrics[claim.metric], difference, f"**{outcome.verdict}**"]


def _number(study: Study, value: float, sign: bool = False) -> str:
    return f"{value * (100 if study.percent else 1):{'+' if sign else ''}{'.1f' if study.percent else '.3g'}}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
