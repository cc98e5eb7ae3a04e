"""The versions of libraries that this code supports. Importing this file refuses any other Transformers.

The configurations import this file first, because Auto classes load a repository's configuration before its model.
With another Transformers, a later import would fail with an error that does not name the version.
"""

from transformers.utils.versions import require_version

TRANSFORMERS = ">=5.23,<6"
# The versions that passed the tests: those of `make test`, and the newest of `make test-newest`.
TESTED_WITH = {"Python": "3.11", "PyTorch": "2.13.0", "Transformers": "5.23.0 and 5.24.0"}

require_version(f"transformers{TRANSFORMERS}")
