"""The one exception type for input that a user can fix."""


class InputError(ValueError):
    """
    Raised when a setting, a data set row or a model cannot be used as given.

    The message names the row, the column or the key, says what was expected and how to fix it. The command line prints
    it as one line and exits with status 2; in Python it is an ordinary `ValueError`.
    """
