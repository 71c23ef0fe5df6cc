"""`clipmill edit`: a teacher moves the boundaries of clips, round by round; each round is reported."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from clipmill.base.console import plain_console
from pipeline.editing.launch import EditRequest, launch_edit
from pipeline.editing.report import report_lines
from pipeline.editing.students import Editing
from training.editing.rounds import HELD


def run_edit(request: EditRequest, console: Console | None = None) -> tuple[list[dict[str, Any]], int]:
    """Start or resume an editing and print its rounds. Raises UserError.

    Returns the rows of `edit_rounds`, and the number of videos that failed in rounds of this command.
    """
    console = console or plain_console()

    def on_start(editing: Editing) -> None:
        console.print(f"[bold]editing {editing.editing}[/] of {escape(str(editing.corpus))}", soft_wrap=True)

    def on_round(row: Mapping[str, Any]) -> None:
        for line in report_lines(row):
            console.print(escape(line), soft_wrap=True, highlight=False)

    editing, rows, num_earlier = launch_edit(request, on_start, on_round)
    held = [row["round"] for row in rows if row["outcome"] in HELD and row["num_accepted"]]
    text = "No round was accepted: the clips keep their boundaries."
    if held:
        text = f"Rounds accepted: {', '.join(map(str, held))}. The originals stay. Train on the edited clips:\n"
        text += f"  clipmill train --corpus {editing.corpus} --run DIR --set data.edits={editing.editing}:accepted …"
    console.print(text, soft_wrap=True, markup=False, highlight=False)
    return rows, sum(row["num_failed"] for row in rows[num_earlier:])
