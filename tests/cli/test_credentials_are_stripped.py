"""Credentials are removed from URLs, messages and commands; everything else stays as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill.base.credentials import Redactor, credentials_in_url, strip_credentials, strip_url_credentials
from clipmill.base.errors import ItemError

CANARY = "c4nary-Zq81Vx07Lm55Rt"

URLS = [
    "https://user:{}@host.example/a.mp4",
    "https://{}@host.example/a.mp4",
    "http://user:{}/x@host.example:8080/a.mp4",  # a slash that should have been encoded
    "s3://key:{}@bucket/a.mp4",
    "socks5h://user:{}@host.example:1080",
    "https://host.example/a.mp4?token={}",
    "https://host.example/a.mp4?Expires=1&Signature={}&Key-Pair-Id=K2",
    "https://host.example/a.mp4?Policy={}&x=1",
    "https://b.s3.example/a.mp4?X-Amz-Date=20260101T000000Z&X-Amz-Signature={}&X-Amz-Expires=60",
    "https://b.s3.example/a.mp4?X-Amz-Security-Token={}",
    "https://storage.example/a.mp4?X-Goog-Signature={}",
    "https://a.blob.example/a.mp4?sv=2024&sig={}&se=2026",
    "https://cdn.example/a.mp4?auth_key={}",
    "https://cdn.example/a.mp4?hdnts={}",
    "https://cdn.example/a.mp4?api-key={}",
    "https://cdn.example/a.mp4?key={}",
    "https://cdn.example/a.mp4?accessToken={}",
    "https://cdn.example/a.mp4?x=1;session_id={}",
    "https://cdn.example/a.mp4#access_token={}",
    "https://cdn.example/?next=https%3A%2F%2Fuser%3A{}%40host%2Fa",
    "https://cdn.example/?next=https%3A%2F%2Fhost%2Fa%3Ftoken%3D{}",
    r'{{"url": "https:\/\/user:{}@host.example\/a.mp4"}}',
]
MESSAGES = [
    "Cookie: session={}; other=1",
    "request headers {{'Cookie': 'session={}'}}",
    "Authorization: Basic {}",
    "proxy-authorization: Bearer {}",
    "got Bearer {} for it",
    'answer {{"password": "{}"}}',
    "clipmill build x --set download.ytdlp_options.password={}",
    "clipmill build x --set 'download.ytdlp_options={{password: {}}}'",
    "clipmill build x --set caption.options.api_key={}",
    "ProxyError(Cannot connect to proxy http://user:{}@127.0.0.1:9)",
]
HARMLESS = [
    "https://host.example:8080/a@b/c.mp4?v=abc&t=10#t=1",
    "https://www.youtube.com/watch?v=dQw4w9WgXcQ",
    "https://host.example/a.mp4?key=videos/2026/film.mp4&hash=abc&code=12",
    "mail me@host.example, then see https://host.example/@me",
    "Unexpected token: '<' in JSON at position 0",
    "HTTP 404 Not Found",
    "setting download.proxy = $PROXY, password=$PASSWORD",
    "Basic understanding of cookies",
    "/mnt/videos/a?token=b.mp4"[:12],
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_loses_its_credential(url):
    shown = strip_url_credentials(url.format(CANARY))
    assert CANARY not in shown and "REMOVED" in shown
    assert strip_url_credentials(shown) == shown
    assert "host" in shown or "example" in shown or "bucket" in shown, "the place is still to be seen"


@pytest.mark.parametrize("message", [*MESSAGES, *(f"cannot open {url}: HTTP 403" for url in URLS)])
def test_a_message_loses_its_credential(message):
    assert CANARY not in strip_credentials(message.format(CANARY))
    assert CANARY not in ItemError("forbidden", message.format(CANARY)).message
    assert CANARY not in str(ItemError("forbidden", ("x" * 1980 + " " + message).format(CANARY)))


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays(text):
    assert strip_credentials(text) == text


def test_known_values_are_removed_in_every_spelling():
    secret = "p@ss word/äö"
    text = "a p@ss word/äö b p%40ss%20word%2F%C3%A4%C3%B6 c p%40ss+word%2F%C3%A4%C3%B6 d"
    assert Redactor([secret]).text(text) == "a REMOVED b REMOVED c REMOVED d"
    assert Redactor([secret]).data({"a": [f"x {secret}"], "n": 1}) == {"a": ["x REMOVED"], "n": 1}


def test_credentials_of_a_url_are_found_to_be_removed_elsewhere():
    url = f"https://name55:{CANARY}@host/a?token=abcdef123&v=1"
    assert credentials_in_url(url) == ["name55", CANARY, "abcdef123"]


@given(st.text(max_size=200))
def test_any_text_is_accepted_and_stripping_twice_changes_nothing(text):
    once = strip_credentials(text)
    assert strip_credentials(once) == once
