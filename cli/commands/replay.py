"""`optplan replay`: a recorded allocator history, simulated entry by entry, and what else it could have been."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import options, output


def replay(
    history: Annotated[
        str, typer.Argument(metavar="HISTORY", help="File of torch.cuda.memory._dump_snapshot, or its JSON; also .gz.")
    ],
    alloc_conf: options.AllocConf = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", metavar="SIZE", help="Replay on a device where torch can get this much, such as 38GiB."
        ),
    ] = None,
    device: Annotated[
        int | None,
        typer.Option(
            metavar="INDEX", help="Device of the snapshot to replay.", show_default="the first with a history"
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Replay a recorded allocator history.

    Runs what a program asked of torch's caching allocator through the simulated one, says whether address for address
    the same came of it, and with --alloc-conf or --memory what would have come of it elsewhere. A snapshot is only
    read: nothing in it is executed. The exit status is 1 if memory runs out under --memory, 2 for bad input.
    """
    from optplan.planner.history.replay import replay_history

    report = replay_history(history, alloc_conf=alloc_conf, memory=memory, device=device)
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.replay import render_replay

        output.print_terminal(render_replay, report)
    if report.what_if is not None and report.what_if.out_of_memory is not None:
        raise typer.Exit(1)
