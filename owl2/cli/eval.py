"""`owl2 eval`, `owl2 eval compare` and `owl2 eval judge`."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from rich.console import Console

from owl2.cli.options import Base, Device, Dtype, command
from owl2.errors import ErrorCode, InputError

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)

Value = TypeVar("Value")
JUDGE_URL = typer.Option(help="OpenAI-compatible endpoint of the judge; its key is OPENAI_API_KEY.")
JUDGE_MODEL = typer.Option(help="Model name of the judge.")


@app.callback()
@command
def evaluate_model(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Checkpoint: a directory or a hub id.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Task names and files with custom questions (.jsonl), comma-separated."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="captions, vqa, mllm, hallucination, text, video, document, scoring, or paper for "
            "all of the paper."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for results.json, responses and the report.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory with the published files, DIR/TASK/...")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List all tasks and the files that are missing.")
    ] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only estimate the time.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 128,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluate only N samples of each task, from all its categories."),
    ] = None,
    no_image_baseline: Annotated[
        bool,
        typer.Option("--no-image-baseline", help="Also ask the same questions without images."),
    ] = False,
    prompts: Annotated[
        Literal["authors", "plain"],
        typer.Option(
            help="authors: prompts and chat format of the authors' evaluation scripts; plain: "
            "prompts of owl2's training data, in the chat format of the checkpoint."
        ),
    ] = "authors",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Replaces the prompts of the tasks: text with {question}, or 'short' for the "
            "question alone."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Replaces the limits of the tasks. Default for custom questions: enough for the "
            "longest expected answer.",
        ),
    ] = None,
    mam: Annotated[
        bool, typer.Option(help="Use the visual weights for images, or the text weights.")
    ] = True,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Image size in pixels; default: that of the checkpoint."),
    ] = None,
    image_policy: Annotated[
        Literal["resize", "pad", "crop"] | None,
        typer.Option(
            help="How an image becomes square; default: that of the task or the checkpoint."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Scoring method, as in `owl2 rate`; default: that of the model."),
    ] = None,
    anchors: Annotated[
        Path | None, typer.Option(help="Folder with the five anchor images of Compare2Score.")
    ] = None,
    judge_url: Annotated[str | None, JUDGE_URL] = None,
    judge_model: Annotated[str | None, JUDGE_MODEL] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Evaluate a model on benchmarks and write a report.

    The same command resumes after an interruption. Several processes share the work when started
    with torchrun or srun (RANK, WORLD_SIZE).
    """
    if context.invoked_subcommand is not None:
        return
    if list_:
        from owl2.eval.listing import print_tasks

        print_tasks(data, Console())
        return
    from owl2.engine.load_model import ModelArgs
    from owl2.eval.evaluate import EvalConfig, evaluate
    from owl2.eval.evaluate import estimate as print_estimate
    from owl2.eval.openai_client import ChatEndpoint

    judge = None
    if judge_url is not None or judge_model is not None:
        judge = ChatEndpoint(
            _require(judge_url, "--judge-url"), _require(judge_model, "--judge-model")
        )
    config = EvalConfig(
        ModelArgs(_require(model, "--model"), device, dtype, image_policy, base=base),
        output=Path() if estimate else _require(output, "--output"),
        tasks=tasks,
        suite=suite,
        data=data,
        batch_size=batch_size,
        limit=limit,
        no_image_baseline=no_image_baseline,
        prompts=prompts,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        mam=mam,
        image_size=image_size,
        method=method,
        anchors=anchors,
        judge=judge,
    )
    if estimate:
        print_estimate(config, Console(highlight=False))
    else:
        evaluate(config)


@app.command("compare")
@command
def compare_runs(
    first: Annotated[Path, typer.Argument(help="Output directory of `owl2 eval`.")],
    second: Annotated[Path, typer.Argument(help="Another one with tasks in common.")],
    output_file: Annotated[
        Path, typer.Option(help="HTML page with the samples on which they differ.")
    ] = Path("compare.html"),
) -> None:
    """Compare two evaluations, with confidence intervals and the samples that differ."""
    from owl2.eval.compare import compare

    compare(first, second, output_file, Console(highlight=False))


@app.command("judge")
@command
def judge_responses(
    run: Annotated[Path, typer.Argument(help="Output directory of `owl2 eval`.")],
    judge_url: Annotated[str, JUDGE_URL],
    judge_model: Annotated[str, JUDGE_MODEL],
) -> None:
    """Score the responses to MM-Vet and MMHal-Bench with a judge model."""
    from owl2.eval.judge import judge_run
    from owl2.eval.openai_client import ChatEndpoint

    judge_run(run, ChatEndpoint(judge_url, judge_model), Console(highlight=False))


def _require(value: Value | None, option: str) -> Value:
    if value is None:
        raise InputError(f"{option} is required. See `owl2 eval --help`.", ErrorCode.MISSING_VALUE)
    return value
