"""Which layers live in which stage."""

from dataclasses import dataclass

from megaroute.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of one stage; under the interleaved schedule a stage has several chunks."""

    index: int
    """Number of the chunk within its stage."""
    layers: range
    """Global layer indices, from 0."""
    first: bool
    """Whether the embedding is here."""
    last: bool
    """Whether the final norm and the output projection are here."""


def chunks_of_stage(num_layers: int, dims: ParallelDims, pipeline_rank: int) -> list[Chunk]:
    """The chunks of one stage, in order.  Chunk v of stage r is the (v * pipeline + r)-th piece of the model."""
    pieces = dims.pipeline * dims.virtual_pipeline
    size = num_layers // pieces
    chunks = []
    for index in range(dims.virtual_pipeline):
        piece = index * dims.pipeline + pipeline_rank
        layers = range(piece * size, (piece + 1) * size)
        chunks.append(Chunk(index, layers, first=piece == 0, last=piece == pieces - 1))
    return chunks
