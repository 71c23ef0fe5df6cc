"""`clipmill train` and `clipmill finetune`: options in, one line at the end out."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from training.launch import launch_training
from training.trainer import Report


def run_train(corpus: str | None, run: str | Path, **options: Any) -> Report:
    """Train with the options of `training.launch.launch_training`, then print how it ended. Raises UserError."""
    report = launch_training(corpus, run, **options)
    if int(os.environ.get("RANK", 0)) != 0:  # torchrun's other processes
        return report
    if report.reason == "done":
        text = f"{report.run} is trained: {report.total_steps:,} steps."
        text += f"\n  clipmill eval --run {report.run}"
    else:
        text = f"Stopped by {report.reason} after step {report.step:,} of {report.total_steps:,}; everything is saved."
        text += f"\n  clipmill train --run {report.run}    resumes"
    Console(highlight=False).print(text, soft_wrap=True)
    return report
