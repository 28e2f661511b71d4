"""Rules across sections, and for the number of processes: arithmetic only, before anything starts."""

from collections.abc import Callable, Iterator
from typing import Literal

from megaroute.common.errors import ConfigError
from megaroute.config.root import Config
from megaroute.config.routing_checks import routing_problems
from megaroute.config.sizes import expert_width

Backend = Literal["gloo", "nccl"]
Problems = Iterator[str]


def check_config(config: Config, world_size: int | None = None, backend: Backend | None = None) -> None:
    """Raise ConfigError if the sections contradict each other, `world_size` processes, or `backend`.

    The message has a line for each problem: the equation that failed with its numbers and dotted keys.  With
    `world_size` None and parallel.data `auto` the rules that need the number of replicas are checked for one replica,
    which is necessary for any number; with `backend` None the rules of a backend are left out.
    """
    if world_size is not None:
        replicas = data_parallel_size(config, world_size)
    else:
        replicas = 1 if config.parallel.data == "auto" else config.parallel.data
    known = None if config.parallel.data == "auto" and world_size is None else replicas
    problems = [
        *_structure(config),
        *routing_problems(config, known),
        *_batches(config, replicas),
        *_backend(config, backend),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def data_parallel_size(config: Config, world_size: int) -> int:
    """Number of replicas that `world_size` processes make.

    Raises ConfigError unless parallel.tensor * parallel.pipeline * parallel.data is `world_size`.
    """
    parallel = config.parallel
    model_part = f"parallel.tensor {parallel.tensor} * parallel.pipeline {parallel.pipeline}"
    replicas, rest = divmod(world_size, parallel.model_size)
    if parallel.data == "auto":
        if rest or not replicas:
            lower = world_size - rest
            either = f"{lower} or {lower + parallel.model_size}" if lower else f"{parallel.model_size}"
            raise ConfigError(
                f"{model_part} = {parallel.model_size} processes make one replica, but {world_size} were started, not "
                f"a multiple; launch {either}"
            )
        return replicas
    expected = parallel.model_size * parallel.data
    if expected != world_size:
        instead = (
            f"set parallel.data={replicas} or launch {expected}" if replicas and not rest else f"launch {expected}"
        )
        raise ConfigError(
            f"{model_part} * parallel.data {parallel.data} = {expected}, but {world_size} processes; {instead}"
        )
    return parallel.data


def _structure(config: Config) -> Problems:
    for check in (_layers, _shards, _pipeline, _schedule, _guards, _tasks):
        yield from check(config)


def _indivisible(number: tuple[str, int], *factors: tuple[str, int], remedy: str) -> Problems:
    """The failing equation, if `number` is not a multiple of the product of `factors`."""
    product = 1
    for _, value in factors:
        product *= value
    if rest := number[1] % product:
        divisor = " * ".join(f"{name} {value}" for name, value in factors)
        divisor = f"({divisor})" if len(factors) > 1 else divisor
        yield f"{number[0]} {number[1]} % {divisor} = {rest}, must be 0; {remedy}"


def _layers(config: Config) -> Problems:
    yield from _indivisible(
        ("model.num_layers", config.model.num_layers),
        ("parallel.pipeline", config.parallel.pipeline),
        ("parallel.virtual_pipeline", config.parallel.virtual_pipeline),
        remedy="every stage holds as many layers: change the number of layers or of stages",
    )


def _shards(config: Config) -> Problems:
    model, tensor = config.model, ("parallel.tensor", config.parallel.tensor)
    for number, remedy in (
        (("model.num_attention_heads", model.num_attention_heads), "tensor ranks share the heads"),
        (("model.ffn_hidden_size", model.ffn_hidden_size), "tensor ranks share the columns of the MLP"),
        (
            ("model.vocab_size", model.vocab_size),
            "tensor ranks share the embedding: pad model.vocab_size to a multiple",
        ),
    ):
        yield from _indivisible(number, tensor, remedy=remedy)
    yield from _experts(config)
    yield from _key_value_heads(config)
    if not config.parallel.sequence:
        return
    if config.parallel.tensor == 1:
        yield "parallel.sequence needs parallel.tensor > 1, which is 1; set parallel.sequence=false or raise it"
    yield from _indivisible(
        ("data.sequence_length", config.data.sequence_length),
        tensor,
        remedy="tensor ranks share the tokens of a row; change one of them or set parallel.sequence=false",
    )


def _experts(config: Config) -> Problems:
    model, moe = config.model, config.routing.moe
    if config.routing.router != "moe":
        return
    key = "routing.moe.ffn_hidden_size"
    if moe.ffn_hidden_size is None:
        width, parts = ("model.ffn_hidden_size", model.ffn_hidden_size), ("routing.moe.top_k", moe.top_k)
        yield from _indivisible(width, parts, remedy=f"experts of a token share the width of its MLP; set {key}")
        key = "model.ffn_hidden_size / routing.moe.top_k"
    yield from _indivisible(
        (key, expert_width(model, config.routing)),
        ("parallel.tensor", config.parallel.tensor),
        remedy="tensor ranks share the columns of each expert",
    )


def _key_value_heads(config: Config) -> Problems:
    """Each tensor rank has whole key-value heads, or each head whole tensor ranks, which share its weights equally."""
    heads, tensor, width = config.model.kv_heads, config.parallel.tensor, config.model.head_size
    name = "model.num_kv_heads" if config.model.num_kv_heads else "model.num_kv_heads (as many as query heads)"
    if heads % tensor == 0:
        return
    if tensor % heads:
        yield (
            f"{name} {heads} % parallel.tensor {tensor} = {heads % tensor} and parallel.tensor {tensor} % {name} "
            f"{heads} = {tensor % heads}, one must be 0; ranks hold whole key-value heads or share one: change either"
        )
    elif rest := 2 * heads * width % tensor:
        yield (
            f"(2 * {name} {heads} * head width {width}) % parallel.tensor {tensor} = {rest}, must be 0; tensor ranks "
            "that share a key-value head hold equal parts of its weights: lower parallel.tensor or change the width"
        )


def _pipeline(config: Config) -> Problems:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline > 1
    if interleaved and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline {parallel.virtual_pipeline} needs parallel.pipeline > 1, which is 1; "
            "set parallel.virtual_pipeline=1 or raise parallel.pipeline"
        )
    if parallel.overlap_p2p and not interleaved:
        yield (
            "parallel.overlap_p2p needs the interleaved schedule, but parallel.virtual_pipeline is 1; "
            "set parallel.overlap_p2p=false or raise parallel.virtual_pipeline"
        )
    if parallel.overlap_p2p and parallel.batch_p2p:
        yield (
            "parallel.overlap_p2p and parallel.batch_p2p exclude each other: a batch of sends is waited for as one; "
            "set one of them to false"
        )
    if interleaved and parallel.pipeline == 2 and parallel.batch_p2p:
        yield (
            f"parallel.pipeline 2 with parallel.virtual_pipeline {parallel.virtual_pipeline} and parallel.batch_p2p "
            "gives wrong gradients without an error: the next and the previous stage are the same process and batched "
            "sends cross; set parallel.batch_p2p=false"
        )


def _schedule(config: Config) -> Problems:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps {optim.warmup_steps} >= train.steps {steps}: the run would end before the peak "
            "learning rate; lower optim.warmup_steps"
        )
    if optim.decay_steps is not None and optim.decay_steps <= optim.warmup_steps:
        yield (
            f"optim.decay_steps {optim.decay_steps} <= optim.warmup_steps {optim.warmup_steps}: the decay would end "
            "before it starts; raise optim.decay_steps"
        )
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr {optim.min_lr:g} > optim.lr {optim.lr:g}: the learning rate would grow; lower optim.min_lr"
    if optim.decay == "inverse_square_root" and optim.warmup_steps == 0:
        yield (
            "optim.decay inverse_square_root scales with the square root of optim.warmup_steps, which is 0; "
            "set optim.warmup_steps to at least 1"
        )


def _guards(config: Config) -> Problems:
    run, train = config.run, config.train
    if run.hang_timeout_s is not None and 2 * run.hang_timeout_s > run.timeout_s:
        yield (
            f"2 * run.hang_timeout_s {run.hang_timeout_s:g} > run.timeout_s {run.timeout_s}: collectives would give up "
            "before the watchdog says which rank they wait for; lower run.hang_timeout_s or raise run.timeout_s"
        )
    if train.rollback_after is None:
        return
    if config.checkpoint.every is None:
        yield (
            f"train.rollback_after {train.rollback_after} needs checkpoints to go back to, but checkpoint.every is not "
            "given; set it"
        )
    if train.rollback_after > train.max_nonfinite:
        yield (
            f"train.rollback_after {train.rollback_after} > train.max_nonfinite {train.max_nonfinite}: steps that are "
            "not finite would end the run before they are rolled back; lower the one or raise the other"
        )


def _tasks(config: Config) -> Problems:
    tasks, every = config.evaluate.tasks, config.evaluate.every
    if tasks and every is None:
        yield f"evaluate.tasks {', '.join(tasks)} would never be scored: evaluate.every is not given; set it"
    if every is not None and not tasks:
        yield f"evaluate.every {every} has nothing to score: evaluate.tasks is empty; name tasks or remove it"


def _batches(config: Config, replicas: int) -> Problems:
    """Rows per step must make whole micro-batches on each replica, and whole rounds of the interleaved schedule."""
    train, parallel = config.train, config.parallel
    factors = [("train.micro_batch", train.micro_batch), ("parallel.data", replicas)]
    if parallel.virtual_pipeline > 1:
        factors.append(("parallel.pipeline", parallel.pipeline))
    remedy = "a step is a whole number of micro-batches on every replica"
    if parallel.virtual_pipeline > 1:
        remedy += ", a multiple of the stages for the interleaved schedule"
    yield from _indivisible(("train.global_batch", train.global_batch), *factors, remedy=remedy)
    yield from _rampup(config, lambda number: _indivisible(number, *factors, remedy=remedy))
    if train.validate_every is not None:
        yield from _indivisible(("train.validate_samples", train.validate_samples), *factors, remedy=remedy)
        if config.data.valid is None:
            yield f"train.validate_every {train.validate_every} needs data.valid, which is not given; set data.valid"
    yield from _indivisible(
        ("data.lanes", config.data.lanes),
        ("parallel.data", replicas),
        remedy="each replica reads a whole number of lanes, which is fixed for the run: change the number of replicas",
    )
    if config.data.workers and config.data.lanes % replicas == 0:
        yield from _indivisible(
            ("data.lanes", config.data.lanes),
            ("parallel.data", replicas),
            ("data.workers", config.data.workers),
            remedy="each worker reads a whole number of lanes: change the number of workers",
        )


def _rampup(config: Config, indivisible: Callable[[tuple[str, int]], Problems]) -> Problems:
    rampup, final = config.train.rampup, config.train.global_batch
    if rampup is None:
        return
    yield from indivisible(("train.rampup.start", rampup.start))
    yield from indivisible(("train.rampup.increment", rampup.increment))
    if rampup.start >= final:
        yield (
            f"train.rampup.start {rampup.start} >= train.global_batch {final}: nothing to grow; lower the start or "
            "remove train.rampup"
        )
    elif rest := (final - rampup.start) % rampup.increment:
        yield (
            f"(train.global_batch {final} - train.rampup.start {rampup.start}) % train.rampup.increment "
            f"{rampup.increment} = {rest}, must be 0; the batch grows in whole increments"
        )


def _backend(config: Config, backend: Backend | None) -> Problems:
    if backend != "gloo":
        return
    if config.train.precision == "fp16":
        yield "train.precision fp16 is not supported on the CPU (gloo); use fp32 or bf16"
    if config.parallel.overlap_p2p and config.parallel.deallocate_pipeline_outputs:
        yield (
            "parallel.overlap_p2p with parallel.deallocate_pipeline_outputs gives NaN or wrong losses without an error "
            "on gloo, which still reads what was freed; set parallel.deallocate_pipeline_outputs=false"
        )
