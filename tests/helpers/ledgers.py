"""Make a corpus of fragments only: the rows that stages would write, without media."""

import hashlib
from pathlib import Path

import pyarrow as pa

from clipmill.base.errors import ItemError
from clipmill.base.settings import Settings
from pipeline.engine import registry
from pipeline.runtime.task import Outcome, Task, commit
from pipeline.stages.stage import Stage
from shards.corpus.fragments import table_schema, write_commit
from shards.corpus.ledger import Ledger
from shards.corpus.schema import LEDGER

STAGES = tuple(stage.name for stage in registry.STAGES if isinstance(stage, Stage))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class FragmentCorpus:
    """Simulate a corpus: tests may change `fingerprints` and `content`; `work_off` does all pending work by stages."""

    def __init__(self, root: Path):
        self.root = root
        self.fingerprints = {stage: f"{stage}-1" for stage in STAGES}
        self.run = 0
        self.num_processed = dict.fromkeys(STAGES, 0)
        self.fail: dict[str, ItemError] = {}  # item → its error
        self.spans_of = {}  # video → spans
        self.bytes_of = {}  # video → its bytes
        self.open()

    def open(self) -> None:
        self.ledger = Ledger(self.root, registry.stages())
        self.synchronised = self.ledger.sync()

    def reopen(self) -> None:
        self.ledger.close()
        self.open()

    def add_sources(
        self, *video_ids: str, unit: str = "u000000", host: str = "127.0.0.1", volume: int = 0, **columns
    ) -> None:
        known = self.ledger.connection.execute("SELECT count(*) FROM ledger.main.all_sources").fetchall()[0][0]
        rows = [
            {
                "item_id": v,
                "unit": unit,
                "key": "i",
                "video_id": v,
                "url": f"http://{host}/{v}",
                "kind": "url",
                "ordinal": known + i,
                "volume": volume,
                **columns,
            }
            for i, v in enumerate(video_ids)
        ]
        name = f"ingest-{unit}-{known}"
        write_commit(
            self.root, name, {"sources": pa.Table.from_pylist(rows, table_schema("sources"))}, LEDGER.empty_table(), []
        )
        self.ledger.load([name])

    def refresh_state(self, run_id: str | None = None, units=None) -> dict[str, dict[str, int]]:
        self.ledger.refresh_state(self.fingerprints, units=units, run_id=run_id or f"run{self.run}", max_attempts=3)
        return self.ledger.counts()

    def work_off(self, stages=STAGES) -> dict[str, int]:
        """Run these stages once; return how many items each processed."""
        self.run += 1
        before = dict(self.num_processed)
        self.refresh_state()
        for stage in stages:
            for volume in self.ledger.volumes():
                self.ledger.show(volume)
                if items := self.ledger.work(stage):
                    self._do(stage, items)
        return {
            stage: self.num_processed[stage] - before[stage]
            for stage in stages
            if self.num_processed[stage] > before[stage]
        }

    def _do(self, stage: str, items: list[dict]) -> None:
        units = self.ledger.unit_of_work(stage)
        for unit in sorted({units[item["item_id"]] for item in items}):
            batch = [item for item in items if units[item["item_id"]] == unit]
            work = Task(stage, unit, batch, Settings(), self.fingerprints[stage], str(self.root), f"run{self.run}")
            outcomes = [self._outcome(stage, item) for item in batch]
            self.ledger.load([commit(work, outcomes, []).name])
            self.num_processed[stage] += len(batch)

    def _outcome(self, stage: str, item: dict) -> Outcome:
        if failure := self.fail.get(f"{stage}:{item['item_id']}"):
            return Outcome(item["item_id"], failure=failure)
        make = getattr(self, stage, lambda item: {})  # no rows for a stage whose table no other stage reads
        return Outcome(item["item_id"], make(item))

    def download(self, item: dict) -> dict:
        content = sha(self.bytes_of.get(item["video_id"], item["video_id"]))
        return {
            "downloads": [
                {
                    "video_id": item["video_id"],
                    "path": "/x",
                    "extractor": "file",
                    "sha256": content,
                    "duration_s": 60.0,
                    "subtitles": [],
                }
            ]
        }

    def transcribe(self, item: dict) -> dict:
        return {
            "transcripts": [
                {"video_id": item["video_id"], "language": "en", "origin": "manual", "words": [], "digest": "same"}
            ]
        }

    def segment(self, item: dict) -> dict:
        video_id, spans = item["video_id"], self.spans_of.get(item["video_id"], [(0.0, 10.0), (10.0, 20.0)])
        rows = [
            {
                "video_id": video_id,
                "clip_id": f"{video_id}.{n}",
                "n": n,
                "start_s": a,
                "end_s": b,
                "text": f"text {n}",
                "origin": "sentences",
            }
            for n, (a, b) in enumerate(spans)
        ]
        return {"spans": rows, "sentences": []}

    def cut(self, item: dict) -> dict:
        return {"clips": [self._clip(item, span) for span in item["spans"]]}

    def _clip(self, item: dict, span: dict) -> dict:
        picture = sha(f"{item['sha256']} {span['start_s']} {self.fingerprints['cut']}")
        return {
            "video_id": item["video_id"],
            "clip_id": span["clip_id"],
            "n": span["n"],
            "span_start_s": span["start_s"],
            "span_end_s": span["end_s"],
            "duration_s": span["end_s"] - span["start_s"],
            "frames": [{"time_s": 1.0, "sha256": picture, "offset": 0, "num_bytes": 1}],
            "frame_sha256": picture,
            "phash": [],
            "tar": "clips/x.tar",
        }

    def caption(self, item: dict) -> dict:
        frame, fingerprint = item["frames"][0]["sha256"], self.fingerprints["caption"]
        row = {
            "clip_id": item["clip_id"],
            "frame_index": 0,
            "frame_sha256": frame,
            "captioner": fingerprint,
            "fingerprint": fingerprint,
        }
        return {"captions": [{**row, "text": f"{fingerprint} saw {frame[:6]}", "score": -0.5}]}

    def score(self, item: dict) -> dict:
        return {
            "scores": [
                {
                    "clip_id": item["clip_id"],
                    "model": "m",
                    "frame_sha256": item["frame_sha256"],
                    "caption_similarity": 0.5,
                }
            ]
        }

    def served_captions(self) -> dict[str, str]:
        self.refresh_state()
        rows = self.ledger.connection.execute(
            "SELECT clip_id, text FROM current_captions WHERE current ORDER BY 1"
        ).fetchall()
        return dict(rows)
