"""Put the ten queries of docs/queries.sql, with what a corpus answers, into README.md.

python docs/answer_queries.py demo/corpus
"""

import io
import re
import sys
from pathlib import Path

from shards.sql import open_manifest, run_query

HERE = Path(__file__).parent
BEGIN, END = "<!-- queries -->", "<!-- end of queries -->"


def main() -> None:
    readme = HERE.parent / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{_answers(Path(sys.argv[1]))}{END}{after}")


def _answers(corpus: Path) -> str:
    parts = []
    with open_manifest(corpus) as connection:
        for title, query in _queries():
            out = io.StringIO()
            run_query(connection, query, "table", out)
            answer = "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines() if line.strip())
            parts.append(f"**{title}**\n\n```sql\n{query};\n```\n```\n{answer}\n```\n\n")
    return "".join(parts)


def _queries() -> list[tuple[str, str]]:
    """(title, SQL) of every statement of the file that has a numbered title above it."""
    statements = (HERE / "queries.sql").read_text().split(";\n")
    found = []
    for statement in statements:
        title = re.search(r"^-- (\d+\. .*)$", statement, re.MULTILINE)
        sql = "\n".join(line for line in statement.splitlines() if not line.startswith("--")).strip()
        if title and sql:
            found.append((title.group(1), sql))
    return found


if __name__ == "__main__":
    main()
