"""A checkpoint -> a Hugging Face folder: safetensors, config.json, tokenizer.json with the markers."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlpt import checkpoint, dist
from rlpt.config import RunConfig
from rlpt.mixture import open_shards
from rlpt.policy import load
from rlpt.policy.markers import with_markers
from rlpt.runlog import read_config
from rlpt_data.strict import UserError, parse


def export(run_dir: Path, step: int | None, out: Path) -> Path:
    """Write step ``step`` (the newest where absent) of a run to ``out``, ready for `from_pretrained`.

    Raises UserError where the run, the checkpoint or an empty output folder is missing.
    """
    config_path = run_dir / "config.json"
    if not config_path.is_file():
        raise UserError(f"{run_dir}: no config.json; give the folder of a run")
    if out.is_file():
        raise UserError(f"{out}: is a file; name a folder with --out")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; name another --out")
    cfg = parse(RunConfig, read_config(config_path), str(config_path))
    path = checkpoint.find(f"{run_dir}@{'last' if step is None else step}")
    shards = open_shards(cfg.data)
    plan = load.blueprint(cfg.policy, shards, cfg.longest_path)
    with dist.world() as world:
        # One process, whatever the run had: no groups of replicas.
        policy = load.sharded(cfg.policy.model_copy(update={"replicas": 1}), plan, world)
        checkpoint.load_weights(path, policy, str(shards.manifest.tokenizer_hash), world)
        tensors = {
            name: tensor.cpu().contiguous() for name, tensor in load.named_full_tensors(policy)
        }
    _write(out, tensors, plan, cfg)
    return out


def _write(out: Path, tensors: dict[str, Any], plan: load.Blueprint, cfg: RunConfig) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    plan.config.architectures = [type(load.meta_model(plan.config)).__name__]
    plan.config.dtype = "float32"
    plan.config.save_pretrained(out)
    tokenizer = with_markers(plan.tokenizer, cfg.policy, plan.vocabulary.markers)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
