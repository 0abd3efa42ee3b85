"""What SFT and GRPO share so that nothing is lost: checkpoints out and in, and the way back to the last whole step."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from rl_lvr.agreement import agree, from_first
from rl_lvr.errors import Fault, UserError
from rl_lvr.finite import first_not_finite
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.feedback import restore_feedback
from rl_lvr.latents.format import FormatIds
from rl_lvr.models import load_weights
from rl_lvr.training.runs.card import card_of
from rl_lvr.training.runs.checkpoints import (
    PARTIAL,
    foreign,
    newest_whole,
    publish,
    require_format,
    require_whole,
    rotate,
    seal,
    tidy,
)
from rl_lvr.training.runs.folder import run_held
from rl_lvr.training.runs.metrics import Metrics
from rl_lvr.training.runs.moments import Moment, Part, set_random_states
from rl_lvr.training.runs.stopping import Abandoned, Stopping
from rl_lvr.wrapping import unwrapped


class Resumable(Trainer):
    """Named before TRL's trainer among the bases. What it resumes besides the model is made of `parts`."""

    markers: FormatIds | None
    control: TrainerControl
    _saved_step: int | None = None
    _partial: Path | None = None
    _drop_update = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.stopping = Stopping(single=self.args.world_size == 1 and not self.is_deepspeed_enabled)
        self.metrics = Metrics(self._metrics, lambda: self.model.training)
        self.parts: list[Part] = [_Log(self)]

    # ---- a run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **more: Any) -> TrainOutput:
        """The parent's; a run that is told to stop, or has to, leaves a checkpoint of its last whole step."""
        with run_held(self.args.output_dir, "training"):
            return self._train(resume_from_checkpoint, *args, **more)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **more: Any) -> TrainOutput:
        checkpoint = from_first(lambda: self._chosen(resume_from_checkpoint))
        if not any(isinstance(callback, _Boundaries) for callback in self.callback_handler.callbacks):
            self.add_callback(_Boundaries(self))
        if checkpoint is not None:
            self._best_so_far(Path(checkpoint))  # refuse now what the end of training would need
        if checkpoint is not None and Path(checkpoint).resolve().parent == Path(self.args.output_dir).resolve():
            self._saved_step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
        try:
            return super().train(checkpoint, *args, **more)
        except (Abandoned, _DoneError) as ended:
            if isinstance(ended, Abandoned):
                self._keep_last_step()
            elif self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
                self._load_best_model()
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, float("nan"), {})
        except Exception as error:
            # Of several processes only one may have this error: they keep a checkpoint only where all agreed to stop.
            if self.stopping.moment is not None and (self.args.world_size == 1 or isinstance(error, Fault)):
                self._keep_last_step()
            raise

    def _chosen(self, resume: str | bool | None) -> str | None:
        run = Path(self.args.output_dir)
        tidy(run)
        if not resume:
            return None
        if resume is not True:
            require_whole(Path(resume))
            found = Path(resume)
        else:
            newest, passed = newest_whole(run)
            if newest is None:
                raise UserError(f"there is no whole checkpoint in {run}{''.join(f'; {clause}' for clause in passed)}.")
            found = newest
        require_format(found, None if self.markers is None else self.markers.format)
        return str(found)

    def _best_so_far(self, checkpoint: Path) -> str | None:
        """The best checkpoint of the run that is resumed, also where its folder has moved since."""
        file = checkpoint / TRAINER_STATE_NAME
        recorded = TrainerState.load_from_json(str(file)).best_model_checkpoint if file.is_file() else None
        if recorded is None or not self.args.load_best_model_at_end:
            return None
        name = Path(recorded).name
        for place in (Path(recorded), Path(self.args.output_dir) / name, checkpoint.parent / name):
            if place.is_dir():
                return str(place)
        raise UserError(
            f"{recorded}, the best model so far, is not there, and load_best_model_at_end may need it: put it back, or "
            "set load_best_model_at_end to false."
        )

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        """transformers forgets a best checkpoint whose folder has moved, and would end with the last model."""
        found: tuple[int, int] = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume, trial)
        if resume is not None and self.args.load_best_model_at_end:
            self.state.best_model_checkpoint = self._best_so_far(Path(resume))
        return found

    def _keep_last_step(self) -> None:
        moment, self.stopping.moment = self.stopping.moment, None
        step = self.state.global_step
        if moment is None or step in (0, self._saved_step):
            return
        self._return_to(moment)
        self._save_checkpoint(self.model_wrapped, None)
        if self.is_world_process_zero():
            print(f"kept a checkpoint of step {step}", file=sys.stderr)

    # ---- moments

    def _now(self) -> Moment:
        moment = Moment({}, self.state.num_input_tokens_seen)
        for part in self.parts:
            part.now(moment)
        return moment

    def _return_to(self, moment: Moment) -> None:
        set_random_states(moment.random)
        self.state.num_input_tokens_seen = moment.tokens_seen
        for part in self.parts:
            part.take(moment)

    def _maybe_log_save_evaluate(self, *args: Any, **more: Any) -> None:
        """The last thing in a step, so what follows belongs to the next one."""
        super()._maybe_log_save_evaluate(*args, **more)
        self.stopping.moment = self._now()

    def _save_rng_state(self, output_dir: str) -> None:
        """Called in every process, so each one's moment is written here too."""
        super()._save_rng_state(output_dir)
        path = Path(output_dir) / f"moment-{self.args.process_index:05d}.json"
        path.write_text(json.dumps(self._now().counters), encoding="utf-8")
        for part in self.parts:
            part.save(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The last thing before the first step of a resumed run."""
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            self._load_moment(Path(checkpoint))
        self.stopping.moment = self._now()

    def _load_moment(self, checkpoint: Path) -> None:
        written = len(list(checkpoint.glob("moment-*.json")))
        moment = None
        if written == self.args.world_size:
            path = checkpoint / f"moment-{self.args.process_index:05d}.json"
            counters = json.loads(path.read_text(encoding="utf-8"))
            moment = Moment(counters, self.state.num_input_tokens_seen, random={})
        for part in self.parts:
            part.load(checkpoint, moment)
        if moment is not None:
            for part in self.parts:
                part.take(moment)
        elif self.is_world_process_zero():
            what = f"is of {written} processes, not {self.args.world_size}" if written else "holds nothing but weights"
            if foreign(checkpoint):
                what = "was not written by rl-lvr and is not verified"
            print(f"{checkpoint} {what}: the run goes on, but not as it would have there", file=sys.stderr)

    # ---- stopping, agreed on by all processes

    def _checked_loss(self, loss: Tensor) -> Tensor:
        """Between forward and backward pass: go on only if all processes can."""
        if not self.model.training:
            return loss
        if self.stopping.heed(not bool(loss.isfinite())):
            self._no_number("loss")
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.stopping.moment = None  # its backward pass ends with the optimizer's step
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once per step, right before the optimizer's. Loss scaling of fp16 skips such a step by itself."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.accelerator.scaler is not None
        if self.is_deepspeed_enabled:
            scaled = bool(self.model_wrapped.fp16_enabled())
        finite = norm is None or bool(torch.as_tensor(norm).isfinite())
        if not (finite or scaled or self._drop_update):
            self._no_number("gradient norm")
        if self._drop_update:
            self._drop_update = False
            for parameter in model.parameters():
                parameter.grad = None  # not zero: momentum and weight decay would still move it
            self._metrics["train"]["skipped_updates"].append(1.0)
        return norm

    def _no_number(self, what: str) -> None:
        if self.args.on_nan_loss == "skip":
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise Fault(f"the {what} is no finite number, and DeepSpeed cannot skip a single update: {_LOWER}")
            self._drop_update = True
            return
        after = f"after step {self.state.global_step} of {self.state.max_steps}"
        raise Fault(f"the {what} is no finite number {after}: {_LOWER}, or set on_nan_loss to skip.")

    def require_finite_weights(self, when: str, cure: str, *, trained: bool = False) -> None:
        """Stop in all processes if a weight of any is not finite; `trained`: one of those that are trained.

        A loss shows a bad weight one step later, if that step uses it, and none after the last step.
        """
        name = first_not_finite(unwrapped(self.model), trained=trained)
        agree(None if name is None else f"parameter {name} is not finite {when}: {cure}")

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, the folder beside those that are whole."""
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The parent writes file after file into its place; here they are written beside, sealed, then moved."""
        run = Path(self._get_output_dir(trial))
        partial, limit = run / PARTIAL, self.args.save_total_limit
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        self._partial = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == partial / name:
            self.state.best_model_checkpoint = best = str(run / name)
        if self.args.should_save:
            self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
            seal(partial / name)
            rotate(run, limit, publish(partial / name, run), best)
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not from a folder that is about to move."""
        if self._partial is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The format goes beside every checkpoint, so that no other one is used with it by mistake; so does a card.

        PEFT writes a card of its own, with the path of the base model on this machine.
        """
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.markers is not None:
            self.markers.format.save(folder)
        card_of(self).save(folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card does not mention latents, and calls a base model in a local folder "None"."""
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else tags or []
            card_of(self, model_name, dataset_name, more).save(Path(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore all weights, or refuse.

        transformers 5.17 compares the file's names with the module's, and does not translate: `visual.*` on disk is
        `model.visual.*` in the module. It then restores nothing of a Qwen2.5-VL, and only warns.
        """
        target: Any = self.model if model is None else model
        if self.is_fsdp_enabled or isinstance(target, PeftModel) or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        dtype = next(target.parameters()).dtype
        stored = load_weights(resume_from_checkpoint, dtype=dtype, model_class=type(target))
        weights = stored.state_dict()
        theirs = {name: weight.shape for name, weight in weights.items()}
        mine = {n: w.shape for n, w in target.state_dict().items() if not n.startswith(f"{FEEDBACK}.")}
        if theirs != mine:
            wrong = sorted(name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name))[0]
            raise UserError(f"checkpoint {resume_from_checkpoint} does not belong to this model: {wrong} differs.")
        target.load_state_dict(weights, strict=False)
        restore_feedback(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """By the same translation of names; transformers' own would mix the best model with the last one."""
        if isinstance(self.model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _DoneError(Exception):
    """The checkpoint that is resumed is that of the last step; transformers would take another one."""


class _Log(Part):
    """What has been measured since the last row of the log."""

    def __init__(self, trainer: Resumable) -> None:
        self._trainer: Any = trainer

    def now(self, moment: Moment) -> None:
        moment.counters |= {
            "metrics": {name: list(values) for name, values in self._trainer._metrics["train"].items()},
            "loss": self._trainer._tr_loss.item(),
            "total_loss": self._trainer._total_loss_scalar,
            "last_logged": self._trainer._globalstep_last_logged,
        }

    def take(self, moment: Moment) -> None:
        counters, metrics = moment.counters, self._trainer._metrics["train"]
        metrics.clear()
        for name, values in counters["metrics"].items():
            metrics[name] = list(values)
        self._trainer._tr_loss = torch.tensor(counters["loss"], device=self._trainer.args.device)
        self._trainer._total_loss_scalar = counters["total_loss"]
        self._trainer._globalstep_last_logged = counters["last_logged"]


class _Boundaries(TrainerCallback):
    """Where a step can no longer be given up, and where the first one begins."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.require_finite_weights("as training begins", "start from another model or checkpoint")
        self.trainer.stopping.moment = self.trainer._now()
        if 0 < state.max_steps <= state.global_step:
            raise _DoneError

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        rates = [group["lr"] for group in self.trainer.optimizer.param_groups]
        if not all(math.isfinite(rate) for rate in rates):
            raise Fault(
                f"the learning rate is not finite after step {state.global_step} of {state.max_steps} ({rates}): look "
                "at learning_rate and the settings of its schedule."
            )

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.stopping.moment = None

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        when = f"after the update of step {state.global_step + 1} of {state.max_steps}"
        self.trainer.require_finite_weights(when, f"{_LOWER}, and go on from an earlier checkpoint", trained=True)


_LOWER = "lower the learning rate, or look at the data and rewards of this step"
