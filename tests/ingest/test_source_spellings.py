"""A source is the same in every spelling of its address: by it a forgotten video is recognised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stages.download.site_fetch import site_key, site_key_of
from shards.corpus.source_ids import canonical_url, normal_url, source_spellings

VIDEO = "https://www.youtube.com/watch?v=dQw4w9WgXcQ"

YOUTUBE = """
http://youtube.com/watch?v=dQw4w9WgXcQ
https://www.youtube.com:443/watch?v=dQw4w9WgXcQ
http://www.youtube.com:80/watch?v=dQw4w9WgXcQ
https://WWW.YOUTUBE.COM./watch?v=dQw4w9WgXcQ
https://user:pw@www.youtube.com/watch?v=dQw4w9WgXcQ
https://www.youtube.com/watch?v=%64Qw4w9WgXcQ
https://www.youtube.com/%77atch?%76=dQw4w9WgXcQ
https://www.youtube.com/./x/../watch?v=dQw4w9WgXcQ
https://www.youtube.com//watch?list=PLx&v=dQw4w9WgXcQ&t=1
https://www.youtube.com/watch?v=dQw4w9WgXcQ#fragment
https://www.youtube.com/watch?v=dQw4w9WgXcQ%20
https://www.youtube.com/watch_popup?v=dQw4w9WgXcQ
https://www.youtube.com/movie?v=dQw4w9WgXcQ
https://www.youtube.com/#/watch?v=dQw4w9WgXcQ
https://www.youtube.com/attribution_link?a=x&u=%2Fwatch%3Fv%3DdQw4w9WgXcQ%26feature%3Dshare
https://www.youtube.com/oembed?url=https%3A//www.youtube.com/watch%3Fv%3DdQw4w9WgXcQ
https://m.youtube.com/shorts/dQw4w9WgXcQ
https://music.youtube.com/watch?v=dQw4w9WgXcQ&si=x
https://gaming.youtube.com/embed/dQw4w9WgXcQ/
https://de.youtube.com/live/dQw4w9WgXcQ?feature=share
https://youtube.com/Shorts/dQw4w9WgXcQ
https://youtube.com/%73horts/dQw4w9WgXcQ
https://www.youtube-nocookie.com/embed/dQw4w9WgXcQ?rel=0
http://youtube-nocookie.com:80/v/dQw4w9WgXcQ
https://www.youtubekids.com/watch?v=dQw4w9WgXcQ
https://youtube.googleapis.com/v/dQw4w9WgXcQ
https://youtu.be/dQw4w9WgXcQ?si=abc
http://youtu.be:80/dQw4w9WgXcQ
https://www.youtu.be./%64Qw4w9WgXcQ
https://y2u.be/dQw4w9WgXcQ
https://yt.be/dQw4w9WgXcQ
""".split()
VIMEO = """
http://vimeo.com/76979871
https://www.vimeo.com:443/76979871
https://player.vimeo.com/video/76979871?h=8272103f6e&title=0
http://player.vimeo.com:80/video/76979871#t=10s
https://vimeo.com/76979871/8272103f6e
https://vimeo.com/channels/staffpicks/76979871
https://vimeo.com/groups/name/videos/76979871
https://vimeo.com/album/2632481/video/76979871
https://vimeo.com/showcase/2632481/video/76979871
https://vimeo.com/video/76979871
https://VIMEO.com/%376979871/
https://vimeo.com/moogaloop.swf?clip_id=76979871
https://vimeopro.com/user/page/video/76979871
""".split()
LINK = "https://cdn.example.com/a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F"
LINKS = """
http://cdn.example.com/a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F
https://cdn.example.com:443/a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F
http://cdn.example.com:80/a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F
HTTPS://CDN.Example.COM./a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F
https://cdn.example.com/a/b%7Ec/%c3%a9%20x.mp4?q=%c3%bc&r=%2f
https://cdn.example.com/a/b%7ec/é%20x.mp4?q=ü&r=%2F
https://cdn.example.com/%61/b~c/%C3%A9%20x%2Emp4?q=%C3%BC&r=%2F
https://cdn.example.com/a/./b~c/z/../%C3%A9%20x.mp4?q=%C3%BC&r=%2F
https://cdn.example.com/a/%2e/b~c/z/%2E%2e/%C3%A9%20x.mp4?q=%C3%BC&r=%2F
https://cdn.example.com/a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F#t=10
https://somebody@cdn.example.com/a/b~c/%C3%A9%20x.mp4?utm_source=x&q=%C3%BC&r=%2F
https://cdn%2Eexample.com/a/b~c/%C3%A9%20x.mp4?q=%C3%BC&r=%2F
""".split()
ALL = [(url, VIDEO) for url in YOUTUBE] + [(url, "https://vimeo.com/76979871") for url in VIMEO]
ALL += [(url, LINK) for url in LINKS]


@pytest.mark.parametrize(("url", "same"), ALL, ids=[url for url, _ in ALL])
def test_all_spellings_of_a_source_are_one(url, same):
    assert normal_url(url) == same
    assert set(source_spellings(url)) & set(source_spellings(same))
    assert normal_url(canonical_url(url)) == same


def test_a_host_in_unicode_is_its_ascii_form():
    assert normal_url("https://Bücher.example/x") == normal_url("http://xn--bcher-kva.example:80/x")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (VIDEO, "https://www.youtube.com/watch?v=dQw4w9WgXcq"),
        (VIDEO, "https://notyoutube.com/watch?v=dQw4w9WgXcQ"),
        (VIDEO, "https://www.youtube.com.evil.example/watch?v=dQw4w9WgXcQ"),
        ("https://www.youtube.com/embed/videoseries?list=PLa", "https://www.youtube.com/embed/videoseries?list=PLb"),
        ("https://www.youtube.com/@a", "https://www.youtube.com/@b"),
        ("https://vimeo.com/1", "https://vimeo.com/11"),
        ("https://vimeo.com/channels/a", "https://vimeo.com/channels/b"),
        ("https://notvimeo.com/76979871", "https://vimeo.com/76979871"),
        ("https://e.com/a", "https://e.com/A"),
        ("https://e.com/a", "https://e.com/a/"),
        ("https://e.com/a%2Fb", "https://e.com/a/b"),
        ("https://e.com/a?x=1&y=2", "https://e.com/a?y=2&x=1"),
        ("https://e.com:8443/a", "https://e.com/a"),
        ("https://e.com/#!/video/1", "https://e.com/#!/video/2"),
        ("s3://Bucket/Key", "s3://bucket/key"),
        ("/data/a.mp4", "/data/A.mp4"),
        ("https://a.example/x", "https://b.example/x"),
    ],
)
def test_other_sources_are_others(one, other):
    assert not set(source_spellings(one)) & set(source_spellings(other))


parts = st.text(st.sampled_from("abAB09._-~%/?&=#:@!+ é2eE7\0\n'\";$`<>\\"), max_size=30)
urls = st.builds(
    "{}://{}/{}".format,
    st.sampled_from(["http", "HTTPS", "s3"]),
    st.sampled_from(["H.example", "h:80", "bü.example", "youtube.com", "vimeo.com", "[::1]", "a..b"]),
    parts,
)


@given(urls | parts)
def test_a_normal_url_is_its_own_normal_url(url):
    try:
        normal = normal_url(url)
    except ValueError:
        return
    assert normal_url(normal) == normal
    assert normal in source_spellings(url) and canonical_url(url) in source_spellings(url)


@pytest.mark.parametrize("url", ["http://[::1", "http://h:port/", "http:///x"])
def test_an_invalid_url_is_an_error(url):
    with pytest.raises(ValueError):
        source_spellings(url)


def test_sites_of_extractors_have_names_for_their_videos():
    for url in (VIDEO, "https://youtu.be/dQw4w9WgXcQ", "https://yewtu.be/watch?v=dQw4w9WgXcQ"):
        assert site_key_of(url) == "youtube:dQw4w9WgXcQ"
    assert site_key_of("https://player.vimeo.com/video/76979871") == site_key_of("https://vimeo.com/76979871")
    for url in ("https://dai.ly/x5kesuj", "https://www.dailymotion.com/embed/video/x5kesuj"):
        assert site_key_of(url) == "dailymotion:x5kesuj"
    assert site_key_of("https://cdn.example.com/x.mp4") is None and site_key_of("/data/x.mp4") is None
    assert site_key("Generic", "index") is None and site_key("Vimeo", "1") == "vimeo:1"
