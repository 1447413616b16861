"""Jobs that a person submits to a Ray cluster, one verb a file."""

import os

# Before torch is imported: its CPU threads must not spin while they wait for each other, for decoding shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
