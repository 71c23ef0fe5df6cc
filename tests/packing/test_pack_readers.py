"""Unmodified webdataset, open_clip, Hugging Face datasets and Energon read the shards."""

import json
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards.packing.index import read_index
from shards.query.sql import open_manifest
from tests.helpers.shards import change_manifest, decode_frames, digest, list_members, make_corpus, pack

NUM_CLIPS = 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Make a packed corpus whose first samples lack a caption and a few of whose others have no text."""
    root = make_corpus(tmp_path_factory.mktemp("readers") / "corpus", NUM_CLIPS)
    plans = pack(root)
    first = ", ".join(f"'{clip_id}'" for clip_id in plans[0].clip_ids.to_pylist())
    change_manifest(root, f"DELETE FROM captions WHERE clip_id IN ({first})")
    change_manifest(root, f"UPDATE scores SET subtitle_similarity = NULL WHERE clip_id IN ({first})")
    change_manifest(root, "UPDATE clips SET text = '', num_words = 0 WHERE num_frames = 4")
    for path in (root / "shards").iterdir():
        path.unlink()
    pack(root)
    return root


@pytest.fixture(scope="module")
def clips(packed):
    with open_manifest(packed) as connection:
        rows = connection.sql("SELECT * FROM catalog").to_arrow_table().to_pylist()
    return {row["clip_id"]: row for row in rows}


@pytest.fixture(scope="module")
def tars(packed):
    return [str(path) for path in sorted((packed / "shards").glob("*.tar"))]


def test_webdataset_groups_the_members_and_decodes_them(tars, clips):
    import webdataset as wds

    dataset = wds.WebDataset(tars, shardshuffle=False).decode("pil")
    seen = []
    for sample in dataset:
        clip = clips[sample["json"]["clip_id"]]
        assert {"mp4", "jpg", "txt", "json"} <= sample.keys()
        assert "." not in sample["__key__"] and sample["__key__"] == sample["json"]["key"]
        assert sample["txt"] == clip["text"]
        assert sample["jpg"].size == (64, 48)
        assert digest(sample["mp4"]) == clip["sha256"]
        assert decode_frames(sample["mp4"]) == clip["num_frames"]
        seen.append(clip["clip_id"])
    assert sorted(seen) == sorted(clips)


def open_clip_loader(tars, **options):
    """Return open_clip's own loader, as `--dataset-type webdataset` builds it."""
    data = pytest.importorskip("open_clip_train.data", reason="open_clip's training package is not installed")
    import torch

    torch.set_num_threads(1)
    arguments = SimpleNamespace(
        train_data="::".join(tars), val_data="::".join(tars), train_num_samples=NUM_CLIPS, val_num_samples=NUM_CLIPS,
        dataset_resampled=False, seed=0, train_data_upsampling_factors=None, batch_size=4, workers=0, world_size=1,
    )  # fmt: skip
    picture_size, text_length = lambda picture: torch.tensor(picture.size), lambda text: [torch.tensor([len(text)])]
    return data.get_wds_dataset(arguments, picture_size, tokenizer=text_length, **options).dataloader


def check_pairs(loader, clips):
    sizes, lengths = zip(*((sizes.tolist(), lengths.flatten().tolist()) for sizes, lengths in loader), strict=True)
    assert sum(sizes, []) == [[64, 48]] * NUM_CLIPS
    assert sorted(sum(lengths, [])) == sorted(len(clip["text"]) for clip in clips.values())


def test_open_clip_evaluates_on_pictures_and_texts(tars, clips):
    check_pairs(open_clip_loader(tars, is_train=False), clips)


def test_open_clip_trains_on_pictures_and_texts(tars, clips, monkeypatch):
    """From webdataset 0.2.96 on, open_clip's training loader fails on every tar because webdataset marks its end
    (webdataset issue 384). If a plain tar fails in that way too, the published fix is applied first.
    """
    from open_clip_train import data

    if not reads_plain_tar(tars[0]):
        monkeypatch.setattr(data, "tar_file_expander", partial(data.tar_file_expander, eof_value=None))
    check_pairs(open_clip_loader(tars, is_train=True), clips)


def reads_plain_tar(tar) -> bool:
    """Return whether open_clip's training reader reaches the end of a tar that Python's tarfile wrote."""
    from open_clip_train import data

    copy = str(tar) + ".plain"
    with tarfile.open(tar) as source, tarfile.open(copy, "w") as target:
        for info in source:
            target.addfile(info, source.extractfile(info))
    try:
        return bool(list(data.tarfile_to_samples_nothrow([{"url": copy}])))
    except KeyError as error:
        assert error.args == ("fname",)
        return False
    finally:
        Path(copy).unlink()


def test_hugging_face_datasets_loads_them_though_the_first_samples_lack_columns(tars, clips, tmp_path):
    """It infers types from the first five samples, which have no caption here."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", cache_dir=str(tmp_path))
    rows = rows.with_format("arrow")[:]
    assert sorted(values["clip_id"] for values in rows["json"].to_pylist()) == sorted(clips)
    for values, text, video in zip(*(rows[name].to_pylist() for name in ("json", "txt", "mp4")), strict=True):
        clip = clips[values["clip_id"]]
        assert text == clip["text"]
        assert digest(video["bytes"]) == clip["sha256"]


def test_energon_finds_the_samples_and_their_parts(tars, clips, tmp_path):
    """The test runs `energon prepare` on the unchanged shards and reads its index."""
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    folder = tmp_path / "energon"
    folder.mkdir()
    for tar in tars:
        (folder / tar.rpartition("/")[2]).symlink_to(tar)
    found = BaseWebdatasetFactory.prepare_dataset(
        EPath(folder), [tar.rpartition("/")[2] for tar in tars], split_parts_ratio=[("train", 1.0)], workers=1
    )
    assert found == {"mp4", "jpg", "txt", "json"}
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    assert sum(info["shard_counts"].values()) == len(clips)


def test_the_layout_that_energon_asks_for(packed, tars):
    """Members of a sample are adjacent, keys end at the first dot and are unique, and all samples are alike."""
    keys = []
    for tar in tars:
        names = [member.name for member in list_members(tar)]
        for start in range(0, len(names), 4):
            stems, extensions = zip(*(name.split(".", 1) for name in names[start : start + 4]), strict=True)
            assert len(set(stems)) == 1 and extensions == ("jpg", "json", "mp4", "txt")
            keys.append(stems[0])
        assert (
            keys[-(len(names) // 4) :]
            == read_index((packed / "shards" / tar).with_suffix(".parquet"))["key"].to_pylist()
        )
    assert len(set(keys)) == len(keys) == NUM_CLIPS
