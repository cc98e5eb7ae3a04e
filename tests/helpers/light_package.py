"""The commands' start and end without torch, which takes seconds to import: for tests of real processes."""

import moe_hf

# Python code to begin a program with; `import torch` fails after it. The two modules that stand in for others are the
# package, whose __init__.py imports the models, and models/finite.py, of which commands need an exception alone.
LIGHT_PACKAGE = f"""import sys, types
sys.modules["torch"] = None
sys.modules["moe_hf"] = package = types.ModuleType("moe_hf")
package.__path__ = {list(moe_hf.__path__)!r}
sys.modules["moe_hf.models.finite"] = finite = types.ModuleType("moe_hf.models.finite")
finite.NonFiniteWeightsError = type("NonFiniteWeightsError", (ValueError,), {{}})
"""
