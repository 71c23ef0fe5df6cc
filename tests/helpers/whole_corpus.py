"""Make a complete small corpus quickly: the rows and media of every stage, committed without Ray or decoding.

The file, title, words and pictures of each video are derived from its id, so that tests can tell videos apart.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.engine.build import Silent, session
from pipeline.runtime.task import Outcome, Task, commit
from pipeline.stages import pack as pack_stage
from pipeline.stages.ingest.stage import ingest_sources
from shards.packing.tar import Blob, write_clips_tar
from tests.helpers.builds import write_list
from tests.helpers.shards import jpeg_bytes, mp4_bytes

SETTINGS = ["ingest.unit_videos=3", "pack.max_samples=4", "download.allow_private_addresses=true"]
CLIPS_PER_VIDEO = 3
VIDEOS = [f"video-{letter}" for letter in "abcdefgh"]  # of the fixture `whole`


def url_of(video_id: str) -> str:
    return f"http://127.0.0.1:9/videos/{video_id}/film.mp4"


def write_sources(path: Path, video_ids: list[str]) -> Path:
    return write_list(path, [{"id": v, "url": url_of(v), "title": f"title of {v}"} for v in video_ids])


def build_whole(
    root: Path,
    sources: Path,
    same_file: dict[str, str] | None = None,
    command: str = "test",
    settings: Sequence[str] = (),
) -> None:
    """Ingest, run all stages and pack. `same_file` maps a video to another one with the same bytes."""
    with session(root, None, [*SETTINGS, *settings], command, create=True) as (current, _):
        current.record_run(ended=True)
        ingest_sources(current, [str(sources)])
        for stage in _MAKERS:
            current.refresh_state()
            for volume in current.ledger.volumes_with_work([stage]):
                current.ledger.show(volume)
                _do(current, stage, same_file or {})
        current.publish()
        pack_here(current)
        current.publish()


def pack_here(current) -> pack_stage.PackReport:
    """Pack all shards in this process."""
    few, pack_stage.FEW_SHARDS = pack_stage.FEW_SHARDS, 1000
    try:
        return pack_stage.pack_corpus(current, Silent(), write=True, redo=False)
    finally:
        pack_stage.FEW_SHARDS = few


def _do(current, stage: str, same_file: dict[str, str]) -> None:
    units = current.ledger.unit_of_work(stage)
    items = current.ledger.work(stage)
    for unit in sorted(set(units.values())):
        some = [item for item in items if units[item["item_id"]] == unit]
        work = Task(
            stage, unit, some, current.settings.cut, f"{stage}-settings", str(current.corpus.root), current.run_id
        )
        outcomes, media = _MAKERS[stage](work, same_file)
        current.ledger.load([commit(work, outcomes, media).name])


def _download(work: Task, same_file: dict[str, str]):
    folder, outcomes = Path(work.root) / "sources" / work.unit, []
    folder.mkdir(parents=True, exist_ok=True)
    for item in work.items:
        video_id = item["video_id"]
        content = source_bytes(same_file.get(video_id, video_id))
        (folder / f"{video_id}.mp4").write_bytes(content)
        (folder / f"{video_id}.en.vtt").write_text(f"WEBVTT\n\n00:00.000 --> 00:02.000\n{spoken(video_id)}\n")
        row = {
            "video_id": video_id,
            "path": f"sources/{work.unit}/{video_id}.mp4",
            "num_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "duration_s": 30.0,
            "subtitles": [],
            "extractor": "http",
        }
        outcomes.append(Outcome(item["item_id"], {"downloads": [row]}))
    return outcomes, []


def source_bytes(video_id: str) -> bytes:
    return hashlib.shake_256(video_id.encode()).digest(5000)


def spoken(video_id: str) -> str:
    return f"the password of {video_id} is sesame{video_id}"


def _transcribe(work: Task, _):
    return [
        Outcome(
            item["item_id"],
            {
                "transcripts": [
                    {
                        "video_id": item["video_id"],
                        "language": "en",
                        "origin": "sidecar",
                        "word_times": "cues",
                        "words": [
                            {"text": word, "start_s": 0.0, "end_s": 1.0} for word in spoken(item["video_id"]).split()
                        ],
                        "num_words": 6,
                        "digest": f"said {item['video_id']}",
                        "source_sha256": item["sha256"],
                    }
                ]
            },
        )
        for item in work.items
    ], []


def _segment(work: Task, _):
    outcomes = []
    for item in work.items:
        rows = [
            {
                "video_id": item["video_id"],
                "clip_id": f"{item['video_id']}.{n}",
                "n": n,
                "start_s": n * 10.0,
                "end_s": n * 10.0 + 4,
                "text": f"{spoken(item['video_id'])} part {n}",
                "num_words": 8,
                "source_sha256": item["sha256"],
            }
            for n in range(CLIPS_PER_VIDEO)
        ]
        spans = [{**row, "origin": "sentences", "num_sentences": 1} for row in rows]
        outcomes.append(Outcome(item["item_id"], {"sentences": rows, "spans": spans}))
    return outcomes, []


def _cut(work: Task, _):
    root, name = Path(work.root), f"clips/{work.name}.tar"
    scratch, blobs, outcomes = root / "clips" / "scratch", [], []
    with open(scratch, "wb") as file:
        for item in work.items:
            rows = []
            for span in item["spans"]:
                number = int.from_bytes(hashlib.sha256(span["clip_id"].encode()).digest()[:4], "big")
                pieces = {"mp4": mp4_bytes(number, 3, 0), "0.jpg": jpeg_bytes(number, 0)}
                for extension, data in pieces.items():
                    blobs.append(Blob(f"{span['clip_id']}.{extension}", scratch, file.tell(), len(data)))
                    file.write(data)
                rows.append(_clip_row(item, span, pieces["mp4"], pieces["0.jpg"]))
            outcomes.append(Outcome(item["item_id"], {"clips": rows}))
    offsets = {member.name: member.offset for member in write_clips_tar(root / name, blobs)}
    scratch.unlink()
    for row in (row for outcome in outcomes for row in outcome.rows["clips"]):
        row |= {"tar": name, "mp4_offset": offsets[f"{row['clip_id']}.mp4"]}
        row["frames"][0]["offset"] = offsets[f"{row['clip_id']}.0.jpg"]
    return outcomes, [name]


def _clip_row(item: dict, span: dict, mp4: bytes, jpg: bytes) -> dict:
    picture = hashlib.sha256(jpg).hexdigest()
    look = int.from_bytes(
        hashlib.sha256(b"" if span["n"] == 0 and item["video_id"] in ALIKE else mp4).digest()[:8], "big"
    )
    return {
        "video_id": item["video_id"],
        "clip_id": span["clip_id"],
        "n": span["n"],
        "span_start_s": span["start_s"],
        "span_end_s": span["end_s"],
        "start_s": span["start_s"],
        "end_s": span["end_s"],
        "duration_s": 1.0,
        "num_frames": 3,
        "fps": 3.0,
        "width": 64,
        "height": 48,
        "codec": "h264",
        "has_audio": False,
        "num_bytes": len(mp4),
        "sha256": hashlib.sha256(mp4).hexdigest(),
        "frames": [{"time_s": span["start_s"], "sha256": picture, "num_bytes": len(jpg)}],
        "frame_time_s": span["start_s"],
        "frame_sha256": picture,
        "motion": 0.1,
        "brightness": 0.5,
        "phash": [look, look, look],
        "source_sha256": item["sha256"],
    }


ALIKE = ("video-b", "video-e")  # their first clips look alike, and the group is named after video-b's


def _caption(work: Task, _):
    return [
        Outcome(
            item["item_id"],
            {
                "captions": [
                    {
                        "clip_id": item["clip_id"],
                        "frame_index": 0,
                        "frame_sha256": item["frames"][0]["sha256"],
                        "captioner": "demo",
                        "fingerprint": work.fingerprint,
                        "text": f"a picture of {item['clip_id']}",
                        "score": -0.5,
                    }
                ]
            },
        )
        for item in work.items
    ], []


def _score(work: Task, _):
    return [
        Outcome(
            item["item_id"],
            {
                "scores": [
                    {
                        "clip_id": item["clip_id"],
                        "model": "demo",
                        "fingerprint": work.fingerprint,
                        "frame_sha256": item["frame_sha256"],
                        "caption_similarity": 0.3,
                    }
                ]
            },
        )
        for item in work.items
    ], []


_MAKERS = {
    "download": _download,
    "transcribe": _transcribe,
    "segment": _segment,
    "cut": _cut,
    "caption": _caption,
    "score": _score,
}
