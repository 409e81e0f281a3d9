"""What of a Trainer's arguments matters to a callback that freezes: what cannot work, what judges, what is told."""

from __future__ import annotations

import os
from typing import Any

from neq_cli.errors import FreezingError

_SETTINGS = (
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "optim", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
    "label_smoothing_factor", "bf16", "fp16",
)  # fmt: skip


def check_arguments(args: Any) -> None:
    """Raise FreezingError where the parameters will lie in pieces, of which no neuron can be told."""
    for what, given in (("FSDP", args.fsdp), ("DeepSpeed", args.deepspeed)):
        asked = os.environ.get(f"ACCELERATE_USE_{what.upper()}", "false").lower() in ("1", "true", "yes")
        if given or asked:
            raise FreezingError(
                f"NEqCallback: {what} keeps parameters in pieces, of which no neuron can be told; train without it, in "
                "several processes by DistributedDataParallel"
            )


def evaluates(args: Any) -> bool:
    """Return whether the trainer evaluates while it trains."""
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def judged_by(args: Any, metric: str | None, lower_is_better: bool | None) -> tuple[str, bool]:
    """Return the column that judges the model and whether a lower one is better, as given or by ``args``."""
    best = args.metric_for_best_model if metric is None and evaluates(args) else None
    if best is not None:
        metric = best if best.startswith("eval_") else f"eval_{best}"
        if lower_is_better is None and args.greater_is_better is not None:
            lower_is_better = not args.greater_is_better
    if metric is None:
        metric = "eval_loss" if evaluates(args) else "train_loss"
    return metric, metric.endswith("loss") if lower_is_better is None else lower_is_better


def settings_of(args: Any) -> dict[str, Any]:
    """Return the training arguments that tell configurations apart, as plain values; not where or how fast."""
    found = {name: getattr(args, name, None) for name in _SETTINGS}
    return {name: getattr(value, "value", value) for name, value in found.items() if value is not None}
