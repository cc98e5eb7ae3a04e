"""Gives the API reference the help of training arguments, which is in `field(default=..., metadata={"help": ...})`."""

import ast

import griffe


class DataclassFields(griffe.Extension):
    """Lists the fields that have a help, with their defaults, in the docstring of their dataclass."""

    def on_class(self, *, cls, **kwargs):
        """Add an `Attributes:` section with a line for each field."""
        fields = [line for attribute in cls.attributes.values() if (line := _described(attribute))]
        if fields and cls.docstring:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(fields)


def _described(attribute: griffe.Attribute) -> str | None:
    """`    name: help. Default: value.`; None for an attribute without help."""
    try:
        call = ast.parse(str(attribute.value), mode="eval").body
    except SyntaxError:
        return None
    if not (isinstance(call, ast.Call) and getattr(call.func, "id", None) == "field"):
        return None
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "metadata" not in keywords:
        return None
    text = " ".join(ast.literal_eval(keywords["metadata"])["help"].split()).rstrip(".")
    default = ast.unparse(keywords["default"]) if "default" in keywords else "None"
    return f"    {attribute.name}: {text}." + ("" if default == "None" else f" Default: `{default}`.")
