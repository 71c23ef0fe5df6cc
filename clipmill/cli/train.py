"""`clipmill train` and `clipmill finetune`: the lines printed at the end of a training."""

import os

from rich.console import Console

from training.trainer import Report


def show_report(report: Report) -> None:
    """Print how a training ended and what to type next; of torchrun's processes only the first prints."""
    if int(os.environ.get("RANK", 0)) != 0:
        return
    if report.reason == "done":
        text = f"{report.run} is trained: {report.total_steps:,} steps."
        text += f"\n  clipmill eval --run {report.run}"
    else:
        text = f"Stopped by {report.reason} after step {report.step:,} of {report.total_steps:,}; everything is saved."
        text += f"\n  clipmill train --run {report.run}    resumes"
    Console(highlight=False).print(text, soft_wrap=True)
