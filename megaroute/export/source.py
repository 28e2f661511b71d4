"""A checkpoint, with the configuration and the tokenizer that it was trained with."""

from dataclasses import dataclass
from pathlib import Path

from megaroute.checkpoint.integrity import verify
from megaroute.checkpoint.layout import RunRecord, check_model, read_cursor, read_run, resolve
from megaroute.common.errors import CheckpointError
from megaroute.config.load import load_config
from megaroute.config.root import Config
from megaroute.config.sizes import routing_shape
from megaroute.data.cursor import Cursor
from megaroute.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """What can be known of a checkpoint before its weights are read."""

    checkpoint: Path
    config: Config
    record: RunRecord
    tokenizer: Tokenizer

    def verify(self) -> None:
        """Compare its files with their checksums, as checkpoint.verify says; raises CheckpointError.

        For who reads tensors in one process: `checkpoint.state.load_state` does it itself, dealt to all ranks.
        """
        verify(self.checkpoint, self.config.checkpoint.verify)


def open_source(path: Path) -> Source:
    """The newest checkpoint of a run directory, or the one named.

    Its tensors are not looked at.  Raises UserError when there is no complete checkpoint, the configuration is that of
    another model, or the tokenizer is not the one it was trained with.
    """
    checkpoint = resolve(path)
    config = load_config(checkpoint.parent.parent / "config.yaml")
    check_model(checkpoint, config.model.model_dump(mode="json"), routing_shape(config.model, config.routing))
    tokenizer = Tokenizer(config.data.tokenizer)
    _check_tokenizer(checkpoint, tokenizer)
    return Source(checkpoint, config, read_run(checkpoint), tokenizer)


def _check_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    trained_with = Cursor.from_json(read_cursor(checkpoint)).identity["tokenizer"]
    if tokenizer.fingerprint != trained_with:
        raise CheckpointError(
            f"data.tokenizer: {tokenizer.path} has sha256 {tokenizer.fingerprint[:12]}, but {checkpoint} was trained "
            f"with {trained_with[:12]}, so its ids would mean other text; put that tokenizer back"
        )
