"""The chunks of this rank's stage, built and initialised."""

from megatron.core.models.gpt import GPTModel

from megaroute.config.root import Config
from megaroute.config.units import Unit
from megaroute.model.initialise import initialise
from megaroute.model.moe import ExpertLayer
from megaroute.model.routed_unit import RoutedUnit
from megaroute.model.spec import block_spec, transformer_config
from megaroute.parallel.dims import ParallelDims
from megaroute.parallel.stages import Chunk, chunks_of_stage
from megaroute.platform.device import Platform
from megaroute.routing.experts import ExpertRouter
from megaroute.routing.routers import Router


def build_chunks(config: Config, dims: ParallelDims, pipeline_rank: int, platform: Platform) -> list[GPTModel]:
    """One model per chunk of the stage, on the platform's device, weights a function of train.seed alone.

    The groups of megaroute.parallel.groups must be up.
    """
    models = []
    for chunk in chunks_of_stage(config.model.num_layers, dims, pipeline_rank):
        model = build_chunk(config, chunk, dims).to(platform.device)
        initialise(model, config)
        models.append(model)
    return models


def build_chunk(config: Config, chunk: Chunk, dims: ParallelDims) -> GPTModel:
    """The model of one chunk, its weights not yet filled."""
    return GPTModel(
        config=transformer_config(config),
        transformer_layer_spec=block_spec(config, chunk),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.data.sequence_length,
        pre_process=chunk.first,
        post_process=chunk.last,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_base,
        vp_stage=chunk.index if dims.virtual_pipeline > 1 else None,
    )


def routers(chunks: list[GPTModel]) -> dict[Unit, Router | ExpertRouter]:
    """Routers of this rank's chunks."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    binary = {module.unit: module.router for module in modules if isinstance(module, RoutedUnit)}
    experts = {
        Unit(module.layer_number - 1, "mlp"): module.router for module in modules if isinstance(module, ExpertLayer)
    }
    return {**binary, **experts}
