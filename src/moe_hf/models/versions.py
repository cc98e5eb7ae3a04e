"""The versions of libraries that this code works with; importing this file refuses any other Transformers.

The configurations import it first, since Auto classes load a repository's configuration before its model. With another
Transformers a later import would fail, with an error that names no version.
"""

from transformers.utils.versions import require_version

TRANSFORMERS = ">=5.23,<6"
# What the tests passed with: the versions of `make test` and the newest of `make test-newest`.
TESTED_WITH = {"Python": "3.11", "PyTorch": "2.13.0", "Transformers": "5.23.0 and 5.24.0"}

require_version(f"transformers{TRANSFORMERS}")
