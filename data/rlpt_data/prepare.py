"""Corpus -> shards, top to bottom.

read -> extract -> filters -> duplicates -> later stages -> split and order -> tokenizer -> encode and
cut -> write. The same corpus and configuration give the same bytes, whatever the order of the input,
the number of workers and the moments of kills: documents are named by their content and sorted by a
hash, which is also the one global shuffle.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlpt_data import passes, stages
from rlpt_data.cuts import CutsConfig
from rlpt_data.documents import Drop
from rlpt_data.duplicates import AGAIN, survivors
from rlpt_data.executors import OWN_WORKERS, ExecutorConfig, check_executor
from rlpt_data.filters import READ
from rlpt_data.inspection import inspect, render_inspect
from rlpt_data.ledger import Entry
from rlpt_data.manifest import SPLITS, Counts, Manifest, digest, total
from rlpt_data.mixing import STAGE as MIXTURE
from rlpt_data.mixing import Part, WeightedSource, parts_of, thinned
from rlpt_data.order import Order, ordered
from rlpt_data.plan import Plan, make_plan
from rlpt_data.sources import SourceConfig
from rlpt_data.split import SplitConfig, check_sides
from rlpt_data.stages import StageConfig
from rlpt_data.store import Store
from rlpt_data.strict import Strict, UserError
from rlpt_data.tally import Tally
from rlpt_data.target import FAILED, check_target, input_hash, present_shards
from rlpt_data.tokenizer import PlainTokenizer
from rlpt_data.training import TokenizerBytes, TokenizerFile, TokenizerTrained, tokenizer_of
from rlpt_data.work import WorkFolder
from rlpt_data.writing import Facts, Shard, assemble

__all__ = ["PrepareConfig", "inspect", "prepare", "render_inspect"]

RECIPE = 4
"""Raised whenever the same corpus and configuration would give other bytes than before."""
MAX_LOSSY_SHARE = 0.01
GENERATED = ("proving",)
"""Sources whose text is made here: no evaluation item can be in it."""


class PrepareConfig(Strict):
    """What `rlpt data prepare` reads from its TOML."""

    out: Path
    """The shard folder to write."""
    source: SourceConfig | None = None
    """Where documents come from. Exclusive with `sources`."""
    sources: tuple[WeightedSource, ...] = ()
    """Several of them, each a `[[sources]]` table with a name, a weight and its own source."""
    stages: tuple[StageConfig, ...] = ()
    """What documents go through, in order, beyond what no shard can do without."""
    tokenizer: Annotated[
        TokenizerFile | TokenizerTrained | TokenizerBytes, Field(discriminator="kind")
    ] = TokenizerTrained()
    cuts: CutsConfig = CutsConfig()
    split: SplitConfig = SplitConfig()
    seed: int = 0
    """Of the order of the documents and of the random cuts."""
    without_decontamination: bool = False
    """Prepare a corpus that was not compared with evaluation sets."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read no more than this many (of every source), in one piece; None: all."""
    shard_bytes: int = Field(default=256 << 20, ge=1)
    """A file holds about this much."""
    num_shards: int | None = Field(default=None, ge=1)
    """Files of every split; None: by ``shard_bytes``. Documents, cuts and split stay the same."""
    workers: int = Field(default=1, ge=1)
    """Processes; their number has no part in the bytes."""
    executor: ExecutorConfig = OWN_WORKERS
    """Who runs the jobs; it has no part in the bytes."""
    max_failed_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """When more of the input's units cannot be read, nothing is written."""

    @field_validator("sources", mode="after")
    @classmethod
    def _by_name(cls, given: tuple[WeightedSource, ...]) -> tuple[WeightedSource, ...]:
        return tuple(sorted(given, key=lambda each: each.name))

    @model_validator(mode="after")
    def _one_form(self) -> "PrepareConfig":
        if (self.source is None) == (not self.sources):
            raise ValueError("give exactly one of [source] and [[sources]] (name, weight, source)")
        kinds = [stage.kind for stage in self.stages]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"a kind of [[stages]] stands once; got {', '.join(kinds)}")
        names = self.weights.keys()
        if len(names) < len(self.sources):
            raise ValueError(f"names of [[sources]] must differ; got {', '.join(names)} repeatedly")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Of every named source."""
        return {each.name: each.weight for each in self.sources}

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The only source has no name."""
        if self.source is not None:
            return {"": self.source}
        return {each.name: each.source for each in self.sources}


@dataclass(frozen=True)
class _Run:
    """What every step of one preparation needs."""

    config: PrepareConfig
    plan: Plan
    work: WorkFolder
    parts: list[Part]
    tally: Tally


def prepare(config: PrepareConfig, overwrite: bool = False, progress: bool = True) -> Manifest:
    """Write the shard folder ``config.out`` and return its manifest.

    A folder that already holds exactly this is left alone and said to be so; work that was
    interrupted goes on. Raises UserError when ``out`` holds something else and ``overwrite`` is
    False, and for every mistake in corpus or config.
    """
    check_target(config.out)
    if any(source.kind not in GENERATED for source in config.named_sources.values()):
        stages.check_guarded(config.stages, config.without_decontamination)
    check_executor(config.executor, config.workers)
    named = config.named_sources.items()
    parts = [each for name, it in named for each in parts_of(it, name, config.max_documents)]
    plan = _plan(config, parts)
    if present := present_shards(config.out, plan, overwrite):
        return present
    who = config.workers, config.executor
    with WorkFolder(config.out, plan, *who, progress=progress) as work:
        work.start(afresh=overwrite)
        manifest = _prepared(_Run(config, plan, work, parts, Tally()))
        if not work.failures:
            work.remove()
    return manifest


def _prepared(run: _Run) -> Manifest:
    config = run.config
    stores, owners, entries = _read(run)
    kept = survivors(stores, stages.near_duplicates(config.stages), run.tally)
    basis = _basis(run.plan.read_basis, entries)
    if stages.after(config.stages):
        stores, basis = _cleaned(run, stores, kept, basis)
        kept = survivors(stores, None, run.tally, AGAIN)
    if config.sources:
        kept = thinned(stores, kept, owners, config.weights, config.seed, run.tally)
    orders, unit = ordered(stores, kept, config.split, config.seed, config.cuts.per_domain)
    tokenizer = _tokenizer(run, stores, orders)
    entries = _encoded(run, stores, owners, orders, basis)
    return _written(run, tokenizer, unit, entries)


def _read(run: _Run) -> tuple[list[Store], list[str], list[Entry]]:
    """The documents of every unit, the name of its source, and what was read."""
    config, folder = run.config, run.work.folder("read")
    jobs = [
        passes.ReadJob(
            # A place of its own, whatever other units there are.
            *(part.name, folder / digest(part.name.encode()), part.config, part.unit),
            *(config.stages, config.split, config.max_documents),
        )
        for part in run.parts
    ]
    entries = run.work.run("read", passes.read, jobs, run.plan.part_bases(run.parts))
    _add(run.tally, entries)
    _check_failures(run)
    done = {entry.unit for entry in entries}
    pairs = [pair for pair in zip(jobs, run.parts, strict=True) if pair[0].unit in done]
    stores = [Store(job.target) for job, _ in pairs]
    if not sum(len(store) for store in stores):
        kinds = ", ".join(sorted({source.kind for source in config.named_sources.values()}))
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(run.tally.reasons.items()))
        raise UserError(
            f"[source] kind = {kinds}: no documents ({reasons or 'it is empty'}); give it text"
        )
    return stores, [part.source for _, part in pairs], entries


def _check_failures(run: _Run) -> None:
    failures = run.work.failures
    for name, failure in failures.items():
        run.tally.enter(READ)
        run.tally.drop(READ, Drop(FAILED, name, failure.error))
    if len(failures) > run.config.max_failed_share * len(run.parts):
        name, failure = next(iter(failures.items()))
        raise UserError(
            f"{run.work.path}/failed: {len(failures)} of {len(run.parts)} units cannot be read, "
            f"e.g. {name} ({failure.error}); mend them and run again (the others are kept), or "
            "raise max_failed_share"
        )


def _cleaned(run: _Run, read: list[Store], kept: list[Any], basis: str) -> tuple[list[Store], str]:
    """The stores after the stages that follow duplicates."""
    config, folder = run.config, run.work.folder("clean")
    jobs = []
    for store, rows in zip(read, kept, strict=True):
        path = folder / f"{store.path.name}.kept.npy"
        passes.save_rows(path, rows)
        target = folder / store.path.name
        job = passes.CleanJob(
            store.path.name, target, store.path, path, config.stages, config.split
        )
        jobs.append(job)
    entries = run.work.run("clean", passes.clean, jobs, [basis] * len(jobs))
    _check_complete(run, "clean", entries, len(jobs))
    _add(run.tally, entries)
    return [Store(job.target) for job in jobs], _basis(basis, entries)


def _tokenizer(run: _Run, stores: list[Store], orders: list[Order]) -> PlainTokenizer:
    """The tokenizer, also as a file for the workers."""
    train = next(order for order in orders if order.split == "train")
    tokenizer = tokenizer_of(run.config.tokenizer, train.documents(stores))
    (run.work.path / "tokenizer.json").write_bytes(tokenizer.json_bytes)
    return tokenizer


def _encoded(
    run: _Run, stores: list[Store], owners: list[str], orders: list[Order], basis: str
) -> list[Entry]:
    """The entry of every shard; its unit is the shard's name."""
    config, folder = run.config, run.work.folder("shards")
    tokenizer = run.work.path / "tokenizer.json"
    paths = tuple(store.path for store in stores)
    jobs = []
    for order in orders:
        places = order.save(folder)
        (folder / order.split).mkdir(exist_ok=True)
        for number, (start, stop) in enumerate(order.shards(config.shard_bytes, config.num_shards)):
            name = f"{order.split}/{number:05d}.arrow"
            where = (name, folder / name, paths, places, start, stop)
            jobs.append(
                passes.EncodeJob(*where, tokenizer, config.cuts, config.seed, tuple(owners))
            )
    basis = digest(f"{basis} {run.plan.plan_id}".encode())
    entries = run.work.run("encode", passes.encode, jobs, [basis] * len(jobs))
    _check_complete(run, "encode", entries, len(jobs))
    _add(run.tally, entries)
    return entries


def _written(
    run: _Run,
    tokenizer: PlainTokenizer,
    unit: Literal["domain", "document", "source"],
    entries: list[Entry],
) -> Manifest:
    config = run.config
    _check_lossless(run.tally, tokenizer)
    found = {e.unit: {k: Counts(**v) for k, v in e.facts["sources"].items()} for e in entries}
    shards = [
        Shard(name, run.work.path / "shards" / name, total(counts.values()))
        for name, counts in found.items()
        if counts
    ]
    sizes = {
        name: sum(s.counts.documents for s in shards if s.name.startswith(f"{name}/"))
        for name in SPLITS
    }
    check_sides(sizes, config.split, unit)
    facts = Facts(
        vocab_size=tokenizer.vocab_size,
        split_by=unit,
        config=run.plan.config,
        input_hash=input_hash(run.plan),
        drops=run.tally.reasons,
        drop_samples=run.tally.samples(),
        extras=stages.contamination_index(config.stages),
        stages=tuple(
            run.tally.table(stages.names(config.stages, [MIXTURE] * bool(config.sources)))
        ),
        sources={
            name: total(counts[name] for counts in found.values() if name in counts)
            for name in config.weights
        }
        or None,
        created_by=run.plan.versions,
    )
    return assemble(config.out, shards, tokenizer.json_bytes, facts)


def _check_complete(run: _Run, phase: str, entries: list[Entry], expected: int) -> None:
    """These passes read what we wrote: a failure is ours, or the machine's."""
    if len(entries) < expected:
        name, failure = next(iter(run.work.failures.items()))
        raise RuntimeError(f"{phase}: {name} failed: {failure.error}\n{failure.trace}")


def _check_lossless(tally: Tally, tokenizer: PlainTokenizer) -> None:
    lossy, entered = tally.reasons["not_lossless"], tally.entered[stages.ENCODE]
    if lossy > MAX_LOSSY_SHARE * entered:
        where = tally.samples()["not_lossless"][0]["where"]
        raise UserError(
            f"{tokenizer.where}: loses bytes of {lossy} of {entered} documents, e.g. {where}; "
            "choose a byte-level or byte-fallback tokenizer"
        )


def _add(tally: Tally, entries: list[Entry]) -> None:
    for entry in entries:
        tally.add(entry.tally)


def _basis(before: str, entries: list[Entry]) -> str:
    """Of everything the next pass reads."""
    found = sorted((entry.unit, sorted(entry.files.items())) for entry in entries)
    return digest(f"{before} {found}".encode())


def _plan(config: PrepareConfig, parts: list[Part]) -> Plan:
    left_out = {"out", "workers", "executor", "max_failed_share"}
    # Configurations from before there were mixtures are still the same.
    left_out |= {"source"} if config.sources else {"sources"}
    table = {"recipe": RECIPE, **config.model_dump(mode="json", exclude=left_out)}
    resources = stages.resources(config.stages)
    if isinstance(config.tokenizer, TokenizerFile):
        resources["tokenizer"] = digest(PlainTokenizer.read(config.tokenizer.path).json_bytes)
    return make_plan(parts, resources, table)
