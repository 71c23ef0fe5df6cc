"""Settings of the download stage."""

from typing import Any, Literal

from pydantic import Field

from clipmill.base.settings import Settings, operational


class DownloadSettings(Settings):
    """How videos are fetched. What only changes speed, patience or access is no part of the stage's fingerprint."""

    # Sites: the best format whose shorter side is at most this, else the smallest there is. HD-VILA took 720.
    max_height: int = Field(720, ge=16, le=4320)
    # Subtitles to fetch, in order; "en" takes "en-GB" too. [] fetches none.
    subtitle_languages: list[str] = ["en"]
    # What a site offers is looked through in this order, one track per language.
    subtitle_kinds: list[Literal["manual", "auto"]] = ["manual", "auto"]
    # The first of these that a site has. vtt and json3 carry word times on YouTube.
    subtitle_formats: list[Literal["vtt", "srt", "ttml", "json3", "srv3", "ass"]] = ["vtt", "json3", "ttml", "srt"]
    # Any further option of yt-dlp by its long name: {"sleep-requests": 1, "extractor-args": "youtube:lang=en"}.
    ytdlp_options: dict[str, Any] = {}
    # Look for a video in a page that is neither a media file nor of a known site.
    generic_pages: bool = True
    # Local files are used where they lie; false copies them into the corpus.
    reference_local_files: bool = True

    # Netscape cookie file for sites that want an account.
    cookies_file: str | None = operational(None)
    # BROWSER[:PROFILE] to read cookies from, as yt-dlp names them (firefox, chrome …).
    cookies_from_browser: str | None = operational(None)
    # http://, https:// or socks5:// proxy; the environment's is not used, so that a build depends on its settings
    # alone.
    proxy: str | None = operational(None, pattern=r"^(https?|socks[45][ah]?)://.+")
    # Bytes per second of one download of a site; None: as fast as it comes.
    rate_limit_bytes_per_s: int | None = operational(None, ge=1)
    user_agent: str = operational("Mozilla/5.0 (compatible; clipmill/0.1)", min_length=1)
    # Loopback, private, link-local and reserved addresses are refused, redirects to them too: a list of URLs must not
    # reach into the network that it is downloaded in.
    allow_private_addresses: bool = operational(False)
    # Schemes read through fsspec; others than these and http(s) are refused.
    object_store_schemes: list[str] = operational(
        ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "oss"]
    )

    # Seconds one source may take, waiting for its host's turn left out; 2 h hold a long video on a slow line.
    timeout_s: float = operational(7200, gt=0)
    # Seconds without a byte before a connection counts as dead.
    stall_timeout_s: float = operational(30, gt=0)
    # Looking at a file that has come may take this long before it counts as one that hangs the decoder.
    probe_timeout_s: float = operational(60, gt=0)
    # Larger files are refused, by their header where it says so, else when they get there.
    max_bytes: int = operational(20_000_000_000, ge=1)
    # Tries after the first one, for failures that can heal.
    retries: int = operational(3, ge=0, le=100)
    # First pause before trying again; doubles each time up to a minute, jittered by the URL.
    backoff_s: float = operational(1.0, ge=0)
    # Downloads from one host at a time, over all workers that share the governor.
    per_host: int = operational(4, ge=1)
    # Seconds between two starts on one host. YouTube wants 5-10 for a guest.
    min_interval_s: float = operational(0.0, ge=0)
    # Pause of a whole host after HTTP 429 or a lockout that names none; doubles while it goes on.
    cooldown_s: float = operational(60.0, gt=0)
    # How long a host may stay locked before what waits for it is given up (a later build tries again).
    lockout_patience_s: float = operational(7200.0, ge=0)
    # Times one source may meet a lockout before it is given up itself.
    lockout_retries: int = operational(8, ge=0)
    # Keep downloaded files after their clips are cut.
    keep_sources: bool = operational(True)
