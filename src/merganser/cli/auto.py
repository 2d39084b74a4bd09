"""`merganser auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _options as options
from .eval import Context, DType, LmEval
from .printing.text import complain, say_json
from .search import Limit, Seed, Tasks

BaseModel = Annotated[
    str, typer.Argument(metavar="BASE", help="The common ancestor of the experts.", show_default=False)
]
ExpertModels = Annotated[
    list[str], typer.Argument(metavar="EXPERT...", help="Two or more models trained from it.", show_default=False)
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder of the result; an existing one is continued.", show_default=False)
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[EXPERT=]FILE...",
        help="Text of each expert's field, to also try methods that use data. Without --tasks, half of each file is a task.",
        show_default=False,
    ),
]
Minutes = Annotated[
    float,
    typer.Option(metavar="N", help="Minutes for everything; counted again from the start when a run is continued."),
]


def auto(
    base: BaseModel,
    experts: ExpertModels,
    out: Out,
    tasks: Tasks = None,
    data: Data = None,
    minutes: Minutes = 60.0,
    seed: Seed = 0,
    limit: Limit = None,
    context: Context = None,
    dtype: DType = None,
    device: options.Device = "cpu",
    batch_tokens: options.BatchTokens = 4096,
    lm_eval: LmEval = None,
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find and test the best merge of some models for some tasks.

    Methods that did well in our measurements are tried on half of the items of each task, then scales by depth for the best of
    them. On the other half, the winner is compared with the best single model and with the average.
    """
    options.quieten_hub(quiet)
    from ..jsonfile import read_object
    from ..search.auto import Interrupted
    from ..search.auto import auto as run
    from ..search.stored import RESULT
    from .printing.found import SearchProgress, print_choice, write_page

    try:
        found = run(
            base,
            experts,
            out,
            tasks or (),
            data=data or (),
            minutes=minutes,
            seed=seed,
            limit=limit,
            context=context,
            dtype=dtype,
            device=device,
            batch_tokens=batch_tokens,
            lm_eval=lm_eval or (),
            cache_dir=cache_dir,
            progress=SearchProgress(quiet=quiet or json),
        )
    except KeyboardInterrupt as stopped:
        best = stopped.best if isinstance(stopped, Interrupted) else None
        complain("note", "what was scored is kept; the same command continues")
        if best is not None:
            complain("note", f"the best so far is {best}")
        raise
    if json:
        say_json(read_object(found.folder / RESULT))
    elif not quiet:
        print_choice(found)
    write_page(found.folder, quiet=quiet or json)
