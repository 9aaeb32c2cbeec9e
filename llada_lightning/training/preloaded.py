"""What the process imports that the runs of a sweep are forked from: all that a fit imports, sooner or later."""

import gc

from llada_lightning.support.libraries import quiet_libraries

quiet_libraries()

import litdata  # noqa: E402, F401  (imported when data is read)
import pandas  # noqa: E402, F401  (imported when the result is written)

import llada_lightning.training.cli  # noqa: E402, F401

# The collector of a forked process would write into every object that it looks at, and so copy its memory.
gc.freeze()
