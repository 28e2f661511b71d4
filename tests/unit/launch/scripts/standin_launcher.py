"""DeepSpeed's two launcher processes without their slow imports: `standin_launcher.py RANKS SCRIPT ARGUMENTS...`.

Like deepspeed.launcher.runner it starts itself again as the second process and passes on statuses above 0 only; like
deepspeed.launcher.launch that one starts the ranks, and ends the others and itself when one fails.
"""

import os
import subprocess
import sys
import time

if sys.argv[1] != "--inner":
    status = subprocess.call([sys.executable, __file__, "--inner", *sys.argv[1:]])
    sys.exit(max(0, status))

count, command = int(sys.argv[2]), [sys.executable, *sys.argv[3:]]
ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(rank)}) for rank in range(count)]
while any(rank.poll() is None for rank in ranks):
    failed = [rank.returncode for rank in ranks if rank.poll()]
    if failed:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()
        sys.exit(failed[0])
    time.sleep(0.05)
sys.exit(next((rank.returncode for rank in ranks if rank.returncode), 0))
