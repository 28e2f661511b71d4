"""Errors with a message for the person on call.  The command line prints their one sentence."""

from megaroute.common.exit_codes import BAD_INPUT, FAILED


class MegarouteError(Exception):
    """The run cannot go on.  The message says what happened (with values), why it matters and what to do."""

    exit_code = FAILED


class UserError(MegarouteError):
    """Something in the user's input is wrong: the message says what (with values), why it matters and what to do."""

    exit_code = BAD_INPUT


class ConfigError(UserError):
    """A configuration key, named by its dotted path, is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A shard, manifest, tokenizer or text file is missing, damaged, or not the one expected."""


class DamagedShard(DataError):
    """Documents that are lost for good: trying again does not help, a good copy of the shard does."""

    def __init__(self, message: str, shard: str = "", document: int | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.shard = shard
        """Path or URL of the shard."""
        self.document = document
        """Number of the document in the shard, if only this one is known to be lost."""
        self.offset = offset
        """Its first byte in the shard."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or belongs to another model or data stream."""


class CheckpointWriteError(MegarouteError):
    """A checkpoint could not be written: no space, no permission, a broken disk.  The older ones are untouched."""


class LeaseLostError(MegarouteError):
    """Another start of the same run writes its checkpoints now."""


class LaunchError(UserError):
    """Processes cannot be started as asked: world size, device, or run directory."""
