"""The options of yt-dlp that `download.ytdlp_options` may set, by name.

yt-dlp has options that run programs, read and write files, and open any address. New releases add more of them, so
only options that are known to be harmless are passed on. `site_fetch` and the settings check use this list.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from clipmill.base.errors import UserError

# By yt-dlp's long name. None of them starts a program, names a file or chooses the host of a request.
ALLOWED = frozenset(
    # requests
    "source-address force-ipv4 force-ipv6 xff geo-bypass no-geo-bypass geo-bypass-country geo-bypass-ip-block "
    "user-agent referer add-headers sleep-requests sleep-interval min-sleep-interval max-sleep-interval "
    "sleep-subtitles legacy-server-connect no-check-certificates prefer-insecure prefer-unsecure encoding no-cookies "
    # downloading
    "concurrent-fragments throttled-rate retries file-access-retries fragment-retries retry-sleep "
    "skip-unavailable-fragments no-abort-on-unavailable-fragments abort-on-unavailable-fragments "
    "no-skip-unavailable-fragments keep-fragments no-keep-fragments buffer-size resize-buffer no-resize-buffer "
    "http-chunk-size hls-prefer-native hls-use-mpegts no-hls-use-mpegts part no-part continue no-continue "
    "mtime no-mtime no-cache-dir no-warnings "
    # choice of videos and formats
    "format format-sort-force no-format-sort-force video-multistreams no-video-multistreams audio-multistreams "
    "no-audio-multistreams prefer-free-formats no-prefer-free-formats check-formats check-all-formats "
    "no-check-formats merge-output-format fixup match-title reject-title min-filesize max-filesize date datebefore "
    "dateafter min-views max-views age-limit "
    # accounts
    "username password twofactor video-password ap-mso ap-username ap-password "
    # extractors
    "use-extractors ies extractor-retries allow-dynamic-mpd no-allow-dynamic-mpd ignore-dynamic-mpd "
    "no-ignore-dynamic-mpd hls-split-discontinuity no-hls-split-discontinuity extractor-args".split()
)
# The settings of clipmill that stand for options which cannot be set here.
INSTEAD = {
    "cookies": "cookies_file",
    "cookies-from-browser": "cookies_from_browser",
    "cookiefile": "cookies_file",
    "cookiesfrombrowser": "cookies_from_browser",
    "proxy": "proxy",
    "limit-rate": "rate_limit_bytes_per_s",
    "rate-limit": "rate_limit_bytes_per_s",
    "socket-timeout": "stall_timeout_s",
    "format-sort": "max_height",
    "sub-langs": "subtitle_languages",
    "sub-format": "subtitle_formats",
}
# Arguments of extractors, as yt-dlp spells them after parsing. Others name hosts, keys and scripts.
EXTRACTOR_ARGUMENTS = frozenset(
    "approximate_date area bitrate cdn check_all client comment_sort comments_sort_by data_sync_id fetch_pot formats "
    "fragment_query include_duplicate_formats is_live lang max_comments original_format_policy player_client "
    "player_js_variant player_js_version player_params player_skip po_token prefer_multi_flv "
    "prefer_segments_playlist profile_id quality raise_incomplete_data skip sort_order split_angles tab type "
    "use_ad_playback_context variant_query visitor_data webpage_client webpage_skip".split()
)


def check_names(options: dict[str, Any]) -> None:
    """Raise UserError that names every option which is not allowed, in either spelling. Imports nothing."""
    for name in options:
        spelled = _spelled(name)
        if spelled in INSTEAD:
            raise UserError(f"download.ytdlp_options: {name} cannot be set here; set download.{INSTEAD[spelled]}.")
    refused = sorted(name for name in options if _spelled(name) not in ALLOWED)
    if refused:
        raise UserError(
            f"download.ytdlp_options: {', '.join(refused)} cannot be set, because only options are passed on that run "
            "no program, open no file and choose no address (pipeline/stages/download/ytdlp_options.py lists them); "
            "remove it."
        )


def check_extractor_arguments(arguments: dict[str, Iterable[str]]) -> None:
    """Raise UserError for an argument that is not allowed. `arguments`: as parsed, {extractor: {name: values}}."""
    refused = sorted({f"{extractor}:{name}" for extractor, names in arguments.items() for name in names
                      if name not in EXTRACTOR_ARGUMENTS})  # fmt: skip
    if refused:
        raise UserError(
            f"download.ytdlp_options: extractor-args {', '.join(refused)} cannot be set, because it may name a host, a "
            "key or a script; remove it."
        )


def command_line(options: dict[str, Any]) -> Iterator[str]:
    """Yield the options as arguments for yt-dlp's own parser, a list value as several. False leaves an option out."""
    for name, value in options.items():
        option = f"--{_spelled(name)}"
        for single in value if isinstance(value, list) else [value]:
            if single is not False:
                yield option if single is True else f"{option}={single}"


def _spelled(name: str) -> str:
    return str(name).lstrip("-").replace("_", "-")
