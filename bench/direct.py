"""Do the work of a build without its engine: every stage's worker code in this process, item after item.

    python -m bench.direct CORPUS OUT      repeats the work of CORPUS under OUT (`bench.build` runs it)

It takes the items from CORPUS's ledger and writes clips and shards, but no ledger, fragments or manifest.
"""

import shutil
import sys
from pathlib import Path

from pipeline.engine.registry import fingerprints, stages
from pipeline.engine.settings import validate
from pipeline.runtime.task import Task, limit_threads
from pipeline.stages.pack import plan_shards, select_samples
from shards.corpus.folder import Corpus
from shards.corpus.ledger import Ledger
from shards.packing.pack import commit_shards, rows_by_shard, write_shard
from shards.query.sql import open_manifest


def main() -> None:
    corpus, out = Corpus(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(corpus.root, out, ignore=shutil.ignore_patterns("shards", ".clipmill"))
    settings = validate(corpus.load_settings())
    limit_threads()
    for stage, unit, items in _work_of(corpus, settings):
        section = getattr(settings, stage.name)
        work = Task(stage.name, unit, items, section, stage.fingerprint(section), str(out), "direct")
        outcomes, _ = stage.run(work)
        assert not any(outcome.failure for outcome in outcomes), outcomes
    with open_manifest(corpus.root) as connection:
        plans = plan_shards(select_samples(connection, settings.pack), settings.pack)
        for plan, rows in rows_by_shard(connection, plans):
            write_shard(plan, rows, out)
        commit_shards(out, plans)


def _work_of(corpus: Corpus, settings):
    """Yield all items of the finished corpus by stage and unit."""
    ledger = Ledger(corpus.root, stages())
    names = [stage.name for stage in stages()]
    ledger.refresh_state(fingerprints(settings), units=None, run_id="direct", max_attempts=1)
    for name in names:
        ledger.mark_pending(name, ledger.items_of(name))
    ledger.refresh_state(fingerprints(settings), units=None, run_id="direct", max_attempts=1)
    for stage in stages():
        units, by_unit = ledger.unit_of_work(stage.name), {}
        for item in ledger.work(stage.name):
            by_unit.setdefault(units[item["item_id"]], []).append(item)
        for unit, items in sorted(by_unit.items()):
            yield stage, unit, items
    ledger.close()


if __name__ == "__main__":
    main()
