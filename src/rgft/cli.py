"""The command line: rgft train | bench | report | maps | inspect | data."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgft import __version__
from rgft.bench_commands import bench, compare_maps, place, report
from rgft.errors import EngagementError, InputError
from rgft.exit_codes import fail, fail_for
from rgft.launch import claim_last_word, end_now, leads, leave
from rgft.methods import METHODS
from rgft.spec import (
    BEAMS,
    MAX_LENGTH,
    MAX_TARGET_LENGTH,
    WRITTEN_ROWS,
    RunSpec,
    from_arguments,
    split_columns,
)

try:
    import click
    from rich.markup import escape
    from rich.table import Table

    from rgft.printed import show, summary
except ImportError as missing:
    sys.exit(
        f"rgft: the command needs more than the library ({missing.name}): pip install 'rgft[train]'"
    )


class Commands(click.Group):
    """Says that the reader of the output has gone, which click and rich keep to themselves."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command, and have all that it printed written."""
        try:
            result = super().invoke(context)
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit) as end:
            if not any(isinstance(e, BrokenPipeError) for e in (end, end.__context__)):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left has nowhere to go
            fail("the reader of the output has gone (broken pipe)", 1)
        return result


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="rgft")
def app() -> None:
    """Residual-guided fine-tuning: spend compute where the error is."""


app.add_command(bench)
app.add_command(report)
app.add_command(compare_maps)


ELSEWHERE = {"--rows": "--max-train-rows", "--learning-rate": "--lr", "--arm": "--method"}
"""Names that suites and other programs have for options."""


@app.command()
@click.option("--output-dir", type=place, required=True, help="Folder of the run.")
@click.option(
    "--model",
    help="Folder, hub id, or of a package: minilm, efficientnet-lite0, smollm2-135m.  [minilm]",
)
@click.option("--task", help="A task by name; `rgft data` lists them.")
@click.option(
    "--data",
    help="Folder with train, validation (and test) as JSONL, JSON, CSV or Parquet; "
    "with --task, where that task lies.",
)
@click.option("--text-columns", help="One text column, or two joined by a comma.  [detected]")
@click.option("--label-column", help="Label column.  [detected]")
@click.option("--target-column", help="Column of texts to write, in place of labels.")
@click.option("--method", help=f"One of: {', '.join(METHODS)}.  [rgft]")
@click.option("--epochs", type=float, help="Passes over the training data.  [3]")
@click.option("--lr", type=float, help="Peak learning rate.  [the method's, scaled to the model]")
@click.option(
    "--seed", type=int, help="Seed of the head, the order of the data, dropout and the method.  [0]"
)
@click.option(
    "--budget",
    help="What training may spend: a share of the FLOPs of full fine-tuning (0.3) "
    "or a time (20min); auto stops when twice the compute buys too little.  [no limit]",
)
@click.option("--batch-size", type=int, help="Samples per step.  [32; with a budget, the method's]")
@click.option(
    "--adam-beta2", type=float, help="Smoothing of squared gradients in AdamW.  [the method's]"
)
@click.option("--max-length", type=int, help=f"Tokens a text is cut at.  [{MAX_LENGTH}]")
@click.option(
    "--image-size", type=int, help="Pixels a side images are scaled to.  [the model's own]"
)
@click.option(
    "--prompt", help="What a model reads before it writes: 'Q: {question} A:'.  [the task's]"
)
@click.option(
    "--max-target-length",
    type=int,
    help="Tokens that texts to write are cut at, and the most that are written."
    f"  [{MAX_TARGET_LENGTH}]",
)
@click.option("--beams", type=int, help=f"Beams of the search that writes texts.  [{BEAMS}]")
@click.option(
    "--written-rows",
    type=int,
    help=f"Write texts for at most so many rows of a split at each evaluation.  [{WRITTEN_ROWS}]",
)
@click.option(
    "--max-train-rows",
    type=int,
    help="Train on so many rows, the same for every seed; budgets are shares of that.  [all]",
)
@click.option(
    "--max-evaluation-rows",
    type=int,
    help="Evaluate on at most so many rows of each split, the same for every seed.  [all]",
)
@click.option(
    "--granularity",
    help="layer, block, head, lora, parameter or a regular expression.  [the method's]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting of the method: beta=0.95, alpha=2, top=0.3, every=1, ...; repeatable.",
)
@click.option(
    "--evaluations",
    type=int,
    help="Evaluations and checkpoints per epoch, about.  [4; fewer on small data]",
)
@click.option(
    "--keep-layers",
    type=int,
    help="Keep the first so many layers, drop the rest.  [all; with a budget, the method's]",
)
@click.option(
    "--skip",
    type=float,
    help="With a budget: share of the well predicted samples that an epoch leaves out.  "
    "[the method's]",
)
@click.option(
    "--group-by-length/--no-group-by-length",
    default=None,
    help="With a budget: batches of texts of like length.  [the method's]",
)
@click.option(
    "--balance",
    type=float,
    help="Weight classes in the loss by (1 / frequency)^BALANCE.  [the method's]",
)
@click.option(
    "--dropout/--no-dropout", default=None, help="Whether dropout acts in training.  [the method's]"
)
@click.option(
    "--precision", help="Of matrix products: float32 or bfloat16 (mixed precision).  [float32]"
)
@click.option(
    "--prefix-cache",
    help="Keep what the frozen deepest layers put out: float32, bfloat16, int8 or off.  "
    "[float32 where it pays]",
)
@click.option(
    "--forgetting/--no-forgetting",
    default=None,
    help="Measure before and after what the model could do untaught: tell how alike sentences are "
    "(STS-B), or predict general text (WikiText-2).  [no]",
)
@click.option(
    "--extend", multiple=True, help="Python file with METHODS or TASKS of your own; repeatable."
)
@click.option("--resume", is_flag=True, help="Go on exactly from the newest checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace a run that is in the folder.")
def train(  # noqa: PLR0913, PLR0917 - its options
    output_dir: Path,
    resume: bool,
    overwrite: bool,
    text_columns: str | None,
    settings: tuple[str, ...],
    extend: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune a model and leave its record, error map and report in a folder."""
    columns = None if text_columns is None else split_columns(text_columns)
    given = {**options, "text_columns": columns, "settings": parse_settings(settings) or None}
    given["extend"] = extend or None
    given = {name: value for name, value in given.items() if value is not None}
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    from rgft import records  # noqa: PLC0415 - what follows takes seconds to import

    over = False
    if resume:
        before = records.read_run(output_dir)
        over = before.get("status") == "finished"
        spec = from_arguments(
            before.get("arguments") or {}, str(output_dir / records.RUN_FILE), **given
        )
    else:
        spec = RunSpec(**given)
    from rgft.notes import afterwards, note, notes_at_once  # noqa: PLC0415
    from rgft.train import run  # noqa: PLC0415

    again = f"go on with: rgft train --resume --output-dir {shlex.quote(str(output_dir))}"
    try:
        with notes_at_once():
            record = run(spec, output_dir, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        begun = (output_dir / records.RUN_FILE).exists()
        fail(f"stopped; {again}" if begun else "stopped before training began", 1)
    leave()
    if record["status"] != "interrupted" and not leads():
        return
    if record["status"] == "interrupted":
        fail(f"stopped and saved at step {record['step']}; {again}", 1)
    for said in afterwards(record):
        note(said)
    show(summary(record))
    report = output_dir / "report.html"
    print(
        f"this run had finished before, nothing to do; report: {report}"
        if over
        else f"report: {report}"
    )


@app.command()
@click.option("--model", default="minilm", show_default=True, help="As for `rgft train`.")
@click.option("--granularity", default="layer", show_default=True, help="As for `rgft train`.")
@click.option("--writes", is_flag=True, help="As for texts to write; else as a classifier.")
@click.option("--seconds", is_flag=True, help="Also in seconds, from a few steps timed here.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def inspect(model: str, granularity: str, writes: bool, seconds: bool, as_json: bool) -> None:
    """List a model's components: parameters, and what each costs to train."""
    from rgft.inspection import ROWS, TOKENS, inspect_model  # noqa: PLC0415
    from rgft.progress import Quiet, waiting  # noqa: PLC0415

    with Quiet(), waiting("timing a few steps" if seconds else "counting FLOPs"):
        rows = inspect_model(model, granularity, seconds=seconds, writes=writes)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    as_what = (
        "the model writes texts"
        if writes
        else "the model is a classifier of two classes (--writes: of texts to write)"
    )
    timed = ("seconds alone", "seconds down to it") if seconds else ()
    table = Table("component", "kind", "depth", "parameters", "alone", "down to it", *timed)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        shown = [f"{row[k]:.1%}" for k in ("cost_alone", "cost_down_to")]
        if seconds:
            shown += [f"{row[k]:.3g}" for k in ("seconds_alone", "seconds_down_to")]
        table.add_row(
            escape(row["name"]), row["kind"], str(row["depth"]), f"{row['numel']:,}", *shown
        )
    show(table)
    print("cost: FLOPs of a step as a share of full fine-tuning, if only this component trains,")
    print("and if this and all nearer to the output train; " + as_what)
    if seconds:
        print(
            f"seconds: forward and backward pass of such a step ({ROWS} texts of {TOKENS} tokens, "
            f"or {ROWS} images) on this machine, {rows[0]['seconds_full']:.3g} for full "
            "fine-tuning; fitted to a few "
            f"timed steps, off by {rows[0]['seconds_error']:.0%} on those"
        )


@app.group(invoke_without_command=True)
@click.pass_context
def data(context: click.Context) -> None:
    """List the tasks and where they come from."""
    if context.invoked_subcommand is not None:
        return
    from rgft.tasks import TASKS  # noqa: PLC0415

    table = Table("task", "kind", "metric", "what", "from", "here")
    for name, entry in TASKS.items():
        here = "yes" if entry.available() else "no"
        table.add_row(name, entry.kind, entry.metric, entry.description, entry.origin, here)
    show(table)


@data.command()
@click.argument("name")
def fetch(name: str) -> None:
    """Bring a task, or the text that forgetting is measured on (wikitext), onto this machine."""
    from rgft.tasks import load_task  # noqa: PLC0415
    from rgft.tasks.general_text import SPLIT, WIKITEXT, load_general_text  # noqa: PLC0415

    if name == WIKITEXT.name:
        print(f"{name}: {SPLIT} {len(load_general_text()):,} characters")
        return
    task = load_task(name)
    rows = ", ".join(f"{split} {len(data):,}" for split, data in task.splits.items())
    print(f"{name}: {rows}")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is a number, true, false, null, a list, or else a string."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise InputError(f"--set takes KEY=VALUE, not '{pair}', e.g. --set beta=0.95")
        if key in settings:
            raise InputError(f"--set gives {key} twice; give each key once")
        try:
            settings[key] = json.loads(text)
        except ValueError:
            settings[key] = text
    return settings


def main() -> None:
    """Entry point: every error of the user's is one line and exit code 2, a machine's has 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _main()
    except BaseException as error:
        end_now(error)
        raise


def _main() -> None:
    try:
        app(prog_name="rgft", standalone_mode=False)
    except InputError as error:
        fail(str(error), 2)
    except EngagementError as error:
        fail(str(error), 1)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        raise SystemExit(2) from None
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if isinstance(error, click.NoSuchOption) and context is not None:
            known = ELSEWHERE.get(error.option_name)
            if any(known in option.opts for option in context.command.params):
                said = f"No such option '{error.option_name}'. Did you mean '{known}'?"
                error = click.UsageError(said, context)
        command = "rgft" if context is None else context.command_path
        fail(f"{error.format_message()} (see `{command} --help`)", 2)
    except (KeyboardInterrupt, click.Abort):
        fail("stopped", 1)
    except (OSError, MemoryError, RuntimeError) as error:
        fail_for(error)
    except Exception:
        claim_last_word(1)  # a traceback follows
        raise


if __name__ == "__main__":
    main()
