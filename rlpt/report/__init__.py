"""`rlpt report`: one run folder -> one self-contained, offline HTML file.

What flows in are files of text, numbers and web pages; none of it may become markup, and nothing
the page shows comes from anywhere but the page. What a run did not write is named in the report,
never silently left out.
"""

from pathlib import Path

from rlpt_data.strict import UserError


def write(run_dir: Path) -> Path:
    """Draw ``run_dir`` as ``run_dir/report.html`` and return its path. Raises UserError where there
    is no run.
    """
    from rlpt.report.run import read

    run = read(run_dir)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"rlpt report: {error.name} is missing; run `pip install 'rlpt[report]'`"
        ) from error
    from rlpt.report.page import render

    path = run_dir / "report.html"
    temporary = path.with_suffix(".tmp")
    # Text may hold half a surrogate pair; it is shown as its escape.
    temporary.write_bytes(render(run).encode("utf-8", "backslashreplace"))
    temporary.replace(path)
    return path
