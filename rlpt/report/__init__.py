"""`rlpt report`: run folders -> one self-contained, offline HTML file.

What flows in are files of text, numbers and web pages; none of it may become markup, and nothing
the page shows comes from anywhere but the page. What a run did not write is named in the report,
never silently left out.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from rlpt_data.strict import UserError


def write(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw runs as one page and return its path: ``out``, else ``report.html`` in the run's folder,
    of several in the folder that holds them all. Raises UserError where there is no run.
    """
    from rlpt.report.run import read_all

    runs = read_all(run_dirs)
    path = out or _place(run_dirs)
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; make it, or name another")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"rlpt report: {error.name} is missing; run `pip install 'rlpt[report]'`"
        ) from error
    from rlpt.report.page import render

    temporary = path.with_suffix(".tmp")
    # The run may be somebody else's, and this a link to a file of ours.
    temporary.unlink(missing_ok=True)
    # Text may hold half a surrogate pair; it is shown as its escape.
    temporary.write_bytes(render(runs).encode("utf-8", "backslashreplace"))
    temporary.replace(path)
    return path


def _place(run_dirs: Sequence[Path]) -> Path:
    if len(run_dirs) == 1:
        return run_dirs[0] / "report.html"
    folder = Path(os.path.commonpath([path.resolve() for path in run_dirs]))
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: is a run itself, with a report of its own; add --out FILE")
    return folder / "report.html"
