"""The console that commands print to, and the table of failures that several of them end with."""

from rich.console import Console
from rich.markup import escape


def plain_console() -> Console:
    """Return a console that does not cut lines when output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def print_failures(console: Console, failures: list[tuple[str, str, int, str]]) -> None:
    """Print a line per (stage, error class) with its count and one example message; print nothing for no failures."""
    if not failures:
        return
    console.print(f"[red]{sum(count for _, _, count, _ in failures):,} failed[/]")
    for stage, error_class, count, example in failures:
        error_class, example = escape(one_line(error_class)), escape(one_line(example))
        text = f"  {stage:<10} {error_class:<18} {count:>7,}  [dim]{example}[/]"
        console.print(text, no_wrap=True, overflow="ellipsis", highlight=False)


def one_line(text: str) -> str:
    """Return at most 200 characters of untrusted text, with control characters and line breaks made spaces."""
    return "".join(c if c.isprintable() else " " for c in text)[:200]
