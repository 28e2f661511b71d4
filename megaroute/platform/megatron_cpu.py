"""Megatron-core on CPU and gloo.  Does nothing where CUDA is available.

Megatron-core asks torch for CUDA by name in many functions.  torch ships `torch.cpu` with the same device interface
(current_device, synchronize, Stream, ...), so it is enough to re-point, inside the modules listed here, the name
`cuda` to `cpu` and two literals.  No global of torch changes: code outside the list that asks for CUDA still fails.
A test pins the version and the number of places per module, so that another release of Megatron-core is noticed.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import torch

MEGATRON_VERSION = "0.16.1"

PORTED_MODULES = (
    "pipeline_parallel.schedules",
    "pipeline_parallel.p2p_communication",
    "tensor_parallel.mappings",
    "tensor_parallel.layers",
    "tensor_parallel.utils",
    "tensor_parallel.data",
    "transformer.utils",
    "transformer.attention",
    "distributed.param_and_grad_buffer",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.clip_grads",
    "models.common.language_module.language_module",
    "models.common.embeddings.rotary_pos_embedding",
    "utils",
    "timers",
)
"""Modules of megatron.core of which each broke at least one run on CPU when it was left out."""

_installed: dict[str, int] | None = None


def install() -> dict[str, int]:
    """Port Megatron-core once per process, before its process groups exist; later calls return the first one's result.

    Returns the number of replaced names and literals per module, empty where CUDA is available.
    """
    global _installed
    if _installed is None:
        _installed = {} if torch.cuda.is_available() else {name: _port_module(name) for name in PORTED_MODULES}
        if _installed:
            _install_rng_tracker()
    return _installed


def _port_module(name: str) -> int:
    module = importlib.import_module(f"megatron.core.{name}")
    seen: set[int] = set()
    return sum(_port(member, module.__name__, seen) for member in list(vars(module).values()))


def _port(member: Any, module_name: str, seen: set[int]) -> int:
    """Port a function, a property, or a class with all its members, if the module defines it."""
    member = getattr(member, "__func__", member)
    if id(member) in seen:
        return 0
    seen.add(id(member))
    if isinstance(member, types.FunctionType):
        count = 0
        if member.__module__ == module_name:
            member.__code__, count = _ported_code(member.__code__)
        return count + _port(getattr(member, "__wrapped__", None), module_name, seen)
    if isinstance(member, property):
        return sum(_port(accessor, module_name, seen) for accessor in (member.fget, member.fset) if accessor)
    if isinstance(member, type) and member.__module__ == module_name:
        return sum(_port(inner, module_name, seen) for inner in list(vars(member).values()))
    return 0


def _ported_code(code: types.CodeType) -> tuple[types.CodeType, int]:
    count = sum(name == "cuda" for name in code.co_names)
    constants = []
    for constant in code.co_consts:
        ported, replaced = _ported_constant(constant)
        constants.append(ported)
        count += replaced
    names = tuple("cpu" if name == "cuda" else name for name in code.co_names)
    return code.replace(co_names=names, co_consts=tuple(constants)), count


def _ported_constant(value: Any) -> tuple[Any, int]:
    if isinstance(value, types.CodeType):
        return _ported_code(value)
    if value == "cuda":
        return "cpu", 1
    if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
        return value.replace("torch.cuda.", "torch."), 1
    if type(value) in (tuple, frozenset):
        parts = [_ported_constant(item) for item in value]
        return type(value)(part for part, _ in parts), sum(count for _, count in parts)
    return value, 0


def _install_rng_tracker() -> None:
    """Give Megatron-core a tracker of CPU generator states; `model_parallel_cuda_manual_seed` then only fills it."""
    rng: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    class CpuRNGStatesTracker(rng.CudaRNGStatesTracker):
        """Named states of torch's CPU generator."""

        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"rng state {name} or seed {seed} already exists")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = rng._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer  # a fork inside a fork keeps the outer stream's progress
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)
                self._current_state_name = outer_name

    rng._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    rng._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
