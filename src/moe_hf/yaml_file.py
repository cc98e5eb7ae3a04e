"""Reads YAML files of arguments strictly: refuses repeated keys, and numbers in base 60."""

from pathlib import Path

import yaml

from .errors import InputError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, and numbers in base 60 such as 12:30."""

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:  # before << merges the keys of other mappings
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        problem=f"{key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_decimal(self, node):
        if ":" in node.value:
            problem = f"{node.value} would be read as a number in base 60, write it in quotes if it is text"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        is_float = node.tag == "tag:yaml.org,2002:float"
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_decimal)


def read_yaml(path: str | Path) -> dict:
    """Read `name: value` lines.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing or cannot be read, is not YAML, has a key twice, or is not a mapping.
    """
    if not Path(path).is_file():
        raise InputError(f"configuration file {path} does not exist")
    try:
        with Path(path).open(encoding="utf-8") as file:
            values = yaml.load(file, Loader=_StrictLoader)  # a SafeLoader: only plain values
    except OSError as error:
        raise InputError(f"configuration file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"configuration file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"configuration file {path} holds {type(values).__name__}, expected 'name: value' lines")
    return values
