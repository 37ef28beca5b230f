"""`kvjax report`: what a run has found, as one HTML page, and its figures as files."""

import pathlib
from typing import Annotated

import typer

from kvjax.commands.common import console, notes, print_wide, user_errors, write_whole

PAGE = "report.html"


def report(
    run_dir: Annotated[
        pathlib.Path, typer.Argument(help="Folder that `kvjax eval GRID.yaml` or `kvjax compare` has written.")
    ],
    out: Annotated[
        pathlib.Path | None, typer.Option(help="File of the page. Default: report.html in the run's folder.")
    ] = None,
    figures: Annotated[
        pathlib.Path | None, typer.Option(help="Folder in which to put every figure, as SVG and as PNG.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Print how all policies differ from this one; the page opens with it. The page has all."),
    ] = None,
) -> None:
    """Makes one HTML page of a run, finished or not: leaderboard, plots, heat maps, and which tokens were kept.

    The page is one file that loads nothing, so it can be sent, archived and opened anywhere.

    **Examples**

    `kvjax report results/leaderboard`

    `kvjax report results/leaderboard --out leaderboard.html --figures figures/`

    `kvjax report results/leaderboard --against "keydiff(0.25)"`
    """
    with user_errors():
        from kvjax.evaluation.leaderboard import difference_table, leaderboard
        from kvjax.evaluation.page import make_page, page_data, read_run
        from kvjax.evaluation.report import TEST

        page = out or run_dir / PAGE
        run = read_run(run_dir)
        board = leaderboard(run.rows, against=against) if against else []
        if not page.parent.is_dir():
            raise ValueError(f"There is no folder {page.parent} to write {page.name} to.")
        if figures is not None:
            figures.mkdir(parents=True, exist_ok=True)
    with notes.status("Making the page ..."):
        data = page_data(run, against)
    with user_errors():
        write_whole(page, make_page(data))
    if against:
        print_wide(difference_table(board, f"Differences from {against} on the same samples"))
        console.print(f"\n* a difference {TEST}\n", style="dim", highlight=False, soft_wrap=True)
    console.print(str(page), highlight=False, soft_wrap=True)
    if figures is not None:
        from kvjax.evaluation.page.figures import write_figures

        with notes.status("Drawing figures ..."):
            written = write_figures(data, figures)
        console.print(f"{len(written)} figures in {figures}", highlight=False, soft_wrap=True)
