"""How the trainer saves: everything into one folder, sealed at the end, or removed again when something fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from vlmtune.errors import TrainingError, VlmtuneError, WeightsError
from vlmtune.train import checkpoint
from vlmtune.train.best import Evaluated, best_of
from vlmtune.train.job import Job


class SealedCheckpoints(Trainer):
    """Trainer with sealed checkpoints and a rotation of its own; `job` and `run_dir` are set by the subclass."""

    job: Job
    run_dir: Path
    model: Any
    optimizer: Any
    lr_scheduler: Any
    _keys_checked = False

    @property
    def evaluations(self) -> list[Evaluated]:
        """All evaluations of the run, those before a resume included."""
        lines = [line for line in self.state.log_history if "eval_loss" in line]
        return [Evaluated(int(line["step"]), line["eval_loss"]) for line in lines]

    def refuse_broken_loss(self, loss: torch.Tensor, step: int) -> None:
        """Raises `TrainingError` on every rank when the loss of any rank is not finite."""
        if not torch.isfinite(self.accelerator.gather(loss.detach().reshape(1)).sum()):
            raise TrainingError(
                "the loss is not a finite number any more",
                where=f"step {step}",
                remedy="Lower the learning rate or lengthen the warm-up; earlier checkpoints are untouched.",
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes, seals and rotates; on failure removes what was begun and raises `WeightsError`."""
        del model, trial
        folder = checkpoint.folder_of(self.run_dir, self.state.global_step)
        self.refuse_broken_loss(self._tr_loss, self.state.global_step)
        if self.args.should_save:
            checkpoint.remove(folder)
        self.accelerator.wait_for_everyone()
        try:
            self._write_checkpoint(folder)
        except WeightsError:
            checkpoint.remove(folder)
            raise
        except (VlmtuneError, OSError, SafetensorError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError, safetensors as its own.
            checkpoint.remove(folder)
            kept = ", ".join(path.name for path in checkpoint.whole(self.run_dir)) or "none"
            raise WeightsError(
                f"the checkpoint could not be written ({str(error).splitlines()[0]})",
                where=str(folder),
                remedy=f"Free space on the disk and start the same command again; whole checkpoints: {kept}.",
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = best_of(self.evaluations)
            checkpoint.write_best(self.run_dir, best, folder)
            checkpoint.rotate(
                self.run_dir, keep=self.job.config.train.keep_checkpoints, best_step=best.step if best else None
            )

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(folder / checkpoint.STATE_FILE))
            checkpoint.add_companions(folder, self.job.opened, self.job.config, self.job.provenance)
            if self.job.skeleton is not None and not self._keys_checked:
                checkpoint.check_keys(folder, self.job.skeleton)
                self._keys_checked = True
            checkpoint.seal(folder, strategy=self.job.strategy, world=self.accelerator.num_processes)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights and config as plain transformers or PEFT writes them; no pickled arguments beside them."""
        if self.args.should_save:
            adapter = isinstance(self.model, PeftModel)
            if not adapter and state_dict is not None:
                # Gathered copies do not share memory any more, so `save_pretrained` would not see the tie.
                tied = set(self.model.all_tied_weights_keys)
                state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
            options = {"save_embedding_layers": False} if adapter else {}
            self.model.save_pretrained(output_dir, state_dict=state_dict, **options)
            if adapter:
                (Path(str(output_dir)) / "README.md").unlink(missing_ok=True)  # PEFT's empty model card

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the weights a second time here, in a format of FSDP's own.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to do: `run` loads the weights of the checkpoint before the model is wrapped.

        Trainer's own way compares parameter names with the names on disk, which differ for InternVL and LLaVA: it
        would load nothing and only warn.
        """
