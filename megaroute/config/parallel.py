"""`parallel`: how many ways the model and the batch are cut."""

from typing import Literal

from pydantic import PositiveInt

from megaroute.config.section import Section


class ParallelConfig(Section):
    """Degrees of parallelism; their product is the number of processes."""

    tensor: PositiveInt = 1
    """Tensor-parallel size: ranks that share each matrix."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size: stages of consecutive layers."""
    virtual_pipeline: PositiveInt = 1
    """Model chunks per stage; above 1 the interleaved schedule runs."""
    data: PositiveInt | Literal["auto"] = "auto"
    """Replicas; `auto` fills the processes at hand, and is 1 for a local launch without --nproc."""
    sequence: bool = False
    """Sequence parallelism: tensor ranks also share the tokens between the matrices (needs tensor > 1)."""
    overlap_p2p: bool = False
    """Overlap pipeline sends with compute (interleaved schedule only)."""
    deallocate_pipeline_outputs: bool = False
    """Free a stage's output once it is sent."""
    batch_p2p: bool = False
    """Issue pipeline sends and receives as one batch."""

    @property
    def model_size(self) -> int:
        """Processes of one replica: tensor * pipeline."""
        return self.tensor * self.pipeline
