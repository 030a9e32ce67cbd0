"""A training run from its configuration to its summary."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmtune.config.load import dump_config
from vlmtune.config.schema import AnySource, RunConfig
from vlmtune.data.loader import MicroBatches
from vlmtune.data.plan.bad_rows import write_bad_rows
from vlmtune.data.plan.packing import Plan, make_eval_plan, make_plan
from vlmtune.data.plan.sharing import resolve_packing
from vlmtune.data.plan.train_plan import TrainPlan
from vlmtune.data.prepared.access import PreparedRows
from vlmtune.data.prepared.measure import BadRow
from vlmtune.data.prepared.prepare import Prepared, open_prepared, prepare, prepared_folder
from vlmtune.data.rows.corpus import open_corpus
from vlmtune.errors import Interrupted, TrainingError
from vlmtune.files import in_use, write_atomic
from vlmtune.infer.locate import RUN_FILE
from vlmtune.models.family import OpenedFolder
from vlmtune.models.load import open_folder
from vlmtune.train import arguments, checkpoint, folder, native_base, space, weights
from vlmtune.train.best import best_of
from vlmtune.train.callbacks import ProgressBar, StopSignal
from vlmtune.train.metrics import MetricsLog
from vlmtune.train.processes import Processes
from vlmtune.train.trainer import Job, VlmTrainer
from vlmtune.tuning import quantised
from vlmtune.tuning.components import learning_rates, report, table
from vlmtune.weights import names

Say = Callable[[str], None]

_MANY = 100_000  # rows that are worth preparing before a job starts


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run left behind.

    best: the checkpoint to use: the smallest eval loss, or the last one without evaluation.
    already_finished: the run was over before this call, which did nothing.
    """

    run_dir: Path
    best: Path
    steps: int
    train_loss: float | None
    eval_loss: float | None
    stopped_early: bool = False
    already_finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    train: MicroBatches
    plan: TrainPlan
    eval: MicroBatches | None
    folders: tuple[Path, ...]
    """Of prepared rows."""


def train(config: RunConfig, *, say: Say | None = None) -> TrainResult:
    """Trains what the configuration says, or goes on with it where a run in the same folder stopped.

    Args:
        config: as `config.load` gives it, with absolute paths and a `train.output_dir`.
        say: gets what a person should read, line by line, in the first process only.

    Raises:
        VlmtuneError: see `errors`; `Interrupted` after a signal, when the checkpoint has been written.
    """
    processes = Processes()
    tell: Say = say if say is not None and processes.is_first else _silent
    strategy = arguments.resolve_strategy(config.train, processes.world)
    if config.train.output_dir is None:
        raise TrainingError("has no value", where="train.output_dir", remedy="Load the configuration with load_config.")
    run_dir = Path(config.train.output_dir)
    quantised.require(config.tuning)
    stop = StopSignal()
    with _alone(run_dir, processes), contextlib.ExitStack() as held:
        folder.claim(run_dir, config)
        if (done := folder.finished(run_dir)) is not None:
            tell(f"This run is finished: {done['steps']} steps, best checkpoint {run_dir / done['best']}.")
            return _result(run_dir, done, already_finished=True)
        opened = open_folder(config.model.path, config.media)
        native = native_base.wanted(config, opened)
        data = _lay_out(config, opened, processes, strategy, tell)
        for prepared in data.folders:  # their shards stay while this runs, even if the rows' file changes
            held.enter_context(in_use(prepared))
        resumed = _begin(run_dir, config, data, processes, strategy, tell)
        if native is not None and processes.first_does(lambda: native_base.provide(native, opened)):
            tell(f"The base is written in the native layout, for PEFT: {native}.")
        # Both made before DeepSpeed's settings exist, which under ZeRO-3 spread every new model over all processes.
        source = weights.source(config, opened, resumed)
        skeleton = names.skeleton(opened) if config.tuning.method == "full" else None
        args = arguments.build(
            config,
            run_dir=run_dir,
            num_steps=data.plan.num_steps,
            accumulation=data.plan.micro_batches_per_step // processes.world,
            strategy=strategy,
        )
        model = weights.load(config, source, resumed, partitioned=strategy == "zero3", native_base=native)
        rates = learning_rates(config.train.learning_rate, config.tuning.learning_rates)
        parameters = report(model, opened, rates)
        tell(table(parameters))
        space.check(run_dir, config, parameters)
        made: dict[str, Any] = {"strategy": strategy, "world": processes.world, "threads": torch.get_num_threads()}
        provenance = checkpoint.provenance(config, opened, **made, native_base=native)
        job = Job(config, opened, data.plan, rates, strategy, provenance, tell, skeleton, stop)
        trainer = VlmTrainer(model, args, job, train_dataset=data.train, eval_dataset=data.eval)
        arguments.check_wrapper(strategy, trainer.accelerator.distributed_type)
        with stop.caught():  # before this there is nothing to save: a signal ends the process at once
            summary = _run(trainer, run_dir, resumed, processes)
        tell(_closing(run_dir, summary, trainer))
        return _result(run_dir, summary)


def _silent(line: str) -> None:
    del line


@contextlib.contextmanager
def _alone(run_dir: Path, processes: Processes) -> Iterator[None]:
    """The first process holds the lock for all."""
    with folder.locked(run_dir) if processes.is_first else contextlib.nullcontext():
        yield


def _lay_out(
    config: RunConfig, opened: OpenedFolder, processes: Processes, strategy: arguments.Strategy, tell: Say
) -> _Data:
    """Reads all rows, refuses or drops bad ones, plans the run and prints its arithmetic."""
    packed, why_not_packed = resolve_packing(config, opened)
    if why_not_packed:
        tell(f"This model cannot pack: {why_not_packed}. Rows are padded instead.")

    dropped: list[tuple[str, BadRow]] = []
    folders: list[Path] = []

    def planned(part: str, sources: tuple[AnySource, ...], make: Callable[..., Any]) -> tuple[PreparedRows, Any]:
        prepared = _prepared(sources, config, opened, processes, tell)
        corpus, shared = prepared.rows.corpus, opened.shared_length
        plan = make(prepared.measured, corpus, config, world=processes.world, packed=packed, shared_length=shared)
        dropped.extend((part, row) for row in prepared.measured.bad)  # the plan refuses them, or leaves them out
        folders.extend(prepared.folders)
        return prepared.rows, plan

    def batches(rows: PreparedRows, plan: Plan, *, augment: bool) -> MicroBatches:
        stand_in = arguments.needs_stand_in(config, strategy)
        seed = config.train.seed
        return MicroBatches(rows, opened, plan, stand_in=stand_in, packed=packed, augment=augment, seed=seed)

    rows, plan = planned("data.sources", config.data.sources, make_plan)
    tell(arithmetic_text(plan.arithmetic()))
    eval_batches = None
    if config.data.eval:
        eval_batches = batches(*planned("data.eval", config.data.eval, make_eval_plan), augment=False)
    if processes.is_first:
        _list_dropped(config, dropped, tell)
    train_batches = batches(rows, plan, augment=True)
    return _Data(train=train_batches, plan=plan, eval=eval_batches, folders=tuple(dict.fromkeys(folders)))


def _prepared(
    sources: tuple[AnySource, ...], config: RunConfig, opened: OpenedFolder, processes: Processes, tell: Say
) -> Prepared:
    """The rows of `sources`; the first process prepares what is missing, then all map the same shards."""
    into, allow = prepared_folder(config), config.data.allow
    if processes.is_first:
        corpus = open_corpus(sources, allow=allow, memory=into)
        prepared = prepare(corpus, opened, into=into, workers=config.data.workers)
    processes.wait()
    if not processes.is_first:
        prepared = open_prepared(open_corpus(sources, allow=allow, memory=into), opened, into)
    said = []
    if prepared.num_kept:
        said.append(f"{prepared.num_kept:,} rows were prepared before")
    if prepared.num_made:
        beforehand = " (`vlmtune prepare` does it before a job)" if prepared.num_made >= _MANY else ""
        said.append(f"{prepared.num_made:,} rows prepared now{beforehand}")
    tell(f"{'; '.join(said)}, in {into}.")
    return prepared


def _list_dropped(config: RunConfig, dropped: list[tuple[str, BadRow]], tell: Say) -> None:
    assert config.train.output_dir is not None  # `train` sees to it
    file = write_bad_rows(Path(config.train.output_dir), dropped)
    if file is not None:
        rows = "1 bad row is" if len(dropped) == 1 else f"{len(dropped):,} bad rows are"
        tell(f"{rows} left out (data.bad_rows: drop), listed in {file}.")


def arithmetic_text(numbers: dict[str, int | float]) -> str:
    """The batch arithmetic of a plan, one number per line."""
    return "\n".join(f"{name.replace('_', ' '):<24}{number:>12,.6g}" for name, number in numbers.items())


def _begin(
    run_dir: Path, config: RunConfig, data: _Data, processes: Processes, strategy: str, tell: Say
) -> Path | None:
    """Makes the folder this run's and cleans it; the checkpoint to go on from, or None."""
    digests = {"rows": data.train.rows.corpus.digest(), "plan": data.plan.digest}
    if data.eval is not None:
        digests["eval rows"] = data.eval.rows.corpus.digest()
    folder.claim(run_dir, config, digests)
    if processes.is_first:
        for name in checkpoint.remove_leftovers(run_dir):
            tell(f"Removed {name}, which was only half written.")
        write_atomic(run_dir / RUN_FILE, dump_config(config))
    processes.wait()
    latest = next(reversed(checkpoint.whole(run_dir)), None)
    if latest is not None:
        checkpoint.check_resumable(latest, strategy=strategy, world=processes.world)
        tell(f"Going on from {latest.name}.")
    return latest


def _run(trainer: VlmTrainer, run_dir: Path, resumed: Path | None, processes: Processes) -> dict[str, Any]:
    """Trains to the end, an early stop, or a signal; the summary that `finished.json` keeps."""
    bar = ProgressBar(trainer.args.max_steps)
    trainer.add_callback(bar)
    if processes.is_first:
        trainer.metrics_log = MetricsLog(run_dir, first_step=checkpoint.step_of(resumed) if resumed else 0)
    try:
        output = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:
        bar.close()
        if trainer.metrics_log is not None:
            trainer.metrics_log.close()
    state = trainer.state
    if trainer.stop_signal is not None and state.global_step < trainer.args.max_steps:
        raise Interrupted(
            f"stopped at step {state.global_step} of {trainer.args.max_steps}, after saving a checkpoint",
            signal_number=trainer.stop_signal,
            where=str(run_dir),
            remedy="The same command goes on from there.",
        )
    best = best_of(trainer.evaluations)
    last = checkpoint.folder_of(run_dir, state.global_step)
    summary = {
        "steps": state.global_step,
        "best": checkpoint.folder_of(run_dir, best.step).name if best else last.name,
        "train_loss": output.training_loss,
        "eval_loss": best.loss if best else None,
        "stopped_early": trainer.stopped_early,
    }
    processes.wait()
    if processes.is_first:
        folder.mark_finished(run_dir, summary)
    return summary


def _result(run_dir: Path, summary: dict[str, Any], *, already_finished: bool = False) -> TrainResult:
    return TrainResult(
        run_dir=run_dir,
        best=run_dir / summary["best"],
        steps=summary["steps"],
        train_loss=summary["train_loss"],
        eval_loss=summary["eval_loss"],
        stopped_early=summary["stopped_early"],
        already_finished=already_finished,
    )


def _closing(run_dir: Path, summary: dict[str, Any], trainer: VlmTrainer) -> str:
    """What a person wants to know at the end."""
    steps = "1 step" if summary["steps"] == 1 else f"{summary['steps']} steps"
    lines = [f"Done: {steps}" + (", stopped early." if summary["stopped_early"] else ".")]
    if summary["eval_loss"] is not None:
        lines.append(f"Best eval loss {summary['eval_loss']:.4f}, {run_dir / summary['best']}")
    else:
        lines.append(f"Last checkpoint {run_dir / summary['best']}")
    lines += [f"Note: {sentence}" for sentence in trainer.unproven]
    lines.append(f"Next: vlmtune export {run_dir} -o DIR")
    return "\n".join(lines)
