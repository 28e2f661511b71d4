"""`optim` and `train`: the update and the length of the run."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from megaroute.config.section import Section


class OptimConfig(Section):
    """AdamW and its schedule; one unit of the schedule is one step."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["cosine", "inverse_square_root", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    decay_steps: PositiveInt | None = None
    """Step at which min_lr is reached; train.steps when not given."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices (not of norms and biases)."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""


class RampupConfig(Section):
    """Growth of the global batch at the start of a run."""

    start: PositiveInt
    """First global batch, in rows."""
    increment: PositiveInt
    """Rows added at a time."""
    samples: PositiveInt
    """Rows over which the batch grows to train.global_batch."""


class SpikeConfig(Section):
    """Steps whose loss or gradient norm stands out above those before.

    Distances from the median of the window, in standard deviations that are estimated from the median absolute
    deviation: they hold although earlier spikes are in the window.
    """

    loss: PositiveFloat | None = 12.0
    """Standard deviations above the median from which a loss is a spike; the loss is not watched when null."""
    grad_norm: PositiveFloat | None = None
    """The same of the gradient norm before clipping."""
    window: int = Field(default=64, ge=8)
    """Steps of which median and deviation are taken; nothing is a spike before there are as many."""
    action: Literal["alarm", "skip"] = "alarm"
    """`alarm` tells and goes on, `skip` also leaves the update out, on all ranks."""


class TrainConfig(Section):
    """Length, batch and arithmetic of the run."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    global_batch: PositiveInt
    """Rows per step over all replicas and micro-batches."""
    micro_batch: PositiveInt = 1
    """Rows of one forward pass of one replica."""
    rampup: RampupConfig | None = None
    """Growth of the global batch; constant when not given."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the layers; bf16 and fp16 keep fp32 master weights and fp32 gradient sums."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of the MLPs and attention cores, or whole layers."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights and of routing noise."""
    validate_every: PositiveInt | None = None
    """Steps between validations (needs data.valid); also after the last step."""
    validate_samples: PositiveInt = 64
    """Rows of one validation, always the same ones."""
    max_nonfinite: NonNegativeInt = 8
    """Consecutive steps with a non-finite loss or gradient that are skipped; one more ends the run."""
    spike: SpikeConfig = SpikeConfig()
    """Steps that stand out."""
    rollback_after: PositiveInt | None = None
    """Consecutive steps that are spikes or not finite after which weights, optimizer and routers go back to the newest
    checkpoint; steps and data go on, so what was bad is not read again.  Never when null."""
    max_rollbacks: NonNegativeInt = 2
    """Rollbacks of one run; where one more would be due the run ends."""
    desync_every: PositiveInt | None = 100
    """Steps between comparisons of what ranks hold alike, bit for bit: parameters and routing decisions; null for
    none."""


class CheckpointConfig(Section):
    """When checkpoints are written, how many stay, and where a run starts."""

    every: PositiveInt | None = None
    """Steps between checkpoints; one is always written at the end and when the run is asked to stop."""
    keep: PositiveInt = 2
    """Newest complete checkpoints that stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints of every so many steps stay for ever; none when not given."""
    keep_best: NonNegativeInt = 0
    """Checkpoints with the lowest validation loss that stay; only steps that were validated take part."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; the last one is always waited for."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory, if there is one."""
    init_from: Path | None = None
    """Run directory or checkpoint whose weights a new run starts with, such as an imported model; its optimizer, steps
    and data start afresh.  Not looked at once the run has a checkpoint of its own."""
    verify: Literal["full", "sizes", "off"] = "full"
    """What is compared with the checksums before loading: every byte, file sizes, or nothing."""
    fallback: bool = False
    """When the newest checkpoint is damaged, go on from the one before instead of refusing."""

    @field_validator("verify", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads it


class MetricsConfig(Section):
    """What is written while the run goes on."""

    log_every: PositiveInt = 10
    """Steps between log lines; metrics.jsonl has a line for each."""
    tensorboard: bool = True
    """Write TensorBoard events through DeepSpeed's monitor."""
    report: bool = True
    """Write report.html when the run ends."""
    trace_samples: NonNegativeInt = 4
    """Validation rows whose routing the report shows."""


class RunConfig(Section):
    """The run directory and the device."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run."""
    directory: str = "runs/{name}"
    """Where everything of the run is written; {name} stands for run.name."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a device and the CPU elsewhere."""
    stop_grace_s: PositiveFloat = 8.0
    """Seconds that the ranks of a local launch get to save after a Ctrl-C, before they are killed."""
    timeout_s: PositiveInt = 600
    """Seconds after which a collective that does not complete ends the run."""
    hang_timeout_s: PositiveFloat | None = 240.0
    """Seconds without progress (a micro-batch, an update) after which the run ends with exit code 70 and says which
    rank is behind; set-up, first step and checkpoints get twice as long.  Never when null."""

    @field_validator("directory")
    @classmethod
    def _only_the_name_is_filled_in(cls, value: str) -> str:
        try:
            value.format(name="x")
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(f"{value!r} has braces other than {{name}}, which stands for run.name") from None
        return value
