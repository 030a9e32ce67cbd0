"""The Trainer subclass: planned micro batches, an exactly token-weighted loss, own evaluation, sealed checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, TrainingArguments

from vlmtune.data.loader import Failed, unwrap
from vlmtune.data.sample import Batch
from vlmtune.nn.side_inputs import hand_over
from vlmtune.nn.stand_in import StandIn
from vlmtune.progress import track
from vlmtune.train.best import best_of, should_stop
from vlmtune.train.callbacks import Schedule
from vlmtune.train.job import Job
from vlmtune.train.loss import summed_cross_entropy
from vlmtune.train.metrics import MetricsLog
from vlmtune.train.proof import FirstStepProof
from vlmtune.train.saving import SealedCheckpoints
from vlmtune.tuning.components import param_groups

# One micro batch on its way through accelerate, which moves the tensors of plain containers to the device.
MicroBatch = dict[str, Any]


@dataclass(slots=True)
class StepTotals:
    """Sums over all ranks since the last line of metrics."""

    tokens: int = 0
    trained: int = 0
    seconds: float = 0.0


def unpack(items: list[Batch | Failed]) -> MicroBatch:
    """Collate function: the one planned micro batch of a DataLoader's "batch of one", as plain containers."""
    (batch,) = items
    if isinstance(batch, Failed):
        return {"failed": batch}  # raised in the main process, see `_received`
    return {
        "inputs": batch.inputs,
        "targets": batch.targets,
        "stand_in": batch.stand_in,
        "num_tokens": batch.num_tokens,
        "num_images": batch.num_images,
    }


def _received(batch: MicroBatch) -> MicroBatch:
    """The micro batch, or the error of the row that a worker could not read."""
    if "failed" in batch:
        unwrap(batch["failed"])
    return batch


def rates_text(rates: Mapping[str, float]) -> str:
    """Learning rates by component as one figure where they are equal, else each with its name."""
    if len(set(rates.values())) == 1:
        return f"{next(iter(rates.values())):.2e}"
    return " ".join(f"{component} {rate:.2e}" for component, rate in rates.items())


class VlmTrainer(SealedCheckpoints):
    """Trains on planned micro batches.

    Item i of a dataset is the whole micro batch i of a flat plan. accelerate deals item i to rank i mod world, so a
    step of N micro batches is N / world accumulation rounds, and the position in the data is the number of steps taken.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        job: Job,
        *,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None,
    ) -> None:
        own_cache = vars(model.config).get("use_cache")
        super().__init__(
            model=model,
            args=args,
            data_collator=unpack,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        # Trainer writes its own use_cache into the config, which would be saved; every batch carries use_cache=False.
        if own_cache is None:
            vars(model.config).pop("use_cache", None)
        else:
            model.config.use_cache = own_cache
        self.remove_callback(PrinterCallback)
        self.add_callback(
            Schedule(job.plan, job.config.train, has_eval=eval_dataset is not None, end_of_step=self._end_of_step)
        )
        self.job = job
        self.stop_signal: int | None = None
        self.stopped_early = False
        self.metrics_log: MetricsLog | None = None
        self.run_dir = Path(str(args.output_dir))
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._bare = bare
        self._stand_in = StandIn(bare)
        self._to_prove = job.config.train.first_step_proof
        self._proof: FirstStepProof | None = None
        self._totals = StepTotals()
        self._step_began = 0.0
        self._rates_of_step: dict[str, float] = {}
        self._eval_loader: DataLoader[Any] | None = None

    # ---- data and optimizer --------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches of the eval plan, dealt to the ranks in turn like those of training."""
        if self._eval_loader is None:
            dataset: Any = eval_dataset if eval_dataset is not None else self.eval_dataset
            workers, pin = self.args.dataloader_num_workers, self.args.dataloader_pin_memory
            loader: DataLoader[Any] = DataLoader(
                dataset, batch_size=1, collate_fn=unpack, num_workers=workers, pin_memory=pin
            )
            self._eval_loader = self.accelerator.prepare(loader)
        return self._eval_loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW (or `train.extra.optim`) over one group per component and kind."""
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = param_groups(
                model if model is not None else self.model, self.job.opened, self.job.rates, self.args.weight_decay
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # ---- the step ------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[MicroBatch], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], torch.Tensor]:
        """The micro batches of this rank's next step, and the number of trained tokens of the step on all ranks."""
        self._step_began = time.perf_counter()
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = [_received(sample) for sample in samples]
        counts = [
            sum(len(sample["targets"]) for sample in samples),
            sum(sample["num_tokens"] for sample in samples),
            sum(sample["num_images"] for sample in samples),
            self.job.stop.number or 0,
        ]
        # The signal travels along: all ranks must stop at the same step.
        gathered = self.accelerator.gather(torch.tensor([counts], device=device, dtype=torch.int64))
        trained, tokens, pictures, _ = gathered.sum(dim=0).tolist()
        self.stop_signal = int(gathered[:, 3].max()) or None
        self._totals.trained += trained
        self._totals.tokens += tokens
        if self._to_prove and self._proof is None:
            self._to_prove = False
            # FSDP has put its own parameters in place by now.
            self._proof = FirstStepProof(self.model, self.job.opened, drop_path=self.job.config.tuning.drop_path)
        if self._proof is not None:
            unmoved = 1 if self.args.get_warmup_steps(self.state.max_steps) else 0  # the first warm-up step has rate 0
            self._proof.begin_step(pictures=pictures > 0, adapters_moved=self.state.global_step > unmoved)
        return samples, torch.tensor(max(trained, 1), device=device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the cross-entropy of this micro batch ÷ trained tokens of the whole step, times the number of ranks.

        The factor undoes the mean that DDP, ZeRO and FSDP take over the ranks' gradients.
        """
        del return_outputs
        if num_items_in_batch is None:
            raise ValueError("the number of trained tokens of the step is needed")
        return self._summed_loss(model, inputs) * (self.accelerator.num_processes / num_items_in_batch)

    def _summed_loss(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        inputs = hand_over(self._bare, batch["inputs"])
        self._stand_in.set(batch["stand_in"])
        logits = model(**inputs).logits
        return summed_cross_entropy(logits, batch["targets"])

    def training_step(
        self, model: torch.nn.Module, inputs: MicroBatch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro batch; judges the first-step proof after the last one of a step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._rates_of_step = {group["component"]: float(group["lr"]) for group in self.optimizer.param_groups}
            if not self.is_deepspeed_enabled:
                # A tower that no picture reached has no gradient on one process, but zeros on several. Zeros everywhere
                # make AdamW move it alike.
                for parameter in model.parameters():
                    if parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            if self._proof is not None:
                self._prove(loss)
        return loss

    def _prove(self, loss: torch.Tensor) -> None:
        assert self._proof is not None
        self.refuse_broken_loss(loss, self.state.global_step + 1)
        self._proof.end_step(self.args.device, self._largest_over_ranks)
        if not self._proof.pending:
            self._proof = None

    def _largest_over_ranks(self, figures: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(figures[None]).amax(dim=0)

    @property
    def unproven(self) -> list[str]:
        """What no step could prove so far, in sentences."""
        return self._proof.open_questions() if self._proof is not None else []

    # ---- evaluation and metrics ----------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss per trained token over the eval plan, the same number whatever the number of processes."""
        del ignore_keys, metric_key_prefix
        model = self.model_wrapped
        model.eval()
        sums, counts = [], []
        loader = self.get_eval_dataloader(eval_dataset)
        with torch.no_grad():
            for batch in track(loader, total=len(loader), label="eval"):
                sums.append(self._summed_loss(model, self._prepare_inputs(_received(batch))).double().cpu())
                counts.append(len(batch["targets"]))
        loss = self._in_order(torch.stack(sums)).sum() / self._in_order(torch.tensor(counts)).sum()
        metrics = {"eval_loss": float(loss)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._keep_the_best()
        return metrics

    def _in_order(self, mine: torch.Tensor) -> torch.Tensor:
        """One value per micro batch of this rank -> those of all ranks in the order of the plan, on the CPU."""
        everyone = self.accelerator.gather(mine.to(self.args.device)[None])
        return everyone.cpu().T.reshape(-1)

    def _keep_the_best(self) -> None:
        best = best_of(self.evaluations)
        if best is not None and best.step == self.state.global_step:
            self.control.should_save = True
        if should_stop(self.evaluations, self.job.config.train.early_stopping):
            self.stopped_early = True
            self.control.should_training_stop = self.control.should_save = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Turns Trainer's figures into a line of metrics; its closing summary is not one."""
        del start_time
        step = self.state.global_step
        epoch = round(self.job.plan.step_epoch(step - 1), 4)
        if "eval_loss" in logs:
            self.state.log_history.append({"step": step, "eval_loss": logs["eval_loss"]})
            self._write({"epoch": epoch, "eval_loss": logs["eval_loss"]})
            self.job.say(f"step {step:>6}  epoch {epoch:<7.2f} eval loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            self._log_step(step, epoch, logs)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _log_step(self, step: int, epoch: float, logs: Mapping[str, float]) -> None:
        if not math.isfinite(logs["loss"]):
            self.refuse_broken_loss(torch.tensor(logs["loss"], device=self.args.device), step)
        totals, self._totals = self._totals, StepTotals()
        speed = totals.tokens / totals.seconds if totals.seconds else 0.0
        line = {
            "epoch": epoch,
            "loss": logs["loss"],
            "learning_rate": self._rates_of_step,
            "grad_norm": logs.get("grad_norm", 0.0),
            "tokens_per_second": round(speed, 1),
            "trained_share": round(totals.trained / max(totals.tokens, 1), 4),
        }
        self._write(line)
        rates = rates_text(self._rates_of_step)
        self.job.say(
            f"step {step:>6}  epoch {epoch:<7.2f} loss {logs['loss']:.4f}  learning rate {rates}  {speed:,.0f} tokens/s"
        )

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.metrics_log is not None:
            self.metrics_log.write(self.state.global_step, line)

    def _end_of_step(self) -> bool:
        """Stops the step's clock (evaluation and saving come after it); whether a signal asks to stop here."""
        self._totals.seconds += time.perf_counter() - self._step_began
        if self.accelerator.num_processes == 1:
            self.stop_signal = self.job.stop.number  # nobody to agree with: one that came during the step counts
        return self.stop_signal is not None
