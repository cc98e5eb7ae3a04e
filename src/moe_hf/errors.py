"""The errors that end a command with one line."""


def first_line(error: Exception) -> str:
    """The first line of an error's message.

    Of a configuration's check that is the check's own message, which the library wraps in an error of its own.
    """
    cause = error.__cause__ if type(error).__name__.startswith("StrictDataclass") else None
    return str(cause or error).strip().partition("\n")[0]


class InputError(ValueError):
    """The user's input is at fault; the message is one line: the argument or file, the value seen, what is allowed."""


class NonFiniteLossError(RuntimeError):
    """Loss, gradient, weights or optimizer became NaN or infinite; the message says at which step and what is kept."""


class InterruptedRun(RuntimeError):
    """A signal ended a training early; the message says after which step, and how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
