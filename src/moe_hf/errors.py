"""The errors that end a command with a message of one line."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message.

    The library wraps errors of a configuration's checks; for these, the result is the first line of the check's
    message.
    """
    cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") else None
    return str(cause or error).strip().partition("\n")[0]


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the argument or file, the value, and what is allowed."""


class NonFiniteLossError(RuntimeError):
    """Loss, gradient, weights or optimizer became NaN or infinite; the message names the step and last checkpoint."""


class InterruptedRun(RuntimeError):
    """A signal ended a training early. The message has the last step, and how to resume."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
