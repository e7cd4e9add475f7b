"""When to save, and which checkpoints to keep. Pure rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flax_partial.callbacks.policies import (
    BestN,
    EveryInterval,
    EveryNSteps,
    LatestN,
    Policy,
    check_count,
    check_interval,
)

if TYPE_CHECKING:
    from datetime import timedelta

    from flax_partial.callbacks.policies import Mode, SavedStep

_ALL = -1  # as `save_top_k`
# Words in the name of a metric that show which is better.
_LARGER = re.compile(
    "acc|accuracy|auc|bleu|correlation|cosine|dice|f1|fbeta|fmeasure|iou|precision|psnr|r2|recall|"
    "reward|rouge|score|sensitivity|similarity|specificity|ssim"
)
_SMALLER = re.compile(
    "bce|bpb|bpc|cer|crossentropy|divergence|entropy|error|fid|hinge|kl|logcosh|loss|mae|mape|mse|"
    "msle|nll|perplexity|poisson|ppl|rmse|wer"
)


@dataclass(frozen=True)
class Schedule:
    """At which steps to save.

    Attributes:
      every_n_epochs: Save at the end of each n-th epoch; None for no epoch.
      every_n_train_steps: Save at each n-th step, too; None for no step.
      train_time_interval: Save when so much time has gone by since the last save, too.
    """

    every_n_epochs: int | None
    every_n_train_steps: int | None
    train_time_interval: timedelta | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          ValueError: A period is below 1, an interval not positive, or nothing would ever be
            saved.
          TypeError: The interval is no `timedelta`.
        """
        check_count("every_n_epochs", self.every_n_epochs)
        check_count("every_n_train_steps", self.every_n_train_steps)
        check_interval("train_time_interval", self.train_time_interval)
        periods = (self.every_n_epochs, self.every_n_train_steps, self.train_time_interval)
        if all(period is None for period in periods):
            raise ValueError(
                "every_n_epochs, every_n_train_steps and train_time_interval are all None: nothing "
                "would be saved. Give one of them."
            )

    def is_step_due(self, step: int) -> bool:
        """Whether to save after `step` optimizer steps, whatever the epoch."""
        return self.every_n_train_steps is not None and step % self.every_n_train_steps == 0

    def is_epoch_due(self, epoch: int) -> bool:
        """Whether to save at the end of an epoch, the first being 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a directory to keep, and by which metric the best is known.

    Attributes:
      policies: What any of them keeps is kept, and the newest always is; none: all are kept.
      monitor: Name of the metric that scores a checkpoint; None if nothing does.
      mode: Whether the best score is the smallest ("min") or the largest ("max").
    """

    policies: tuple[Policy, ...] = ()
    monitor: str | None = None
    mode: Mode = "min"

    @classmethod
    def of(
        cls,
        *,
        keep: Policy | Iterable[Policy] | None,
        keep_last: int | None,
        monitor: str | None,
        mode: Literal["min", "max", "auto"],
        save_top_k: int | None,
        keep_every_n_steps: int | None,
        keep_time_interval: timedelta | None,
    ) -> Retention:
        """Takes the options of a callback.

        Raises:
          ValueError: A count is below 1, an interval not positive, `mode` is unknown or says
            something else than a policy, or there is no metric to rank by.
          TypeError: An interval is no `timedelta`, or `keep` no policy.
        """
        check_count("keep_last", keep_last)
        check_count("save_top_k", None if save_top_k == _ALL else save_top_k)
        check_count("keep_every_n_steps", keep_every_n_steps)
        check_interval("keep_time_interval", keep_time_interval)
        policies = [*_policies(keep)]
        monitor, known = _scored_by(policies, monitor, mode)
        if keep_last is not None:
            policies.append(LatestN(keep_last))
        if save_top_k not in (None, _ALL):
            if monitor is None:
                raise ValueError(
                    f"save_top_k={save_top_k} needs a score to rank by. Pass monitor=, the name "
                    "of one of the trainer's callback_metrics."
                )
            policies.append(BestN(save_top_k, monitor, known))
        if keep_every_n_steps is not None:
            policies.append(EveryNSteps(keep_every_n_steps))
        if keep_time_interval is not None:
            policies.append(EveryInterval(keep_time_interval))
        return cls(() if save_top_k == _ALL else tuple(policies), monitor, known)

    @property
    def removes(self) -> bool:
        """Whether any checkpoint is ever removed."""
        return bool(self.policies)

    @property
    def looks_inside(self) -> bool:
        """Whether it takes more than the steps to tell what is removed."""
        return any(getattr(policy, "looks_inside", True) for policy in self.policies)

    @property
    def modes(self) -> dict[str, Mode]:
        """Metrics by which checkpoints are ranked, each with its mode."""
        ranking = (policy for policy in self.policies if isinstance(policy, BestN))
        found = {policy.monitor: policy.mode for policy in ranking}
        return found if self.monitor is None else found | {self.monitor: self.mode}

    @property
    def about_unranked(self) -> str:
        """Returns what becomes of checkpoints without a score; "" if the score decides nothing."""
        numbers = [policy.max_unranked for policy in self.policies if isinstance(policy, BestN)]
        if not numbers:
            return ""
        return f" It is not ranked; of such checkpoints the {max(numbers)} newest are kept."

    def expired(self, saved: Sequence[SavedStep]) -> list[int]:
        """Returns the steps to remove, of checkpoints ordered by step; never the newest."""
        if not self.policies or not saved:
            return []
        kept = {saved[-1].step}.union(*(policy.keep(saved) for policy in self.policies))
        return [one.step for one in saved if one.step not in kept]


def direction(monitor: str | None, mode: Literal["min", "max", "auto"]) -> Mode:
    """Returns whether the best score is the smallest or the largest; "auto" goes by its name.

    Raises:
      ValueError: `mode` is none of these, or the name does not show it.
    """
    if mode not in ("min", "max", "auto"):
        raise ValueError(f"mode is {mode!r}; it must be 'min', 'max' or 'auto'.")
    if mode != "auto":
        return mode
    name = (monitor or "loss").lower().replace("io_u", "iou")  # as Keras calls it
    words = re.split(r"[^a-z0-9]+", name)
    is_larger, is_smaller = (any(map(one.fullmatch, words)) for one in (_LARGER, _SMALLER))
    if is_larger == is_smaller:
        raise ValueError(
            f"mode='auto' cannot tell by its name whether {monitor!r} is better small or large. "
            "Pass mode='min' or mode='max'."
        )
    return "max" if is_larger else "min"


def _scored_by(
    policies: Sequence[Policy], monitor: str | None, mode: Literal["min", "max", "auto"]
) -> tuple[str | None, Mode]:
    """Returns the metric that scores checkpoints, and its mode: as given, or the first policy's."""
    ranking = [policy for policy in policies if isinstance(policy, BestN)]
    if monitor is None and ranking:
        return ranking[0].monitor, ranking[0].mode
    known = direction(monitor, mode)
    for policy in ranking:
        if policy.monitor == monitor and policy.mode != known:
            raise ValueError(
                f"mode={mode!r} ranks by {monitor!r} the other way than {policy}. Leave out "
                f"monitor=, or pass mode={policy.mode!r}."
            )
    return monitor, known


def _policies(keep: Policy | Iterable[Policy] | None) -> tuple[Policy, ...]:
    if keep is None:
        return ()
    policies = tuple(keep) if isinstance(keep, Iterable) else (keep,)
    for policy in policies:
        if isinstance(policy, type) or not callable(getattr(policy, "keep", None)):
            raise TypeError(f"keep holds {policy!r}, which is no policy: it has no method keep.")
    return policies
