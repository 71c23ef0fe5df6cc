"""Settings of the download stage."""

from typing import Any, Literal

from pydantic import Field, IPvAnyNetwork

from clipmill.base.secrets import REFERENCE
from clipmill.base.settings import Settings, operational, setting


class DownloadSettings(Settings):
    """Settings of fetching videos. Those that change only speed, patience or access are not in the fingerprint."""

    # Pixels of the shorter side: sites give the best format up to this, else their smallest. HD-VILA took 720.
    max_height: int = Field(720, ge=16, le=4320)
    # Subtitles to fetch, in order; "en" takes "en-GB" too. [] fetches none.
    subtitle_languages: list[str] = ["en"]
    # Kinds of subtitles, best first; one track per language is fetched.
    subtitle_kinds: list[Literal["manual", "auto"]] = ["manual", "auto"]
    # Subtitle formats, best first; the first that a site offers is fetched. vtt and json3 carry word times on YouTube.
    subtitle_formats: list[Literal["vtt", "srt", "ttml", "json3", "srv3", "ass"]] = ["vtt", "json3", "ttml", "srt"]
    # Further options of yt-dlp by their long names: {"sleep-requests": 1, "extractor-args": "youtube:lang=en"}. Options
    # that run programs, open files or choose addresses are refused. A
    # password is $NAME, an environment variable, or file:PATH (docs/reliability.md, "Secrets").
    ytdlp_options: dict[str, Any] = setting(
        {}, reaches="sends a secret of this machine", unless=rf'(?:(?!"(?:{REFERENCE})")[\s\S])*', secret=True
    )
    # Search other pages, which are neither media files nor of a known site, for a video.
    generic_pages: bool = True
    # Use local files in place; false copies them into the corpus.
    reference_local_files: bool = True

    # Netscape cookie file for sites that want an account.
    cookies_file: str | None = operational(None, reaches="reads a file")
    # BROWSER[:PROFILE] to read cookies from, as yt-dlp names them (firefox, chrome …).
    cookies_from_browser: str | None = operational(None, reaches="reads the cookies of a browser")
    # http://, https:// or socks5:// proxy; with a password $NAME, an environment variable that holds the URL, or
    # file:PATH. Proxies of the environment are ignored, so that a build depends on its settings alone.
    proxy: str | None = operational(
        None, pattern=rf"^((https?|socks[45][ah]?)://.+|{REFERENCE})$", reaches="sends all traffic there", secret=True
    )
    # Bytes per second of one download from a site; null: without limit.
    rate_limit_bytes_per_s: int | None = operational(None, ge=1)
    # User-Agent header of all requests; some sites refuse names that they do not know.
    user_agent: str = operational("Mozilla/5.0 (compatible; clipmill/0.1)", min_length=1)
    # Allow loopback, private, link-local and reserved addresses. Off, so that neither a list of URLs nor a redirect can
    # reach into the local network.
    allow_private_addresses: bool = operational(False, reaches="opens addresses of this machine and its network")
    # Further networks ("203.0.113.0/24") that no download may connect to: what leads back to this machine or into its
    # network by public addresses, such as that of its router.
    refused_networks: list[IPvAnyNetwork] = operational([])
    # Schemes read through fsspec; all others but http(s) are refused.
    object_store_schemes: list[str] = operational(
        ["s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hdfs", "oss"],
        reaches="opens addresses and files",
        unless=r'\[(?:"(?:s3|s3a|gs|gcs|az|abfs|abfss|adl|hdfs|oss)"(?:, )?)*\]',
    )

    # Seconds for one source without waiting for its host's turn; 2 h allow for a long video on a slow line.
    timeout_s: float = operational(7200, gt=0)
    # Seconds without a byte before a connection counts as dead.
    stall_timeout_s: float = operational(30, gt=0)
    # Bytes per second that must arrive, over rate_window_s; a slower download ends as stalled, and a retry continues
    # it. 0: without limit.
    min_bytes_per_s: float = operational(1000.0, ge=0)
    # Seconds over which min_bytes_per_s is measured.
    rate_window_s: float = operational(60.0, gt=0)
    # Seconds until the headers of an answer are complete, however they trickle.
    answer_timeout_s: float = operational(120.0, gt=0)
    # Seconds for probing a downloaded file, plus one for every 10 MB, before it counts as one that hangs the decoder.
    probe_timeout_s: float = operational(60, gt=0)
    # Most bytes of a file; a larger one is refused by its header, or else while it is downloaded.
    max_bytes: int = operational(20_000_000_000, ge=1)
    # Attempts after the first one, for retryable failures.
    retries: int = operational(3, ge=0, le=100)
    # Seconds before the first retry; doubled each time up to a minute, with a jitter that depends on the URL.
    backoff_s: float = operational(1.0, ge=0)
    # Downloads from one host at a time, over all workers of the cluster.
    per_host: int = operational(4, ge=1)
    # Seconds between two starts on one host. YouTube wants 5-10 for a guest.
    min_interval_s: float = operational(0.0, ge=0)
    # Seconds to pause a host after HTTP 429 or a lockout without Retry-After; doubled each time in a row.
    cooldown_s: float = operational(60.0, gt=0)
    # Seconds that a host may stay locked before its waiting downloads fail (a later build retries them).
    lockout_patience_s: float = operational(7200.0, ge=0)
    # Lockouts of one source before it fails.
    lockout_retries: int = operational(8, ge=0)
    # Keep downloaded files after their clips are cut.
    keep_sources: bool = operational(True)
