"""A study's rows as a page: what was asked, what came out, and how to run it again."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from bench.studies.study import VERDICTS, Arm, Claim, Study, Table
from clipmill.base.atomic_file import write_text

DEFAULT_OUT = "docs/studies"
INDEX = """# Studies

Claims of the methods' papers tried in miniature on the demo world, where the truth is known: small models, minutes of
training, several seeds, held-out clips. Each page has its table, its plot, what was tried, and whether each ordering
came out: “yes” and “no” where the differences within seeds lie beyond the 95 % interval of Student's t, else
“undecided”. What comes out here need not come out on real videos, and the other way round.

```
clipmill study                                        # which there are
clipmill study proxies --out docs/studies/proxies     # runs one, or goes on with it; --seeds, --workers, --size small
clipmill study --out docs/studies                     # writes this page from the rows of all
```

How one is written: [training/studies](../../training/studies/__init__.py)."""


def write_report(study: Study, size: str, num_seeds: int, table: Table, out: Path) -> None:
    """DIR/plot.svg and DIR/README.md. Says nothing of the machine or the day: same rows, same bytes."""
    study.draw(table, out / "plot.svg")
    write_text(out / "README.md", page(study, size, num_seeds, table))


def write_index(folder: Path, done: Mapping[str, tuple[Study, Table, float]]) -> None:
    """FOLDER/README.md: of every study that was run into a folder of its name there, by name with its rows and
    processor seconds, what was claimed and what came out.
    """
    lines = [["study", "claimed", "came out", "processor minutes"], ["---"] * 4]
    for name, (study, table, cpu_s) in done.items():
        outcome = "not finished" if table.lacks(study) else _verdicts(study, table)
        lines.append([f"[{name}]({name}/README.md)", study.claimed, outcome, f"{cpu_s / 60:.0f}"])
    write_text(folder / "README.md", f"{INDEX}\n\n{_markdown(lines)}\n")


def _verdicts(study: Study, table: Table) -> str:
    verdicts = [table.outcome(claim).verdict for claim in study.claims]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts)


def page(study: Study, size: str, num_seeds: int, table: Table) -> str:
    command = f"clipmill study {study.name} --out {DEFAULT_OUT}/{study.name}"
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
        "## Did it come out?",
        claims(study, table),
        f"Differences are taken within seeds: mean ± standard error over {num_seeds} of them. “Yes” and “no” are what "
        "lies beyond the 95 % interval of Student's t; everything else is undecided.",
        study.notes,
        "## Again",
        f"```\n{command}\n```",
        f"Size `{size}`: {settings}. All rows: [rows.csv](rows.csv).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def scores(study: Study, table: Table) -> str:
    """A Markdown table: a line per arm, a column per metric."""
    under_conditions = any(arm.condition for arm in study.arms)
    head = (["", "condition"] if under_conditions else [""]) + list(study.metrics.values())
    lines = [head, ["---"] * len(head)]
    for arm in study.arms:
        names = [arm.name, arm.condition] if under_conditions else [arm.name]
        lines.append(names + [_cell(study, table, arm, metric) for metric in study.metrics])
    return _markdown(lines)


def claims(study: Study, table: Table) -> str:
    lines = [["claimed", "on", "difference", "came out"], ["---"] * 4]
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
