"""The command line. Only what `--help` needs is imported at the top; each command imports its own part.

Exit codes: 0 all done · 1 something failed in this run (printed and recorded) · 2 a wrong input · 3 the command ended
early, by a crash or a full disk · 130 interrupted · 141 the reader of the output has closed it.
"""

import atexit
import errno
import os
import re
import shlex
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from clipmill.base.errors import UserError

CRASHED, INTERRUPTED, PIPE_CLOSED = 3, 130, 141


class _Raised(Exception):
    """An exception of a command that typer would turn into an exit code of its own."""

    def __init__(self, error: BaseException):
        super().__init__(error)
        self.error = error


class _Commands(TyperGroup):
    """Pass interrupts, ends of input, errors of pipes and exits of libraries on to `_run`, past typer's handlers."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError, OSError, SystemExit) as error:
            raise _Raised(error) from error


class _TakesDashes(TyperCommand):
    """A command whose arguments may begin with a dash, as every 64th YouTube id does: `explain corpus -x1y2z3`."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        options = [parameter for parameter in self.params if parameter.opts[0].startswith("-")]
        takes_value = {name: not option.is_flag for option in options for name in option.opts}
        takes_value |= dict.fromkeys(ctx.help_option_names, False)
        given, arguments, rest = [], [], list(args)
        while rest:
            word = rest.pop(0)
            name, equals, _ = word.partition("=")
            if word == "--":
                arguments += rest
                break
            if name not in takes_value:
                arguments.append(word)
                continue
            given.append(word)
            if takes_value[name] and not equals and rest:
                given.append(rest.pop(0))
        return super().parse_args(ctx, [*given, "--", *arguments])


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a list of video URLs into a clip-text corpus that you query with SQL, and train models on parts of it.",
)

CorpusOption = Annotated[
    str, typer.Option("--corpus", help="The corpus folder, or s3://BUCKET/PREFIX.", show_default=False)
]
CorpusArgument = Annotated[
    str, typer.Argument(help="The corpus folder, or s3://BUCKET/PREFIX.", metavar="DIR", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change and save a setting; see `clipmill settings`.", metavar="SECTION.KEY=VALUE"),
]
TrySetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Use another setting, without saving it.", metavar="SECTION.KEY=VALUE"),
]
RunOption = Annotated[Path, typer.Option("--run", help="The run folder.", show_default=False)]
RunRecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe, e.g. clip_vip_b32, or a YAML file.")]
TableOption = Annotated[
    list[str] | None,
    typer.Option(help="Load a file as a table, e.g. feedback=run/feedback.parquet.", metavar="NAME=FILE"),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A recipe, e.g. hd_vila, or a YAML file.")]
SelectOption = Annotated[str | None, typer.Option(help="Train on the clips that this SELECT returns.", metavar="SQL")]
WhereOption = Annotated[
    str | None, typer.Option(help="Train on the clips that match this condition on `catalog`.", metavar="SQL")
]
PackOption = Annotated[
    str | None,
    typer.Option(help="Read the shards of this named pack, not those of the main one.", metavar="NAME"),
]
FormatOption = Annotated[str, typer.Option(help="table or json.")]


@app.command()
def build(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Lists (.txt .csv .tsv .jsonl .parquet), folders, globs, files, URLs, - for standard input, or a "
            "benchmark's folder (msrvtt:FOLDER, see docs/benchmarks.md). Omit to continue with the known sources.",
            show_default=False,
        ),
    ] = None,
    corpus: CorpusOption = "corpus",
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Build a corpus: run every stage from sources to shards. Resumes, and adds new sources."""
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
    """Import the stages for the help of `run` only when it is printed."""

    def format_help(self, ctx, formatter) -> None:
        from pipeline.engine.registry import stage_names

        *names, last = stage_names()[1:]
        self.params[0].help = f"The stage: {', '.join(names)} or {last}."
        super().format_help(ctx, formatter)


@app.command(cls=_RunCommand)
def run(
    stage: Annotated[str, typer.Argument(show_default=False)],
    corpus: CorpusOption = "corpus",
    redo: Annotated[bool, typer.Option("--redo", help="Redo all items, not only the pending ones.")] = False,
    where: Annotated[
        str | None,
        typer.Option(help="Also redo items that match, e.g. \"error_class = 'timeout'\".", metavar="SQL"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="With `pack`: write the pack in shards/NAME/, beside the main one; --set pack.… is then for it.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Run one stage on the items that are pending in it."""
    from clipmill.cli.display import Terminal
    from pipeline.engine.build import build as build_corpus
    from pipeline.engine.build import require_stage

    require_stage(stage)
    if name is not None and stage != "pack":
        raise UserError(f"--name {name}: it names a pack, so it goes with `clipmill run pack`.")
    report = build_corpus(
        corpus,
        [],
        stages=[stage],
        recipe=None,
        assignments=set_ or [],
        command=_command(),
        redo=redo,
        where=where,
        pack=name,
        display=(display := Terminal()),
    )
    display.finished(report, corpus)
    raise typer.Exit(report.exit_code)


@app.command()
def status(corpus: CorpusArgument, set_: TrySetOption = None) -> None:
    """Count what is done, pending and failed in each stage; with --set, what a change would make pending."""
    from clipmill.cli.display import show_status

    show_status(corpus, set_ or [])


@app.command()
def trust(corpus: CorpusArgument) -> None:
    """Confirm the settings of a corpus from elsewhere that run code, open addresses or read other files."""
    from clipmill.cli.display import show_trust

    show_trust(corpus)


@app.command(cls=_TakesDashes)
def sql(
    corpus: CorpusArgument,
    query: Annotated[
        str | None, typer.Argument(help="An SQL query. Omit for an interactive prompt.", show_default=False)
    ] = None,
    format: Annotated[str, typer.Option(help="table, csv, json or parquet.")] = "table",
    table: TableOption = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the whole corpus, without its media, as one DuckDB file.", metavar="FILE"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the FILE of --export.")] = False,
) -> None:
    """Query the corpus with SQL, read-only. Works while a build is running."""
    from shards.query.export import export as export_to
    from shards.query.prompt import prompt
    from shards.query.sql import named_tables, open_manifest, run_query

    if export:
        if query or table:
            raise UserError(f"--export {export}: it writes the whole corpus; leave the query and --table out.")
        typer.echo(f"{export}: {export_to(corpus, export, force=force) / 1e6:,.1f} MB")
        return
    with open_manifest(corpus, named_tables(table or [])) as connection:
        if query is None:
            prompt(connection)
        else:
            run_query(connection, query, format)


@app.command()
def stats(corpus: CorpusArgument) -> None:
    """Show the corpus in numbers: totals, the funnel from source to sample, histograms, bytes on disk."""
    from rich.console import Console

    from shards.query.disk import disk_use
    from shards.query.sql import open_manifest
    from shards.query.statistics import render, report

    with open_manifest(corpus) as connection:
        render(report(connection, disk_use(corpus, connection)), Console())


@app.command()
def verify(
    corpus: CorpusArgument,
    decode: Annotated[bool, typer.Option(help="Also decode every clip and count its frames.")] = True,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read all other files: sources, subtitles, clips, fragments, manifest.")
    ] = False,
) -> None:
    """Check every shard against the manifest, with --deep every file. Exits with 1 if there is a problem."""
    from clipmill.cli.display import verify_corpus

    raise typer.Exit(verify_corpus(corpus, decode, deep))


@app.command()
def forget(
    corpus: CorpusArgument,
    video: Annotated[list[str] | None, typer.Option(help="A video_id. Repeatable.", metavar="ID")] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="A URL. Repeatable. An unknown one is kept out from now on.", metavar="URL")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="An SQL condition on `videos`, e.g. \"channel = 'x'\".", metavar="SQL")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Reason to record.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Preview; change nothing.")] = False,
) -> None:
    """Forget videos, and copies of their files, for good. Nothing reads or downloads them again."""
    from clipmill.cli.forget import run_forget

    raise typer.Exit(run_forget(corpus, video or [], url or [], where, reason=reason, yes=yes, dry_run=dry_run))


@app.command()
def compact(corpus: CorpusArgument) -> None:
    """Delete every byte of forgotten videos. Rewrites only the files that contain some."""
    from clipmill.cli.forget import run_compact

    raise typer.Exit(run_compact(corpus))


@app.command(cls=_TakesDashes)
def explain(
    corpus: CorpusArgument,
    id: Annotated[str, typer.Argument(help="A video_id, clip_id, sample key or URL.", metavar="ID")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the history of a source, clip or sample: every stage and attempt, and where its bytes are."""
    from clipmill.cli.explain import run_explain

    raise typer.Exit(run_explain(corpus, id, as_json=json))


@app.command()
def train(
    corpus: Annotated[
        str | None,
        typer.Option(help="A corpus folder or URL, or a glob of plain tars. Omit for the run's.", show_default=False),
    ] = None,
    run: RunOption = Path("run"),
    recipe: RunRecipeOption = None,
    init: Annotated[
        str | None, typer.Option(help="Initial weights: a run, file, folder or open_clip:NAME/TAG.", show_default=False)
    ] = None,
    select: SelectOption = None,
    where: WhereOption = None,
    pack: PackOption = None,
    workers: Annotated[int, typer.Option(help="Training processes; more than one run under Ray Train.")] = 1,
    address: Annotated[str | None, typer.Option(help="The Ray cluster to train on, e.g. auto.")] = None,
    table: TableOption = None,
    set_: SetOption = None,
) -> None:
    """Train a model on a selection of a corpus. Resumes from the latest checkpoint in RUN."""
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
        pack=pack,
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
    corpus: Annotated[str, typer.Option(help="A corpus folder or URL, or a glob of plain tars.", show_default=False)],
    recipe: RunRecipeOption = None,
    select: SelectOption = None,
    where: WhereOption = None,
    pack: PackOption = None,
    workers: Annotated[int, typer.Option(help="Training processes, one device each.")] = 1,
    gpu: Annotated[
        list[str] | None, typer.Option(help="Estimate for this GPU, e.g. H100. Repeatable.", metavar="NAME")
    ] = None,
    table: TableOption = None,
    format: FormatOption = "table",
    set_: TrySetOption = None,
) -> None:
    """Estimate the cost of a training run: steps, bytes, memory, FLOPs, time. Starts nothing."""
    from clipmill.cli.estimate import run_plan
    from shards.query.sql import named_tables

    if format not in ("table", "json"):
        raise UserError(f"--format {format}: choose table or json.")
    run_plan(
        corpus,
        recipe=recipe,
        select=select,
        where=where,
        pack=pack,
        workers=workers,
        gpus=gpu or (),
        assignments=set_ or [],
        tables=named_tables(table or []),
        format=format,
    )


@app.command("eval")
def evaluate(
    run: Annotated[Path | None, typer.Option(help="The run to evaluate.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="Or a model: a file or folder, open_clip:NAME/TAG, or demo.", show_default=False)
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="A corpus folder or URL, or a glob of plain tars. Omit for the run's.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="For --model: a recipe or a YAML file.", show_default=False)
    ] = None,
    select: Annotated[
        str | None, typer.Option(help="Search the clips that this SELECT returns.", metavar="SQL")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="Search the clips that match. Omit for the setting eval.where.", metavar="SQL")
    ] = None,
    pack: PackOption = None,
    text: Annotated[str | None, typer.Option(help="Queries: subtitle or caption.")] = None,
    dsl: Annotated[bool, typer.Option("--dsl", help="Also rank with dual softmax over all queries.")] = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="best, last or a step. Omit for best if RUN was validated, else last.", show_default=False),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the run's averaged weights.")] = False,
    save_similarity: Annotated[
        Path | None, typer.Option(help="Save the similarities to this .npz or .safetensors file.", show_default=False)
    ] = None,
    format: FormatOption = "table",
    set_: TrySetOption = None,
) -> None:
    """Evaluate text-to-video and video-to-text retrieval with a run's checkpoint or any model."""
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
        pack=pack,
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
    corpus: Annotated[str | None, typer.Option(help="The corpus folder. Omit for OUT's.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The teacher: a run, or a model as for `eval`. Omit for OUT's.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for this editing and its students' runs. Resumes.")] = Path("edit"),
    recipe: RunRecipeOption = None,
    where: Annotated[
        str | None, typer.Option(help="Edit the clips that match. Omit for the run's data.where.", metavar="SQL")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Maximum number of rounds. 0: one round, no student.", show_default=False)
    ] = None,
    train: Annotated[
        bool | None, typer.Option("--train/--no-train", help="Train a student between rounds. Default: yes.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Scoring processes; more than one run on Ray.")] = 1,
    table: TableOption = None,
    set_: SetOption = None,
) -> None:
    """Move clip boundaries to where the text is shown. Then train with --set data.edits=accepted."""
    from clipmill.cli.edit import run_edit
    from pipeline.editing.launch import EditRequest
    from shards.query.sql import named_tables
    from shards.storage.s3 import is_url

    if is_url(corpus):
        raise UserError(f"--corpus {corpus}: `edit` needs a corpus in a folder, not in a store (docs/object_store.md).")
    request = EditRequest(
        out,
        corpus=None if corpus is None else Path(corpus),
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
    _, num_failed = run_edit(request)
    raise typer.Exit(1 if num_failed else 0)


@app.command()
def settings(
    section: Annotated[
        str | None,
        typer.Argument(help="A section, e.g. cut, data or train. Omit for all.", metavar="SECTION", show_default=False),
    ] = None,
    format: Annotated[str, typer.Option(help="text, yaml (a template for --recipe) or markdown.")] = "text",
) -> None:
    """List every setting with its default, accepted values and purpose."""
    from clipmill.cli.settings import show_settings

    show_settings(section, format)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder to create; resumes there.", metavar="DIR")] = Path("demo"),
    videos: Annotated[int, typer.Option(help="Number of videos in the demo world.")] = 48,
) -> None:
    """Run everything on a small generated world of videos: build, query, train, evaluate."""
    from clipmill.cli.demo import run_demo

    raise typer.Exit(run_demo(folder, videos))


def _command() -> str:
    """Return the command as it is recorded: without credentials."""
    from clipmill.base.credentials import strip_credentials

    return shlex.join(["clipmill", *map(strip_credentials, sys.argv[1:])])


def main() -> None:
    _leave(_run())


def _run() -> int:
    """Run the command line; return the exit code."""
    interrupts: list[int] = []

    def note_interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as after `nohup`
        signal.signal(signal.SIGINT, note_interrupt)
    try:
        app()
    except SystemExit as end:  # typer's: a command's exit code, or 2 after a mistake in the options
        return end.code
    except BaseException as error:
        error = error.error if isinstance(error, _Raised) else error
        if interrupts or isinstance(error, (KeyboardInterrupt, EOFError)):  # libraries turn interrupts into errors
            typer.echo("\nclipmill: interrupted. Run the same command again to resume.", err=True)
            return INTERRUPTED
        return _code_of(error)
    return 0


def _code_of(error: BaseException) -> int:
    """Print why a command ended early; return its exit code. 1 is not among them: it is for items that failed."""
    if isinstance(error, UserError):
        from clipmill.base.credentials import strip_credentials
        from clipmill.base.text import visible

        typer.echo(f"clipmill: {visible(strip_credentials(str(error)), keep=chr(10))}", err=True)
        return 2
    if BrokenPipeError in (type(error), type(error.__context__)):  # rich turns it into an exit
        return PIPE_CLOSED
    if isinstance(error, SystemExit) and not error.code:
        return 0
    if isinstance(error, Exception) and _is_damaged_database(error):
        typer.echo(f"clipmill: {error}\nThe manifest is damaged: `clipmill build` publishes it again.", err=True)
        return 2
    if isinstance(error, Exception) and _is_unwritable_disk(error):
        typer.echo(f"clipmill: {error}. Committed work is safe; fix this and run the command again.", err=True)
        return CRASHED
    traceback.print_exception(error)
    typer.echo(
        "clipmill: crashed by a defect of clipmill or of a library. Committed work is safe. Please report the "
        "traceback above.",
        err=True,
    )
    return CRASHED


def _is_damaged_database(error: Exception) -> bool:
    """Tell errors of a database with wrong bytes, which DuckDB finds when a query reads them."""
    return "duckdb" in type(error).__module__ and re.search("checksum|corrupt", str(error), re.IGNORECASE) is not None


def _is_unwritable_disk(error: Exception) -> bool:
    """Tell errors of a full or read-only disk from others; DuckDB's are known by their text only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
    return "duckdb" in type(error).__module__ and any(text in str(error) for text in words)


def _leave(code: int) -> NoReturn:
    """Exit without interpreter shutdown.

    With Ray's threads alive shutdown is slow, and DuckDB's binding prints a page about leaked types that looks like an
    error.
    """
    with suppress(KeyboardInterrupt):  # a second one, while Ray shuts down
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError, ValueError):  # its reader has ended, or it is closed
            stream.flush()
    os._exit(code)
