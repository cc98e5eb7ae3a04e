"""Start and end of commands without torch, whose import takes seconds: for tests of real processes."""

import moe_hf

# Python code for the start of a program, after which `import torch` fails. The code replaces two modules: the package,
# whose __init__.py imports the models, and models/finite.py, from which commands need only an exception.
LIGHT_PACKAGE = f"""import sys, types
sys.modules["torch"] = None
sys.modules["moe_hf"] = package = types.ModuleType("moe_hf")
package.__path__ = {list(moe_hf.__path__)!r}
sys.modules["moe_hf.models.finite"] = finite = types.ModuleType("moe_hf.models.finite")
finite.NonFiniteWeightsError = type("NonFiniteWeightsError", (ValueError,), {{}})
"""
