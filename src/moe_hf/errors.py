"""The error which says that the user's input is at fault."""


class InputError(ValueError):
    """The user's input is at fault; the message is one line: the argument or file, the value seen, what is allowed."""
