"""What the server of `processes.forks` imports before it forks: here, so that none of its forks looks for garbage among
all that."""

import gc
import importlib

gc.disable()
for _name in ("test_distributed", "test_checkpoint"):
    importlib.import_module(_name)
gc.freeze()
gc.enable()
