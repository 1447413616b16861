"""Jobs that a person submits to a Ray cluster, one verb a file."""

import os

# Before torch is imported: its CPU threads must not spin while they wait for each other, for decoding shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before ray is imported: its counsel against many processes; a sweep's small ones are many, and take next to nothing.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "worker processes have been started on node")
