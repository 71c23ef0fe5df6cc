"""The command line. Only what `--help` needs is imported at the top; each command imports its own part.

Exit codes: 0 all done · 1 some items failed (said, counted, recorded) · 2 the user's mistake.
"""

import atexit
import errno
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.core import TyperCommand

from clipmill.base.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a list of video URLs to a queryable clip-text corpus, and to CLIP-ViP trained on any selection of it.",
)

CorpusOption = Annotated[
    str, typer.Option("--corpus", help="The corpus folder, or s3://BUCKET/PREFIX.", show_default=False)
]
CorpusArgument = Annotated[
    str, typer.Argument(help="The corpus folder, or s3://BUCKET/PREFIX.", metavar="DIR", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting and keep it, e.g. --set cut.fps=2.", metavar="SECTION.KEY=VALUE"),
]
RunOption = Annotated[Path, typer.Option("--run", help="The run folder.", show_default=False)]
RunRecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="A recipe's name or a YAML file of settings, e.g. clip_vip_b32.")
]
TableOption = Annotated[
    list[str] | None,
    typer.Option(help="Load a file as a table, e.g. feedback=run/feedback.parquet.", metavar="NAME=FILE"),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe's name or a YAML file of settings.")]


@app.command()
def build(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Lists (.txt .csv .tsv .jsonl .parquet), folders, globs, files, URLs, - for standard input, or a "
            "benchmark's folder (msrvtt:FOLDER, see docs/benchmarks.md); none: go on with what the corpus knows.",
            show_default=False,
        ),
    ] = None,
    corpus: CorpusOption = "corpus",
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Every stage, from sources to shards. Resumes; appends what is new in SOURCES."""
    from clipmill.cli.display import Terminal
    from pipeline.engine.build import build as build_corpus
    from pipeline.engine.registry import stage_names
    from shards.corpus.folder import Corpus

    if not sources:
        Corpus(corpus).require()
    report = build_corpus(
        corpus,
        sources or [],
        stages=stage_names(),
        recipe=recipe,
        assignments=set_ or [],
        command=_command(),
        display=(display := Terminal()),
    )
    display.finished(report, corpus)
    raise typer.Exit(report.exit_code)


class _RunCommand(TyperCommand):
    """`run`, which imports the stages only when its help has to name them."""

    def format_help(self, ctx, formatter) -> None:
        from pipeline.engine.registry import stage_names

        *names, last = stage_names()[1:]
        self.params[0].help = f"{', '.join(names)} or {last}."
        super().format_help(ctx, formatter)


@app.command(cls=_RunCommand)
def run(
    stage: Annotated[str, typer.Argument(show_default=False)],
    corpus: CorpusOption = "corpus",
    redo: Annotated[bool, typer.Option("--redo", help="Do all of it again, not only what is pending.")] = False,
    where: Annotated[
        str | None,
        typer.Option(help="Do again what this SQL condition names, e.g. \"error_class = 'timeout'\".", metavar="SQL"),
    ] = None,
    set_: SetOption = None,
) -> None:
    """One stage, and only what is pending in it."""
    from clipmill.cli.display import Terminal
    from pipeline.engine.build import build as build_corpus
    from pipeline.engine.build import require_stage

    require_stage(stage)
    report = build_corpus(
        corpus,
        [],
        stages=[stage],
        recipe=None,
        assignments=set_ or [],
        command=_command(),
        redo=redo,
        where=where,
        display=(display := Terminal()),
    )
    display.finished(report, corpus)
    raise typer.Exit(report.exit_code)


@app.command()
def status(corpus: CorpusArgument, set_: SetOption = None) -> None:
    """What each stage has done, has to do and could not do; with --set, what a change would make pending."""
    from clipmill.cli.display import show_status

    show_status(corpus, set_ or [])


@app.command()
def sql(
    corpus: CorpusArgument,
    query: Annotated[
        str | None, typer.Argument(help="A query; none: an interactive prompt.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="table, csv, json or parquet.")] = "table",
    table: TableOption = None,
) -> None:
    """Ask the manifest. Read-only, also while a build is running."""
    from shards.query.prompt import prompt
    from shards.query.sql import named_tables, open_manifest, run_query

    with open_manifest(corpus, named_tables(table or [])) as connection:
        if query is None:
            prompt(connection)
        else:
            run_query(connection, query, format)


@app.command()
def stats(corpus: CorpusArgument) -> None:
    """The corpus in numbers: what HD-VILA reports, the funnel from source to sample, histograms."""
    from rich.console import Console

    from shards.query.sql import open_manifest
    from shards.query.statistics import render, report

    with open_manifest(corpus) as connection:
        render(report(connection), Console())


@app.command()
def verify(
    corpus: CorpusArgument,
    decode: Annotated[bool, typer.Option(help="Also decode every clip and count its frames.")] = True,
) -> None:
    """Check every shard against the manifest; exit 1 and a list when anything is off."""
    from clipmill.cli.display import verify_corpus

    raise typer.Exit(verify_corpus(corpus, decode))


@app.command()
def forget(
    corpus: CorpusArgument,
    video: Annotated[list[str] | None, typer.Option(help="A video_id; may be given again.", metavar="ID")] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="A URL, in any spelling; also one that is to be kept out.", metavar="URL")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="A condition on `videos`, e.g. \"channel = 'x'\".", metavar="SQL")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Kept with the tombstone.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Forget videos for good, copies of their files too: nothing reads or fetches them any more."""
    from clipmill.cli.forget import run_forget

    raise typer.Exit(run_forget(corpus, video or [], url or [], where, reason=reason, yes=yes, dry_run=dry_run))


@app.command()
def compact(corpus: CorpusArgument) -> None:
    """Remove every byte of what was forgotten, rewriting only the files that hold any of it."""
    from clipmill.cli.forget import run_compact

    raise typer.Exit(run_compact(corpus))


@app.command()
def explain(
    corpus: CorpusArgument,
    id: Annotated[str, typer.Argument(help="A video_id, clip_id, sample key or URL.", metavar="ID")],
    json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """The whole story of a source, a clip or a sample: every stage and attempt, and where its bytes are."""
    from clipmill.cli.explain import run_explain

    raise typer.Exit(run_explain(corpus, id, as_json=json))


@app.command()
def train(
    corpus: Annotated[
        str | None,
        typer.Option(help="A corpus folder or URL, or a pattern of plain tars; none: the run's.", show_default=False),
    ] = None,
    run: RunOption = Path("run"),
    recipe: RunRecipeOption = None,
    init: Annotated[
        str | None, typer.Option(help="Start from a run, a file or folder, open_clip:NAME/TAG.", show_default=False)
    ] = None,
    select: Annotated[str | None, typer.Option(help="Train on the clips of this SELECT.", metavar="SQL")] = None,
    where: Annotated[
        str | None, typer.Option(help="Train on the clips of this condition on `catalog`.", metavar="SQL")
    ] = None,
    workers: Annotated[int, typer.Option(help="Training processes, under Ray Train when more than one.")] = 1,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to train on, e.g. auto.")] = None,
    table: TableOption = None,
    set_: SetOption = None,
) -> None:
    """Post-pretrain CLIP on a selection of a corpus. Resumes where RUN has a checkpoint."""
    from clipmill.cli.train import show_report
    from shards.query.sql import named_tables
    from training.launch import launch_training

    report = launch_training(
        corpus,
        run,
        recipe=recipe,
        init=init,
        select=select,
        where=where,
        workers=workers,
        address=address,
        assignments=set_ or [],
        tables=[(name, str(path)) for name, path in named_tables(table or []).items()],
        command=_command(),
    )
    show_report(report)


app.command("finetune", help="Fine-tune a model for retrieval: `train` with a recipe such as msrvtt_b32.")(train)


@app.command()
def plan(
    corpus: Annotated[
        str, typer.Option(help="A corpus folder or URL, or a pattern of plain tars.", show_default=False)
    ],
    recipe: RunRecipeOption = None,
    select: Annotated[str | None, typer.Option(help="Train on the clips of this SELECT.", metavar="SQL")] = None,
    where: Annotated[
        str | None, typer.Option(help="Train on the clips of this condition on `catalog`.", metavar="SQL")
    ] = None,
    workers: Annotated[int, typer.Option(help="Training processes, a device each.")] = 1,
    gpu: Annotated[
        list[str] | None, typer.Option(help="A GPU to estimate the time on, e.g. H100; none: a few.", metavar="NAME")
    ] = None,
    table: TableOption = None,
    format: Annotated[str, typer.Option(help="table or json.")] = "table",
    set_: SetOption = None,
) -> None:
    """What a training run would cost: steps, bytes, memory, FLOPs, time. Reads the corpus, starts nothing."""
    from clipmill.cli.estimate import run_plan
    from shards.query.sql import named_tables

    if format not in ("table", "json"):
        raise UserError(f"--format {format}: choose table or json.")
    run_plan(
        corpus,
        recipe=recipe,
        select=select,
        where=where,
        workers=workers,
        gpus=gpu or (),
        assignments=set_ or [],
        tables=named_tables(table or []),
        format=format,
    )


@app.command("eval")
def evaluate(
    run: Annotated[Path | None, typer.Option(help="A run.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="Or any model: a folder, a file, open_clip:NAME/TAG, demo.", show_default=False)
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="A corpus folder or URL, or plain tars; none: the run's.", show_default=False),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings to evaluate a model with.", show_default=False)] = None,
    select: Annotated[str | None, typer.Option(help="Search the clips of this SELECT.", metavar="SQL")] = None,
    where: Annotated[
        str | None, typer.Option(help="Search the clips of this condition; none: the run's eval.where.", metavar="SQL")
    ] = None,
    text: Annotated[str | None, typer.Option(help="subtitle or caption: what a clip is searched by.")] = None,
    dsl: Annotated[bool, typer.Option("--dsl", help="Also with dual softmax over all queries.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="best, last, or a step; none: best where RUN was validated.", show_default=False),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The run's averaged weights.")] = False,
    save_similarity: Annotated[
        Path | None, typer.Option(help="Keep the similarities: .npz or .safetensors.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="table or json.")] = "table",
    set_: SetOption = None,
) -> None:
    """Text-video retrieval both ways, by a run's checkpoint or any model."""
    from clipmill.cli.evaluate import run_eval

    if format not in ("table", "json"):
        raise UserError(f"--format {format}: choose table or json.")
    metrics = run_eval(
        run=run,
        model=model,
        corpus=corpus,
        recipe=recipe,
        select=select,
        where=where,
        text=text,
        dsl=dsl,
        checkpoint=checkpoint,
        ema=ema,
        save_similarity=save_similarity,
        assignments=set_ or [],
        format=format,
    )
    raise typer.Exit(1 if metrics["num_failures"] else 0)


@app.command()
def edit(
    corpus: Annotated[str | None, typer.Option(help="The corpus folder; none: OUT's.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The teacher: a run, or any model as for `eval`; none: OUT's.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder for the students' runs; where it goes on.")] = Path("edit"),
    recipe: RunRecipeOption = None,
    where: Annotated[
        str | None, typer.Option(help="Edit the clips of this condition on `catalog`; none: the run's.", metavar="SQL")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="At most so many rounds; 0: one, by the given teacher alone.", show_default=False)
    ] = None,
    train: Annotated[
        bool | None, typer.Option("--train/--no-train", help="Train a student between rounds, as by default, or not.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that score, on Ray when more than one.")] = 1,
    table: TableOption = None,
    set_: SetOption = None,
) -> None:
    """Move clips' boundaries to where their texts are shown: rows, for `train --set data.edits=accepted`."""
    from clipmill.cli.edit import run_edit
    from pipeline.editing.launch import EditRequest
    from shards.query.sql import named_tables

    request = EditRequest(
        out,
        corpus=_folder(corpus),
        model=model,
        recipe=recipe,
        where=where,
        rounds=rounds,
        trains=train,
        workers=workers,
        assignments=tuple(set_ or []),
        tables=tuple((name, str(path)) for name, path in named_tables(table or []).items()),
        command=_command(),
    )
    rows = run_edit(request)
    raise typer.Exit(1 if any(row["num_failed"] for row in rows) else 0)


@app.command()
def settings(
    section: Annotated[
        str | None,
        typer.Argument(help="cut, caption, data, train …; none: all of them.", metavar="[SECTION]", show_default=False),
    ] = None,
    format: Annotated[str, typer.Option(help="text, yaml (a template for --recipe) or markdown.")] = "text",
) -> None:
    """List every setting with its default, its limits and what it does."""
    from clipmill.cli.settings import show_settings

    show_settings(section, format)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to make it.", metavar="[DIR]")] = Path("demo"),
    videos: Annotated[int, typer.Option(help="How many videos the demo world has.")] = 48,
) -> None:
    """The whole job on a small made-up world of videos, served on this machine."""
    from clipmill.cli.demo import run_demo

    raise typer.Exit(run_demo(folder, videos))


def _folder(corpus: str | None) -> Path | None:
    from shards.storage.s3 import is_url

    if is_url(corpus):
        raise UserError(f"--corpus {corpus}: edit works on corpora in folders only (docs/object_store.md).")
    return None if corpus is None else Path(corpus)


def _command() -> str:
    return shlex.join(["clipmill", *sys.argv[1:]])


def main() -> None:
    _leave(_run())


def _run() -> int:
    try:
        app()
    except UserError as error:
        from clipmill.base.text import visible

        typer.echo(f"clipmill: {visible(str(error), keep=chr(10))}", err=True)
        return 2
    except KeyboardInterrupt:
        typer.echo("\nclipmill: stopped. The same command goes on from here.", err=True)
        return 130
    except Exception as error:
        if not _disk_takes_no_more(error):
            raise
        typer.echo(f"clipmill: {error}. What is committed is safe; the same command goes on from here.", err=True)
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _disk_takes_no_more(error: Exception) -> bool:
    """Whether the corpus's disk is full or read-only; DuckDB says so in words alone."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
    return "duckdb" in type(error).__module__ and any(text in str(error) for text in words)


def _leave(code: int) -> NoReturn:
    """End without tearing the interpreter down: with Ray's threads alive that takes time, and DuckDB's binding prints a
    page about types that were never freed, which people take for an error.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)
