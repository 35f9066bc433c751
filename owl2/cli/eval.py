"""Commands of evaluation: eval, and its compare and judge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console

from owl2.errors import InputError

if TYPE_CHECKING:
    from owl2.eval.evaluate import Judge

app = typer.Typer(invoke_without_command=True, no_args_is_help=True)

Value = TypeVar("Value")
JudgeUrl = Annotated[
    str | None,
    typer.Option(help="An OpenAI-compatible endpoint that judges; its key: OPENAI_API_KEY."),
]
JudgeModel = Annotated[str | None, typer.Option(help="The judging model's name there.")]


@app.callback()
def evaluate_model(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="A checkpoint: directory or hub id.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Names, and files of your own questions (.jsonl), separated by commas."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="captions, vqa, mllm, hallucination, text, video, or paper: all."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.json, the answers and the report.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the benchmarks' own files, DIR/TASK/...")
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Only list the tasks, and whether their data is there.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only estimate the time, from tokens and a trial.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 128,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many questions of each task.")
    ] = None,
    blind: Annotated[bool, typer.Option(help="Ask the same without the image, too.")] = False,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Words with {question} in them, or 'short' for the question alone; what the model "
            "was trained with. Default: the task's own."
        ),
    ] = None,
    mam: Annotated[
        bool, typer.Option(help="Off: the text weights for images, too (the paper's ablation).")
    ] = True,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels, instead of the checkpoint's.")
    ] = None,
    image_policy: Annotated[
        Literal["resize", "pad"] | None,
        typer.Option(help="resize or pad, instead of the task's or the checkpoint's."),
    ] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
) -> None:
    """Ask a model the questions of tasks, score the answers and write a report.

    Started again after it was stopped, it goes on where it was.
    """
    if context.invoked_subcommand is not None:
        return
    if list_:
        from owl2.eval.listing import show_tasks

        show_tasks(data, Console())
        return
    from owl2.eval.estimate import show_plan
    from owl2.eval.evaluate import Settings, evaluate
    from owl2.eval.model_args import Subject

    settings = Settings(
        subject=Subject(_given(model, "--model"), device, dtype, mam, image_size, image_policy),
        output=Path() if plan else _given(output, "--output"),
        tasks=tasks,
        suite=suite,
        data=data,
        batch_size=batch_size,
        limit=limit,
        blind=blind,
        prompt=prompt,
        judge=_judge(judge_url, judge_model),
    )
    if plan:
        show_plan(settings, Console())
    else:
        evaluate(settings)


@app.command("compare")
def compare_runs(
    first: Annotated[Path, typer.Argument(help="A folder that `owl2 eval` wrote.")],
    second: Annotated[Path, typer.Argument(help="Another one, with tasks in common.")],
    output: Annotated[
        Path, typer.Option(help="The page with the questions on which they differ.")
    ] = Path("compare.html"),
) -> None:
    """Compare two evaluations: differences with intervals, and where they differ, as a page."""
    from owl2.eval.compare import compare

    compare(first, second, output, Console())


@app.command("judge")
def judge_answers(
    run: Annotated[Path, typer.Argument(help="A folder that `owl2 eval` wrote.")],
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
) -> None:
    """Have the answers judged that need it: of MM-Vet and MMHal-Bench."""
    from owl2.eval.evaluate import Judge, judge

    url, name = _given(judge_url, "--judge-url"), _given(judge_model, "--judge-model")
    judge(run, Judge(url, name), Console())


def _given(value: Value | None, option: str) -> Value:
    if value is None:
        raise InputError(f"{option} is missing: see `owl2 eval --help`.")
    return value


def _judge(url: str | None, model: str | None) -> "Judge | None":
    from owl2.eval.evaluate import Judge

    if url is None and model is None:
        return None
    return Judge(_given(url, "--judge-url"), _given(model, "--judge-model"))
