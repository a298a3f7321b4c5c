"""A model folder that somebody gave: its configuration is read, and nothing in it is run.

Weights are safetensors, never a pickle; Python files beside them are no part of the model.
"""

from pathlib import Path
from typing import Any

import transformers

from rlpt_data.strict import UserError


def model_config(folder: Path, where: str) -> Any:
    """The transformers configuration at ``folder``; ``where`` is the key that names it.

    Raises UserError where there is none, where only the folder's own code could read it, and where its weights are no
    safetensors.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{where} = {folder}: no config.json there; give a transformers model folder (`rlpt export` writes one)"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{where} = {folder}: no safetensors there, and nothing else is loaded (a pickle can run code); save the "
            "model as safetensors"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    # Whatever a file of somebody else makes transformers raise.
    except Exception as error:
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{where} = {folder}: its config.json is of no model that transformers has ({cause}); code that a model "
            "brings along is never run: give a model of a known type"
        ) from error
    # Where its own code is: nobody whom the folder is handed on to shall run it either.
    config.__dict__.pop("auto_map", None)
    return config
