"""A study keeps finished runs, resumes where it stopped, and reports any outcome."""

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from bench.studies import STUDIES, load, runner
from bench.studies.__main__ import main
from bench.studies.keep import kept
from bench.studies.runner import run_study
from bench.studies.study import Arm, Cell, Claim, Study, Table
from clipmill.base.errors import UserError
from training.run.plots import bars


@dataclass(frozen=True)
class Size:
    height: float = 1.0


def run(arm: Arm, seed: int, size: Size, cache: Path) -> dict[str, float]:
    (cache / "calls").open("a").write(f"{arm.label} {seed}\n")
    if (cache / "stop").exists() and seed == 1:
        raise KeyboardInterrupt
    return {
        "score": size.height * {"low": 0.2, "high": 0.6}[arm.name] + 0.01 * seed,
        "flat": 1 / 3 + 0.1 * (-1) ** seed,
    }


def draw(table: Table) -> Figure:
    return bars("Toys", {"all": {"high": 1.0}}, y_label="score")


STUDY = Study(
    name="toy",
    title="Toys",
    question="Which is higher?",
    claimed="High is.",
    setting="Two numbers.",
    arms=(Arm("low"), Arm("high")),
    metrics={"score": "score", "flat": "flat"},
    claims=(
        Claim("high > low", "score", "high", "low"),
        Claim("low > high", "score", "low", "high"),
        Claim("high > low on what is the same", "flat", "high", "low"),
        Claim("low as good as high", "flat", "low", "high", by=-0.05),
    ),
    sizes={"default": Size(), "small": Size(0.5)},
    run=run,
    draw=draw,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the toy study in this process; return the number of runs it made."""
    monkeypatch.setattr(runner, "load", lambda name: STUDY)
    cache = tmp_path / "cache"
    cache.mkdir()

    def again(**options) -> int:
        (cache / "calls").unlink(missing_ok=True)
        run_study("toy", tmp_path / "out", cache=cache, progress=lambda line: None, **options)
        return len((cache / "calls").read_text().splitlines()) if (cache / "calls").exists() else 0

    return again


def test_a_study_is_not_run_twice(toy, tmp_path: Path) -> None:
    assert toy() == 6
    page = (tmp_path / "out" / "README.md").read_bytes()
    assert toy() == 0
    assert (tmp_path / "out" / "README.md").read_bytes() == page
    assert toy(num_seeds=4) == 2


def test_an_interrupted_study_resumes(toy, tmp_path: Path) -> None:
    (tmp_path / "cache" / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        toy()
    assert not (tmp_path / "out" / "README.md").exists()
    (tmp_path / "cache" / "stop").unlink()
    assert toy() == 4


def test_rows_do_not_depend_on_their_order(toy, tmp_path: Path) -> None:
    toy()
    rows = (tmp_path / "out" / "rows.csv").read_text()
    lines = rows.splitlines()
    (tmp_path / "out" / "rows.csv").write_text("\n".join([lines[0], *reversed(lines[3:])]) + "\n")
    assert toy() == 1
    assert (tmp_path / "out" / "rows.csv").read_text() == rows


def test_a_torn_run_is_done_again(toy, tmp_path: Path) -> None:
    toy()
    lines = (tmp_path / "out" / "rows.csv").read_text().splitlines()
    (tmp_path / "out" / "rows.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert toy() == 1


def test_two_at_once_do_not_mix(toy, tmp_path: Path) -> None:
    with runner.only_writer(tmp_path / "out"), pytest.raises(UserError, match="another process runs a study there"):
        toy()
    assert toy() == 6


def test_rows_of_other_settings_are_not_mixed(toy) -> None:
    toy()
    with pytest.raises(UserError, match="size"):
        toy(size="small")
    with pytest.raises(UserError, match="small"):
        toy(size="huge")
    with pytest.raises(UserError, match="--seeds"):
        toy(num_seeds=0)


def test_a_claim_comes_out_by_its_numbers_alone(toy, tmp_path: Path) -> None:
    toy()
    page = (tmp_path / "out" / "README.md").read_text()
    verdicts = [line.rsplit("|", 2)[1].strip() for line in page.splitlines() if "**" in line and line.startswith("|")]
    assert verdicts == ["**yes**", "**no**", "**undecided**", "**yes**"]
    assert "| high > low | score | +40.0 ± 0.0 |" in page and "| high | 61.0 ± 1.0 |" in page


def test_a_few_seeds_that_disagree_decide_nothing() -> None:
    scores = {("high", 0): 0.5, ("low", 0): 0.3, ("high", 1): 0.4, ("low", 1): 0.39, ("high", 2): 0.5, ("low", 2): 0.4}
    table = Table({Cell(Arm(arm), seed): {"score": value} for (arm, seed), value in scores.items()})
    outcome = table.outcome(STUDY.claims[0])
    assert outcome.verdict == "undecided" and math.isclose(outcome.mean, 0.31 / 3)


def test_a_claim_about_arms_that_are_not_there_is_refused() -> None:
    with pytest.raises(AssertionError, match="toy"):
        replace(STUDY, claims=(Claim("?", "score", "high", "middle"),))


def test_what_is_kept_is_made_once_and_whole(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError):
        kept(tmp_path / "thing", fails)
    assert not (tmp_path / "thing").exists()
    made = [kept(tmp_path / "thing", lambda path: path.write_text("whole")) for _ in range(2)]
    assert made[0].read_text() == "whole"
    assert kept(tmp_path / "thing", fails) == made[0]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_describes_itself(name: str) -> None:
    study = load(name)
    assert study.name == name and study.num_seeds >= 3 and len(study.arms) > 1 and study.claims


def test_the_command_lists_the_studies(capsys) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(name in shown for name in STUDIES)
    with pytest.raises(SystemExit, match="2"):
        main(["proxies"])
    assert "pass --out DIR" in capsys.readouterr().err


def test_an_index_tells_what_came_out(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "STUDIES", {"toy": ("toy", "toys"), "never": ("never", "run")})
    with pytest.raises(UserError, match="no study"):
        runner.index(tmp_path)
    toy()
    (tmp_path / "out").rename(tmp_path / "toy")
    runner.index(tmp_path)
    row = "| [toy](toy/README.md) | High is. | 2 yes, 1 no, 1 undecided | 0 |"
    assert row in (tmp_path / "README.md").read_text()
    rows = tmp_path / "toy" / "rows.csv"
    rows.write_text("".join(line for line in rows.read_text().splitlines(keepends=True) if ",high," not in line))
    runner.index(tmp_path)
    assert "| not finished |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_small_study_by_the_command(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--size", "small"]
    main(["proxies", *options, "--seeds", "1", "--workers", "1"])
    rows = list(csv.DictReader((tmp_path / "out" / "rows.csv").open()))
    assert len(rows) == len(load("proxies").arms) * len(load("proxies").metrics)
    assert json.loads((tmp_path / "out" / "study.json").read_text())["size"] == "small"
    assert "<svg" in (tmp_path / "out" / "plot.svg").read_text()
