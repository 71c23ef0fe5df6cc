"""List the studies, or run one: `python -m bench.studies [NAME] --out DIR`."""

import argparse
import os
import sys
from pathlib import Path

from bench.studies import STUDIES, load
from bench.studies.runner import index, run_study
from clipmill.base.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.studies", description=__doc__)
    parser.add_argument("name", nargs="?", choices=STUDIES, help="the study to run; without it, list them all")
    parser.add_argument("--out", type=Path, help="write rows, table and plot here; without NAME, write an index of DIR")
    parser.add_argument("--size", default="default", help="default, or small for a quick look")
    parser.add_argument("--seeds", type=int, help="number of seeds; by default the study's own number")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; one per core")
    parser.add_argument("--cache", type=Path, default=Path("runs/studies"), help="shared clips and corpora")
    arguments = parser.parse_args(argv)
    if arguments.name is None:
        for name, (_, question) in STUDIES.items():
            print(f"{name:<13}{question}")
        if arguments.out is not None:
            index(arguments.out)
            print(f"\nWrote {arguments.out / 'README.md'}.")
        return
    if arguments.out is None:
        parser.error("pass --out DIR, the folder for the study's rows, table and plot")
    try:
        run_study(
            arguments.name,
            arguments.out,
            size=arguments.size,
            num_seeds=arguments.seeds,
            cache=arguments.cache,
            workers=arguments.workers,
            progress=print,
        )
    except UserError as error:
        sys.exit(f"bench.studies: {error}")
    print(f"\nWrote the table of {load(arguments.name).title!r} to {arguments.out / 'README.md'}.")


if __name__ == "__main__":
    main()
