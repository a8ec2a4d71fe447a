"""The error that a user can mend; any other exception is a bug of this package."""

from __future__ import annotations


class UserError(ValueError):
    """What a user can mend: the message names the field or file, the value, and the mend, in one line.

    The command line prints the message and exits with code 2. Every other exception is a bug: it shows its traceback.
    """
