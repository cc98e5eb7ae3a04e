"""The errors that end a command with one line."""


class InputError(ValueError):
    """The user's input is at fault; the message is one line: the argument or file, the value seen, what is allowed."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message says at which step and what was kept."""


class InterruptedRun(RuntimeError):
    """A signal ended a training early; the message says after which step, and how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
