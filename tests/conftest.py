"""One thread for every test: the tensors are tiny, and waiting for a second thread can cost more than it saves."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
