"""The exceptions ktrt raises on purpose.

A message names the file, key or tensor, what was found, what was expected, and what to do. Entry
points print it as it is and exit with code 2; any other exception is a defect in ktrt.
"""


class KtrtError(Exception):
    """Base of every error ktrt raises on purpose."""


class ConfigError(KtrtError):
    """A configuration, a setting or a request that cannot be used."""


class CheckpointError(KtrtError):
    """A model directory that is incomplete, damaged or of an unsupported kind."""


class AdapterError(KtrtError):
    """An adapter that cannot be applied, completely, to the model at hand."""
