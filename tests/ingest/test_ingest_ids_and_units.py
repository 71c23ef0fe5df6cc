"""Ids are safe and stable, duplicates collapse, and units are assigned once."""

import json
import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stages.ingest.ingest import IngestSettings, ingest
from shards.corpus.schema import TABLES
from shards.corpus.source_ids import ID_PATTERN, canonical_url, canonical_urls, video_id_for, video_ids

YOUTUBE = "https://www.youtube.com/watch?v=dQw4w9WgXcQ"
NOTHING = pa.table(
    {"video_id": pa.array([], pa.string()), "url": pa.array([], pa.string()), "unit": pa.array([], pa.string()),
     "ordinal": pa.array([], pa.int64()), "volume": pa.array([], pa.int32())}
)  # fmt: skip

words = st.text(st.sampled_from("abAB09._-~%/?&=#:@!+ é\0\n'\";$`<>\\"), max_size=30)
addresses = st.one_of(
    st.builds(
        "{}://{}{}".format,
        st.sampled_from(["http", "HTTPS", "s3", "x+y"]),
        st.sampled_from(["H.example", "h:80"]),
        words,
    ),
    st.builds("https://www.youtube.com/{}{}".format, st.sampled_from(["watch?v=", "shorts/", "embed/"]), words),
    st.builds("/{}".format, words),
    words,
)


@pytest.mark.parametrize(
    "url",
    [
        "https://www.youtube.com/watch?v=dQw4w9WgXcQ",
        "http://youtube.com/watch?v=dQw4w9WgXcQ&t=42s&list=PLx&index=2",
        "https://m.youtube.com/watch?feature=share&v=dQw4w9WgXcQ#t=1",
        "HTTPS://Music.YouTube.com/watch?v=dQw4w9WgXcQ",
        "https://www.youtube.com/watch/?app=desktop&v=dQw4w9WgXcQ",
        "https://youtu.be/dQw4w9WgXcQ",
        "https://youtu.be/dQw4w9WgXcQ?si=abc&t=1",
        "https://www.youtube.com/shorts/dQw4w9WgXcQ?feature=share",
        "https://www.youtube.com/live/dQw4w9WgXcQ/",
        "https://www.youtube.com/embed/dQw4w9WgXcQ?rel=0",
        "https://www.youtube-nocookie.com/embed/dQw4w9WgXcQ",
        "https://www.youtube.com/v/dQw4w9WgXcQ",
    ],
)
def test_all_forms_of_a_youtube_url_are_one_video(url):
    assert (canonical_url(url), video_id_for(url)) == (YOUTUBE, "dQw4w9WgXcQ")


@pytest.mark.parametrize(
    "url",
    [
        "https://www.youtube.com/embed/videoseries?list=PLx",
        "https://www.youtube.com/embed/live_stream?channel=UCx",
        "https://www.youtube.com/playlist?list=dQw4w9WgXcQ",
        "https://www.youtube.com/watch?v=dQw4w9WgXcQtoolong",
        "https://notyoutube.com/watch?v=dQw4w9WgXcQ",
        "https://www.youtube.com.evil.example/watch?v=dQw4w9WgXcQ",
        "https://www.youtube.com/@channel",
    ],
)
def test_urls_of_other_sites_get_a_hash(url):
    assert re.fullmatch(r"v[0-9a-f]{20}", video_id_for(url))


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("HTTP://Example.COM:80/A?b=1&a=2", "http://example.com/A?b=1&a=2"),
        ("https://example.com:443", "https://example.com/"),
        ("https://example.com:8443/x", "https://example.com:8443/x"),
        ("https://example.com./x#top", "https://example.com/x"),
        ("https://example.com/#!/video/1", "https://example.com/#!/video/1"),
        ("https://e.com/x?utm_source=a&b=2&UTM=3&fbclid=4&utm_=5&c", "https://e.com/x?b=2&UTM=3&c"),
        ("https://e.com/x?utm_source=a", "https://e.com/x"),
        ("https://User:Pw@E.com/x", "https://User:Pw@e.com/x"),
        ("http://[::1]:80/x", "http://[::1]/x"),
        ("S3://Bucket/Key?versionId=1", "s3://Bucket/Key?versionId=1"),
        ("/data/My Video.mp4", "/data/My Video.mp4"),
    ],
)
def test_canonical_urls(url, canonical):
    assert canonical_url(url) == canonical


@pytest.mark.parametrize("url", ["http://[::1", "http://h:port/", "http://h:99999/", "http:///x", "http://:80/"])
def test_an_invalid_url_is_an_error(url):
    with pytest.raises(ValueError):
        canonical_url(url)


@given(addresses)
def test_a_canonical_url_is_its_own_canonical_url(url):
    try:
        canonical = canonical_url(url)
    except ValueError:
        return
    assert canonical_url(canonical) == canonical
    assert video_id_for(url) == video_id_for(canonical) or "://" not in url


@given(addresses, st.none() | words)
def test_an_id_is_safe_whatever_comes_in(url, given_id):
    try:
        video_id = video_id_for(url, given_id)
    except ValueError:
        return
    assert re.fullmatch(ID_PATTERN, video_id)
    assert video_id == video_id_for(url, given_id)


@given(st.lists(st.tuples(addresses, st.none() | words), max_size=20))
@settings(max_examples=200)
def test_the_vectorised_rules_are_the_rules(pairs):
    def scalar(url):
        try:
            return canonical_url(url)
        except ValueError:
            return None

    canonical = canonical_urls(pa.array([url for url, _ in pairs], pa.string()))
    assert canonical.to_pylist() == [scalar(url) for url, _ in pairs]
    kept = [
        (url, given_id)
        for (url, given_id), known in zip(pairs, canonical.to_pylist(), strict=True)
        if known is not None
    ]
    ids = video_ids(canonical.drop_null(), pa.array([given_id for _, given_id in kept], pa.string()))
    assert ids.to_pylist() == [video_id_for(scalar(url), given_id) for url, given_id in kept]


@pytest.mark.parametrize(
    "given_id", ["../../etc/passwd", "a/b", "a\0b", "a;rm -rf", "", "x" * 65, "a.b", "ü", "a\n", " a"]
)
def test_an_unsafe_id_is_replaced_and_kept_as_the_source_id(tmp_path, given_id):
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps({"url": "http://h/1.mp4", "id": given_id}))
    (row,) = ingest([str(path)], IngestSettings(), NOTHING).table.to_pylist()
    assert row["video_id"] == video_id_for("http://h/1.mp4") or given_id.strip() == row["video_id"]
    assert (row["source_id"] or "") == given_id.strip()


# --- the ingest


def make(tmp_path, *lines: str, known: pa.Table = NOTHING, unit_videos: int = 2, name: str = "list.txt"):
    path = tmp_path / name
    path.write_text("\n".join(lines))
    return ingest([str(path)], IngestSettings(unit_videos=unit_videos), known)


def test_the_table_is_that_of_sources_with_a_unit(tmp_path):
    found = make(tmp_path, "http://h/1.mp4")
    assert found.table.schema == TABLES["sources"].append(pa.field("unit", pa.string()))


def test_duplicates_collapse_and_are_counted(tmp_path):
    found = make(tmp_path, YOUTUBE, "https://youtu.be/dQw4w9WgXcQ", "http://h/1.mp4?utm_source=x", "http://H:80/1.mp4")
    assert found.table["url"].to_pylist() == [YOUTUBE, "http://h/1.mp4?utm_source=x"]
    assert (found.num_seen, found.num_duplicates, found.problems) == (4, 2, [])


def test_one_id_for_two_urls_is_a_problem_and_the_first_wins(tmp_path):
    lines = ["url,id", "http://h/1.mp4,a", "http://h/2.mp4,a", "http://h/2.mp4,a", "http://h/3.mp4,c"]
    found = make(tmp_path, *lines, name="list.csv")
    assert found.table["url"].to_pylist() == ["http://h/1.mp4", "http://h/3.mp4"]
    assert [(p.location.rpartition("/")[2], p.error_class) for p in found.problems] == [("list.csv:3", "duplicate-id")]
    assert found.num_duplicates == 1
    known = found.table
    again = make(tmp_path, "url,id", "http://h/9.mp4,a", name="more.csv", known=known)
    assert again.table.num_rows == 0 and [p.error_class for p in again.problems] == ["duplicate-id"]


def test_units_are_consecutive_groups_and_never_refilled(tmp_path):
    first = make(tmp_path, *(f"http://h/{i}.mp4" for i in range(5)))
    assert first.table["unit"].to_pylist() == ["u000000", "u000000", "u000001", "u000001", "u000002"]
    assert first.table["ordinal"].to_pylist() == [0, 1, 2, 3, 4]
    second = make(tmp_path, *(f"http://h/{i}.mp4" for i in range(3, 8)), known=first.table)
    assert second.table["url"].to_pylist() == [f"http://h/{i}.mp4" for i in (5, 6, 7)]
    assert second.table["unit"].to_pylist() == ["u000003", "u000003", "u000004"]
    assert second.table["ordinal"].to_pylist() == [5, 6, 7]
    assert (second.num_seen, second.num_duplicates) == (5, 2)


def test_a_list_without_new_sources_adds_none(tmp_path):
    first = make(tmp_path, "http://h/1.mp4")
    again = make(tmp_path, "http://h/1.mp4", known=first.table)
    assert again.table.num_rows == 0 and again.num_duplicates == 1
    assert make(tmp_path, "").table.num_rows == 0


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 4), st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_in_two_parts_or_in_one_the_same_sources_come_out(tmp_path_factory, picks, unit_videos, cut):
    folder = tmp_path_factory.mktemp("l")
    lines = [f"http://h/{i}.mp4" for i in picks]
    whole = make(folder, *lines, unit_videos=unit_videos).table
    first = make(folder, *lines[:cut], unit_videos=unit_videos).table
    second = make(folder, *lines, unit_videos=unit_videos, known=first).table
    both = pa.concat_tables([first, second])
    assert both["url"].to_pylist() == whole["url"].to_pylist() == [f"http://h/{i}.mp4" for i in dict.fromkeys(picks)]
    assert both["video_id"].to_pylist() == whole["video_id"].to_pylist()
    assert both["ordinal"].to_pylist() == list(range(whole.num_rows))
    units = both["unit"].to_pylist()
    assert units == sorted(units) and all(units.count(unit) <= unit_videos for unit in units)
    assert set(first["unit"].to_pylist()).isdisjoint(second["unit"].to_pylist())


def test_the_same_lists_give_the_same_table(tmp_path):
    lines = [f"http://h/{i % 7}.mp4" for i in range(20)]
    assert make(tmp_path, *lines).table.equals(make(tmp_path, *lines).table)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_volumes_are_filled_in_order_and_never_change(tmp_path_factory, counts, unit_videos, volume_units):
    path, known = tmp_path_factory.mktemp("l") / "list.txt", NOTHING
    for count in counts:  # each list has further sources than all before
        path.write_text("\n".join(f"http://h/{known.num_rows + i}.mp4" for i in range(count)))
        chosen = IngestSettings(unit_videos=unit_videos, volume_units=volume_units)
        known = pa.concat_tables([known, ingest([str(path)], chosen, known).table.select(known.column_names)])
    units: dict[int, set[str]] = {}
    for unit, volume in zip(known["unit"].to_pylist(), known["volume"].to_pylist(), strict=True):
        units.setdefault(volume, set()).add(unit)
    assert list(units) == list(range(len(units)))
    assert sum(map(len, units.values())) == len({*known["unit"].to_pylist()})  # no unit is in two volumes
    assert all(len(units[volume]) == volume_units for volume in list(units)[:-1])


def test_sources_of_a_corpus_without_volumes_are_those_of_the_first(tmp_path):
    known = make(tmp_path, *(f"http://h/{i}.mp4" for i in range(4))).table
    known = known.set_column(known.schema.get_field_index("volume"), "volume", pa.nulls(4, pa.int32()))
    path = tmp_path / "more.txt"
    path.write_text("\n".join(f"http://h/{i}.mp4" for i in range(4, 10)))
    found = ingest([str(path)], IngestSettings(unit_videos=2, volume_units=3), known).table
    assert found["volume"].to_pylist() == [0, 0, 1, 1, 1, 1]
