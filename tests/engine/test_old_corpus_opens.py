"""A corpus and a training run of an earlier version open, are up to date, and continue unchanged.

Both are in tests/data/old_corpus, whose README says what they hold and how they were made; recorded.json has the
values that the earlier version computed. They are never updated: if one differs, users' corpora would be built again,
or their runs would continue with other batches.

No recorded hash depends on the version of a library. Hashes of models cover the tag's name or the file's bytes. Losses
are fp32 on a CPU; other processors round differently.
"""

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from clipmill.cli.app import app
from pipeline.engine.build import session
from pipeline.engine.registry import fingerprints
from pipeline.engine.settings import resolve
from shards.corpus.fragments import commit_name

DATA = Path(__file__).parents[1] / "data" / "old_corpus"
RECORDED = json.loads((DATA / "recorded.json").read_text())

NUM_FAILED = 2  # sources of the corpus: a missing page, and one that is not a video
STAGES = ("download", "transcribe", "segment", "cut", "caption", "score", "pack")
LAST_STEP, NUM_STEPS = 8, 12  # of the run: where it was stopped, and its length
REWRITTEN = ("manifest.duckdb", "README.txt", "corpus.yaml")  # which a later version may complete

# The parts of a corpus that a user may keep: everything, everything but the cache, or only what cannot be rebuilt.
AS_IT_WAS, NO_CACHE, NO_MANIFEST = "as it was", "with an empty cache", "without cache and manifest"
NO_FOLDER = "without the cache's folder"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(DATA / "corpus_and_run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def copy_of_corpus(unpacked: Path, folder: Path, kind: str = AS_IT_WAS) -> Path:
    corpus = Path(shutil.copytree(unpacked / "corpus", folder / "corpus"))
    if kind != AS_IT_WAS:
        shutil.rmtree(corpus / ".clipmill")
    if kind == NO_CACHE:
        (corpus / ".clipmill").mkdir()
    if kind == NO_MANIFEST:
        (corpus / "manifest.duckdb").unlink()
    return corpus


def copy_of_run(unpacked: Path, folder: Path, corpus: Path) -> Path:
    """Copy the run and update the corpus path in its selections."""
    run = Path(shutil.copytree(unpacked / "run", folder / "run"))
    for path in (run / "selection.arrow", run / "eval.arrow"):
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        metadata = table.schema.metadata | {b"root": str(corpus).encode()}
        with pa.ipc.new_file(path, table.schema.with_metadata(metadata)) as writer:
            writer.write_table(table)
    return run


def clipmill(*arguments: str | Path, code: int = 0) -> str:
    """Run the command in this process; returns its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def assigned(settings: list[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def settings_of(path: Path) -> dict:
    """Return the settings in a corpus.yaml or run.yaml."""
    return yaml.safe_load(path.read_text())["settings"]


def hashes(corpus: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the corpus that is never rewritten."""
    names = [str(path.relative_to(corpus)) for path in corpus.rglob("*") if path.is_file()]
    kept = [name for name in names if not name.startswith(".clipmill/") and name not in REWRITTEN]
    return {name: hashlib.sha256((corpus / name).read_bytes()).hexdigest() for name in kept}


def leaves(settings: dict, prefix: str = "") -> dict[str, str]:
    """Return every setting by its dotted name, as text; a later version may add some."""
    found = {}
    for name, value in settings.items():
        inner = (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": repr(value)}
        )
        found |= inner
    return found


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_it_is_the_corpus_that_was_recorded(unpacked):
    assert hashes(unpacked / "corpus") == RECORDED["files"]
    assert any(name.startswith("sources/") for name in RECORDED["files"]), "sources should be kept"


@pytest.mark.parametrize("kind", [AS_IT_WAS, NO_CACHE, NO_FOLDER])
def test_status_finds_nothing_to_do(unpacked, tmp_path, kind):
    corpus = copy_of_corpus(unpacked, tmp_path, kind)
    rows = status_of(corpus)
    assert list(rows) == list(STAGES)
    for stage, counts in rows.items():
        assert counts.pop("done") > 0, stage
        assert counts.pop("failed") == (NUM_FAILED if stage == "download" else 0), stage
        assert "pending" in counts and not any(counts.values()), stage
    assert hashes(corpus) == RECORDED["files"]


def status_of(corpus: Path) -> dict[str, dict[str, int]]:
    """Return {stage: {column: number}} from the printed table, whose numbers are right-aligned with the headings."""
    header, *rows = clipmill("status", corpus).splitlines()
    columns = [(match.group(), match.end()) for match in re.finditer(r"\S+", header)]
    starts = [len("transcribe"), *(end for _, end in columns[1:-1])]
    found = {}
    for row in rows:
        if (stage := row.split(" ")[0]) in STAGES:
            cells = {name: row[start:end] for (name, end), start in zip(columns[1:], starts, strict=True)}
            found.setdefault(stage, {name: int(cell.strip() or 0) for name, cell in cells.items()})
    return found


@pytest.mark.parametrize("kind", [AS_IT_WAS, NO_CACHE, NO_MANIFEST])
def test_a_build_has_nothing_to_do(unpacked, tmp_path, kind):
    corpus = copy_of_corpus(unpacked, tmp_path, kind)
    settings = settings_of(corpus / "corpus.yaml")
    clipmill("build", "--corpus", corpus)  # some sources failed in its old runs, which does not count
    assert hashes(corpus) == RECORDED["files"], "and no row of a run, which any build would leave"
    assert leaves(settings).items() <= leaves(settings_of(corpus / "corpus.yaml")).items()
    clipmill("verify", "--no-decode", corpus)


def test_verify_is_clean(unpacked):
    assert re.search(rf"\b{len(RECORDED['rows']['samples'])}\b", clipmill("verify", unpacked / "corpus"))


def test_tables_and_views_have_the_columns_and_rows_that_they_had(unpacked, tmp_path):
    """The manifest is published by this version from the old fragments."""
    corpus = copy_of_corpus(unpacked, tmp_path, NO_MANIFEST)
    clipmill("build", "--corpus", corpus)
    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        sql = "SELECT table_name, column_name, data_type FROM information_schema.columns"
        types = {(table, column): kind for table, column, kind in connection.sql(sql).fetchall()}
        for table, columns in RECORDED["columns"].items():
            assert {column: types.get((table, column)) for column in columns} == columns, table
        for table, recorded in RECORDED["rows"].items():
            columns = ", ".join(f'"{name}"' for name in recorded[0])
            rows = connection.sql(f"SELECT {columns} FROM {table}").to_arrow_table().to_pylist()
            assert in_order(rows) == in_order(recorded), table


def in_order(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def test_shards_packed_anew_are_the_same_bytes(unpacked, tmp_path):
    corpus = copy_of_corpus(unpacked, tmp_path)
    tars = {name: digest for name, digest in RECORDED["files"].items() if re.fullmatch(r"shards/\d+\.tar", name)}
    indexes = {path: pq.read_table(path) for path in (corpus / "shards").glob("*.parquet")}
    assert len(tars) == len(indexes) == 2
    for name in tars:
        (corpus / name).unlink()
    clipmill("run", "pack", "--redo", "--corpus", corpus)
    assert {name: digest for name, digest in hashes(corpus).items() if name in tars} == tars
    assert all(pq.read_table(path).equals(table) for path, table in indexes.items())


# Columns of a clip that no encoder version or processor's rounding changes, and columns that rounding may change a bit.
SAME = ("span_start_s", "span_end_s", "start_s", "end_s", "num_frames", "fps", "width", "height", "codec", "has_audio")
SAME += ("text", "num_words", "num_sentences", "origin", "language", "transcript_origin")
SAME += ("caption", "captioner", "shard")
NEAR = ("motion", "brightness", "align_cost", "caption_score", "subtitle_similarity", "caption_similarity")


@pytest.mark.slow
def test_stages_done_again_make_the_same_clips(local_ray, unpacked, tmp_path):
    """The workers of a real build run every stage after the download from the kept sources."""
    corpus = copy_of_corpus(unpacked, tmp_path, NO_MANIFEST)
    made = [*corpus.glob("fragments/*/*.parquet"), *corpus.glob("clips/*"), *corpus.glob("shards/*")]
    for path in made:
        if not path.name.startswith(("ingest-", "download-")):
            path.unlink()
    clipmill("trust", corpus)  # its settings let it download from this machine
    clipmill("build", "--corpus", corpus)
    assert {path.stem for path in corpus.glob("fragments/ledger/*.parquet")} == RECORDED["commits"].keys()
    with duckdb.connect(str(corpus / "manifest.duckdb"), read_only=True) as connection:
        catalog = connection.sql("FROM catalog ORDER BY clip_id").to_arrow_table().to_pylist()
    recorded = RECORDED["rows"]["catalog"]
    assert [row["clip_id"] for row in catalog] == [row["clip_id"] for row in recorded]
    for name in SAME:
        assert [row[name] for row in catalog] == [row[name] for row in recorded], name
    for name in NEAR:
        assert numbers(catalog, name) == pytest.approx(numbers(recorded, name), rel=0.02, abs=0.01), name


def numbers(rows: list[dict], name: str) -> dict[str, float]:
    return {row["clip_id"]: row[name] for row in rows if row[name] is not None}


# -- fingerprints, keys, names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED["fingerprints"])
def test_fingerprints_of_stages_are_the_same_bytes(unpacked, name):
    """This covers the defaults, recipes, changed settings and the corpus's own settings."""
    recorded = RECORDED["fingerprints"][name]
    saved = settings_of(unpacked / "corpus" / "corpus.yaml") if name == "the corpus" else None
    assert fingerprints(resolve(saved, recorded["recipe"], recorded["set"])) == recorded["stages"]


@pytest.mark.parametrize("change", RECORDED["keys"])
def test_keys_of_all_items_are_the_same_bytes(unpacked, tmp_path, change):
    """This covers the corpus with its own settings and the items that a changed setting makes pending."""
    recorded, found = RECORDED["keys"][change], {}
    corpus = copy_of_corpus(unpacked, tmp_path, NO_CACHE)
    with session(corpus, None, recorded["set"], "test", create=False) as (current, _):
        current.refresh_state()
        for stage in recorded["stages"]:
            rows = current.ledger.connection.sql(f"SELECT item_id, key, status FROM state_{stage}").fetchall()
            found[stage] = {item: [key, status] for item, key, status in rows}
    assert found == recorded["stages"]


def test_commits_are_named_as_their_work(unpacked):
    """A commit's name is a hash of its items and their keys, so the same work gets the same name."""
    for name, rows in RECORDED["commits"].items():
        path = unpacked / "corpus" / "fragments" / "ledger" / f"{name}.parquet"
        assert pq.read_table(path, columns=list(rows[0])).to_pylist() == rows
        if rows[0]["stage"] != "ingest":
            items = {(row["item_id"], row["key"]) for row in rows}
            assert commit_name(rows[0]["stage"], rows[0]["unit"], items) == name


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [LAST_STEP, 4])
def test_the_run_resumes_with_the_batches_and_losses_that_it_would_have_had(unpacked, tmp_path, step):
    """The run resumes from its last checkpoint, and from the one before if the last is missing."""
    corpus = copy_of_corpus(unpacked, tmp_path)
    run, recorded = copy_of_run(unpacked, tmp_path, corpus), RECORDED["run"]
    if step != LAST_STEP:
        shutil.rmtree(run / "checkpoints" / f"step-{LAST_STEP:08d}")
    before = lines(run / "log.jsonl")
    clipmill("train", "--run", run, "--corpus", corpus)
    log = lines(run / "log.jsonl")
    assert log[:step] == before[:step] and log[step]["wall_s"] > before[step - 1]["wall_s"]
    assert [row["step"] for row in log] == list(range(1, NUM_STEPS + 1))
    for name in ("step", "epoch", "batch"):
        assert [row[name] for row in log] == [row[name] for row in recorded["steps"]], name
    for name in recorded["steps"][0].keys() - {"step", "epoch", "batch"}:
        assert [row[name] for row in log] == pytest.approx([row[name] for row in recorded["steps"]], rel=2e-3), name
    assert [row["step"] for row in lines(run / "eval.jsonl")] == recorded["evaluations"]
    seen = {row["clip_id"]: row["times_seen"] for row in pq.read_table(run / "feedback.parquet").to_pylist()}
    assert seen == {row["clip_id"]: row["times_seen"] for row in recorded["feedback"]}
    assert not (run / "failures.jsonl").exists() or not lines(run / "failures.jsonl")


@pytest.mark.parametrize("name", RECORDED["selections"])
def test_selections_and_orders_of_new_runs_are_the_same(unpacked, tmp_path, name):
    """Runs with the old settings, some of them changed, plan the recorded two epochs."""
    recorded = RECORDED["selections"][name]
    run, recipe = tmp_path / "new", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings_of(unpacked / "run" / "run.yaml")))
    init = unpacked / "run" / "checkpoints" / f"step-{LAST_STEP:08d}"
    settings = assigned([*recorded["set"], "train.max_steps=1"])
    clipmill("train", "--run", run, "--corpus", unpacked / "corpus", "--recipe", recipe, "--init", init, *settings)
    clips = frozen_clips(run / "selection.arrow", recorded)
    if recorded["held_out"]:
        frozen_clips(run / "eval.arrow", recorded["held_out"])
    assert lines(run / "log.jsonl")[0]["batch"] == recorded["batch"]
    batches = planned(run, recorded["plan"], 0, clips)
    clipmill("train", "--run", run, "--set", f"train.max_steps={len(batches) + 1}")
    batches += planned(run, recorded["plan"], 1, clips)
    assert len(batches) >= 4
    assert batches[: len(recorded["batches"])] == recorded["batches"][: len(batches)]


def planned(run: Path, fingerprint: str, epoch: int, clips: list[str]) -> list[list[str | None]]:
    """Return the clips of an epoch's batches from its file, with None for a hole."""
    rows = np.load(run / "plan" / f"plan-{fingerprint}-{epoch:05d}.npy")
    return [[clips[row] if row < len(clips) else None for row in batch] for batch in rows.tolist()]


def frozen_clips(path: Path, recorded: dict) -> list[str]:
    """Check that the selection is the recorded one and return its clips."""
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    for name in ("hash", "snapshot"):
        assert table.schema.metadata[name.encode()].decode() == recorded.get(name, ""), name
    assert table["clip_id"].to_pylist() == recorded["clips"]
    return recorded["clips"]
