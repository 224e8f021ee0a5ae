"""What the server process imports from which workers are forked. Nothing else imports this module."""

import gc

import dact.tuning.workers  # noqa: F401 (and all that it imports)

# What is imported lives as long as the process: collections in the workers would copy its memory, and the exit take a
# second.
gc.freeze()
