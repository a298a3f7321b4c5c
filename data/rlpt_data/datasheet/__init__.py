"""`rlpt data inspect`: a shard folder -> its datasheet, one self-contained, offline HTML file.

What flows in are the manifest, samples of what was left out, and text of web pages; none of it may
become markup. What a folder does not say is said to be so, and never guessed.
"""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from rlpt_data.datasheet import figures, samples
from rlpt_data.provenance import sources_of
from rlpt_data.shards import CUT_KINDS, ShardFolder
from rlpt_data.store import flush
from rlpt_data.strict import UserError
from rlpt_data.visible import visible


def default_path(folder: Path) -> Path:
    """Beside the folder, which is immutable: runs/data/web -> runs/data/web.html."""
    resolved = folder.resolve()
    return resolved.with_name(f"{resolved.name}.html")


def write(path: Path, out: Path) -> None:
    """Write the datasheet of the shard folder ``path``.

    Raises UserError where there is no such folder, and when ``out`` lies inside it.
    """
    html = render(ShardFolder.open(path))
    if out.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{out}: lies in the shard folder, which must not change; choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(html.encode())
        flush(file)
    partial.rename(out)


def render(folder: ShardFolder) -> str:
    """The whole page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    files = resources.files("rlpt_data.datasheet")
    template = environment.from_string((files / "page.html.j2").read_text(encoding="utf-8"))
    style = Markup((files / "page.css").read_text(encoding="utf-8"))
    return template.render(style=style, **context(folder))


def context(folder: ShardFolder) -> dict[str, Any]:
    """Everything the page says, as plain values."""
    manifest = folder.manifest
    splits = figures.splits(folder)
    return {
        "name": folder.path.resolve().name,
        "manifest": manifest,
        "tiles": figures.tiles(folder),
        "splits": splits,
        "kinds": [kind for kind in CUT_KINDS if any(split["cuts"][kind] for split in splits)],
        "sources": sources_of(manifest.config),
        "funnel": figures.funnel(manifest),
        "dropped": figures.dropped(folder),
        "contamination": figures.contamination(folder),
        "lengths": figures.lengths(folder),
        "languages": figures.languages(folder),
        "domains": figures.domains(folder),
        "cuts": samples.cuts(folder),
        "kept": samples.kept(folder),
        "config": json.dumps(manifest.config, indent=2, ensure_ascii=False),
    }
