"""Make a small model with a small vocabulary, and selections of a small packed corpus to evaluate it on."""

from pathlib import Path
from typing import Any

import torch

from shards.packing.pack import PackSettings
from tests.helpers.clip_vip import tiny_model
from tests.helpers.shards import change_manifest, make_corpus, pack
from training.data.selection import Selection, freeze
from training.models.clip4clip.model import Clip4Clip
from training.models.clip4clip.settings import Clip4ClipSettings
from training.models.clip_vip.model import ClipVip
from training.parallel.distributed import Process
from training.run.settings import RunSettings, resolve

# The words of tests/helpers/manifests.py, so that no text consists of unknown words only.
WORDS = tuple("red blue circle square moves left right the a over sea field we see now then".split())
ALONE = Process(torch.device("cpu"))


def small_model(seed: int = 0, **changes: Any) -> ClipVip:
    return tiny_model(seed, vocab_size=len(WORDS) + 4, words=WORDS, context_length=24, **changes)


def small_clip4clip(head: str) -> Clip4Clip:
    return Clip4Clip(small_model(num_added=0, num_times=0), Clip4ClipSettings(head=head, num_layers=1))


def small_settings(*assignments: str) -> RunSettings:
    base = ["data.num_frames=4", "data.max_text_tokens=24", "train.precision=fp32", "eval.batch_size=5"]
    return resolve(None, None, [*base, "data.loader_processes=0", *assignments])


def packed_corpus(root: Path, num_clips: int = 12, sql: str = "") -> Path:
    """Make a packed corpus whose clips all have different subtitles and captions, then change the manifest by `sql`."""
    assert num_clips <= len(WORDS)
    make_corpus(root, num_clips)
    first = f"list_extract({list(WORDS)}, 1 + k.n)"
    change_manifest(root, f"UPDATE clips k SET text = concat({first}, ' ', text)")
    change_manifest(
        root, f"UPDATE captions c SET text = concat({first}, ' ', c.text) FROM clips k WHERE k.clip_id = c.clip_id"
    )
    if sql:
        change_manifest(root, sql)
    pack(root, PackSettings(shard_bytes=1_000_000, max_samples=5))
    return root


def selected(corpus: Path, where: str = "") -> Selection:
    freeze(corpus / "eval.arrow", corpus, where)
    return Selection(corpus / "eval.arrow")


def damage(corpus: Path, selection: Selection, row: int) -> str:
    """Overwrite a clip's bytes in its shard."""
    clip = selection.take([row]).to_pylist()[0]
    with open(corpus / clip["shard"], "r+b") as shard:
        shard.seek(clip["mp4_offset"])
        shard.write(b"\0" * clip["mp4_bytes"])
    return clip["clip_id"]
