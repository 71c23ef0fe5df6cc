"""Readers of the retrieval benchmarks' published annotation files; each fills an `Annotations`.

A reader selects the videos and texts that the benchmark's protocol uses: every text it adds is a reference text of its
video, and `split` is its purpose. If the original files are missing, the lists that CLIP-ViP's configurations
name (JSON lines of clip_id and text) are read instead. Files are untrusted. Layouts and protocols: docs/benchmarks.md.
"""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipmill.base.errors import UserError
from pipeline.stages.ingest.benchmarks.annotations import Annotations, Entry
from pipeline.stages.ingest.benchmarks.folder import (
    Folder,
    of_type,
    read_csv,
    read_json,
    read_json_lines,
    read_lines,
    read_pickle,
)
from pipeline.stages.ingest.list_files import is_unicode

Reader = Callable[[Folder, Annotations], None]
Names = dict[str, tuple[str, ...]]  # split → file names; the first that exists is read
Rows = list[tuple[str, dict]]  # (location, object) of a JSON list

DIDEMO_SEGMENT_S = 5.0  # annotators chose among segments of this length …
DIDEMO_END_S = 31.0  # … in the part of a video that they saw; the bound is CLIP4Clip's
MSRVTT_EXTRA = {"category": "category", "url": "source_url", "start time": "start_s", "end time": "end_s"}
LISTS: Names = {split: (f"{split}_list.txt",) for split in ("train", "val", "test")}


# --- MSR-VTT --------------------------------------------------------------------------------------------------------


def msrvtt_1ka(train_csv: str, train_jsonl: str | None) -> Reader:
    """Make a reader of MSR-VTT's 1k-A split.

    Training videos have all their sentences, test videos only the one that the csv selects.
    """
    test: Names = {"test": ("MSRVTT_JSFUSION_test.csv", "test1ka.jsonl")}
    train: Names = {"train": (train_csv, train_jsonl) if train_jsonl else (train_csv,)}

    def read(folder: Folder, found: Annotations) -> None:
        needed = _files(folder, train | test)
        for split, path in needed.items():
            if path.suffix == ".jsonl":
                _read_clip_vip(path, split, found, paragraph=False)
            elif split == "test":
                for place, row in read_csv(path, ("video_id", "sentence"), found.problems):
                    found.add_video(row["video_id"], split, place)
                    found.add_text(row["video_id"], row["sentence"], f"{place}#sentence")
            else:
                for place, row in read_csv(path, ("video_id",), found.problems):
                    found.add_video(row["video_id"], split, place)
        if "train" in needed and needed["train"].suffix == ".csv":
            _add_sentences(_msrvtt_data(folder, found), found, wanted="train")

    return read


def msrvtt_full(folder: Folder, found: Annotations) -> None:
    """Read the splits of the data file itself (train, val, test), each with all sentences."""
    data = _msrvtt_data(folder, found)
    for videos, _ in data:
        for place, video in videos:
            split = video.get("split")
            if split in ("train", "validate", "test"):
                found.add_video(video.get("video_id"), "val" if split == "validate" else split, place)
            else:
                found.problem(place, "bad-line", f"split is {split!r}; expected train, validate or test")
    _add_sentences(data, found, wanted=None)


def _add_sentences(data: list[tuple[Rows, Rows]], found: Annotations, wanted: str | None) -> None:
    """Add the sentences of a split's videos (None: of all splits).

    Sentences of other videos in the data file are skipped.
    """
    for videos, sentences in data:
        listed = {str(row.get("video_id")) for _, row in videos}
        for _, row in videos:
            if row.get("video_id") in found:
                kept = {name: row.get(column) for column, name in MSRVTT_EXTRA.items()}
                found[row["video_id"]].extra |= {name: value for name, value in kept.items() if _is_json_scalar(value)}
        for place, row in sentences:
            video = row.get("video_id")
            if video in found:
                if wanted in (None, found[video].split):  # else a test video, which has the one sentence of its list
                    found.add_text(video, row.get("caption"), f"{place}/caption")
            elif str(video) not in listed:  # else a video that the protocol does not use
                found.unknown(video, place)


def _msrvtt_data(folder: Folder, found: Annotations) -> list[tuple[Rows, Rows]]:
    """Return (videos, sentences) of the single data file, or of each of the two earlier files."""
    names = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
    paths = [path for path in map(folder.file, names) if path]
    if not paths:
        needed = f"{names[0]}, or {names[1]} and {names[2]}"
        raise UserError(f"SOURCES: {folder.argument}: no annotation file found; it needs {needed}")
    if paths[0].name == names[0]:
        paths = paths[:1]
    tables = []
    for path in paths:
        data = of_type(read_json(path, found.problems), dict, path, "an object with videos and sentences")
        lists = {key: of_type(data.get(key), list, path, f"a list {key}") for key in ("videos", "sentences")}
        videos, sentences = (_objects(rows, f"{path}#/{key}", found) for key, rows in lists.items())
        tables.append((videos, sentences))
    return tables


# --- MSVD -----------------------------------------------------------------------------------------------------------


def msvd(folder: Folder, found: Annotations) -> None:
    """Read lists of videos by split, and about forty sentences for each video."""
    _read_lists(_files(folder, LISTS), found)
    names = ("raw-captions.pkl", "AllVideoDescriptions.txt", "video_corpus.csv", "MSR Video Description Corpus.csv")
    path = folder.file(*names)
    if path is None:
        needed = f"one of {', '.join(names)}"
        raise UserError(f"SOURCES: {folder.argument}: no annotation file found; it needs {needed}")
    if path.suffix == ".txt":  # a video's name, a space and a sentence; lines that start with # are comments
        for place, line in read_lines(path, found.problems):
            if not line.startswith("#"):
                video, _, sentence = line.partition(" ")
                found.add_text(video, sentence, place)
        return
    if path.suffix == ".csv":  # sentences in many languages; videos are named VideoID_Start_End
        for place, row in read_csv(path, ("VideoID", "Start", "End", "Language", "Description"), found.problems):
            if row["Language"] == "English":
                video = f"{row['VideoID']}_{row['Start']}_{row['End']}"
                found.add_text(video, row["Description"], f"{place}#Description")
        return
    # {video: [[word, …], …]}; a sentence may also be a string.
    for video, sentences in of_type(read_pickle(path), dict, path, "a dict of video to sentences").items():
        for n, sentence in enumerate(of_type(sentences, list, path, f"a list of sentences for {video!r}")):
            words = isinstance(sentence, list | tuple) and all(isinstance(word, str) for word in sentence)
            found.add_text(video, " ".join(sentence) if words else sentence, f"{path}#/{video}/{n}")


# --- LSMDC ----------------------------------------------------------------------------------------------------------


def lsmdc(folder: Folder, found: Annotations) -> None:
    """Read one line per sentence and clip; a clip may have several. The test split is the challenge's 1,000 clips."""
    names: Names = {
        "train": ("LSMDC16_annos_training.csv", "train_101k_frame.jsonl"),
        "val": ("LSMDC16_annos_val.csv",),
        "test": ("LSMDC16_challenge_1000_publictect.csv", "test_1k_frame.jsonl"),
    }
    for split, path in _files(folder, names).items():
        if path.suffix == ".jsonl":
            _read_clip_vip(path, split, found, paragraph=False)
            continue
        for place, line in read_lines(path, found.problems):
            columns = line.split("\t")
            if len(columns) != 6:
                found.problem(place, "bad-line", f"{len(columns)} columns instead of 6 separated by tabs")
            elif found.add_video(columns[0], split, place):
                found.add_text(columns[0], columns[5], f"{place}#sentence")


# --- DiDeMo ---------------------------------------------------------------------------------------------------------


def didemo(folder: Folder, found: Annotations) -> None:
    """Read one paragraph per video: its descriptions in the file's order.

    The clip is the part that annotators saw, at most 31 s.
    """
    names: Names = {split: (f"{split}_data.json", f"{split}.jsonl") for split in LISTS}
    for entry, rows in _read_didemo(folder, names, found):
        _add_paragraph(entry, [(row.get("description"), f"{place}/description") for place, row in rows], found)
    for entry in found:
        entry.spans[0] = (0.0, DIDEMO_END_S)


def didemo_moments(folder: Folder, found: Annotations) -> None:
    """Read one clip per description: the segments chosen by most annotators, in a tie those named first."""
    names: Names = {split: (f"{split}_data.json",) for split in LISTS}
    for entry, rows in _read_didemo(folder, names, found):
        for n, (place, row) in enumerate(rows):
            times = row.get("times")
            if not isinstance(times, list) or not times or not all(map(_is_pair, times)):
                message = f"{entry.video}: expected a list of [first, last] segments, found {times!r}"
                found.problem(f"{place}/times", "bad-span", message)
                continue
            first, last = Counter(map(tuple, times)).most_common(1)[0][0]
            span = (first * DIDEMO_SEGMENT_S, (last + 1) * DIDEMO_SEGMENT_S)
            _add_moment(entry, n, span, row.get("description"), f"{place}/description", found)


def _read_didemo(folder: Folder, names: Names, found: Annotations) -> list[tuple[Entry, Rows]]:
    """Return the videos with their descriptions; a list of a split's videos, if it exists, selects them."""
    lists = _files(folder, LISTS, needed=False)
    videos: dict[str, Rows] = {}
    for split, path in _files(folder, names).items():
        if path.suffix == ".jsonl":
            _read_clip_vip(path, split, found, paragraph=True)
            continue
        if split in lists:
            _read_lists({split: lists[split]}, found)
        rows = of_type(read_json(path, found.problems), list, path, "a list of descriptions")
        for place, row in _objects(rows, f"{path}#", found):
            video = row.get("video")
            if split not in lists:
                found.add_video(video, split, place)
            if video in found:  # else the list leaves it out
                videos.setdefault(video, []).append((place, row))
    return [(found[video], rows) for video, rows in videos.items()]


# --- ActivityNet Captions -------------------------------------------------------------------------------------------


def activitynet(folder: Folder, found: Annotations) -> None:
    """Read one paragraph per video: its sentences in the file's order."""
    names: Names = {"train": ("train.json", "train.jsonl"), "val1": ("val_1.json", "val1.jsonl")}
    for entry, path, value in _read_activitynet(folder, names, found):
        sentences = enumerate(value["sentences"])
        pieces = [(sentence, f"{path}#/{entry.video}/sentences/{n}") for n, sentence in sentences]
        _add_paragraph(entry, pieces, found)


def activitynet_moments(folder: Folder, found: Annotations) -> None:
    """Read one clip per sentence, at the sentence's timestamps."""
    for entry, path, value in _read_activitynet(folder, {"train": ("train.json",), "val1": ("val_1.json",)}, found):
        times, sentences = value.get("timestamps"), value["sentences"]
        if not isinstance(times, list) or len(times) != len(sentences):
            message = f"expected {len(sentences)} timestamps, one per sentence"
            found.problem(f"{path}#/{entry.video}/timestamps", "bad-span", message)
            continue
        for n, (pair, sentence) in enumerate(zip(times, sentences, strict=True)):
            place = f"{path}#/{entry.video}/sentences/{n}"
            if _is_pair(pair):
                _add_moment(entry, n, (float(pair[0]), float(pair[1])), sentence, place, found)
            else:
                found.problem(place, "bad-span", f"expected [start, end] in seconds, found {pair!r}")


def _read_activitynet(folder: Folder, names: Names, found: Annotations) -> list[tuple[Entry, Path, dict]]:
    """Return the videos of train.json and val_1.json.

    The lists train_ids.json and val_ids.json, if they exist, select among them.

    val_2.json is not read: it describes the videos of val_1.json again, in other annotators' words.
    """
    lists = _files(folder, {"train": ("train_ids.json",), "val1": ("val_ids.json",)}, needed=False)
    videos = []
    for split, path in _files(folder, names).items():
        if path.suffix == ".jsonl":
            _read_clip_vip(path, split, found, paragraph=True)
            continue
        wanted = None
        if split in lists:
            wanted = of_type(read_json(lists[split], found.problems), list, lists[split], "a list of video ids")
            for n, video in enumerate(wanted):
                found.add_video(video, split, f"{lists[split]}#/{n}")
        values = of_type(read_json(path, found.problems), dict, path, "an object of video to its sentences")
        for video, value in values.items():
            entry = found.add_video(video, split, f"{path}#/{video}") if wanted is None or video in found else None
            if entry and isinstance(value, dict) and isinstance(value.get("sentences"), list):
                videos.append((entry, path, value))
            elif entry:
                found.problem(f"{path}#/{video}/sentences", "bad-line", "expected a list of sentences")
    return videos


# --- VATEX ----------------------------------------------------------------------------------------------------------


def vatex(captions: str) -> Reader:
    """Make a reader of ten sentences per video, in English (enCap) or Chinese (chCap).

    Videos are named YouTubeID_start_end.
    """
    names: Names = {"train": ("vatex_training_v1.0.json",), "val": ("vatex_validation_v1.0.json",)}
    if captions == "enCap":
        names["test"] = ("vatex_public_test_english_v1.1.json",)

    def read(folder: Folder, found: Annotations) -> None:
        lists = _files(folder, LISTS, needed=False)
        _read_lists(lists, found)
        for split, path in _files(folder, names).items():
            rows = of_type(read_json(path, found.problems), list, path, "a list of videos")
            for place, row in _objects(rows, f"{path}#", found):
                video = row.get("videoID")
                if lists and video not in found or not lists and not found.add_video(video, split, place):
                    continue  # the lists leave it out, or the name is invalid
                sentences = row.get(captions)
                if not isinstance(sentences, list):
                    found.problem(f"{place}/{captions}", "bad-line", f"{video}: expected a list {captions}")
                    continue
                for k, sentence in enumerate(sentences):
                    found.add_text(video, sentence, f"{place}/{captions}/{k}")

    return read


# --- shared by the readers ------------------------------------------------------------------------------------------


def _files(folder: Folder, names: Names, needed: bool = True) -> dict[str, Path]:
    """Return the existing files by split. Raises UserError if files are `needed` and none exists."""
    paths = {split: path for split, wanted in names.items() if (path := folder.file(*wanted))}
    if needed and not paths:
        allowed = ", ".join(" or ".join(wanted) for wanted in names.values())
        raise UserError(f"SOURCES: {folder.argument}: no annotation file found; it needs {allowed}")
    return paths


def _read_lists(paths: dict[str, Path], found: Annotations) -> None:
    """Add the videos of files with one name per line."""
    for split, path in paths.items():
        for place, video in read_lines(path, found.problems):
            found.add_video(video, split, place)


def _read_clip_vip(path: Path, split: str, found: Annotations, paragraph: bool) -> None:
    """Read lines of {"clip_id": …, "text": a string or several}, the format of CLIP-ViP's own data loader."""
    for place, row in read_json_lines(path, found.problems):
        name, texts = row.get("clip_id"), row.get("text")
        name = name.rpartition("/")[2] if isinstance(name, str) else name  # LSMDC's names are MOVIE/CLIP
        entry = found.add_video(name, split, place)
        if entry is None:
            continue
        pieces = [(text, f"{place}#/text/{n}") for n, text in enumerate(texts if isinstance(texts, list) else [texts])]
        if paragraph:
            _add_paragraph(entry, pieces, found)
        else:
            for text, where in pieces:
                found.add_text(name, text, where)


def _objects(rows: list, where: str, found: Annotations) -> Rows:
    """Return the rows that are objects, with their locations; the others become problems."""
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            found.problem(f"{where}/{n}", "bad-line", f"not a JSON object: {row!r}")
    return [(f"{where}/{n}", row) for n, row in enumerate(rows) if isinstance(row, dict)]


def _add_paragraph(entry: Entry, pieces: list[tuple[Any, str]], found: Annotations) -> None:
    """Add a video's sentences, given as (text, location), as one text separated by spaces."""
    before = len(entry.texts)
    for text, place in pieces:
        found.add_text(entry.video, text, place)
    sentences = [text for _, text in entry.texts[before:]]
    del entry.texts[before:]
    if sentences:
        entry.texts.append((0, " ".join(sentences)))


def _add_moment(entry: Entry, n: int, span: tuple[float, float], text: Any, place: str, found: Annotations) -> None:
    """Add a clip with one sentence. `n` is the sentence's position in the file, which bad sentences do not shift."""
    if not 0 <= span[0] < span[1]:
        found.problem(place, "bad-span", f"{entry.video}: the span from {span[0]} to {span[1]} s is not valid")
        return
    before = len(entry.texts)
    found.add_text(entry.video, text, place, clip=n)
    if len(entry.texts) > before:
        entry.spans[n] = span


def _is_json_scalar(value: Any) -> bool:
    """Return True for a number or a text that can be written as JSON in UTF-8."""
    return (type(value) in (int, float) and math.isfinite(value)) or (isinstance(value, str) and is_unicode(value))


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(x) in (int, float) for x in value)


READERS: dict[str, Reader] = {
    "msrvtt": msrvtt_1ka("MSRVTT_train.9k.csv", "train9k.jsonl"),
    "msrvtt-7k": msrvtt_1ka("MSRVTT_train.7k.csv", None),
    "msrvtt-full": msrvtt_full,
    "msvd": msvd,
    "lsmdc": lsmdc,
    "didemo": didemo,
    "didemo-moments": didemo_moments,
    "activitynet": activitynet,
    "activitynet-moments": activitynet_moments,
    "vatex": vatex("enCap"),
    "vatex-zh": vatex("chCap"),
}
