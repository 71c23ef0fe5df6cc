"""`clipmill train` and `clipmill finetune`: the lines printed at the end of a training."""

import os

from rich.console import Console

from training.trainer import Report


def show_report(report: Report) -> None:
    """Print the result of a training and the next command; under torchrun only the first process prints."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    if report.reason == "done":
        text = f"Training finished: {report.run}, {report.total_steps:,} steps."
        text += f"\n  clipmill eval --run {report.run}"
    else:
        saved = f"step {report.step:,} of {report.total_steps:,} is saved" if report.step else "no step was made yet"
        text = f"Stopped by {report.reason}; {saved}."
        text += f"\n  clipmill train --run {report.run}    resumes"
    Console(highlight=False).print(text, soft_wrap=True)
