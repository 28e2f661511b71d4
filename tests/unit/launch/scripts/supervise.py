"""Run a command under the supervisor: `supervise.py GRACE COMMAND...`."""

import sys

from megaroute.launch.command import Launch
from megaroute.launch.local import run

sys.exit(run(Launch(tuple(sys.argv[2:]), {"DS_ACCELERATOR": "cpu"}), grace_s=float(sys.argv[1])))
