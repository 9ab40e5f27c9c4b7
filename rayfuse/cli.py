"""The command line. Heavy modules are imported by the command that needs them, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rayfuse.config import load_config
from rayfuse.errors import RayfuseError
from rayfuse.models.imports import collector_paused
from rayfuse.report.terminal import make_console, make_printable

app = typer.Typer(
    name="rayfuse",
    help="Fuse several expert language models with different tokenizers into one student, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
inspect_app = typer.Typer(help="Look at what fusion works on.", no_args_is_help=True)
app.add_typer(inspect_app, name="inspect")

ConfigFile = Annotated[Path, typer.Argument(help="the run's YAML file", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="a.b=value ...: changes to the file", show_default=False)]


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check everything that can be wrong before a run: keys, files, tokenizers, templates, data, disk."""
    from rayfuse.check import check_config

    console = make_console()
    faults = check_config(load_config(config, overrides or []), console)
    if faults:
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to plan for: 1 to 8, or nodes of 8", show_default="the student's")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="their name, for example h800 or rtx4090", show_default="as this machine has")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="a YAML file in place of both: gpu, nodes, ...")] = None,
    samples: Annotated[
        int | None, typer.Option(help="rows of the data", min=1, show_default="counted where they are here")
    ] = None,
    length: Annotated[
        float | None, typer.Option(help="mean student tokens of a sample", min=1, show_default="max_length")
    ] = None,
    price: Annotated[float | None, typer.Option(help="of a GPU hour", min=0)] = None,
    fit: Annotated[Path | None, typer.Option(help="write the configuration with the settings chosen here")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what a run will need and cost, from configurations and weight headers alone; status 1: it does not fit."""
    from rayfuse.plan.command import chosen_hardware, write_fit
    from rayfuse.plan.estimate import estimate
    from rayfuse.plan.page import plan_json, plan_lines

    resolved = load_config(config, overrides or [])
    made = estimate(resolved, chosen_hardware(resolved, gpus, gpu, cluster), samples=samples, length=length)
    console = make_console(plain=True)
    for line in [plan_json(made, price)] if as_json else plan_lines(made, price):
        console.print(line)
    if fit is not None:
        write_fit(made, config, overrides or [], fit)
    if made.faults:
        raise typer.Exit(1)


@app.command()
def fuse(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what the output folder holds")] = False,
) -> None:
    """Run all stages of a configuration and write the fused model."""
    run(config, overrides or [], resume=resume)


@app.command()
def prefer(config: ConfigFile, overrides: Overrides = None) -> None:
    """Let teachers and pivot answer prompts, judge the answers, and write preference or training data.

    Stopped and started again, it goes on from the answers that are there.
    """
    import json

    resolved = load_config(config, overrides or [])
    from rayfuse.prefer.make import prefer as make
    from rayfuse.prefer.make import summary_path, summary_table

    console = make_console()
    output = make(resolved, console=console)
    summary = json.loads(summary_path(output).read_text(encoding="utf-8"))
    console.print(summary_table(summary))
    for what, count in summary["counts"].items():
        if count:
            console.print(f"{what}: {count:,}", highlight=False)
    console.print(f"rows     {output}\nsummary  {summary_path(output)}", highlight=False, soft_wrap=True)


def run(config: Path, overrides: list[str], *, resume: bool = False) -> None:
    """`rayfuse fuse`, also for scripts: run, then show the results and where they are."""
    resolved = load_config(config, overrides)

    with collector_paused():
        from rayfuse.run.fuse import fuse as fuse_config

    console = make_console()
    fuse_config(resolved, resume=resume, console=console)
    show_results(Path(resolved.output), console)


def show_results(output: Path, console: Console) -> None:
    """Print a finished run's table, and where its model and report are."""
    import json

    from rayfuse.report.page import result_table

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    if results["models"]:
        console.print(result_table(results))
    console.print(f"fused model  {output / 'model'}\nreport       {output / 'report.html'}", highlight=False)


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/quickstart"),
    cache: Annotated[
        Path | None, typer.Option(help="where the small experts are kept", show_default="~/.cache/rayfuse")
    ] = None,
) -> None:
    """Train three small experts and a pivot (once), fuse them, show the result."""
    from rayfuse.quickstart.run import run_quickstart

    console = make_console()
    run_quickstart(folder, cache, console)
    show_results(folder, console)


@app.command()
def teachers(
    config: ConfigFile,
    action: Annotated[str, typer.Argument(help="up, down, status or scale", show_default=False)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="NAME N of scale; a.b=value ...: changes to the file", show_default=False),
    ] = None,
) -> None:
    """Keep a configuration's teachers up apart from a run, so that several runs share them."""
    overrides = [argument for argument in arguments or [] if "=" in argument]
    resolved = load_config(config, overrides)
    from rayfuse.teachers.serving.manage import manage

    manage(resolved, action, [argument for argument in arguments or [] if "=" not in argument], make_console())


@app.command("serve-teachers")
def serve_teachers(config: ConfigFile, overrides: Overrides = None) -> None:
    """Let people and programs ask a configuration's teachers over HTTP, while runs use them."""
    resolved = load_config(config, overrides or [])
    from rayfuse.teachers.http.served import serve_teachers as serve

    serve(resolved, make_console())


@inspect_app.command("align")
def inspect_align(
    config: ConfigFile,
    overrides: Overrides = None,
    text: Annotated[str, typer.Option("--text", help="the response text to look at")] = "",
) -> None:
    """Show how each teacher's tokens meet the student's, and which student tokens no teacher has."""
    resolved = load_config(config, overrides or [])
    from rayfuse.alignment.inspection import alignment_view
    from rayfuse.models.loading import load_tokenizer

    if not text:
        raise typer.BadParameter('give a text to look at, for example --text "12345 apples"', param_hint="--text")
    text = os.fsencode(text).decode("utf-8", "surrogateescape")  # an argument is UTF-8 whatever the locale says
    teachers = {teacher.name: load_tokenizer(teacher) for teacher in resolved.teachers}
    make_console().print(alignment_view(load_tokenizer(resolved.student), teachers, text))


@inspect_app.command("labels")
def inspect_labels(
    run: Annotated[Path, typer.Argument(help="folder of a run with a `consensus`", show_default=False)],
    first: Annotated[int, typer.Option(help="how many to show; 0: all")] = 30,
) -> None:
    """List the labels of a run's data that are probably wrong, the most doubtful first."""
    from rayfuse.consensus.inspection import labels_table

    Console().print(labels_table(run, first))


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors that rayfuse raises on purpose become one message and exit status 1; all that is printed is printable."""
    make_printable()
    try:
        yield
    except RayfuseError as error:
        make_console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        plain = make_console(stderr=True, plain=True)
        for text in (str(error), *getattr(error, "__notes__", ())):
            plain.print(text)
        raise SystemExit(1) from None
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        make_console(stderr=True, plain=True).print(
            f"ConfigError: this process names files in {sys.getfilesystemencoding()}, by its locale, which lacks "
            f"{error.object[error.start : error.end]!r} of {error.object!r}; set PYTHONUTF8=1 (or LC_ALL=C.UTF-8)"
        )
        raise SystemExit(1) from None


def main() -> None:
    """Entry point of `rayfuse`."""
    with errors_shown():
        app()


if __name__ == "__main__":
    main()
