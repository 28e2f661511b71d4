"""Errors with a message for the person on call.  The command line prints their one sentence."""


class MegarouteError(Exception):
    """The run cannot go on.  The message says what happened (with values), why it matters and what to do."""

    exit_code = 1


class UserError(MegarouteError):
    """Something in the user's input is wrong: the message says what (with values), why it matters and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key, named by its dotted path, is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A shard, manifest, tokenizer or text file is missing, damaged, or not the one expected."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or belongs to another model or data stream."""


class LaunchError(UserError):
    """Processes cannot be started as asked: world size, device, or run directory."""
