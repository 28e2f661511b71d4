"""A rank that does nothing for long: `rank.py FOLDER BEHAVIOUR`.  It writes a file per event, for a test to wait for.

Behaviours: `save` stops with 75 at SIGTERM after half a second of saving, `forget` too but leaves its helper behind,
`stubborn` does not stop, a number N fails with status N on rank 1 while the others save.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megaroute.launch.local import follow_supervisor

folder, behaviour = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
asked = []
signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
follow_supervisor(grace_s=2)
# A helper of the rank, as a checkpoint writer is: it must not be signalled while the rank saves.
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / f"rank{rank}.up").write_text(f"{os.getpid()} {helper.pid} {os.getppid()}")

until = time.monotonic() + 40
while time.monotonic() < until and (not asked or behaviour == "stubborn"):
    time.sleep(0.05)
    if rank == 1 and behaviour.isdigit():
        helper.kill()
        sys.exit(int(behaviour))
time.sleep(0.5)
if helper.poll() is None:
    (folder / f"rank{rank}.saved").touch()
if behaviour != "forget":
    helper.kill()
    helper.wait()
sys.exit(75)
