"""What a run will cost before it is started: tokens, FLOPs and bytes of a step, every branch with its context along
(naive) beside one trunk for all (shared).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rlpt import flops, memory
from rlpt.config import RunConfig
from rlpt.doctor import GIB, matmul_gflops
from rlpt.flops import Layout
from rlpt.stages import RLStage, Stage
from rlpt_data.strict import UserError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from rlpt.policy.load import Blueprint

MIB = 2**20


def plan(cfg: RunConfig, ranks: int = 1) -> dict[str, Any]:
    """The memory of a rank, and a step of every stage at its longest, in the layouts that it could have.

    ``step_seconds_at_least`` is a step's FLOPs over the matrix throughput of ``ranks`` devices like this machine's,
    measured now, which a small policy does not reach. Raises UserError where the shards are missing or the ranks cannot
    share a step.
    """
    from rlpt.mixture import open_shards
    from rlpt.policy.load import blueprint, meta_model

    _check_ranks(cfg, ranks)
    made = blueprint(cfg.policy, open_shards(cfg.data), cfg.longest_path)
    parameters = sum(weight.numel() for weight in meta_model(made.config).parameters())
    speed = matmul_gflops()
    return {
        "parameters": parameters,
        "ranks": ranks,
        "layout": made.layout,
        "layout_note": made.note,
        "training_state_gib": parameters * memory.STATE_BYTES / GIB,
        "weights_bytes": memory.state_bytes(cfg, parameters, ranks),
        "machine_gflops_per_second": speed,
        "stages": {stage.name: _stage(cfg, stage, made, ranks, speed) for stage in cfg.stage},
    }


def _check_ranks(cfg: RunConfig, ranks: int) -> None:
    for stage in cfg.stage:
        if stage.documents_per_step % ranks or ranks % cfg.policy.replicas:
            raise UserError(
                f"--ranks {ranks}: must divide documents_per_step = {stage.documents_per_step} of stage {stage.name}, "
                f"and be a multiple of policy.replicas = {cfg.policy.replicas}"
            )


def _stage(
    cfg: RunConfig, stage: Stage, made: "Blueprint", ranks: int, speed: float
) -> dict[str, Any]:
    """Its settings that costs depend on, and under the name of each layout the costs of a step."""
    found = {
        "kind": stage.kind,
        "steps": stage.steps,
        "documents_per_step": stage.documents_per_step,
        "micro_batch_tokens": stage.micro_batch_tokens,
        "layout": "naive",
    }
    layouts: tuple[Layout, ...] = ("naive",)
    if isinstance(stage, RLStage):
        found |= {
            "cuts_per_document": cfg.prompts.cuts_per_document,
            "group_size": stage.group_size,
            "layout": made.layout,
        }
        layouts = ("naive", "shared")
    costs = {name: _costs(cfg, stage, made.config, name, ranks, speed) for name in layouts}
    if isinstance(stage, RLStage):
        found["rewards"] = _rewards(stage, costs[made.layout]["one_forward"])
    return found | costs


def _rewards(stage: RLStage, one_forward: bool) -> str:
    """Which forward rewards are read from, and why."""
    if one_forward and stage.why_separate(whole=False) is not None:
        return "rewards are read off the forward that is trained: a rank's documents always fit one micro-batch"
    return stage.arrangement


def _costs(
    cfg: RunConfig, stage: Stage, config: Any, layout: Layout, ranks: int, speed: float
) -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = memory.step_memory(cfg, stage, config, layout, ranks, device)
    cost = flops.step_cost(cfg, stage, config, layout, ranks)
    seconds = cost.flops / 1e9 / speed / ranks
    found: dict[str, Any] = flops.table(cost, stage.steps) | {
        "step_seconds_at_least": seconds,
        "stage_seconds_at_least": seconds * stage.steps,
        "largest_micro_batch_tokens": held.micro_batch_tokens,
        "activation_bytes": held.activation_bytes,
        "head_bytes": held.head_bytes,
        "cache_bytes": held.cache_bytes,
        "peak_bytes": held.peak_bytes,
    }
    if isinstance(stage, RLStage):
        shape = flops.documents(cfg, stage, ranks)
        found["one_forward"] = flops.reads_training_forward(shape, stage, layout)
    return found


# ---- for people ----------------------------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value:,}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / MIB:.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value / 3600:.1f} h" if value >= 3600 else f"{value:.3g} s"


ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefilled_tokens": ("tokens the engine reads", _count),
    "sampled_tokens": ("tokens sampled", _count),
    "scored_tokens": ("tokens scored, not trained", _count),
    "trained_tokens": ("tokens trained", _count),
    "step_gflops": ("GFLOPs of a step", _rounded),
    "step_seconds_at_least": ("a step takes at least", _seconds),
    "stage_seconds_at_least": ("all steps take at least", _seconds),
    "largest_micro_batch_tokens": ("largest micro-batch, tokens", _count),
    "activation_bytes": ("its activations", _bytes),
    "head_bytes": ("its head: gradients, logits", _bytes),
    "cache_bytes": ("the engine's key/value cache", _bytes),
    "peak_bytes": ("peak beside the weights", _bytes),
}
"""Figures of a step, how a table calls them and how they are written."""


def render(found: dict[str, Any]) -> "Group":
    """The plan: what a rank holds, then a table a stage."""
    from rich.console import Group

    share = " a rank" if found["ranks"] > 1 else ""
    lines = [
        f"{found['parameters']:,} parameters on {found['ranks']} rank{'s' * (found['ranks'] > 1)}",
        f"{_bytes(found['weights_bytes'])}{share} of weights, gradients, optimiser and the engine's copy",
        f"{_rounded(found['machine_gflops_per_second'])} GFLOP/s of matrix products on this machine, measured now",
        found["layout_note"],
        "Every context, thought and document at its longest: a real step costs less. With several cuts the ratio is",
        "less, too: real cuts lie all over a document, and short contexts are cheap to repeat.",
    ]
    tables = [table(name, stage) for name, stage in found["stages"].items()]
    return Group(*lines, *(part for each in tables for part in ("", each)))


def table(name: str, stage: dict[str, Any]) -> "Table":
    """A step of one stage, a column per layout."""
    from rich import box
    from rich.table import Table

    layouts = [layout for layout in ("naive", "shared") if layout in stage]
    made = Table(
        title=_title(name, stage), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    made.add_column("")
    for layout in layouts:
        taken = " (taken)" if layout == stage["layout"] and len(layouts) > 1 else ""
        made.add_column(layout + taken, justify="right")
    if len(layouts) == 2:
        made.add_column("naive / shared", justify="right")
        made.caption, made.caption_justify = stage["rewards"], "left"
        forms = [_form(stage[layout]) for layout in layouts]
        made.add_row("rewards come from", *forms, "")
    for key, (label, written) in ROWS.items():
        values = [stage[layout][key] for layout in layouts]
        if any(values):
            made.add_row(label, *map(written, values), *_ratio(values))
    return made


def _title(name: str, stage: dict[str, Any]) -> str:
    words = f"{name}: {stage['steps']} steps of {stage['documents_per_step']} documents"
    if stage["kind"] == "rl":
        cuts = stage["cuts_per_document"]
        words += f", {cuts} cut{'s' * (cuts > 1)} each, {stage['group_size']} thoughts a cut"
    return words


def _form(costs: dict[str, Any]) -> str:
    if costs["one_forward"]:
        return "training forward"
    return "own pass" if costs["scored_tokens"] else "no forward"


def _ratio(values: list[float]) -> list[str]:
    """Of the two layouts; nothing where there is but one."""
    if len(values) < 2:
        return []
    return [f"{values[0] / values[1]:.2f}" if values[1] else "-"]
