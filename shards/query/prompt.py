"""The prompt of `clipmill sql DIR`: statements typed on a terminal, answered as tables."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb

from clipmill.base.errors import UserError
from clipmill.base.text import sql_identifier, visible
from shards.query.sql import run_query

HINT = """Give a query, for instance
  clipmill sql DIR "SELECT * FROM funnel"
  clipmill sql DIR "SELECT clip_id, caption, text FROM catalog LIMIT 10" --format csv
  clipmill sql DIR "SHOW TABLES"
or run `clipmill sql DIR` on a terminal for a prompt."""


def prompt(connection: duckdb.DuckDBPyConnection) -> None:
    """Read statements, ended by `;` or an empty line, until Ctrl-D. The corpus stays as it was at the start.

    Raises UserError with examples of queries when the input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UserError(HINT)
    _start_history()
    print("Statements end with ; or an empty line. .tables  .schema [NAME]  .help  .quit or Ctrl-D")
    for statement in _statements():
        try:
            if statement.startswith("."):
                if statement.split()[0] in (".quit", ".exit"):
                    return
                _command(connection, statement)
            else:
                run_query(connection, statement)
        except UserError as error:
            print(visible(str(error), keep="\n"), file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)


def _start_history() -> None:
    """Edit lines with a lasting history, if Python has readline and the home folder can be written."""
    import atexit
    from contextlib import suppress

    with suppress(ImportError):
        import readline

        path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "clipmill" / "sql_history"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.read_history_file(path)
            readline.set_history_length(1000)
            atexit.register(readline.write_history_file, path)


def _statements() -> Iterator[str]:
    """Yield whole statements as they are typed; Ctrl-C drops an unfinished one, Ctrl-D ends."""
    lines: list[str] = []
    while True:
        try:
            line = input("clipmill> " if not lines else "     ...> ").rstrip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            lines = []
            continue
        if line:
            lines.append(line)
        if lines and (not line or line.endswith(";") or lines[0].startswith(".")):
            yield "\n".join(lines).strip()
            lines = []


def _command(connection: duckdb.DuckDBPyConnection, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == ".tables":
        run_query(connection, "SHOW TABLES")
    elif name == ".schema":
        wanted = argument.strip()
        run_query(connection, f"DESCRIBE {sql_identifier(wanted)}" if wanted else "SHOW ALL TABLES")
    elif name == ".help":
        print(".tables        the tables and views\n.schema NAME   columns of one\n.quit          leave (or Ctrl-D)")
    else:
        raise UserError(f"{name} is not a command; known are .tables, .schema [NAME], .help and .quit.")
